"""Results of ``convergence.py``'s cells: CSV, tables, plots, and one page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from benchmarks.convergence import SINGLE, Cells, tuned_at, tuned_variants, tuning, usual_lr
from benchmarks.protocol import Protocol
from hsplit.report.figures import GRID, INK, drawing_style, inline_svg
from hsplit.report.page import PageSection, Plot, page

# The papers' own figures: how many times as long each takes to converge as HSplitLoRA, with equal budgets.
PAPERS_TIMES = {
    "ft": "1.4 (LLaMA-2-7B), 1.5 (GPT-2-L)",
    "cenlora": "1.3, 1.3",
    "hetlora": "1.6, 1.7",
    "splitlora": "1.5, 1.5",
}
# Perplexity lost with unequal budgets against equal ones, and above HSplitLoRA's end (LLaMA-2-7B).
PAPERS_LOSSES = {"hetlora": ("0.38", "0.47"), "splitlora": ("0.10", "0.15")}
AT_THE_CLIENT = ", mean client"
OURS = "hsplitlora"
TRAINING, EVALUATED = "train_virtual_time_s", "virtual_time_s"
Found = Mapping[str, Any]
"""A finished cell."""


@dataclass(frozen=True)
class Grid:
    """The finished cells of a protocol at the rates that were tuned.

    Attributes:
        protocol: theirs.
        by: cells by data set, variant and ``h``; one of a single node stands for every ``h``.
        targets: perplexity to reach, by data set and seed.
    """

    protocol: Protocol
    by: Mapping[tuple[str, str, float], Sequence[Found]]
    targets: Mapping[tuple[str, int], float]

    def cells(self, data: str, name: str, h: float) -> Sequence[Found]:
        """Return the cells of a variant, whatever ``h`` they are made at."""
        everywhere = name.removesuffix(AT_THE_CLIENT) in SINGLE
        return self.by.get((data, name, self.protocol.levels[0] if everywhere else h), [])

    def names(self, part: str) -> list[str]:
        """Return the variants of a part of which a cell has finished; single nodes also at a client's speed."""
        own = self.protocol.parts[part]
        data = own.data or self.protocol.main_data
        names = [name for name in own.variants if any(key[:2] == (data, name) for key in self.by)]
        return [*names, *(name + AT_THE_CLIENT for name in names if name in SINGLE)]

    def time(self, cell: Found, column: str = TRAINING) -> float:
        """Return the virtual seconds of a cell to its seed's target; infinite if never, NaN without a target."""
        return reached(cell["rows"], self.targets.get((cell["data"], cell["seed"]), math.nan), column)


def grid_of(cells: Cells) -> Grid:
    """Collect the finished cells."""
    protocol = cells.protocol
    by: dict[tuple[str, str, float], list[Found]] = defaultdict(list)
    factor = protocol.server.tflops / protocol.clients.tflops
    rate_of = {name: own.rate_of or name for own in protocol.parts.values() for name in own.variants}
    for cell in cells.all():
        if cell["seed"] == protocol.rates.seed or cell["lr"] != tuning(cells, rate_of[cell["variant"]], cell["h"])[0]:
            continue
        by[cell["data"], cell["variant"], cell["h"]].append(cell)
        if cell["variant"] in SINGLE:
            by[cell["data"], cell["variant"] + AT_THE_CLIENT, cell["h"]].append(slowed(cell, factor))
    targets = {
        (data, cell["seed"]): target_of(cell["rows"], protocol.target.part)
        for (data, name, _), own in by.items()
        for cell in own
        if name == protocol.target.policy and cell["rows"]
    }
    return Grid(protocol, by, targets)


def reached(rows: Sequence[Mapping[str, Any]], target: float, column: str) -> float:
    """Return the value of ``column`` at which perplexity first reaches ``target``, interpolated; infinite if never."""
    if math.isnan(target):
        return math.nan
    for before, after in pairwise(rows):
        if after["ppl"] <= target:
            if before["ppl"] <= target:
                return float(before[column])
            part = (before["ppl"] - target) / (before["ppl"] - after["ppl"])
            return float(before[column] + part * (after[column] - before[column]))
    return math.inf


