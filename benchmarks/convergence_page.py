"""Results of ``convergence.py``'s cells: CSV, tables, plots, and one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, geometric_mean, pstdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import common
from benchmarks import convergence as protocol
from benchmarks.common import Table
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
# One node with all clients' data, whatever clients have.
SINGLE = ("cenlora", "ft")


@dataclass(frozen=True)
class Line:
    """A policy or variant at one ``h``, over its seeds.

    Attributes:
        name: of the policy or variant.
        h: coefficient of variation.
        seeds: their number.
        available, data_lost: clients that take part, part of the examples that others have; means.
        ppl, ppl_spread: at the end, mean and standard deviation over seeds; NaN if no client could take part.
        lost: above its own end at ``h = 0`` with the same seeds; NaN where there is none.
        target_s: virtual seconds to the target, mean; infinite where a seed does not reach it.
        rounds: to the target, likewise.
        tokens: trained on by the end, mean.
        sent_mb: up and down over the whole run, mean.
        captured: importance, of the last round's plan, mean.
    """

    name: str
    h: float
    seeds: int
    available: float
    data_lost: float
    ppl: float
    ppl_spread: float
    lost: float
    target_s: float
    rounds: float
    tokens: float
    sent_mb: float
    captured: float


def reached(rows: Sequence[Mapping[str, Any]], target: float, column: str) -> float:
    """Return the value of ``column`` at which perplexity first reaches ``target``, interpolated; infinite if never."""
    for before, after in pairwise(rows):
        if after["ppl"] <= target:
            if before["ppl"] <= target:
                return float(before[column])
            part = (before["ppl"] - target) / (before["ppl"] - after["ppl"])
            return float(before[column] + part * (after[column] - before[column]))
    return math.inf


def target_of(cells: Sequence[Mapping[str, Any]], part: float) -> float:
    """Mean perplexity of ``cenlora`` after ``part`` of its rounds; NaN where it has not run."""
    ends = [cell["rows"][math.ceil(part * (len(cell["rows"]) - 1))]["ppl"] for cell in cells if cell["rows"]]
    return fmean(ends) if ends else math.nan


def line(
    name: str, h: float, cells: Sequence[Mapping[str, Any]], equal: Sequence[Mapping[str, Any]], target: float
) -> Line:
    """Means over ``cells``, one a seed; ``equal`` are those at ``h = 0``."""
    ran = [cell for cell in cells if cell["rows"]]
    ends = [cell["rows"][-1]["ppl"] for cell in ran]
    at_equal = {cell["seed"]: cell["rows"][-1]["ppl"] for cell in equal if cell["rows"]}
    lost = [cell["rows"][-1]["ppl"] - at_equal[cell["seed"]] for cell in ran if cell["seed"] in at_equal]
    whole = len(ran) == len(cells)

    return Line(
        name,
        h,
        len(cells),
        _mean([cell["available"] for cell in cells]),
        _mean([cell["data_lost"] for cell in cells]),
        _mean(ends) if whole else math.nan,
        pstdev(ends) if ends and whole else math.nan,
        _mean(lost) if whole else math.nan,
        _mean([reached(cell["rows"], target, "virtual_time_s") for cell in cells]),
        _mean([reached(cell["rows"], target, "round") for cell in cells]),
        _mean([cell["rows"][-1]["tokens"] for cell in ran]),
        _mean([sum(row["bytes_up"] + row["bytes_down"] for row in cell["rows"]) / 1e6 for cell in ran]),
        _mean([cell["rows"][-1]["captured_importance"] for cell in ran]),
    )


def slowed(cell: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A single node's cell at a speed ``factor`` times lower: all that it does is computing."""
    rows = [{**row, "virtual_time_s": row["virtual_time_s"] * factor} for row in cell["rows"]]
    return {**cell, "variant": cell["variant"] + AT_THE_CLIENT, "rows": rows}


