"""What holders of unequal ranks learn under each way to aggregate their adapters (METHOD 6).

    hsplit bench ranks --data devset.csv        # or: python -m benchmarks.ranks; hours
    hsplit bench ranks --list                   # the runs that are left

SmolLM2-135M in this process: five clients hold all layers, at ranks 2, 4, 8, 16 and 32, so that every weight is
aggregated over unequal ranks; six rounds of ten steps, two examples of each client a step. The residual's cap is far
above the sum of the ranks; what it cuts all the same is in the table. Data are equal in kind (iid) or not (a Dirichlet
partition), with perplexity over all held-out texts, and that of the worst client.

Rules of policies, beside the exact sum of products (``concat``): factors averaged with zeros beyond a holder's rank;
factors averaged over the holders that have a direction (``fedavg``, which a policy allows at equal ranks alone);
HetLoRA, FlexLoRA, RaFLoRA. Added to ``concat``: other restarts; rates that grow with a layer's holders; Nesterov
momentum on the aggregate; the mean of the holders' moments of AdamW; a threshold of the residual's energy instead of
its cap, as in FLoRIST (arXiv 2506.09199). The last three are here alone. Finished runs stay in ``cells/``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from benchmarks import capacity, common
from benchmarks.common import Table
from benchmarks.pace import DATA
from hsplit.actors import server
from hsplit.config import RunConfig
from hsplit.lora.aggregation import (
    Aggregation,
    Aggregator,
    Contribution,
    Outcome,
    Restart,
    average_factors,
    mean_factors,
)
from hsplit.lora.holder import HeldAdapters, Holder
from hsplit.lora.low_rank import LowRankSum, spectral
from hsplit.lora.optimizer import FIRST, SECOND, moment_views
from hsplit.lora.residual import Residual
from hsplit.models.factors import LowRank
from hsplit.observe.observer import SilentDisplay
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.scheduler import Review, Scheduler
from hsplit.run.coordinator import Coordinator

RANKS = (2, 4, 8, 16, 32)
BATCH, STEPS, ROUNDS, SEEDS = 2, 10, 6, (0, 1, 2)
CAP = 256
VELOCITY_RANK = 64
"""Directions of a weight's velocity that are kept."""
POLICY = """
split: 30
ranks: 32
freeze: never
importance: {metric: equal}
replan: {tau: null, measured: false}
"""


# -- rules and additions that no policy has ---------------------------------------------------------------------------


