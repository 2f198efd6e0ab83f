"""Figures of the report, by matplotlib: each an inline SVG element that fits a light and a dark page."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar
from xml.etree import ElementTree

from hsplit.data.description import ClientShare
from hsplit.observe.tables import PHASES, MetricsRow, PlanRow
from hsplit.observe.wording import number_text
from hsplit.report.run_record import Holding, PlanHistory, RunRecord
from hsplit.report.usage import HolderMemory, HolderSteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

MAX_HOLDERS = 40
"""Most holders in one figure; more would not be legible."""
COLOURS = ("#3b82c4", "#d9772b", "#2f9e6e", "#c94f7c", "#8b6cc4", "#a0803c", "#4aa3b5", "#7d8590")
"""Colours of the runs in order, legible on a light and on a dark page."""
INK = "#010203"
"""Stands for the page's text colour in a figure."""
GRID = "#040506"
"""Stands for the page's line colour in a figure."""
WARNING = "▲"
"""Marks memory above its limit."""

_WIDE_IN, _NARROW_IN = 9.5, 4.9
# Most layers that fit the screen of a phone.
_FEW_LAYERS = 12
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")
_MAX_ANNOTATED_LAYERS = 48
# Shade, from 0 to 1, of a layer that is held at a rank not known.
_HELD = 0.5
_MEMORY_SERIES = (("declared", COLOURS[7]), ("predicted", COLOURS[0]), ("measured", COLOURS[1]))
# Okabe and Ito's palette, which colour-blind readers can distinguish; idle phases are grey, or hatched.
_PHASE_COLOURS = {
    "data": "#cc79a7",
    "unpack": "#e69f00",
    "forward": "#0072b2",
    "tail": "#d55e00",
    "backward": "#009e73",
    "optimizer": "#f0e442",
    "pack": "#56b4e9",
    "paced": COLOURS[7],
    "waiting": "none",
}
# The part of a figure's width that a character takes.
_DIGIT_SHARE = 0.014


# -- curves over rounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A plot of one figure of each round against another: ``x`` and ``y`` are columns of ``metrics.csv``."""

    title: str
    x_label: str
    y_label: str
    missing: str
    x: str
    y: str

    def points(self, rows: Iterable[MetricsRow]) -> list[tuple[float, float]]:
        """Return the known points; NaN for figures that are not finite."""
        # a validation loss of exactly 0 is one over no tokens
        known = [row for row in rows if (row.val_loss if self.y == "val_ppl" else row.train_loss is not None)]
        pairs = [(_across(row, self.x), getattr(row, self.y)) for row in known]
        return [(x, y if math.isfinite(y) else math.nan) for x, y in pairs]


def _across(row: MetricsRow, column: str) -> float:
    """A figure to plot against; in tables of older versions, which lack training times, the whole time."""
    value = getattr(row, column)
    return float(getattr(row, column.removeprefix("train_")) if value is None else value)


CURVES = tuple(
    Curve(f"{y_label} against {across}", x_label, y_label, missing, x, y)
    for y, y_label, missing in (
        ("val_ppl", "validation perplexity", "nothing was held out"),
        ("train_loss", "train loss", "no round of training yet"),
    )
    for x, across, x_label in (
        ("train_virtual_time_s", "virtual time", "virtual time (s), without validation"),
        ("train_wall_time_s", "wall time", "wall time (s), without validation"),
        ("tokens", "tokens", "supervised tokens trained on"),
        ("round", "round", "round"),
    )
)


