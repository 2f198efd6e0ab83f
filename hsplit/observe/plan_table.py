"""The plan as ``hsplit plan`` prints it: who holds what, and why it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hsplit.observe.wording import (
    NOTHING,
    insight_lines,
    lacking_text,
    layers_held,
    memory_text,
    number_text,
    plan_lines,
    printable,
    ranks_by_kind,
    share_text,
)
from hsplit.scheduling.plan import HolderPlan, Plan

if TYPE_CHECKING:
    from hsplit.scheduling.insight import Insight


def plan_table(plan: Plan, insight: Insight | None = None) -> Group:
    """One row a client, then the server's; below it makespan, captured importance and where that came from.

    With an insight, also who the bottleneck is and what one more GB of memory would buy.

    Made to be read at 80 columns too, where the ranks by weight kind take several lines.
    """
    lines = plan_lines(plan) + ([] if insight is None else insight_lines(insight, plan))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold", min_width=8)
    table.add_column("split", justify="right", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    table.add_column("ranks", overflow="fold", min_width=14)
    table.add_column("predicted /\ndeclared", no_wrap=True)
    table.add_column("step time\n(virtual)", justify="right", no_wrap=True)
    table.add_column("share of\ncaptured", justify="right", no_wrap=True)
    for client in plan.clients:
        _add_row(table, client, plan.layers)
    table.add_section()
    _add_row(table, plan.server, plan.layers)
    # Not as the table's caption, which would be broken at the table's width.
    return Group(table, Text("\n".join(map(printable, lines))))


def _add_row(table: Table, holder: HolderPlan, layers: int) -> None:
    # two lines, so that the column is narrow without rich having to break it
    ranks = ranks_by_kind(holder.ranks) if holder.available else lacking_text(holder).replace(", ", ",\n")
    cells = (
        printable(holder.name),
        NOTHING if holder.split is None else str(holder.split),
        layers_held(holder, layers),
        ranks,
        memory_text(holder),
        number_text(holder.step_time_s, "s") if holder.available else NOTHING,
        share_text(holder),
    )
    table.add_row(*(Text(cell) for cell in cells), style=None if holder.available else "dim")