def averaged(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """Average A and B, each direction over the holders that have it."""
    return Outcome(None, mean_factors(contributions))


AVERAGED = Aggregation(averaged, keeps_residual=False, truncates=True, decomposes=False)
PADDED = Aggregation(average_factors, keeps_residual=False, truncates=True, decomposes=False)


class Recording(Residual):
    """A residual that shows what joined it last."""

    joined: LowRankSum = LowRankSum((), ())

    def join(self, delta: LowRank | LowRankSum | None, beside: int = 0, allowed: float = 0.0) -> float:
        """Add as usual."""
        terms = LowRankSum((), ()) if delta is None else delta
        self.joined = terms if isinstance(terms, LowRankSum) else LowRankSum((terms,), (1.0,))
        return super().join(delta, beside, allowed)


class WithMomentum(Aggregator):
    """Nesterov momentum: ``v <- mu v + Delta`` of what rounds learn; the residual takes ``mu v`` beside ``Delta``."""

    mu = 0.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.residuals = {
            name: Recording(*own._shape, own.cap, own._dtype, own._sent_dtype) for name, own in self.residuals.items()
        }
        self._velocity: dict[str, LowRank] = {}

    def aggregate(self, held: Sequence[HeldAdapters], *others: Any, **named: Any) -> float:
        """Aggregate, and go on in the direction of earlier rounds."""
        before = dict(self._common)
        cut = super().aggregate(held, *others, **named)
        for name, residual in self.residuals.items():
            assert isinstance(residual, Recording)
            terms = list(zip(residual.joined.terms, residual.joined.weights, strict=True))
            terms += [(self._common[name], 1.0)] if name in self._common else []
            terms += [(before[name], -1.0)] if name in before else []
            terms += [(self._velocity[name], self.mu)] if name in self._velocity else []
            if terms:
                parts = spectral(LowRankSum(tuple(term for term, _ in terms), tuple(weight for _, weight in terms)))
                velocity = parts.part(0, min(VELOCITY_RANK, max(parts.rank, 1)), torch.float32)
                self._velocity[name] = velocity
                cut = max(cut, residual.add(LowRankSum((velocity,), (self.mu,))))
        return cut


class WithThreshold(Aggregator):
    """Keeps the residual's leading directions, as many as hold a part of its energy, instead of a fixed number."""

    energy = 1.0

    def aggregate(self, held: Sequence[HeldAdapters], *others: Any, **named: Any) -> float:
        """Aggregate, and cut what is beyond the threshold."""
        cut = super().aggregate(held, *others, **named)
        for residual in self.residuals.values():
            if residual.rank:
                parts = spectral(LowRankSum((residual.factors,), (1.0,)))
                shares = parts.S.square().cumsum(0) / parts.S.square().sum()
                kept = max(1, int((shares < self.energy).sum()) + 1)
                cut = max(cut, parts.norm_beyond(kept) / float(parts.S.norm()))
                # Holders have none of these factors.
                residual.restore(parts.part(0, kept, residual.factors.A.dtype), None)
                residual._sent = 0
        return cut


def average_moments(holders: Iterable[Holder]) -> None:
    """Give all holders of a direction the mean of their moments of AdamW."""
    every = list(holders)
    views = [view for holder in every if (view := moment_views(holder._optimizer)) is not None]
    if len(views) < len(every):
        return
    for name in every[0].adapters.names:
        for side in (0, 1):
            for key in (FIRST, SECOND):
                found = [view(key, own.adapters.spans(name)[side]) for view, own in zip(views, every, strict=True)]
                moments = [moment.T if side else moment for moment in found]
                mean = moments[0].new_zeros(max(map(len, moments)), moments[0].shape[1])
                having = mean.new_zeros(len(mean), 1)
                for moment in moments:
                    mean[: len(moment)] += moment
                    having[: len(moment)] += 1
                for moment in moments:
                    moment.copy_((mean / having)[: len(moment)])


@dataclass(frozen=True)
class Way:
    """One way to aggregate.

    Attributes:
        policy: keys of a policy.
        aggregator: in place of the usual one.
        moments: whether holders average their moments.
    """

    policy: tuple[str, ...] = ()
    aggregator: type[Aggregator] = Aggregator
    moments: bool = False


def momentum(mu: float) -> type[Aggregator]:
    """The aggregator with momentum ``mu``."""
    return type("Momentum", (WithMomentum,), {"mu": mu})


def threshold(energy: float) -> type[Aggregator]:
    """The aggregator that keeps ``energy`` of the residual."""
    return type("Threshold", (WithThreshold,), {"energy": energy})


USUAL = "concat"
WAYS = {
    USUAL: Way(),
    "averaged, zeros": Way(("aggregation=benchmarks.ranks:PADDED",)),
    "averaged (fedavg)": Way(("aggregation=benchmarks.ranks:AVERAGED",)),
    "momentum 0.5": Way(aggregator=momentum(0.5)),
    "rates by holders": Way(("lr_scaling=sqrt",)),
    "moments averaged": Way(moments=True),
    "energy 0.99": Way(aggregator=threshold(0.99)),
    "hetlora": Way(("aggregation=hetlora",)),
    "flexlora": Way(("aggregation=flexlora", "moments=fit")),
    "raflora": Way(("aggregation=raflora", "moments=fit")),
    "concat, random restart": Way(("reinit=random", "moments=drop")),
    "concat, svd restart": Way(("reinit=svd", "moments=fit")),
    "momentum 0.9": Way(aggregator=momentum(0.9)),
    "energy 0.9": Way(aggregator=threshold(0.9)),
}


# -- runs -------------------------------------------------------------------------------------------------------------


class UnequalRanks(Scheduler):
    """Plans in which the clients' ranks are :data:`RANKS`, in turn."""

    def first(self, fleet: Fleet, state: PlanningState) -> Review:
        """Make the first plan; there is no other."""
        review = super().first(fleet, state)
        clients = tuple(
            replace(part, ranks=dict.fromkeys(part.ranks, RANKS[index % len(RANKS)]))
            for index, part in enumerate(review.made.clients)
        )
        return replace(review, plan=replace(review.made, clients=clients))


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        way: its name in :data:`WAYS`.
        data: its name in :data:`DATA`.
        seed: of data and adapters.
    """

    way: str
    data: str
    seed: int

    @property
    def key(self) -> str:
        """Of its file."""
        return f"{self.way}-{self.data}-s{self.seed}".replace(" ", "_").translate({ord(sign): None for sign in ",()"})


def cells() -> list[Cell]:
    """All runs, way by way."""
    return [Cell(way, data, seed) for way in WAYS for seed in SEEDS for data in DATA]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left, and make the table."""
    about = "What holders of unequal ranks learn under each way to aggregate their adapters."
    parser = common.flags_of("ranks", about)
    parser.add_argument("--data", default="restaurants", help="as job.data.source")
    parser.add_argument("--model", help="as job.model")
    common.cell_flags(parser)
    options = parser.parse_args(arguments)
    console, header = Console(width=140), common.header_of("ranks", arguments, "torch", "transformers")
    every = common.finished_cells(
        cells(),
        options,
        console,
        header,
        run=lambda cell: run_cell(cell, options),
        outcome=common.said,
    )
    if not every:
        return
    table = ways(every)
    title = f"Perplexity after {ROUNDS} rounds of {STEPS} steps at ranks {', '.join(map(str, RANKS))}: mean and range"
    common.show_table(console, *table, title=title)
    common.write_markdown(options.to / "ranks.md", header, [common.titled(title, table)])


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the perplexity of what was learned: everybody's, and each client's."""
    way = WAYS[cell.way]
    # Rules are names in a policy; what has a state of its own is no rule.
    with tempfile.TemporaryDirectory() as name, mock.patch.object(server, "Aggregator", way.aggregator):
        run = configured(Path(name), cell, options)
        source, inputs = common.read(run)
        scheduler = UnequalRanks(run, source.spec)
        with common.in_process(run, source.directory, inputs, SilentDisplay(), scheduler=scheduler) as made:
            coordinator, directory = made
            if way.moments:
                _average_moments_after_rounds(coordinator)
            wall_s = common.seconds_of(coordinator.run)
            rows = [asdict(row) for row in coordinator.rows]
            losses = common.learned_losses(run, source.directory, coordinator, directory)
    return {
        **asdict(cell),
        **common.perplexities(losses),
        "cut": coordinator.state.residual_cut,
        "rows": rows,
        "wall_s": wall_s,
    }


def configured(folder: Path, cell: Cell, options: argparse.Namespace) -> RunConfig:
    """The configuration of one run: every client holds all layers."""
    overrides = [
        *(f"job.data.source={options.data}", f"job.seed={cell.seed}", f"job.batch_size={BATCH}"),
        *(f"job.rounds={ROUNDS}", f"job.local_steps={STEPS}", f"job.validation.every={ROUNDS}"),
        *("job.base=bf16", "job.dtype=bf16", "job.keep_checkpoints=1", f"job.residual.max_rank={CAP}"),
        *(*DATA[cell.data], *(f"policy.{key}" for key in WAYS[cell.way].policy)),
        *([f"job.model={options.model}"] if options.model else []),
    ]
    return common.configured(folder, capacity.CLUSTER % len(RANKS), POLICY, overrides)


def _average_moments_after_rounds(coordinator: Coordinator) -> None:
    aggregate = coordinator.aggregate
    actors = coordinator._executor.actors  # type: ignore[attr-defined]  # in-process by construction

    def followed() -> None:
        aggregate()
        average_moments(actors[name].holder for name in coordinator.context.clients)

    coordinator.aggregate = followed  # type: ignore[method-assign]


def ways(found: Sequence[Mapping[str, Any]]) -> Table:
    """Columns and cells: each way's perplexity, and the difference to ``concat`` with the same seed."""
    columns = ["data", "way", "perplexity", f"against {USUAL}", "worst client", f"against {USUAL}", "cut", "seeds"]
    by = {(one["data"], one["way"], one["seed"]): one for one in found}
    rows = []
    for data in DATA:
        for way in WAYS:
            usual = {seed: by[data, USUAL, seed] for seed in SEEDS if (data, USUAL, seed) in by}
            pairs = [(by[data, way, seed], usual[seed]) for seed in usual if (data, way, seed) in by]
            if not pairs:
                continue
            cut = max(one["cut"] for one, _ in pairs)
            shown = f"{cut:.1%}" if cut else "none"
            rows.append([data, way, *common.against(pairs), shown, str(len(pairs))])
    return columns, rows


if __name__ == "__main__":
    main()
