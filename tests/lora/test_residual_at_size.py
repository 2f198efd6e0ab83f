"""Aggregation of many holders: its memory, and what the cap cuts over many rounds (METHOD section 6)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hsplit.actors.profiling import _blocks
from hsplit.lora.aggregation import Contribution, Outcome, Restart, noise_free
from hsplit.lora.residual import Residual
from hsplit.models.factors import LowRank


def _allocations(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """Run ``work``; returns its result, the most bytes allocated at once, and the largest single allocation."""
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = work()
    live: dict[int, int] = {}
    held = peak = largest = 0
    for address, size in _blocks(profiler):
        held -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            held, largest = held + size, max(largest, size)
            peak = max(peak, held)
    return result, peak, largest


def _contributions(
    side: int, ranks: list[int], common: LowRank | None, draw: torch.Generator, step: float = 1e-2
) -> list[Contribution]:
    made = []
    for rank in ranks:
        B, A = torch.zeros(side, rank), torch.randn(rank, side, generator=draw).mul_(side**-0.5)
        if common is not None:
            shared = min(rank, common.rank)
            B[:, :shared], A[:shared] = common.B[:, :shared], common.A[:shared]
        B.add_(torch.randn(side, rank, generator=draw), alpha=step)
        made.append(Contribution(LowRank(B, A), 1 / len(ranks)))
    return made


@pytest.mark.parametrize("reinit", ["random", "svd"])
@pytest.mark.parametrize(
    ("side", "holders", "largest_rank", "rounds"),
    [(1024, 40, 16, 3), (256, 40, 16, 2), pytest.param(4096, 100, 32, 3, marks=pytest.mark.drill)],
)
def test_no_dense_matrix_and_at_most_four_times_the_factors(
    side: int, holders: int, largest_rank: int, rounds: int, reinit: str
) -> None:
    chance, draw = random.Random(0), torch.Generator().manual_seed(0)
    ranks = [chance.randint(1, largest_rank) for _ in range(holders)]
    restart = Restart(reinit, tuple(ranks))
    residual, common = Residual(side, side, 128), None

    def aggregate(given: list[Contribution]) -> tuple[Outcome, float]:
        made = noise_free(given, restart)
        return made, 0.0 if made.residual is None else residual.add(made.residual)

    for _ in range(rounds):
        given = _contributions(side, ranks, common, draw)
        factors = sum(c.term.nbytes for c in given) + residual.nbytes
        (outcome, cut), peak, largest = _allocations(lambda given=given: aggregate(given))  # type: ignore[misc]
        assert peak <= 4 * factors
        # In the small matrices the holders have nearly as many directions as there are, or more: as many in fp64 may
        # take what an fp64 matrix takes.
        assert largest < 4 * side * side if side >= 1024 else largest <= 8 * side * side
        assert residual.rank == 128 and 0 < cut < 1
        common = outcome.common
        assert (common is None) == (reinit == "random")


@pytest.mark.parametrize("reinit", ["random", "svd"])
@pytest.mark.parametrize(("side", "cap"), [(96, 48), (64, 16)])
def test_recorded_cuts_account_for_what_is_missing(side: int, cap: int, reinit: str) -> None:
    # 12 holders of up to 8 directions: in the smaller matrix more than it has dimensions.
    chance, draw = random.Random(1), torch.Generator().manual_seed(1)
    residual, common = Residual(side, side, cap), None
    exact, lost = torch.zeros(side, side, dtype=torch.float64), 0.0
    for _ in range(30):
        ranks = [chance.choice([1, 2, 4, 8]) for _ in range(12)]
        given = _contributions(side, ranks, common, draw)
        term = sum(c.share * c.term.to(torch.float64).dense() for c in given)
        started = 0 if common is None else common.to(torch.float64).dense()
        before = residual.factors.to(torch.float64).dense()
        # A holder whose rank is smaller than the common restart cannot occur: it has the smallest rank.
        outcome = noise_free(given, Restart(reinit, (1,)))
        cut = 0.0 if outcome.residual is None else residual.add(outcome.residual)
        common = outcome.common
        restarted = 0 if common is None else common.to(torch.float64).dense()
        joined = before + term - restarted
        missing = joined - residual.factors.to(torch.float64).dense()
        assert abs(float(missing.norm()) - cut * float(joined.norm())) <= 1e-5 * float(term.norm())
        lost += cut * float(joined.norm())
        exact += term - started
        held = residual.factors.to(torch.float64).dense() + restarted
        assert (exact - held).norm() <= lost + 1e-5 * exact.norm()
    assert lost > 0


@pytest.mark.parametrize("reinit", ["random", "svd"])
def test_nothing_is_cut_from_a_sum_that_fits(reinit: str) -> None:
    """Twelve holders in one four-dimensional subspace: their ranks add up past the cap, their sum's rank does not."""
    side, cap = 64, 16
    draw = torch.Generator().manual_seed(2)
    span = torch.randn(4, side, generator=draw)
    residual = Residual(side, side, cap)
    exact = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(5):
        given = [
            Contribution(
                LowRank(torch.randn(side, 4, generator=draw), torch.randn(4, 4, generator=draw) @ span), 1 / 12
            )
            for _ in range(12)
        ]
        exact += sum(c.share * c.term.to(torch.float64).dense() for c in given)
        outcome = noise_free(given, Restart(reinit, (1, 2)))
        assert outcome.residual is not None
        assert residual.add(outcome.residual) < 1e-6
        restarted = 0 if outcome.common is None else outcome.common.to(torch.float64).dense()
        assert (residual.factors.to(torch.float64).dense() + restarted - exact).norm() <= 1e-6 * exact.norm()
        exact -= restarted