def curve_svg(curve: Curve, runs: Sequence[RunRecord], large: bool = False) -> str:
    """Draw ``curve`` of every run, with a legend for several; a large one of one run shows the values at its ends."""
    from matplotlib.figure import Figure

    drawn = False
    with drawing_style():
        figure = Figure(figsize=(_NARROW_IN, 3.1) if large else (4.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, run in enumerate(runs):
            if not (points := curve.points(run.metrics)):
                continue
            drawn = True
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[index % len(COLOURS)],
                linestyle=_LINES[index // len(COLOURS) % len(_LINES)],
                linewidth=2 if large else 1.5,
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=4,
                label=literal(run.name),
            )
            if large and len(runs) == 1 and len(points) > 1:
                _name_ends(axes, points)
        axes.set_xlabel(curve.x_label)
        axes.set_ylabel(curve.y_label)
        if curve.x_label == "round":
            _whole_numbers(axes)
        if not drawn:
            axes.text(0.5, 0.5, curve.missing, ha="center", transform=axes.transAxes)
        elif len(runs) > 1:
            axes.legend(fontsize=8)
        return inline_svg(figure, f"{curve.y}-{curve.x}".replace("_", "-"), curve.title)


def _name_ends(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Write the first and the last value beside their points, off the curve."""
    first, last = points[0], points[-1]
    places = ((first, (0, 7 if first[1] > last[1] else -7), "center"), (last, (8, 0), "left"))
    axes.margins(x=0.14, y=0.12)
    for point, offset, side in places:
        if math.isfinite(point[1]):
            vertical = "center" if not offset[1] else "bottom" if offset[1] > 0 else "top"
            text = number_text(point[1])
            axes.annotate(text, point, offset, textcoords="offset points", ha=side, va=vertical, color=INK)


def traffic_svg(rows: Sequence[MetricsRow], key: str) -> str:
    """Draw the bytes sent and received by the clients, by round."""
    with drawing_style():
        figure, axes = _bars(2.6)
        rounds = [row.round for row in rows]
        up, down = [row.bytes_up / 1e6 for row in rows], [row.bytes_down / 1e6 for row in rows]
        axes.bar([r - 0.2 for r in rounds], up, 0.38, color=COLOURS[0], label="up, from clients")
        axes.bar([r + 0.2 for r in rounds], down, 0.38, color=COLOURS[1], label="down, to clients")
        _whole_numbers(axes)
        axes.set_xlabel("round")
        axes.set_ylabel("MB in the round")
        axes.grid(visible=True, axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        return inline_svg(figure, key, "bytes up and down by round")


# -- holders ----------------------------------------------------------------------------------------------------------


def holdings_svg(holdings: Sequence[Holding], key: str) -> str:
    """Draw a heat map of total rank, a row a holder and a column a layer; layers not held stay blank."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = capped(holdings)
    layers, width = _layers(holdings), _NARROW_IN if shallow(holdings) else _WIDE_IN
    highest = max((rank or 0 for holding in shown for rank in holding.ranks.values()), default=0)
    with drawing_style():
        figure, axes = _bars(0.8 + 0.3 * len(shown), [holding.name for holding in shown], width)
        for row, holding in enumerate(shown):
            for layer, rank in holding.ranks.items():
                shade = _HELD if rank is None else rank / highest if highest else 0.0
                colour = colormaps["YlGnBu"](0.08 + 0.8 * shade)
                axes.add_patch(Rectangle((layer - 0.47, row - 0.44), 0.94, 0.88, facecolor=colour))
                if rank is not None and layers <= _MAX_ANNOTATED_LAYERS:
                    _centred(axes, layer, row, str(rank), dark=shade > 0.55)
        axes.set_xlim(-0.5, layers - 0.5)
        _whole_numbers(axes)
        axes.set_xlabel("layer")
        return inline_svg(figure, key, "total LoRA rank by holder and layer")


def shallow(holdings: Sequence[Holding]) -> bool:
    """True if the figure of ``holdings`` may shrink on a small screen, False if it should be scrolled."""
    return _layers(holdings) <= _FEW_LAYERS


def _layers(holdings: Sequence[Holding]) -> int:
    return 1 + max((layer for holding in holdings for layer in holding.ranks), default=0)


def memory_svg(record: Sequence[HolderMemory], key: str) -> str:
    """Draw bars of every holder's worst and last round; the server, often far larger, has a scale of its own."""
    from matplotlib.figure import Figure

    clients = capped([holder for holder in record if holder.last.kind == "client"])
    groups = [group for group in (clients, [h for h in record if h.last.kind != "client"]) if group]
    with drawing_style():
        figure = Figure(figsize=(_WIDE_IN, 1.5 + 0.45 * sum(map(len, groups))), layout="constrained")
        heights = [len(group) + 0.7 for group in groups]
        grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, sharex="row", sharey="row")
        for pair, group in zip(grid, groups, strict=True):
            _memory_bars(pair[0], [holder.worst for holder in group])
            _memory_bars(pair[1], [holder.last for holder in group])
            _name_rows(pair[0], [holder.name for holder in group])
        grid[0, 0].set_title("worst round")
        grid[0, 1].set_title("last round")
        for axes in grid[-1]:
            axes.set_xlabel("memory (GB)")
        legend = {
            label: bar for axes in grid.flat for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(legend.values(), legend.keys(), loc="outside upper right", ncols=3)
        return inline_svg(figure, key, "declared, predicted and measured memory by holder")


def data_svg(shares: Mapping[str, ClientShare], key: str) -> str:
    """Draw each client's part of the shared data: its examples by label, and their lengths."""
    from matplotlib.figure import Figure

    names = capped(list(shares))
    totals = Counter[str]()
    for share in shares.values():
        totals.update(share.labels)
    # The last colour is for labels without one of their own.
    common = [label for label, _ in totals.most_common(len(COLOURS) - 1)]
    with drawing_style():
        figure = Figure(figsize=(_WIDE_IN, 1.4 + 0.25 * len(names)), layout="constrained")
        counts, lengths = figure.subplots(1, 2, sharey=True)
        begins = [0] * len(names)
        for label, colour in zip([*common, None], COLOURS, strict=False):
            sizes = [_labelled(shares[name], label, common) for name in names]
            if any(sizes):
                text = literal(label) if label is not None else "others" if totals else "examples"
                counts.barh(range(len(names)), sizes, 0.8, left=begins, color=colour, label=text)
            begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
        boxes = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), shares[name].characters, strict=True)) for name in names
        ]
        ink = {"color": INK}
        style = {"boxprops": ink, "whiskerprops": ink, "capprops": ink, "medianprops": {"color": COLOURS[1]}}
        rows = {"positions": range(len(names)), "orientation": "horizontal", "widths": 0.6, "manage_ticks": False}
        lengths.bxp(boxes, showfliers=False, **rows, **style)
        _name_rows(counts, names)
        counts.set_xlabel("examples")
        lengths.set_xlabel("characters of an example")
        for axes in (counts, lengths):
            axes.grid(visible=False, axis="y")
            axes.set_xlim(left=0)
        if totals:
            figure.legend(loc="outside upper left", ncols=4)
        return inline_svg(figure, key, "examples of each client by label, and their lengths")


