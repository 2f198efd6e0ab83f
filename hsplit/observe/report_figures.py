"""The report's figures: curves over rounds, tokens, wall and virtual time, who holds what, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hsplit.observe.inline_svg import drawing_style, inline_svg, literal
from hsplit.observe.metrics import MetricsRow
from hsplit.observe.report_data import Holding, RunRecord

COLOURS = ("#3b82c4", "#d9772b", "#2f9e6e", "#c94f7c", "#8b6cc4", "#a0803c", "#4aa3b5", "#7d8590")
"""Colours of the runs in order, which read on a light and on a dark page."""
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")
MAX_HOLDERS = 40
"""Holders in one figure; more would not be legible."""
_MAX_ANNOTATED_LAYERS = 48
T = TypeVar("T")

_HELD = 0.5
"""Shade, from 0 to 1, of a layer that is held at a rank not known."""


@dataclass(frozen=True)
class Curve:
    """One of the report's plots of a figure of each round against another."""

    key: str
    title: str
    x_label: str
    y_label: str
    x: Callable[[MetricsRow], float]
    y: Callable[[MetricsRow], float | None]


def _curves() -> tuple[Curve, ...]:
    across: tuple[tuple[str, str, Callable[[MetricsRow], float]], ...] = (
        ("round", "round", lambda row: row.round),
        ("tokens", "supervised tokens trained on", lambda row: row.tokens),
        ("wall-time", "wall time (s)", lambda row: row.wall_time_s),
        ("virtual-time", "virtual time (s)", lambda row: row.virtual_time_s),
    )
    up: tuple[tuple[str, str, Callable[[MetricsRow], float | None]], ...] = (
        ("perplexity", "validation perplexity", lambda row: row.val_ppl),
        ("loss", "train loss", lambda row: row.train_loss),
    )
    return tuple(
        Curve(f"{y_key}-{x_key}", f"{y_label} against {x_key.replace('-', ' ')}", x_label, y_label, x, y)
        for y_key, y_label, y in up
        for x_key, x_label, x in across
    )


CURVES = _curves()


def run_colour(index: int) -> str:
    """The colour of run ``index`` in every curve."""
    return COLOURS[index % len(COLOURS)]


def curve_svg(curve: Curve, runs: Sequence[RunRecord]) -> str:
    """``curve`` of every run, overlaid; with several runs, a legend."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with drawing_style():
        figure = Figure(figsize=(4.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            points = [(curve.x(row), y) for row in run.metrics if (y := curve.y(row)) is not None]
            axes.plot(
                [x for x, _ in points],
                [y if math.isfinite(y) else math.nan for _, y in points],
                color=run_colour(index),
                linestyle=_LINES[index // len(COLOURS) % len(_LINES)],
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                label=literal(run.name),
            )
        axes.set_xlabel(curve.x_label)
        axes.set_ylabel(curve.y_label)
        if curve.x_label == "round":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not any(line.get_xydata().size for line in axes.get_lines()):  # type: ignore[union-attr]
            axes.text(0.5, 0.5, "no round of training yet", ha="center", transform=axes.transAxes)
        elif len(runs) > 1:
            axes.legend(fontsize=8)
        return inline_svg(figure, curve.key, curve.title)


def holdings_svg(holdings: Sequence[Holding], key: str) -> str:
    """A heat map of total rank, a row a holder and a column a layer; what is not held is left blank."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    shown = capped(holdings)
    layers = 1 + max((layer for holding in shown for layer in holding.ranks), default=0)
    highest = max((rank or 0 for holding in shown for rank in holding.ranks.values()), default=0)
    with drawing_style():
        figure = Figure(figsize=(9.5, 0.8 + 0.3 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        for row, holding in enumerate(shown):
            for layer, rank in holding.ranks.items():
                shade = _HELD if rank is None else rank / highest if highest else 0.0
                colour = colormaps["YlGnBu"](0.08 + 0.8 * shade)
                axes.add_patch(Rectangle((layer - 0.47, row - 0.44), 0.94, 0.88, facecolor=colour))
                if rank is not None and layers <= _MAX_ANNOTATED_LAYERS:
                    dark = shade > 0.55
                    axes.text(
                        *(layer, row, str(rank)),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="#ffffff" if dark else "#102030",
                    )
        axes.set_xlim(-0.5, layers - 0.5)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_yticks(range(len(shown)), [literal(holding.name) for holding in shown])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        return inline_svg(figure, key, "total LoRA rank by holder and layer")


def traffic_svg(rows: Sequence[MetricsRow], key: str) -> str:
    """Bytes that the clients sent and received, by round."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with drawing_style():
        figure = Figure(figsize=(9.5, 2.6), layout="constrained")
        axes = figure.subplots()
        rounds = [row.round for row in rows]
        axes.bar([r - 0.2 for r in rounds], [row.bytes_up / 1e6 for row in rows], 0.38, color=COLOURS[0])
        axes.bar([r + 0.2 for r in rounds], [row.bytes_down / 1e6 for row in rows], 0.38, color=COLOURS[1])
        for container, label in zip(axes.containers, ("up, from clients", "down, to clients"), strict=True):
            container.set_label(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")
        axes.set_ylabel("MB in the round")
        axes.grid(visible=False, axis="x")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        return inline_svg(figure, key, "bytes up and down by round")


def capped(holders: Sequence[T]) -> list[T]:
    """At most ``MAX_HOLDERS``, of which the last, the server where there is one, stays."""
    return list(holders) if len(holders) <= MAX_HOLDERS else [*holders[: MAX_HOLDERS - 1], holders[-1]]
