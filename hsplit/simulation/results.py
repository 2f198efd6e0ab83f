"""Results of a simulation: CSV files, one self-contained HTML page, and a table for a terminal."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hsplit.errors import InputError, os_reason
from hsplit.observe.wording import NOTHING, number_text
from hsplit.report.figures import COLOURS, drawing_style, inline_svg
from hsplit.report.page import PageSection, Plot, page
from hsplit.simulation.sweep import Setting, Sweep

# Headings of two lines, with the unit, so that a fleet of 100,000 fits into 80 columns.
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
"""Headings of one line each, for a page."""


def cells(setting: Setting) -> list[str]:
    """Cells of one row, in the order of :data:`COLUMNS`."""
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
    """Table with one row for every fleet and number of servers."""
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


def write_simulation(sweep: Sweep, to: Path) -> None:
    """Write ``settings.csv``, ``rounds.csv`` and ``report.html`` into ``to``.

    Raises:
        InputError: a file cannot be written.
    """
    rounds = [
        {"clients": s.clients, "servers": s.servers, **asdict(round_)} for s in sweep.settings for round_ in s.rounds
    ]
    try:
        to.mkdir(parents=True, exist_ok=True)
        _write(to / "settings.csv", [s.row() for s in sweep.settings], sweep.about)
        if rounds:
            _write(to / "rounds.csv", rounds, sweep.about)
        (to / "report.html").write_text(simulation_page(sweep), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to: {to}: {os_reason(error)}") from error


def _write(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("# simulation: nothing was trained; all seconds are virtual\n")
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def simulation_page(sweep: Sweep) -> str:
    """The HTML page of a simulation."""
    fitting = [s for s in sweep.settings if not s.refused]
    settings = {key: NOTHING if value is None else value for key, value in sweep.about.items()}
    unit = "Seconds are virtual; figures are of a round."
    sections = [
        PageSection("What it comes to", lines=sweep.findings(), facts=settings),
        PageSection("Fleets and servers", [unit], columns=HEADINGS, rows=map(cells, sweep.settings)),
    ]
    if fitting:
        sections.append(PageSection("Growth", plots=_growth(fitting)))
        sections.append(PageSection("Rounds of the largest fleet", plots=_rounds(fitting[-1])))
    return page("Simulation", "Nothing was trained: all seconds are virtual, of declared budgets.", sections)


def _growth(settings: Sequence[Setting]) -> list[Plot]:
    plots: tuple[tuple[str, str, Callable[[Setting], float]], ...] = (
        ("round", "virtual seconds a round (simulation)", lambda s: s.round_s),
        ("share", "server's part of a local step (simulation)", lambda s: s.server_share),
        ("memory", "GB that each server needs (simulation)", lambda s: s.server_gb),
        ("bytes", "GB a round, up and down (simulation)", lambda s: (s.bytes_up + s.bytes_down) / 1e9),
    )
    made = []
    for key, label, value in plots:
        curves = {}
        for count in dict.fromkeys(s.servers for s in settings):
            own = [s for s in settings if s.servers == count]
            curves[f"{count} server{'s' if count > 1 else ''}"] = ([s.clients for s in own], [value(s) for s in own])
        made.append(_curves(key, label, "clients", curves, logarithmic=True))
    return made


def _rounds(setting: Setting) -> list[Plot]:
    trained = setting.rounds[1:]
    numbers = [r.round for r in trained]
    label = f"{setting.clients:,} clients, {setting.servers} servers"
    seconds, present = [r.round_s for r in trained], [r.present for r in trained]
    return [
        _curves("seconds", "virtual seconds a round (simulation)", "round", {label: (numbers, seconds)}),
        _curves("present", "clients there (simulation)", "round", {label: (numbers, present)}),
    ]


def _curves(
    key: str,
    label: str,
    across: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    logarithmic: bool = False,
) -> Plot:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with drawing_style():
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.subplots()
        for index, (name, (x, y)) in enumerate(curves.items()):
            axes.plot(x, y, "o-", markersize=3, label=name, color=COLOURS[index % len(COLOURS)])
        axes.set(xlabel=across, ylabel=label)
        if logarithmic:
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1.1 * max(max(y) for _, y in curves.values()) or 1)
        axes.legend(fontsize="small")
        return Plot(inline_svg(figure, f"simulation-{key}", label), label)
