"""Laws E3 and E4 with holders of unequal ranks: what a small rank has no room for stays frozen beside its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.config import Job, Policy
from hsplit.lora.aggregation import Aggregator
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.lora.learned import LearnedTerm, learned, learned_parts
from hsplit.lora.low_rank import concatenate, empty
from hsplit.models.factors import LowRank
from hsplit.models.spec import LinearShape

D_OUT, D_IN = 96, 80
WEIGHT = LinearShape("layers.0.q", 0, D_OUT, D_IN)
# 0 of a client that only computes forward.
RANK = st.sampled_from([0, 1, 2, 4, 8, 16])
laws = settings(max_examples=60, deadline=None)


@dataclass
class Follower:
    """A holder of one weight that does with an update what holders do, and nothing else."""

    name: str
    rank: int
    tokens: int
    beside: LowRank = field(default_factory=lambda: empty(D_OUT, D_IN))
    live: LowRank = field(default_factory=lambda: empty(D_OUT, D_IN))

    def take(self, update: RoundUpdate, draw: torch.Generator) -> None:
        change = update.residuals.get(WEIGHT.name)
        if change is not None:
            assert change.factors is not None
            self.beside = concatenate([self.beside.up_to_rank(change.start_rank), change.factors])
        start = update.common.get(WEIGHT.name, empty(D_OUT, D_IN))
        assert start.rank <= self.rank
        fresh = LowRank(
            torch.zeros(D_OUT, self.rank - start.rank), torch.randn(self.rank - start.rank, D_IN, generator=draw)
        )
        self.live = concatenate([start, fresh])

    def learn(self, draw: torch.Generator) -> torch.Tensor:
        """Train; what it learned, in fp64."""
        before = self.live.to(torch.float64).dense()
        B = self.live.B + 1e-2 * torch.randn(self.live.B.shape, generator=draw)
        A = self.live.A + 1e-2 * torch.randn(self.live.A.shape, generator=draw)
        self.live = LowRank(B, A)
        return self.live.to(torch.float64).dense() - before

    @property
    def weight(self) -> torch.Tensor:
        """The weight with which it computes, without the base."""
        return self.beside.to(torch.float64).dense() + self.live.to(torch.float64).dense()

    def collect(self) -> HeldAdapters:
        terms = {WEIGHT.name: self.live} if self.rank else {}
        return HeldAdapters(self.name, terms, {0: self.tokens}, {WEIGHT.name: 0})


def _learned(aggregator: Aggregator) -> torch.Tensor:
    term = learned(aggregator.state()).get(WEIGHT.name)
    return torch.zeros(D_OUT, D_IN, dtype=torch.float64) if term is None else term.to(torch.float64).dense()


@laws
@given(
    ranks=st.lists(RANK, min_size=1, max_size=5),
    tokens=st.lists(st.integers(0, 300), min_size=5, max_size=5),
    later=st.lists(RANK, min_size=5, max_size=5),
    resumed=st.booleans(),
    merges=st.booleans(),
    reinit=st.sampled_from(["svd", "mean"]),
    max_rank=st.sampled_from([40, 128]),
    wait=st.sampled_from([0.0, 0.02, 0.5]),
    seed=st.integers(0, 2**16),
)
def test_everybody_computes_with_the_exact_sum_but_for_what_waits(
    ranks: list[int],
    tokens: list[int],
    later: list[int],
    resumed: bool,
    merges: bool,
    reinit: str,
    max_rank: int,
    wait: float,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    job = Job.model_validate({"dtype": "fp32", "residual": {"max_rank": max_rank}})

    def made() -> Aggregator:
        policy = Policy.model_validate({"reinit": reinit, "pace": {"residual_wait": wait}})
        return Aggregator([WEIGHT], job, policy, torch.float32, merges=merges)

    aggregator = made()
    followers = [Follower(f"c{i}", rank, tokens[i]) for i, rank in enumerate(ranks)]
    for follower in followers:
        follower.take(RoundUpdate(0, {}, {}), draw)
    cap = aggregator.residuals[WEIGHT.name].cap
    for round_ in range(1, 5):
        before = _learned(aggregator)
        total = sum(f.tokens for f in followers if f.rank)
        delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        for follower in followers:
            learned = follower.learn(draw) if follower.tokens and follower.rank else 0.0
            delta += follower.tokens / max(total, 1) * learned
        frozen = {f.name: {WEIGHT.name: 0} for f in followers if not f.rank}
        cut = aggregator.aggregate([f.collect() for f in followers], frozen, last=round_ == 4)
        after = _learned(aggregator)
        residual = after if cut == 0 else after - _common(aggregator)
        allowed = 1e-5 * delta.norm() + cut * 1.001 * residual.norm() / max(1e-12, 1 - cut**2) ** 0.5
        assert (after - before - delta).norm() <= allowed
        assert aggregator.lag <= (0.0 if round_ == 4 else wait)
        whole = ()
        if resumed and round_ == 2:
            state, aggregator = aggregator.state(), made()
            aggregator.load_state(state)
            whole = (WEIGHT.name,)
        send(aggregator, followers, round_, draw, whole)
        for follower in followers:
            # What plans reserve for.
            assert cap is not None and follower.beside.rank <= cap
        if round_ == 3:
            # Another plan: other ranks, and nothing changes but who trains how much of it.
            weights = [follower.weight for follower in followers]
            for follower, rank in zip(followers, later, strict=False):
                follower.rank = rank
            cut, _ = aggregator.fit_restarts({f.name: {WEIGHT.name: f.rank} for f in followers})
            send(aggregator, followers, round_, draw)
            for follower, weight in zip(followers, weights, strict=True):
                assert cut > 0 or (follower.weight - weight).norm() <= 1e-5 * weight.norm()


def send(
    aggregator: Aggregator, followers: list[Follower], round_: int, draw: torch.Generator, whole: tuple[str, ...] = ()
) -> None:
    """Begin a round: everybody has the same weight, the exact sum less what waits."""
    updates = [aggregator.update_for(round_, {WEIGHT.name: f.rank}, whole) for f in followers]
    aggregator.mark_sent()
    expected, lag = _learned(aggregator), aggregator.residuals[WEIGHT.name].lag
    for follower, update in zip(followers, updates, strict=True):
        follower.take(update, draw)
        assert (follower.weight - expected).norm() <= 1e-6 * expected.norm() + lag
        assert (follower.weight - followers[0].weight).norm() <= 1e-6 * expected.norm()


def _common(aggregator: Aggregator) -> torch.Tensor:
    common = learned_parts(aggregator.state()).get(WEIGHT.name, LearnedTerm()).common
    return torch.zeros(D_OUT, D_IN, dtype=torch.float64) if common is None else common.to(torch.float64).dense()


def test_a_small_rank_costs_the_others_nothing() -> None:
    """Directions that only the largest rank trains continue there, instead of starting fresh."""
    draw = torch.Generator().manual_seed(0)
    aggregator = Aggregator([WEIGHT], Job(), Policy(reinit="svd"), torch.float32, merges=False)
    followers = [Follower("small", 1, 10), Follower("large", 8, 10)]
    for follower in followers:
        follower.take(RoundUpdate(0, {}, {}), draw)
        follower.learn(draw)
    aggregator.aggregate([f.collect() for f in followers])
    update = aggregator.update_for(1, {WEIGHT.name: 8})
    assert update.common[WEIGHT.name].rank == 8
    # Of 9 directions one has joined the residual.
    assert aggregator.residuals[WEIGHT.name].rank == 1


@pytest.mark.parametrize("ranks", [(16, 16), (4,)])
def test_equal_ranks_freeze_nothing(ranks: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    aggregator = Aggregator([WEIGHT], Job(), Policy(reinit="svd"), torch.float32, merges=False)
    followers = [Follower(f"c{i}", rank, 10) for i, rank in enumerate(ranks)]
    for follower in followers:
        follower.take(RoundUpdate(0, {}, {}), draw)
        follower.learn(draw)
    aggregator.aggregate([f.collect() for f in followers])
    for follower in followers:
        follower.take(aggregator.update_for(1, {WEIGHT.name: follower.rank}), draw)
        assert follower.beside.rank == aggregator.residuals[WEIGHT.name].rank