def write_results(
    to: Path, cells: protocol.Cells, scale: protocol.Scale, header: Mapping[str, Any], console: Console
) -> None:
    """Everything that follows from the finished cells."""
    done = cells.all()
    # The rate that each variant goes with, as far as it is known.
    rates = {name: protocol.chosen_lr(cells, scale, name) for name in protocol.VARIANTS}
    grid = [c for c in done if c["seed"] in scale.seeds and c["lr"] == rates[c["variant"]]]
    factor = protocol.SERVER_TFLOPS / protocol.MEAN["tflops"]
    grid += [slowed(c, factor) for c in grid if c["policy"] in SINGLE]
    if not grid:
        console.print("no cell of the grid has run yet")
        return
    target = target_of([c for c in grid if c["variant"] == "cenlora"], protocol.TARGET_PART)
    by: dict[tuple[str, float], list[Any]] = {}
    for cell in grid:
        by.setdefault((cell["variant"], cell["h"]), []).append(cell)
    lines = [line(name, h, own, by.get((name, 0.0), []), target) for (name, h), own in by.items()]
    policies = [one for one in lines if one.name.removesuffix(AT_THE_CLIENT) in protocol.POLICIES]
    policies.sort(key=lambda one: (one.h, one.target_s, one.ppl))
    of_policies = {
        (name, h): own for (name, h), own in by.items() if name.removesuffix(AT_THE_CLIENT) in protocol.POLICIES
    }
    devices = ", ".join(sorted({c["device"] for c in grid}))
    facts = {**header, "cells computed on": devices, "target perplexity": f"{target:.3f}"}
    facts |= {"rounds": scale.rounds, "local_steps": scale.local_steps}
    common.write_rows(to / "curves.csv", list(_curve_rows(grid)), facts)
    common.write_rows(to / "budgets.csv", _budget_rows(grid), facts)
    common.write_rows(to / "headline.csv", policies, facts)
    single = [c for c in grid if c["variant"] == "cenlora"]
    own_targets = {c["seed"]: target_of([c], protocol.TARGET_PART) for c in single}
    own_aim = "Times as long as hsplitlora, each seed to its own cenlora's perplexity"
    tables = {
        "Policies": policy_table(policies),
        # Ratios of times are geometric means, every seed's beside them.
        "The papers' claims": claims_table(of_policies, target),
        # Seeds draw other data, some of it harder.
        f"{own_aim} (geometric mean; every seed)": times_table(of_policies, own_targets),
    }
    ablations = [c for c in grid if c["variant"] in protocol.ABLATIONS and c["seed"] == scale.seeds[0]]
    if ablations:
        wholes = [c for c in grid if c["variant"] in (protocol.NOTHING_OFF, "hsplitlora")]
        held = ablation_rows(ablations, wholes, target)
        tables["Ablations"] = ablation_table(held)
        common.write_rows(to / "ablations.csv", held, facts)
    tables["Learning rates"] = rate_table(done, scale)
    for title, (columns, rows) in tables.items():
        common.show_table(console, columns, rows, title=title)
    body = [common.titled(title, content) for title, content in tables.items()]
    common.write_markdown(to / "convergence.md", facts, body)
    (to / "convergence.html").write_text(_page(grid, policies, tables, facts, target))
    with drawing_style():
        figure = _curves(grid, "virtual_time_s", "seconds (virtual)", target)
        common.save_figure(figure, to / "convergence.svg")
    console.print(f"written to {to}")


# -- tables ---------------------------------------------------------------------------------------------------------


def policy_table(lines: Sequence[Line]) -> Table:
    """A row a policy and ``h``, the fastest first."""
    columns = ["policy", "h", "seeds", "clients", "data lost", "perplexity", "± (seeds)", "lost against h 0"]
    columns += ["s to target (virtual)", "rounds to target", "tokens", "MB sent", "captured importance"]
    rows = [
        [
            one.name,
            f"{one.h:g}",
            str(one.seeds),
            f"{one.available:.1f}",
            f"{one.data_lost:.0%}",
            _figure(one.ppl, ".3f"),
            _figure(one.ppl_spread if one.seeds > 1 else math.nan, ".3f"),
            _figure(one.lost, "+.3f"),
            _time(one.target_s, one.ppl),
            _time(one.rounds, one.ppl),
            _figure(one.tokens, ",.0f"),
            _figure(one.sent_mb, ",.0f"),
            _figure(one.captured, ".2f"),
        ]
        for one in lines
    ]
    return columns, rows