def target_of(rows: Sequence[Mapping[str, Any]], part: float) -> float:
    """Return the perplexity after ``part`` of a run's rounds."""
    return float(rows[math.ceil(part * (len(rows) - 1) - 1e-6)]["ppl"])


def slowed(cell: Found, factor: float) -> dict[str, Any]:
    """A single node's cell at a speed ``factor`` times lower: all that it does is computing."""
    rows = [{**row, **{name: factor * row[name] for name in (TRAINING, EVALUATED)}} for row in cell["rows"]]
    return {**cell, "variant": cell["variant"] + AT_THE_CLIENT, "rows": rows}


def write_results(to: Path, cells: Cells, header: Mapping[str, Any], console: Console) -> None:
    """Everything that follows from the finished cells."""
    grid, protocol = grid_of(cells), cells.protocol
    if not grid.by:
        console.print("no cell of the grid has run yet")
        return
    every = [cell for own in grid.by.values() for cell in own]
    facts = {**header, "protocol": protocol.sha256, "why": protocol.why}
    facts |= {"cells computed on": ", ".join(sorted({cell["device"] for cell in every}))}
    to.mkdir(parents=True, exist_ok=True)
    common.write_rows(to / "curves.csv", list(_curve_rows(every)), facts)
    common.write_rows(to / "budgets.csv", _budget_rows(every), facts)
    tables: dict[str, Table] = {}
    for part in protocol.parts:
        if not (names := grid.names(part)):
            continue
        own = protocol.parts[part]
        data = own.data or protocol.main_data
        if own.policy is None:
            tables[f"{part}: time to the target as a multiple of {OURS}'s"] = times_table(grid, part, names)
            tables[f"{part}: the same, evaluation included"] = times_table(grid, part, names, EVALUATED)
            tables[f"{part}: ends"] = ends_table(grid, part, names)
        else:
            tables[f"{part} ({own.policy}, {data})"] = changes_table(grid, part, names)
    tables["The papers' claims"] = claims_table(grid)
    tables["Learning rates"] = rate_table(cells)
    for title, (columns, rows) in tables.items():
        common.show_table(console, columns, rows, title=title)
    common.write_markdown(to / "convergence.md", facts, [common.titled(title, own) for title, own in tables.items()])
    (to / "convergence.html").write_text(_page(grid, tables, facts))
    with drawing_style():
        common.save_figure(time_figure(grid), to / "convergence.svg")
    console.print(f"written to {to}")


# -- tables ---------------------------------------------------------------------------------------------------------


def times_table(grid: Grid, part: str, names: Sequence[str], column: str = TRAINING) -> Table:
    """Ratios of time to that of ours, to each seed's own target."""
    own = grid.protocol.parts[part]
    data, levels = own.data or grid.protocol.main_data, own.levels or grid.protocol.levels
    rows = []
    for name in names:
        ratios = [
            ratio_text(
                [(grid.time(a, column), grid.time(b, column)) for a, b in paired(grid, data, name, OURS, h)],
            )
            for h in levels
        ]
        seconds = [[grid.time(cell, column) for cell in grid.cells(data, name, h) if cell["rows"]] for h in levels]
        rows.append([name, *(x for pair in zip(map(_seconds, seconds), ratios, strict=True) for x in pair)])
    return ["policy", *(x for h in levels for x in (f"s, h {h:g} (virtual)", f"times {OURS}'s, h {h:g}"))], rows


