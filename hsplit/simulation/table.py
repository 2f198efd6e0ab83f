"""What was simulated, as a table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hsplit.observe.wording import NOTHING, number_text
from hsplit.simulation.sweep import Setting, Sweep

# Two lines a heading, with the unit, so that a fleet of 100,000 still fits into 80 columns.
COLUMNS = (
    "clients",
    "servers",
    "train",
    "step,\ns",
    "round,\ns",
    "server\nshare",
    "bottle-\nneck",
    "memory,\nGB",
    "up,\nGB",
    "down,\nGB",
    "Gbit/s",
)

HEADINGS = tuple(column.replace("-\n", "").replace("\n", " ") for column in COLUMNS)
"""The same in one line each, for a page."""


def cells(setting: Setting) -> list[str]:
    """One line, in the order of :data:`COLUMNS`."""
    head = [f"{setting.clients:,}", str(setting.servers)]
    if setting.refused:
        return [*head, *[NOTHING] * 4, "memory", *[NOTHING] * 4]
    return [
        *head,
        f"{setting.training:,.0f}",
        number_text(setting.step_s),
        number_text(setting.round_s),
        f"{setting.server_share:.0%}",
        setting.bottleneck,
        number_text(setting.server_gb),
        number_text(setting.bytes_up / 1e9),
        number_text(setting.bytes_down / 1e9),
        number_text(setting.server_gbps),
    ]


def sweep_table(sweep: Sweep) -> Table:
    """One line for every fleet and number of servers."""
    title = (
        f"simulation of {sweep.about['model']}:\nnothing is trained, all seconds are virtual; up and down are a round's"
    )
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column.startswith("bottle") else "right", no_wrap=True)
    for setting in sweep.settings:
        table.add_row(*cells(setting))
    return table
