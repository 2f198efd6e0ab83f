"""What was simulated, as a table for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hsplit.observe.wording import NOTHING, bytes_text, number_text
from hsplit.simulation.sweep import Setting, Sweep

COLUMNS = (
    "clients",
    "servers",
    "train",
    "step, s",
    "round, s",
    "server",
    "bottleneck",
    "each server",
    "up",
    "down",
    "Gbit/s",
)


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
        bytes_text(setting.server_gb * 1e9),
        bytes_text(setting.bytes_up),
        bytes_text(setting.bytes_down),
        number_text(setting.server_gbps),
    ]


def sweep_table(sweep: Sweep) -> Table:
    """One line for every fleet and number of servers."""
    table = Table(
        title=f"simulation of {sweep.about['model']}: nothing is trained, all seconds are virtual; bytes are a round's",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "bottleneck" else "right")
    for setting in sweep.settings:
        table.add_row(*cells(setting))
    return table