def _labelled(share: ClientShare, label: str | None, common: Sequence[str]) -> int:
    """Count a share's examples with ``label``; ``None``: with none of the ``common`` ones."""
    if label is not None:
        return share.labels.get(label, 0)
    return share.examples - sum(share.labels.get(own, 0) for own in common)


def _memory_bars(axes: Axes, rows: Sequence[PlanRow]) -> None:
    measured = any(row.measured_bytes is not None for row in rows)
    series = _MEMORY_SERIES if measured else _MEMORY_SERIES[:2]
    thickness = 0.8 / len(series)
    for index, (name, colour) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * thickness for row in range(len(rows))]
        sizes = [(memory_sizes(row)[index] or 0) / 1e9 for row in rows]
        axes.barh(places, sizes, thickness * 0.9, color=colour, label=name)
        if name == "measured":
            for place, size, row in zip(places, sizes, rows, strict=True):
                axes.text(size, place, _exceeded(row), va="center", fontsize=7, color=INK)
    if any(map(_exceeded, rows)):
        axes.margins(x=0.3)  # room for the marks
    axes.grid(visible=False, axis="y")


def memory_sizes(row: PlanRow) -> tuple[int | None, ...]:
    """Return declared, predicted and measured bytes; None for missing ones."""
    return row.declared_bytes, row.predicted_bytes if row.available else None, row.measured_bytes


def _exceeded(row: PlanRow) -> str:
    measured = row.measured_bytes or 0
    if measured > row.declared_bytes:
        return f" {WARNING} over declared"
    return f" {WARNING} over predicted" if measured > row.predicted_bytes and row.available else ""


