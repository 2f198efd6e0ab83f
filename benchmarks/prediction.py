"""Which importance metric predicts what ranks are worth (METHOD 3): rank correlation over random allocations.

    hsplit bench prediction --data devset.csv train.jsonl     # or: python -m benchmarks.prediction; hours
    hsplit bench prediction --list                            # the runs that are left

Centralized LoRA (``cenlora``) on SmolLM2-135M in this process, a step of ten examples. For each of 24 allocations every
weight gets a rank out of 1 to 32, drawn so that kinds of weights and parts of the model differ widely and all take the
bytes of rank 8 everywhere. What an allocation is worth is how far the validation loss falls. Each metric predicts that
from one probe of the untrained model, as the plan's ``learning``: ``rngwp``, ``spectral``, ``equal`` (by parameters)
and ``alike`` (every weight the same). A metric predicts if allocations that it ranks higher lower the loss more:
Spearman's correlation, for each data set and seed.

The same allocations are trained with every seed, so that seeds also say how far the outcome itself can be predicted: by
the correlation of one seed's falls with another's.

Data are as for ``hsplit bench capacity``. Finished runs stay in ``cells/``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import common
from benchmarks.capacity import BATCH, CLIENTS, CLUSTER, as_read
from benchmarks.common import Table
from hsplit.config import RunConfig
from hsplit.models.spec import LinearShape, ModelSpec
from hsplit.observe.observer import SilentDisplay
from hsplit.planning.importance import Score, equal_importance, scores
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.ranks import at_levels, captured_by, gain_table, greedy_levels
from hsplit.planning.scheduler import Review, Scheduler

ALLOCATIONS, SEEDS = 24, (0, 1)
RANKS = np.array((1, 2, 4, 8, 16, 32))
MEAN_RANK = 8
STEPS, ROUNDS = 10, 4
TOKENS = 512
"""Supervised tokens of each client's texts that are probed."""
PROBED = ("rngwp", "spectral")
METRICS = (*PROBED, "equal", "alike")
PROBE = -1
"""Allocation of the run that trains nothing and probes."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: name of the data set.
        seed: of data and adapters.
        allocation: number of the allocation of ranks, or :data:`PROBE`.
    """

    data: str
    seed: int
    allocation: int

    @property
    def key(self) -> str:
        """Of its file."""
        return f"{self.data}-s{self.seed}-" + ("probe" if self.allocation == PROBE else f"a{self.allocation}")


class DrawnRanks(Scheduler):
    """Plans in which a single node has given ranks.

    Args:
        run, spec: as for a scheduler.
        ranks: by weight name.
    """

    def __init__(self, run: RunConfig, spec: ModelSpec, ranks: Mapping[str, int]) -> None:
        super().__init__(run, spec)
        self._ranks = dict(ranks)

    def first(self, fleet: Fleet, state: PlanningState) -> Review:
        """Make the first plan; there is no other."""
        review = super().first(fleet, state)
        clients = tuple(replace(part, ranks=self._ranks) for part in review.made.clients)
        return replace(review, plan=replace(review.made, clients=clients))


def cells(data: Sequence[str]) -> list[Cell]:
    """All runs, the probes first."""
    return [Cell(name, seed, a) for a in range(PROBE, ALLOCATIONS) for seed in SEEDS for name in data]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left, and make the tables."""
    parser = common.flags_of("prediction", __doc__)
    parser.add_argument("--data", nargs="+", default=["restaurants"], help="files, built-in texts, or 'tasks'")
    parser.add_argument("--model", help="as job.model")
    common.cell_flags(parser)
    options = parser.parse_args(arguments)
    console, header = Console(width=140), common.header_of("prediction", arguments, "torch", "transformers")
    sources = {Path(source).stem: source for source in options.data}
    every = common.finished_cells(
        cells(list(sources)),
        options,
        console,
        header,
        run=lambda cell: run_cell(cell, sources[cell.data], options.model),
        outcome=lambda found: f"loss fell by {found['fall']:.4f}" if "fall" in found else "probed",
    )
    if not every:
        return
    table = correlated(every)
    title = f"Spearman's correlation of predicted learning with the fall of loss in {ROUNDS * STEPS} steps"
    common.show_table(console, *table, title=title)
    common.write_markdown(options.to / "prediction.md", header, [common.titled(title, table)])


# -- runs -------------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, source: str, model: str | None = None) -> dict[str, Any]:
    """Train with the allocation's ranks, or probe."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        read = as_read(source, folder, cell.seed)
        if cell.allocation == PROBE:
            begun = [_probed(folder, cell, read, model, metric) for metric in PROBED]
            weights = begun[0][1]
            found = {metric: own for metric, (own, _, _) in zip(PROBED, begun, strict=True)}
            return {**asdict(cell), **found, "weights": weights, "wall_s": sum(one[2] for one in begun)}
        run = configured(folder, cell, read, model)
        known, inputs = common.read(run)
        ranks = allocation_of(cell.allocation, known.spec.targeted(run.job.targets))
        scheduler = DrawnRanks(run, known.spec, ranks)
        with common.in_process(run, known.directory, inputs, SilentDisplay(), scheduler=scheduler) as (coordinator, _):
            wall_s = common.seconds_of(coordinator.run)
            curve = [(row.tokens, float(row.val_loss or 0.0)) for row in coordinator.rows]
        return {**asdict(cell), "ranks": ranks, "curve": curve, "fall": curve[0][1] - curve[-1][1], "wall_s": wall_s}