def claims_table(by: Mapping[tuple[str, float], Sequence[Any]], target: float) -> Table:
    """The papers' ratios and losses, and ours beside them: each policy against ``hsplitlora`` on the seeds of both.

    Args:
        by: cells by policy and ``h``; a single node has those at ``h = 0`` alone, which stand for every ``h``.
        target: perplexity to reach.
    """
    levels = sorted({h for _, h in by})
    largest = f"at h {levels[-1]:g}"
    columns = ["policy", "seeds", *(f"times as long, h {h:g}" for h in levels), "papers, equal budgets"]
    columns += [f"above hsplitlora at the end, h {levels[0]:g}", largest, "papers", f"lost {largest}", "papers"]
    rows = []
    for name in dict.fromkeys(name for name, _ in by):
        everywhere = name.removesuffix(AT_THE_CLIENT) in SINGLE
        pairs = {
            h: _paired(by.get((name, 0.0 if everywhere else h), []), by.get(("hsplitlora", h), [])) for h in levels
        }
        ends = {
            h: [(one["rows"][-1]["ppl"], own["rows"][-1]["ppl"]) for one, own in pairs[h]]
            for h in (levels[0], levels[-1])
        }
        above = [_mean([one - own for one, own in ends[h]]) for h in ends]
        lost = _paired(by.get((name, levels[-1]), []), by.get((name, 0.0), []))
        papers_lost, papers_above = PAPERS_LOSSES.get(name, ("", ""))
        rows.append(
            [
                name,
                str(max(len(pair) for pair in pairs.values())),
                *(ratio_text(pairs[h], target) for h in levels),
                PAPERS_TIMES.get(name, ""),
                *(_figure(value, "+.3f") for value in above),
                papers_above,
                ""
                if everywhere
                else _figure(_mean([a["rows"][-1]["ppl"] - b["rows"][-1]["ppl"] for a, b in lost]), "+.3f"),
                papers_lost,
            ]
        )
    return columns, rows


def times_table(by: Mapping[tuple[str, float], Sequence[Any]], targets: Mapping[int, float]) -> Table:
    """Ratios of time to that of ``hsplitlora``, to a target of each seed's own.

    Args:
        by: as for :func:`claims_table`.
        targets: perplexity to reach, by seed.
    """
    levels = sorted({h for _, h in by})
    rows = []
    for name in dict.fromkeys(name for name, _ in by):
        everywhere = name.removesuffix(AT_THE_CLIENT) in SINGLE
        ratios = []
        for h in levels:
            pairs = _paired(by.get((name, 0.0 if everywhere else h), []), by.get(("hsplitlora", h), []))
            known = [pair for pair in pairs if pair[0]["seed"] in targets]
            ratios.append(ratio_text(known, targets))
        rows.append([name, *ratios])
    return ["policy", *(f"h {h:g}" for h in levels)], rows


