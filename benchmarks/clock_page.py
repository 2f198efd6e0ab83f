"""Tables, the plot and the files of ``clock.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from hsplit.benchmark import markdown_table, show_table, write_rows


def write_results(
    to: Path, rows: Sequence[Any], holders: Sequence[Any], header: Mapping[str, Any], console: Console
) -> None:
    """Show what was found, and write it into ``to``: ``clock.csv``, ``holders.csv``, ``clock.md``, ``clock.svg``.

    Args:
        rows: ``Row`` of every setting.
        holders: ``HolderRow`` of every holder in every setting.
        header: what they were measured on, and with.
    """
    for columns, cells in (table(rows), holder_table(holders)):
        show_table(console, columns, cells)
    furthest = max((ratio for row in rows for ratio in row.ratios), key=lambda ratio: abs(ratio - 1))
    console.print(f"furthest from one another: {furthest:.3f}")
    to.mkdir(parents=True, exist_ok=True)
    ratios = ("emulated_by_predicted", "measured_by_predicted", "measured_by_emulated")
    written = [asdict(row) | dict(zip(ratios, row.ratios, strict=True)) for row in rows]
    write_rows(to / "clock.csv", written, header)
    write_rows(to / "holders.csv", [asdict(row) for row in holders], header)
    told = "".join(f"- {key}: {value}\n" for key, value in header.items())
    tables = [markdown_table(*table(rows)), markdown_table(*holder_table(holders))]
    (to / "clock.md").write_text("\n".join([told, *tables]))
    plot(rows, to / "clock.svg")
    console.print(f"written to {to}")


def table(rows: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a round by the three routes."""
    columns = ["h", "microbatches", "labels", "splits", "predicted, s (virtual)", "emulated, s", "measured, s"]
    columns += ["emulated / predicted", "measured / predicted", "measured / emulated", "pace"]
    cells = []
    for row in rows:
        seconds = (row.predicted_s, row.emulated_s, row.measured_s)
        setting = [f"{row.heterogeneity:g}", str(row.microbatches), row.labels, row.splits]
        cells.append([*setting, *(f"{value:.2f}" for value in (*seconds, *row.ratios, row.pace))])
    return columns, cells


def holder_table(holders: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: each holder's own part of a local step, by level, with the fewest microbatches."""
    columns = ["h", "holder", "of a core", "GFLOP/s", "split", "predicted, s (virtual)", "emulated, s", "measured, s"]
    first = min(row.microbatches for row in holders)
    cells = []
    for row in holders:
        if (row.microbatches, row.labels) == (first, "server"):
            seconds = (row.predicted_time_s, row.emulated_time_s, row.measured_time_s)
            budget = [f"{row.share:.2f}", f"{row.gflops:.1f}", str(row.split)]
            cells.append([f"{row.heterogeneity:g}", row.name, *budget, *(f"{value:.2f}" for value in seconds)])
    return columns, cells


def plot(rows: Sequence[Any], to: Path) -> None:
    """A round's seconds by the three routes, a group of bars a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    routes = {"predicted (virtual)": "predicted_s", "emulated": "emulated_s", "measured": "measured_s"}
    for index, (name, field) in enumerate(routes.items()):
        at = [position + 0.27 * (index - 1) for position in range(len(rows))]
        axes.bar(at, [getattr(row, field) for row in rows], width=0.25, label=name)
    names = [f"h {row.heterogeneity:g}\n{row.microbatches} parts\nlabels: {row.labels}" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="seconds a round (median)", ylim=(0, None))
    # Above the bars.
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(to)
