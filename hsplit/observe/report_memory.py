"""The report's section on memory: declared, predicted and measured, as bars and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from hsplit.observe.inline_svg import INK, drawing_style, inline_svg, literal
from hsplit.observe.memory_record import HolderMemory, memory_record
from hsplit.observe.metrics import PlanRow
from hsplit.observe.report_figures import COLOURS, capped
from hsplit.observe.report_page import plot, table, text
from hsplit.observe.wording import NOTHING, bytes_text

_MARK = "▲"
_SERIES = (("declared", COLOURS[7]), ("predicted", COLOURS[0]), ("measured", COLOURS[1]))
_NAMED = 6


def memory_section(rows: Sequence[PlanRow], key: str) -> str:
    """HTML of the section; ``rows`` are all of ``plan.csv``, at least one."""
    record = memory_record(rows)
    last = max(row.round for row in rows)
    caption = (
        f"Left, each holder's worst round: the one whose measured peak was the largest part of its declared memory"
        f" (of the predictions where nothing was measured). Right, the last round, {last}."
    )
    return f"<h3>Memory</h3>{_warnings(record)}{plot(memory_svg(record, key), caption, wide=True)}{_table(record)}"


def memory_svg(record: Sequence[HolderMemory], key: str) -> str:
    """Bars of every holder's worst and last round; the server, often far larger, has a scale of its own."""
    from matplotlib.figure import Figure

    clients = capped([holder for holder in record if holder.last.kind == "client"])
    groups = [group for group in (clients, [h for h in record if h.last.kind != "client"]) if group]
    with drawing_style():
        figure = Figure(figsize=(9.5, 1.5 + 0.45 * sum(map(len, groups))), layout="constrained")
        heights = [len(group) + 0.7 for group in groups]
        grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, sharex="row", sharey="row")
        for pair, group in zip(grid, groups, strict=True):
            for axes, shown in zip(pair, ([h.worst for h in group], [h.last for h in group]), strict=True):
                measured = any(row.measured_bytes is not None for row in shown)
                kinds = _SERIES if measured else _SERIES[:2]
                thickness = 0.8 / len(kinds)
                for index, (kind, colour) in enumerate(kinds):
                    places = [row + (index - (len(kinds) - 1) / 2) * thickness for row in range(len(shown))]
                    sizes = [(_size(row, kind) or 0) / 1e9 for row in shown]
                    axes.barh(places, sizes, thickness * 0.9, color=colour, label=kind)
                    if kind == "measured":
                        for place, size, row in zip(places, sizes, shown, strict=True):
                            axes.text(size, place, _exceeded(row), va="center", fontsize=7, color=INK)
                if any(map(_exceeded, shown)):
                    axes.margins(x=0.3)  # room for the marks
                axes.grid(visible=False, axis="y")
            pair[0].set_yticks(range(len(group)), [literal(holder.name) for holder in group])
            pair[0].set_ylim(len(group) - 0.5, -0.5)
        grid[0, 0].set_title("worst round")
        grid[0, 1].set_title("last round")
        for axes in grid[-1]:
            axes.set_xlabel("memory (GB)")
        legend = {
            label: bar for axes in grid.flat for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(legend.values(), legend.keys(), loc="outside upper right", ncols=3)
        return inline_svg(figure, key, "declared, predicted and measured memory by holder")


def _size(row: PlanRow, kind: str) -> int | None:
    if kind == "declared":
        return row.declared_bytes
    return row.measured_bytes if kind == "measured" else row.predicted_bytes if row.available else None


def _exceeded(row: PlanRow) -> str:
    measured = row.measured_bytes or 0
    if measured > row.declared_bytes:
        return f" {_MARK} over declared"
    return f" {_MARK} over predicted" if measured > row.predicted_bytes and row.available else ""


def _warnings(record: Sequence[HolderMemory]) -> str:
    """Which holders took more than they should have, also those that the figure leaves out."""
    lines = []
    for what, over in (
        ("declared", {holder.name: holder.over_declared for holder in record}),
        ("predicted", {holder.name: holder.over_predicted for holder in record}),
    ):
        named = [f"{name} ({_rounds(rounds)})" for name, rounds in over.items() if rounds]
        if named:
            lines.append(f"{_MARK} Measured more than {what}: {_first(named)}.")
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def _rounds(rounds: Sequence[int]) -> str:
    return f"{'round' if len(rounds) == 1 else 'rounds'} {_first(list(map(str, rounds)))}"


def _first(words: Sequence[str]) -> str:
    """The first of ``words``, and how many more there are."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more


def _table(record: Sequence[HolderMemory]) -> str:
    columns = (
        *("holder", "kept to its memory", "declared, last", "predicted, last", "measured, last"),
        *("worst round", "declared then", "predicted then", "measured then"),
    )
    rows = [
        (
            *(holder.name, f"{_MARK} {holder.mark}" if holder.mark else _kept(holder)),
            *_amounts(holder.last),
            holder.worst.round,
            *_amounts(holder.worst),
        )
        for holder in record
    ]
    return table(columns, rows, text_columns=2)


def _kept(holder: HolderMemory) -> str:
    return "not measured" if holder.worst.measured_bytes is None else "yes"


def _amounts(row: PlanRow) -> tuple[str, ...]:
    sizes = (_size(row, kind) for kind, _ in _SERIES)
    return tuple(NOTHING if size is None else bytes_text(size) for size in sizes)