def timing_svg(holders: Sequence[HolderSteps], key: str) -> str:
    """Draw a bar a holder, stacked by phase in the order of ``PHASES``; phases without any time are left out."""
    shown = capped(holders)
    with drawing_style():
        figure, axes = _bars(1.3 + 0.3 * len(shown), [holder.name for holder in shown])
        starts = [0.0] * len(shown)
        for phase in PHASES:
            widths = [holder.seconds[phase] for holder in shown]
            if not any(widths):
                continue
            axes.barh(
                *(range(len(shown)), widths, 0.8, starts),
                color=_PHASE_COLOURS[phase],
                linewidth=0,
                # in the page's line colour, so that waiting recedes on a light and on a dark page
                edgecolor=GRID,
                hatch="////" if phase == "waiting" else None,
                label=phase,
            )
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.grid(visible=True, axis="x")
        axes.set_xlabel("wall time of a local step (s)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(PHASES), fontsize=8)
        return inline_svg(figure, key, "wall time of a local step by holder and phase")


# -- split points -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Rounds ``first`` to ``last``, counted from 1, in which a client had one split; None: it took no part."""

    first: int
    last: int
    split: int | None


def split_pieces(history: PlanHistory, client: str, rounds: int) -> list[Piece]:
    """Return the split points of ``client`` in rounds 1 to ``rounds``, with equal neighbours merged.

    A plan made after ``r`` rounds holds from round ``r + 1`` on. Rounds before the first known plan are left out.
    """
    plans = [(done + 1, plan) for done in range(rounds) if (plan := history.plan_after(done)) is not None]
    splits = [(round, {holder.name: holder.split for holder in plan.available}.get(client)) for round, plan in plans]
    runs = [(split, [round for round, _ in run]) for split, run in groupby(splits, key=itemgetter(1))]
    return [Piece(own[0], own[-1], split) for split, own in runs]


def splits_svg(history: PlanHistory, clients: Sequence[str], rounds: int, key: str) -> str:
    """Draw a bar for each of ``clients`` over rounds 1 to ``rounds``, with the split points written into it."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    layers = max(plan.layers for plan in history.plans.values())
    with drawing_style():
        figure, axes = _bars(0.8 + 0.3 * len(clients), clients)
        for row, client in enumerate(clients):
            for piece in split_pieces(history, client, rounds):
                length, dark, text, short = piece.last - piece.first + 1, None, "unavailable", "×"
                if piece.split is not None:
                    shade, text, short = piece.split / layers, str(piece.split), ""
                    corner, dark = (piece.first - 0.5, row - 0.42), shade <= 0.5
                    face = colormaps["cividis"](shade)
                    axes.add_patch(Rectangle(corner, length, 0.84, facecolor=face, edgecolor=INK, linewidth=0.5))
                fitting = next((t for t in (text, short) if len(t) * _DIGIT_SHARE < length / rounds), "")
                _centred(axes, (piece.first + piece.last) / 2, row, fitting, dark)
        axes.set_xlim(0.5, rounds + 0.5)
        _whole_numbers(axes)
        axes.set_xlabel("round")
        return inline_svg(figure, key, "split point of each client by round")


# -- drawing ----------------------------------------------------------------------------------------------------------

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)"}
_REFERENCE = re.compile(r"url\(#")
_FINE_DIGITS = re.compile(r"(\.\d\d)\d+")

_STYLE = {
    "svg.fonttype": "none",  # text can be selected, searched and read aloud
    "font.family": "DejaVu Sans",  # measured with matplotlib's font, shown in the page's own
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in the report's style within the block; matplotlib's settings are restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # wants its own literals of the keys
        yield


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """Return ``figure`` as an ``<svg>`` element that scales with the page and refers to nothing outside it.

    Args:
        figure: drawn in ``drawing_style``, with ``INK`` and ``GRID`` for the page's colours.
        key: unique in the page, of letters, digits and dashes; starts every id of the element.
        label: description for readers who cannot see the figure.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for parent in root.iter():
        # a style sheet inside would apply to the whole page
        for style in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(style)
    for element in root.iter():
        _adapt(element, key)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, key: str) -> None:
    """Give the element unique ids, the page's colours, and only visible digits."""
    for name, value in element.attrib.items():
        if name == "id":
            value = f"{key}-{value}"
        elif name == _XLINK:
            value = value.replace("#", f"#{key}-", 1)
        elif name == "d":
            # most of a heat map's bytes would be digits below a hundredth of a point
            value = _FINE_DIGITS.sub(r"\1", value)
        else:
            value = _REFERENCE.sub(f"url(#{key}-", value)
        if name in ("style", "fill", "stroke"):
            for drawn, page in _PAGE_COLOURS.items():
                value = value.replace(drawn, page)
        element.set(name, value)


def literal(name: str) -> str:
    """Escape ``name``, which matplotlib would take for mathematics, or leave out of a legend."""
    return f"\u200b{name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def capped(holders: Sequence[T]) -> list[T]:
    """Return at most ``MAX_HOLDERS`` holders, always with the last, which may be the server."""
    return list(holders) if len(holders) <= MAX_HOLDERS else [*holders[: MAX_HOLDERS - 1], holders[-1]]


def _bars(height_in: float, names: Sequence[str] = (), width_in: float = _WIDE_IN) -> tuple[Figure, Any]:
    """Return a figure without grid lines, with a named row for each of ``names``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    if names:
        _name_rows(axes, names)
    return figure, axes


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [literal(name) for name in names])


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _centred(axes: Axes, x: float, y: float, text: str, dark: bool | None) -> None:
    """Write ``text`` on a dark or a light cell, or (``None``) on the page itself."""
    colour = INK if dark is None else "#ffffff" if dark else "#102030"
    axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