def ends_table(grid: Grid, part: str, names: Sequence[str]) -> Table:
    """Perplexity at the end, who took part, and what was sent."""
    own = grid.protocol.parts[part]
    data, levels = own.data or grid.protocol.main_data, own.levels or grid.protocol.levels
    columns = ["policy", "h", "seeds", "clients", "data lost", "perplexity (least to most)", "against cenlora"]
    columns += ["lost against h 0", "worst client", "against splitlora's", "largest cut", "tokens", "MB sent"]
    rows = []
    for name in (name for name in names if not name.endswith(AT_THE_CLIENT)):
        for h in levels[: 1 if name in SINGLE else None]:
            found = grid.cells(data, name, h)
            ran = [cell for cell in found if cell["rows"]]
            last = [cell["rows"][-1] for cell in ran]
            lost = [(a, b) for a, b in _of_seeds(ran, grid.cells(data, name, levels[0])) if h != levels[0]]
            worst = [row["worst_ppl"] for row in last if row["worst_ppl"] is not None]
            cuts = [cut for cell in ran for cut in cell["cuts"].values()]
            rows.append(
                [
                    name,
                    f"{h:g}" if name not in SINGLE else "any",
                    str(len(found)),
                    _mean([cell["available"] for cell in found], ".1f"),
                    _mean([cell["data_lost"] for cell in found], ".0%"),
                    spread([row["ppl"] for row in last], ".3f") if ran else "nobody fits",
                    _difference(paired(grid, data, name, "cenlora", h), "ppl"),
                    _difference(lost, "ppl"),
                    _mean(worst, ".3f"),
                    _difference(paired(grid, data, name, "splitlora", h), "worst_ppl"),
                    f"{max(cuts):.1e}" if cuts and max(cuts) else "none",
                    _mean([row["tokens"] for row in last], ",.0f"),
                    _mean([sum(r["bytes_up"] + r["bytes_down"] for r in cell["rows"]) / 1e6 for cell in ran], ",.0f"),
                ]
            )
    return columns, rows


def changes_table(grid: Grid, part: str, names: Sequence[str]) -> Table:
    """Each change of a policy against the policy itself, over the seeds of both; the spread of re-seeding beside it."""
    own = grid.protocol.parts[part]
    assert own.policy is not None
    data, levels = own.data or grid.protocol.main_data, own.levels or grid.protocol.levels
    columns = ["changed", "h", "perplexity against the whole (least to most)", "worst client's", "time (every seed)"]
    columns += ["seeds spread by"]
    rows = []
    for h in levels:
        for name in names:
            pairs = paired(grid, data, name, own.policy, h)
            ends = [b["rows"][-1]["ppl"] - grid.targets.get((data, b["seed"]), 0.0) for _, b in pairs]
            times = ratio_text([(grid.time(a), grid.time(b)) for a, b in pairs])
            # Seeds draw other data, some of it harder: their ends against their own targets.
            by_seed = f"{max(ends) - min(ends):.3f}" if len(ends) > 1 else ""
            worst = _difference(pairs, "worst_ppl")
            rows.append([name, f"{h:g}", _difference(pairs, "ppl"), worst, times, by_seed])
    return columns, rows


def claims_table(grid: Grid) -> Table:
    """The papers' ratios and losses, and ours beside them, on the main data set."""
    data, (first, *_, last) = grid.protocol.main_data, grid.protocol.levels
    columns = ["policy", "seeds", f"times as long, h {first:g}", "papers, equal budgets"]
    columns += [f"above {OURS} at the end, h {last:g}", "papers", f"lost, h {last:g}", "papers"]
    rows = []
    for name in dict.fromkeys(name for of, name, _ in grid.by if of == data):
        if name.removesuffix(AT_THE_CLIENT) not in tuned_variants(grid.protocol):
            continue
        equal, unequal = (paired(grid, data, name, OURS, h) for h in (first, last))
        lost = _of_seeds(grid.cells(data, name, last), grid.cells(data, name, first))
        papers_lost, papers_above = PAPERS_LOSSES.get(name, ("", ""))
        rows.append(
            [
                name,
                str(max(len(equal), len(unequal))),
                ratio_text([(grid.time(a), grid.time(b)) for a, b in equal]),
                PAPERS_TIMES.get(name, ""),
                _difference(unequal, "ppl"),
                papers_above,
                "" if name.removesuffix(AT_THE_CLIENT) in SINGLE else _difference(lost, "ppl"),
                papers_lost,
            ]
        )
    return columns, rows