def test_directions_that_are_only_rounding_errors_are_no_cut() -> None:
    draw = torch.Generator().manual_seed(5)
    term = LowRank(torch.randn(96, 12, generator=draw), torch.randn(12, 96, generator=draw))
    residual = Residual(96, 96, 16)
    assert residual.add(term) == 0.0
    # Twice as many directions as before by count, past the cap, and the very same ones.
    assert residual.add(LowRank(term.B * 0.5, term.A)) == 0.0
    assert residual.rank == 12
    assert residual.add(LowRank(torch.randn(96, 12, generator=draw), torch.randn(12, 96, generator=draw))) > 0.01


@pytest.mark.parametrize("reinit", ["random", "svd"])
def test_without_a_cap_the_residual_becomes_a_matrix_and_stays_exact(reinit: str) -> None:
    side, draw = 48, torch.Generator().manual_seed(3)
    residual, common = Residual(side, side, None), None
    exact = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(6):
        given = _contributions(side, [2, 4, 8], common, draw)
        exact += sum(c.share * c.term.to(torch.float64).dense() for c in given)
        exact -= 0 if common is None else common.to(torch.float64).dense()
        outcome = noise_free(given, Restart(reinit, (2, 4, 8)))
        assert outcome.residual is None or residual.add(outcome.residual) == 0.0
        common = outcome.common
        kept = residual.factors.to(torch.float64).dense() if residual.matrix is None else residual.matrix.double()
        kept = kept + (0 if common is None else common.to(torch.float64).dense())
        assert (kept - exact).norm() <= 1e-6 * exact.norm()
    assert residual.matrix is not None and residual.rank == 0


def test_holders_hear_of_a_residual_that_has_become_zero() -> None:
    draw = torch.Generator().manual_seed(4)
    term = LowRank(torch.randn(16, 6, generator=draw), torch.randn(6, 16, generator=draw))
    residual = Residual(16, 16, 8)
    residual.add(term)
    residual.mark_sent()
    residual.add(LowRank(-term.B, term.A))
    update = residual.update(whole=False)
    assert update is not None and update.start_rank == 0 and update.factors is not None
    assert torch.equal(update.factors.dense(), torch.zeros(16, 16))