def _paired(cells: Sequence[Any], others: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Those of one seed together, where both have run."""
    of_seed = {cell["seed"]: cell for cell in others if cell["rows"]}
    return [(cell, of_seed[cell["seed"]]) for cell in cells if cell["rows"] and cell["seed"] in of_seed]


def ratio_text(pairs: Sequence[tuple[Any, Any]], target: float | Mapping[int, float]) -> str:
    """Format the time of the first of each pair to the target over the second's: ``1.24 (1.52, 1.10, 1.15)``.

    Args:
        pairs: two cells of one seed each.
        target: perplexity to reach, or that of each seed.

    Returns:
        The geometric mean over seeds and, of several, every seed's own ratio; ``never`` for a seed whose first cell
        does not get there. Empty where the second does not.
    """
    ratios = []
    for one, own in pairs:
        aim = target if isinstance(target, float) else target[own["seed"]]
        theirs, ours = (reached(cell["rows"], aim, "virtual_time_s") for cell in (one, own))
        if math.isinf(ours):
            return ""
        ratios.append(theirs / ours)
    if not ratios:
        return ""
    mean = "not reached" if math.inf in ratios else f"{geometric_mean(ratios):.2f}"
    every = ", ".join("never" if math.isinf(ratio) else f"{ratio:.2f}" for ratio in ratios)
    return f"{mean} ({every})" if len(ratios) > 1 else mean


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


@dataclass(frozen=True)
class Ablation:
    """A variant against the whole method, on one seed and computed on the same device.

    Attributes:
        name, h, device: the variant, the coefficient of variation, and the computing device.
        ppl, against: at the end, and above the whole method's; NaN where that has not run on this device.
        target_s: virtual seconds to the target; infinite where it is not reached.
        sent_mb, captured: as of :class:`Line`.
    """

    name: str
    h: float
    device: str
    ppl: float
    against: float
    target_s: float
    sent_mb: float
    captured: float


def ablation_rows(
    ablations: Sequence[Mapping[str, Any]], wholes: Sequence[Mapping[str, Any]], target: float
) -> list[Ablation]:
    """One for each of ``ablations``, and before them ``wholes`` of the same levels, seeds and devices."""
    where = {(c["h"], c["seed"], c["device"]) for c in ablations}
    whole = {key: c for c in wholes if (key := (c["h"], c["seed"], c["device"])) in where}
    others = [c for c in ablations if c not in whole.values()]
    rows = []
    for cell in sorted([*whole.values(), *others], key=lambda c: c["h"]):
        if not cell["rows"]:
            continue
        one = line(cell["variant"], cell["h"], [cell], [], target)
        base = whole.get((cell["h"], cell["seed"], cell["device"]))
        against = math.nan if base is None else one.ppl - base["rows"][-1]["ppl"]
        rows.append(
            Ablation(one.name, one.h, cell["device"], one.ppl, against, one.target_s, one.sent_mb, one.captured)
        )
    return rows


def ablation_table(rows: Sequence[Ablation]) -> Table:
    """Variants against the whole method."""
    columns = ["variant", "h", "computed on", "perplexity", "against the whole", "s to target (virtual)", "MB sent"]
    table = [
        [
            one.name,
            f"{one.h:g}",
            one.device,
            f"{one.ppl:.3f}",
            _figure(one.against, "+.3f"),
            _time(one.target_s, one.ppl),
            f"{one.sent_mb:,.0f}",
            f"{one.captured:.2f}",
        ]
        for one in rows
    ]
    return [*columns, "captured importance"], table


def rate_table(done: Sequence[Mapping[str, Any]], scale: protocol.Scale) -> Table:
    """Perplexity at the end by learning rate, on the seed that is for tuning."""
    columns = ["policy", *(f"{factor:g} x usual" for factor in scale.factors), "usual rate"]
    tried = {(c["variant"], c["lr"]): c for c in done if c["seed"] == protocol.TUNING_SEED}
    rows = []
    for name in scale.policies:
        usual = protocol.usual_lr(name)
        found = [tried.get((name, factor * usual)) for factor in scale.factors]
        ends = ["" if c is None else f"{c['rows'][-1]['ppl']:.3f}" if c["rows"] else "nobody fits" for c in found]
        rows.append([name, *ends, f"{usual:g}"])
    return columns, rows


def _figure(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _time(value: float, ppl: float) -> str:
    if math.isnan(ppl):
        return "nobody fits"
    return "not reached" if math.isinf(value) else f"{value:.1f}"


# -- plots ----------------------------------------------------------------------------------------------------------


def _curve_rows(grid: Sequence[Mapping[str, Any]]) -> Any:
    for cell in grid:
        of = {key: cell[key] for key in ("variant", "h", "seed", "lr", "available")}
        yield from ({**of, **row} for row in cell["rows"])


def _budget_rows(grid: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every client's drawn budgets, once for each level and seed."""
    drawn = {(cell["h"], cell["seed"]): cell["budgets"] for cell in grid}
    return [
        {"h": h, "seed": seed, "client": index, **budget}
        for (h, seed), budgets in sorted(drawn.items())
        for index, budget in enumerate(budgets)
    ]


def _curves(grid: Sequence[Mapping[str, Any]], column: str, label: str, target: float) -> Figure:
    """Perplexity against ``column``, a panel for each ``h``; thin lines are seeds."""
    levels = sorted({cell["h"] for cell in grid})
    names = [n for n in protocol.POLICIES if any(c["variant"] == n for c in grid)]
    # Results independent of h are in every panel.
    everywhere = {*SINGLE, *(name + AT_THE_CLIENT for name in SINGLE)}
    if column == "virtual_time_s":
        names += [name for name in sorted(everywhere) if name.endswith(AT_THE_CLIENT)]
    figure = common.new_figure(3.1 * len(levels), 3.4)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for panel, h in zip(panels, levels, strict=True):
        for index, name in enumerate(names):
            own = [c for c in grid if c["variant"] == name and (c["h"] == h or name in everywhere) and c["rows"]]
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
        # Without cenlora there is none.
        if math.isfinite(target):
            panel.axhline(target, color=GRID, linewidth=1)
            panel.set(ylim=(0.9 * target, 1.7 * target))
    panels[0].set_ylabel("validation perplexity", color=INK)
    handles = {text: h for p in panels for h, text in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return figure


def _against_h(lines: Sequence[Line], attribute: str, label: str) -> Figure:
    figure = common.new_figure(5.2, 3.4)
    axes = figure.subplots()
    for name in dict.fromkeys(one.name for one in lines):
        own = sorted((one for one in lines if one.name == name), key=lambda one: one.h)
        points = [(one.h, getattr(one, attribute)) for one in own if math.isfinite(getattr(one, attribute))]
        if points and name.removesuffix(AT_THE_CLIENT) in SINGLE:
            axes.axhline(points[0][1], linestyle=":", label=f"{name} (any h)", color=GRID)
        elif points:
            axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="coefficient of variation h", ylabel=label)
    axes.legend(fontsize="small")
    return figure


def _page(
    grid: Sequence[Any],
    policies: Sequence[Line],
    tables: Mapping[str, Table],
    facts: Mapping[str, Any],
    target: float,
) -> str:
    seeds = len({cell["seed"] for cell in grid})
    plots = []
    with drawing_style():
        drawn = {
            "time": (_curves(grid, "virtual_time_s", "seconds (virtual)", target), "against virtual time"),
            "tokens": (_curves(grid, "tokens", "tokens", target), "against tokens trained on"),
            "rounds": (_curves(grid, "round", "rounds", target), "against rounds"),
        }
        for key, (figure, what) in drawn.items():
            caption = f"Validation perplexity {what}; every line is one seed, of up to {seeds}; grey: the target."
            drawing = Plot(inline_svg(figure, key, caption), caption, wide=True)
            plots.append(PageSection(f"Perplexity {what}", plots=[drawing]))
        for key, attribute, label in (
            ("end", "ppl", "perplexity at the end"),
            ("target", "target_s", "seconds to target (virtual)"),
        ):
            caption = f"{label.capitalize()} by heterogeneity, mean over seeds."
            svg = inline_svg(_against_h(policies, attribute, label), key, caption)
            plots.append(PageSection(label.capitalize(), plots=[Plot(svg, caption)]))
    shown = [PageSection(title, columns=columns, rows=rows) for title, (columns, rows) in tables.items()]
    setting = PageSection("Setting", facts=facts)
    subtitle = "Times are virtual: at the declared budgets. Perplexity is of everybody's held-out texts."
    return page("Convergence against budget heterogeneity", subtitle, [*plots, *shown, setting])