def rate_table(cells: Cells) -> Table:
    """Perplexity by learning rate, on the seed that is for tuning; the chosen one in brackets."""
    protocol, rates = cells.protocol, cells.protocol.rates
    tried = {(c["variant"], c["h"], c["lr"]): c for c in cells.all() if c["seed"] == rates.seed}
    widest = [2.0**power for power in range(-8, 9)]
    found: dict[tuple[str, float], dict[float, str]] = {}
    for name, variant in tuned_variants(protocol).items():
        for h in dict.fromkeys(tuned_at(protocol, variant.policy, h) for h in protocol.levels):
            usual, chosen = usual_lr(protocol, variant.policy), tuning(cells, name, h)[0]
            ends = {}
            for factor in widest:
                if (cell := tried.get((name, h, usual * factor))) is not None:
                    end = f"{cell['rows'][-1]['ppl']:.3f}" if cell["rows"] else "nobody fits"
                    ends[factor] = f"[{end}]" if usual * factor == chosen else end
            if ends:
                found[name, h] = ends
    factors = [factor for factor in widest if any(factor in ends for ends in found.values())]
    rows = [[name, f"{h:g}", *(ends.get(factor, "") for factor in factors)] for (name, h), ends in found.items()]
    return ["policy", "h", *(f"{factor:g} x usual" for factor in factors)], rows


def paired(grid: Grid, data: str, name: str, other: str, h: float) -> list[tuple[Found, Found]]:
    """Cells of two variants of one seed together, where both have run."""
    return _of_seeds(grid.cells(data, name, h), grid.cells(data, other, h))


def _of_seeds(cells: Sequence[Found], others: Sequence[Found]) -> list[tuple[Found, Found]]:
    of_seed = {cell["seed"]: cell for cell in others if cell["rows"]}
    return [(cell, of_seed[cell["seed"]]) for cell in cells if cell["rows"] and cell["seed"] in of_seed]


def ratio_text(pairs: Sequence[tuple[float, float]]) -> str:
    """Format times over other times: ``1.24 (1.52, 1.10, 1.15)``.

    Args:
        pairs: two times of each seed.

    Returns:
        The geometric mean over seeds and, of several, every seed's own ratio; ``never`` for a seed whose first time is
        infinite. Empty where a second one is, or where there is no target.
    """
    if not pairs or any(math.isnan(one) or not math.isfinite(other) for one, other in pairs):
        return ""
    ratios = [one / other for one, other in pairs]
    mean = "not reached" if math.inf in ratios else f"{geometric_mean(ratios):.2f}"
    every = ", ".join("never" if math.isinf(ratio) else f"{ratio:.2f}" for ratio in ratios)
    return f"{mean} ({every})" if len(ratios) > 1 else mean


def spread(values: Sequence[float], form: str) -> str:
    """Format a mean, and of several values the least and the most: ``3.84 (3.71 to 3.98)``."""
    if not values:
        return ""
    mean = format(fmean(values), form)
    return f"{mean} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else mean


def _difference(pairs: Sequence[tuple[Found, Found]], field: str) -> str:
    ends = [(a["rows"][-1][field], b["rows"][-1][field]) for a, b in pairs if a is not b]
    return spread([a - b for a, b in ends if a is not None and b is not None], "+.3f")


def _mean(values: Sequence[float], form: str) -> str:
    return format(fmean(values), form) if values else ""


def _seconds(values: Sequence[float]) -> str:
    if not values:
        return ""
    return "not reached" if math.inf in values else "" if math.isnan(fmean(values)) else f"{fmean(values):.1f}"


# -- plots ----------------------------------------------------------------------------------------------------------


def _curve_rows(cells: Sequence[Found]) -> Iterator[dict[str, Any]]:
    for cell in cells:
        of = {key: cell[key] for key in ("variant", "data", "h", "seed", "lr", "available")}
        yield from ({**of, **row} for row in cell["rows"])


def _budget_rows(cells: Sequence[Found]) -> list[dict[str, Any]]:
    """Return every client's drawn budgets, once for each level and seed."""
    drawn = {(cell["h"], cell["seed"]): cell["budgets"] for cell in cells}
    return [
        {"h": h, "seed": seed, "client": index, **budget}
        for (h, seed), budgets in sorted(drawn.items())
        for index, budget in enumerate(budgets)
    ]