def _probed(
    folder: Path, cell: Cell, source: str, model: str | None, metric: str
) -> tuple[dict[str, Score], list[dict[str, Any]], float]:
    """Probe the untrained model: scores by weight name, the weights' shapes, and seconds."""
    untrained = ["job.rounds=1", "job.local_steps=1", "job.lr=1e-12", f"policy.importance.metric={metric}"]
    run = configured(folder, cell, source, model, untrained)
    known, inputs = common.read(run)
    with common.in_process(run, known.directory, inputs, SilentDisplay()) as (coordinator, _):
        wall_s = common.seconds_of(coordinator.run)
        (node,) = (part.name for part in coordinator.context.plan.available)
        reports = coordinator._executor.actors[node].probe(1, TOKENS)  # type: ignore[attr-defined]
    shapes = known.spec.targeted(run.job.targets)
    return scores(reports, shapes, metric), [asdict(shape) for shape in shapes], wall_s


def configured(folder: Path, cell: Cell, source: str, model: str | None, changes: Sequence[str] = ()) -> RunConfig:
    """The configuration of one run: a single node that reserves memory for the largest ranks."""
    overrides = [
        *(f"job.data.source={source}", f"job.seed={cell.seed}", f"job.batch_size={BATCH}"),
        *(f"job.rounds={ROUNDS}", f"job.local_steps={STEPS}", "job.base=bf16", "job.dtype=bf16"),
        *("job.keep_checkpoints=1", f"policy.ranks={RANKS[-1]}", f"job.rank_set={RANKS.tolist()}"),
        *([f"job.model={model}"] if model else []),
        *changes,
    ]
    return common.configured(folder, CLUSTER % CLIENTS, "cenlora", overrides)


def allocation_of(number: int, shapes: Sequence[LinearShape]) -> dict[str, int]:
    """Draw a rank for each weight; all allocations take about the bytes of :data:`MEAN_RANK` everywhere.

    Args:
        number: of the allocation.
        shapes: the weights.
    """
    draw = np.random.default_rng(number)
    kinds = sorted({shape.name.rpartition(".")[2] for shape in shapes})
    layers = 1 + max(shape.layer for shape in shapes)
    by_kind = dict(zip(kinds, draw.normal(0, 1.5, len(kinds)), strict=True))
    by_third = draw.normal(0, 1.5, 3)
    worth = np.exp(
        [by_kind[s.name.rpartition(".")[2]] + by_third[3 * s.layer // layers] + draw.normal(0, 0.5) for s in shapes]
    )
    unit = np.array([float(s.d_in + s.d_out) for s in shapes])
    # Worth is a gain per byte here, so that large weights have no less of a chance.
    values = (worth * unit)[:, None] * captured_by(RANKS)
    slack = np.array([(MEAN_RANK - RANKS[0]) * unit.sum()])
    levels = greedy_levels(slack, np.ones((1, len(shapes)), dtype=bool), unit, values, RANKS)[0]
    return {shape.name: int(RANKS[level]) for shape, level in zip(shapes, levels, strict=True)}


# -- what they show ---------------------------------------------------------------------------------------------------


def predicted(metric: str, probe: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    """Compute the ``learning`` of an allocation by a metric, from the probe of its data and seed."""
    shapes = [LinearShape(**shape) for shape in probe["weights"]]
    names = [shape.name for shape in shapes]
    if metric == "alike":
        importance: Mapping[str, Score] = dict.fromkeys(names, 1.0)
    elif metric == "equal":
        importance = equal_importance(shapes)
    else:
        importance = {name: tuple(own) if isinstance(own, list) else own for name, own in probe[metric].items()}
    values = gain_table(importance, names, RANKS)
    levels = np.searchsorted(RANKS, [ranks[name] for name in names])
    return float(at_levels(values, levels).sum())


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Compute Spearman's rank correlation of values without ties."""
    places = [np.argsort(np.argsort(values)).astype(np.float64) for values in (first, second)]
    own, other = (values - values.mean() for values in places)
    return float(own @ other / (own @ own))


def correlated(found: Sequence[Mapping[str, Any]]) -> Table:
    """Columns and cells: every data set and seed, each metric's correlation, and the means."""
    columns = ["data", "seed", "runs", "fall of loss", *METRICS, "other seed's fall"]
    probes = {(one["data"], one["seed"]): one for one in found if one["allocation"] == PROBE}
    falls: dict[tuple[str, int], dict[int, float]] = {}
    rows, every = [], dict[str, list[float]]()
    for key, probe in probes.items():
        own = [one for one in found if (one["data"], one["seed"]) == key and one["allocation"] != PROBE]
        falls[key] = {one["allocation"]: one["fall"] for one in own}
        if len(own) < 3:
            continue
        fell = [one["fall"] for one in own]
        by_metric = [correlation([predicted(metric, probe, one["ranks"]) for one in own], fell) for metric in METRICS]
        for metric, value in zip(METRICS, by_metric, strict=True):
            every.setdefault(metric, []).append(value)
        spread = f"{statistics.fmean(fell):.4f} ({min(fell):.4f} to {max(fell):.4f})"
        rows.append([key[0], str(key[1]), str(len(own)), spread, *(f"{value:+.2f}" for value in by_metric), ""])
    for row in rows:
        others = [
            correlation([one[a] for a in both], [other[a] for a in both])
            for (first, one), (second, other) in combinations(falls.items(), 2)
            if first[0] == second[0] == row[0] and len(both := sorted(one.keys() & other.keys())) > 2
        ]
        row[-1] = f"{statistics.fmean(others):+.2f}" if others else "–"
    if rows:
        rows.append(["mean", "", "", "", *(f"{statistics.fmean(every[metric]):+.2f}" for metric in METRICS), ""])
    return columns, rows


if __name__ == "__main__":
    main()
