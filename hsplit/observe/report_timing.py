"""The report's section on a local step's time: a bar a holder by phase, and how much of it is arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from hsplit.observe.inline_svg import GRID, drawing_style, inline_svg, literal
from hsplit.observe.metrics import MetricsRow
from hsplit.observe.report_figures import COLOURS, MAX_HOLDERS, capped
from hsplit.observe.report_page import plot, text
from hsplit.observe.timing import PHASES, TimingRow
from hsplit.observe.timing_record import HolderSteps, StepShares, holder_steps, step_shares

# Okabe and Ito's palette, which colour-blind readers can tell apart; what is no work is grey, or hatched.
_COLOURS = {
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
_WAITING_HATCH = "////"
_WHOSE = {False: "the busiest client", True: "the server"}
_NAMED = 3
"""How many parts of a step that are not arithmetic are named."""


def timing_section(timing: Sequence[TimingRow], metrics: Sequence[MetricsRow], key: str) -> str:
    """HTML of the section, empty where no time was recorded.

    Args:
        timing: all rows of ``timing.csv``.
        metrics: all rows of ``metrics.csv``, which tell each round's steps.
        key: unique in the page; starts the figure's ids.
    """
    holders, shares = holder_steps(timing, metrics), step_shares(timing)
    if not holders or shares is None:
        return ""
    more = f" The first {MAX_HOLDERS - 1} and the last are shown." if len(holders) > MAX_HOLDERS else ""
    caption = (
        "Wall time of a local step by holder and phase, mean over the rounds that it took part in. Tail: norm, head,"
        " loss and its gradient. Paced: slept, so that the wall follows the declared speed. Waiting: for others, for"
        f" messages, for a core.{more}"
    )
    svg = plot(timing_svg(holders, key), caption, wide=True)
    return f"<h3>Where a step's time goes</h3><p>{text(shares_text(shares))}</p>{svg}"


def shares_text(shares: StepShares) -> str:
    """``shares`` in words: the arithmetic, and the largest parts of the rest."""
    parts = {f"{phase} at {_WHOSE[server]}": share for (server, phase), share in shares.overhead.items()}
    parts["neither of them at work"] = shares.idle
    largest = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:_NAMED]
    named = ", ".join(f"{what} {share:.1%}" for what, share in largest if share > 0)
    rest = f" Largest of the rest: {named}." if named else ""
    return (
        f"Of a local step's wall time {shares.arithmetic:.1%} is the model's arithmetic on the path that everybody"
        " waits for: forward, tail, backward and optimizer of the slowest client, and the server's. What both do at"
        f" the same time counts twice.{rest}"
    )


def timing_svg(holders: Sequence[HolderSteps], key: str) -> str:
    """A bar a holder, stacked by phase in the order of ``PHASES``; phases in which nobody spent time are left out."""
    from matplotlib.figure import Figure

    shown = capped(holders)
    with drawing_style():
        figure = Figure(figsize=(9.5, 1.3 + 0.3 * len(shown)), layout="constrained")
        axes = figure.subplots()
        starts = [0.0] * len(shown)
        for phase in PHASES:
            widths = [holder.seconds[phase] for holder in shown]
            if not any(widths):
                continue
            axes.barh(
                *(range(len(shown)), widths, 0.8, starts),
                color=_COLOURS[phase],
                linewidth=0,
                # in the page's line colour, so that waiting recedes on a light and on a dark page
                edgecolor=GRID,
                hatch=_WAITING_HATCH if phase == "waiting" else None,
                label=phase,
            )
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(shown)), [literal(holder.name) for holder in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("wall time of a local step (s)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=len(PHASES), fontsize=8)
        return inline_svg(figure, key, "wall time of a local step by holder and phase")