def time_figure(grid: Grid) -> Figure:
    """Time to the target against ``h`` on the main data set: a line a policy, through geometric means; dots are seeds.

    Each seed's time is divided by what cenlora takes at the server's speed.
    """
    data, levels = grid.protocol.main_data, grid.protocol.levels
    figure = common.new_figure(6.4, 4.2)
    axes = figure.subplots()
    names = [name for part in grid.protocol.parts for name in grid.names(part)]
    known = tuned_variants(grid.protocol)
    names = [n for n in dict.fromkeys(names) if n.removesuffix(AT_THE_CLIENT) in known and n != "cenlora"]
    for index, name in enumerate(names):
        points = []
        for h in levels:
            ratios = [grid.time(a) / grid.time(b) for a, b in paired(grid, data, name, "cenlora", h)]
            ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
            axes.plot([h] * len(ratios), ratios, ".", color=f"C{index % 10}", alpha=0.5)
            if ratios:
                points.append((h, geometric_mean(ratios)))
        if points:
            style = "--" if name.endswith(AT_THE_CLIENT) else "-"
            width = 2.2 if name == OURS else 1.2
            axes.plot(*zip(*points, strict=True), style, color=f"C{index % 10}", label=name, linewidth=width)
    axes.axhline(1.0, color=GRID, linewidth=1)
    axes.set(xlabel="heterogeneity h of the clients' budgets", yscale="log")
    axes.set_ylabel("time to the target / centralized LoRA's (virtual)", color=INK)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def curve_figure(grid: Grid, data: str, column: str, label: str) -> Figure:
    """Perplexity against ``column``, a panel for each ``h``; every line is a seed."""
    levels = [h for h in grid.protocol.levels if any(of == data and at == h for of, _, at in grid.by)]
    known = tuned_variants(grid.protocol)
    names = [n for of, n, _ in grid.by if of == data and n.removesuffix(AT_THE_CLIENT) in known]
    figure = common.new_figure(3.1 * len(levels), 3.4)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    aims = [target for (of, _), target in grid.targets.items() if of == data]
    for panel, h in zip(panels, levels, strict=True):
        for index, name in enumerate(dict.fromkeys(names)):
            own = [cell for cell in grid.cells(data, name, h) if cell["rows"]]
            for number, cell in enumerate(own):
                panel.plot(
                    [row[column] for row in cell["rows"]],
                    [row["ppl"] for row in cell["rows"]],
                    color=f"C{index % 10}",
                    linestyle="--" if name.endswith(AT_THE_CLIENT) else "-",
                    linewidth=1.0 if len(own) > 1 else 1.6,
                    label=name if number == 0 else None,
                )
        panel.set(xlabel=label, title=f"h {h:g}")
        if aims:
            panel.set(ylim=(0.9 * min(aims), 1.7 * max(aims)))
    panels[0].set_ylabel("validation perplexity", color=INK)
    handles = {text: h for p in panels for h, text in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return figure


def _page(grid: Grid, tables: Mapping[str, Table], facts: Mapping[str, Any]) -> str:
    sections = []
    with drawing_style():
        caption = "Time to each seed's target over that of centralized LoRA at the server's speed; dots are seeds."
        svg = inline_svg(time_figure(grid), "time", caption)
        sections.append(PageSection("Time to the target", plots=[Plot(svg, caption, wide=True)]))
        for data in dict.fromkeys(data for data, _, _ in grid.by):
            for column, label in ((TRAINING, "seconds of training (virtual)"), ("tokens", "tokens trained on")):
                caption = f"Validation perplexity on {data} against {label}; every line is one seed."
                svg = inline_svg(curve_figure(grid, data, column, label), f"{data}-{column}", caption)
                sections.append(
                    PageSection(f"{data}: perplexity against {label}", plots=[Plot(svg, caption, wide=True)])
                )
    sections += [PageSection(title, columns=columns, rows=rows) for title, (columns, rows) in tables.items()]
    sections.append(PageSection("Setting", facts=facts))
    subtitle = "Times are virtual: at the declared budgets. Perplexity is of everybody's held-out texts."
    return page("Convergence against budget heterogeneity", subtitle, sections)
