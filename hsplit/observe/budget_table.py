"""Measured budgets as ``hsplit probe`` prints them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hsplit.measuring.figure import Figures
from hsplit.observe.wording import NOTHING, printable

_HEADINGS = {
    "memory_gb": "memory\nGB",
    "tflops": "compute\nTFLOP/s",
    "bandwidth_mbps": "bandwidth\nMbit/s",
    "latency_ms": "latency\nms",
}


def budget_table(machines: Mapping[str, str], figures: Figures) -> Table:
    """One row a holder: each figure, and below it the least and the greatest of its samples.

    Args:
        machines: the host's name by holder, in the order of the rows.
        figures: by holder and key of its budget.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold", min_width=8)
    table.add_column("machine", overflow="fold", min_width=8)
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, machine in machines.items():
        found = [figures[name].get(key) for key in _HEADINGS]
        cells = [NOTHING if f is None else f"{f.value:g}\n{f.low:g}-{f.high:g}" for f in found]
        table.add_row(*(Text(cell) for cell in (printable(name), printable(machine), *cells)))
    return table
