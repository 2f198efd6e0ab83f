"""Every aggregation against the few lines that its paper publishes, written densely."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.errors import InputError
from hsplit.lora.aggregation import AGGREGATIONS, Contribution, Outcome, Restart, _frozen, find_aggregation
from hsplit.lora.low_rank import LowRankSum
from hsplit.models.factors import LowRank

D_OUT, D_IN = 20, 14
rules = settings(max_examples=40, deadline=None)
holders = given(
    ranks=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5),
    tokens=st.lists(st.integers(1, 500), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)


def contributions(ranks: Sequence[int], tokens: Sequence[int], seed: int) -> list[Contribution]:
    draw = torch.Generator().manual_seed(seed)
    total = sum(tokens[: len(ranks)])
    return [
        Contribution(
            LowRank(torch.randn(D_OUT, rank, generator=draw), torch.randn(rank, D_IN, generator=draw)), count / total
        )
        for rank, count in zip(ranks, tokens, strict=False)
    ]


def aggregated(name: str, given: Sequence[Contribution], reinit: str = "random") -> Outcome:
    return AGGREGATIONS[name].rule(given, Restart(reinit, tuple(c.term.rank for c in given)))


def dense(term: LowRank | LowRankSum) -> torch.Tensor:
    return term.dense() if isinstance(term, LowRank) else term.dense_rows(0, D_OUT)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one.double() - other.double()).norm() <= 1e-5 * max(1.0, float(other.double().norm())))


@rules
@holders
def test_a_spectral_restart_goes_on_with_rows_of_a_fresh_length(ranks: list[int], tokens: list[int], seed: int) -> None:
    # Large B and small A, as after a while of training.
    given = [Contribution(LowRank(50 * c.term.B, 1e-3 * c.term.A), c.share) for c in contributions(ranks, tokens, seed)]
    outcome = aggregated("concat", given, "svd")
    assert outcome.common is not None
    total = sum(c.share * c.term.dense().double() for c in given)
    rest = 0 if outcome.residual is None else dense(outcome.residual)
    assert close(dense(outcome.common) + rest, total)
    if len(given) == 1:
        assert outcome.residual is None and outcome.common is given[0].term
    else:
        # A fresh row of U(-1/sqrt(d), 1/sqrt(d)) has a length of 1/sqrt(3) or so; powers of two come within sqrt(2).
        lengths = outcome.common.A.norm(dim=1) * 3**0.5
        assert float(lengths.min()) > 0.7 and float(lengths.max()) < 1.42
        assert outcome.common.rank == min(*ranks, D_OUT, D_IN)


def test_what_one_holder_alone_has_trained_is_cut_only_where_the_next_rank_is_smaller() -> None:
    (only,) = contributions([8], [10], 0)
    outcome = AGGREGATIONS["concat"].rule([only], Restart("svd", (8, 2)))
    assert outcome.common is not None and outcome.common.rank == 2 and outcome.residual is not None
    assert close(dense(outcome.common) + dense(outcome.residual), only.term.dense())


@rules
@holders
def test_concat_is_floras_stack(ranks: list[int], tokens: list[int], seed: int) -> None:
    given = contributions(ranks, tokens, seed)
    # FLoRA, algorithm 1: A = p_1 A_1 (+) ... (+) p_K A_K stacked by rows, B = B_1 (+) ... (+) B_K by columns.
    A = torch.cat([c.share * c.term.A for c in given], dim=0)
    B = torch.cat([c.term.B for c in given], dim=1)
    outcome = aggregated("concat", given)
    assert outcome.residual is not None and outcome.common is None
    assert close(dense(outcome.residual), B @ A)


@rules
@given(tokens=st.lists(st.integers(1, 500), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_fedavg_is_the_mean_of_a_and_of_b(tokens: list[int], seed: int) -> None:
    given = contributions([4] * len(tokens), tokens, seed)
    A, B = sum(c.share * c.term.A for c in given), sum(c.share * c.term.B for c in given)
    outcome = aggregated("fedavg", given)
    assert outcome.residual is None and outcome.common is not None
    assert close(outcome.common.A, A) and close(outcome.common.B, B)


@rules
@holders
def test_hetlora_pads_with_zeros_and_weights_by_the_norm_of_the_product(
    ranks: list[int], tokens: list[int], seed: int
) -> None:
    given, top = contributions(ranks, tokens, seed), max(ranks)
    norms = torch.stack([(c.term.B @ c.term.A).norm() for c in given])
    weights = norms / norms.sum()
    A, B = torch.zeros(top, D_IN), torch.zeros(D_OUT, top)
    for c, weight in zip(given, weights, strict=True):
        A += weight * torch.nn.functional.pad(c.term.A, (0, 0, 0, top - c.term.rank))
        B += weight * torch.nn.functional.pad(c.term.B, (0, top - c.term.rank))
    outcome = aggregated("hetlora", given)
    assert outcome.residual is None and outcome.common is not None
    assert close(outcome.common.A, A) and close(outcome.common.B, B)


@rules
@holders
def test_flexlora_gives_each_rank_the_svd_of_the_mean_product(ranks: list[int], tokens: list[int], seed: int) -> None:
    given = contributions(ranks, tokens, seed)
    U, S, V = torch.linalg.svd(sum(c.share * c.term.B.double() @ c.term.A.double() for c in given))
    outcome = aggregated("flexlora", given)
    assert outcome.residual is None and outcome.common is not None
    assert outcome.common.rank == min(max(ranks), sum(ranks), D_IN)
    for rank in ranks:
        own = outcome.common.up_to_rank(rank)
        # B = U S and A = V, of the leading directions.
        assert close(own.dense(), (U[:, :rank] * S[:rank]) @ V[:rank])
        assert close(own.A.norm(dim=1), torch.ones(rank)) and close(own.B.norm(dim=0), S[:rank])


@rules
@holders
def test_raflora_averages_each_slice_over_those_who_have_it(ranks: list[int], tokens: list[int], seed: int) -> None:
    given = contributions(ranks, tokens, seed)
    mean = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    # One direction at a time, which is the same: the weights are equal within a slice.
    for direction in range(max(ranks)):
        having = [c for c in given if c.term.rank > direction]
        total = sum(c.share for c in having)
        for c in having:
            mean += c.share / total * torch.outer(c.term.B[:, direction].double(), c.term.A[direction].double())
    U, S, V = torch.linalg.svd(mean)
    outcome = aggregated("raflora", given)
    assert outcome.residual is None and outcome.common is not None
    for rank in ranks:
        assert close(outcome.common.up_to_rank(rank).dense(), (U[:, :rank] * S[:rank]) @ V[:rank])


@rules
@holders
def test_florist_keeps_the_fewest_directions_with_nine_tenths_of_the_energy(
    ranks: list[int], tokens: list[int], seed: int
) -> None:
    given = contributions(ranks, tokens, seed)
    U, S, V = torch.linalg.svd(sum(c.share * c.term.dense().double() for c in given))
    kept = next(k for k in range(1, len(S) + 1) if float((S[:k] ** 2).sum()) >= 0.9 * float((S**2).sum()))
    outcome = aggregated("florist", given)
    assert outcome.common is None and isinstance(outcome.residual, LowRank) and outcome.residual.rank == kept
    assert close(outcome.residual.dense(), (U[:, :kept] * S[:kept]) @ V[:kept])


@rules
@holders
def test_fedplora_averages_each_direction_over_those_who_trained_it(
    ranks: list[int], tokens: list[int], seed: int
) -> None:
    given = contributions(ranks, tokens, seed)
    # Beside them what some had frozen, of a restart that had more directions than anybody has trained.
    began = LowRank(torch.randn(D_OUT, 9), torch.randn(9, D_IN))
    outcome = AGGREGATIONS["fedplora"].rule([*given, *_frozen(began, given)], Restart("mean", (16,)))
    assert outcome.residual is None and outcome.common is not None
    made = []
    for direction in range(9):
        having = [c for c in given if c.term.rank > direction]
        total = sum(c.share for c in having)
        B = sum(c.share / total * c.term.B[:, direction].double() for c in having) if having else began.B[:, direction]
        A = sum(c.share / total * c.term.A[direction].double() for c in having) if having else began.A[direction]
        made.append(torch.cat([torch.as_tensor(B).float(), torch.as_tensor(A).float()]))
    # Every direction once, in a drawn order.
    found = torch.cat([outcome.common.B, outcome.common.A.T]).T
    distances = torch.cdist(torch.stack(made), found)
    assert float(distances.min(dim=1).values.max()) < 1e-4
    assert sorted(distances.argmin(dim=1).tolist()) == list(range(9))
    again = AGGREGATIONS["fedplora"].rule([*given, *_frozen(began, given)], Restart("mean", (2, 4), spare=1))
    assert again.common is not None and again.residual is not None and again.common.rank == 3
    assert torch.equal(again.common.A, outcome.common.A[:3]) and torch.equal(again.residual.A, outcome.common.A[3:])


def test_the_rules_differ_where_ranks_do() -> None:
    """The references can fail: on the same holders no two rules agree."""
    given = contributions([1, 2, 8], [30, 20, 10], 0)
    outcomes = {name: aggregated(name, given) for name in ("concat", "hetlora", "flexlora", "raflora", "florist")}
    made = {}
    for name, outcome in outcomes.items():
        term = outcome.residual or outcome.common
        assert term is not None
        made[name] = dense(term).float()
    names = list(made)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if {one, other} != {"concat", "flexlora"}:
                assert not close(made[one], made[other]), (one, other)
    # FlexLoRA averages products too; it is the largest rank that cuts.
    error = (made["concat"] - made["flexlora"]).norm() / made["concat"].norm()
    assert 0 < error < 1


def test_adapters_that_have_learned_nothing_do_not_divide_by_zero() -> None:
    given = [Contribution(LowRank(torch.zeros(D_OUT, r), torch.randn(r, D_IN)), 0.5) for r in (2, 4)]
    # A restart of dead directions, A and B both zero, could never be trained again.
    for name in ("flexlora", "raflora", "florist"):
        assert aggregated(name, given) == Outcome(None, None)
    for name in ("hetlora", "flexlora", "raflora", "concat"):
        outcome = aggregated(name, given)
        for term in (outcome.residual, outcome.common):
            if term is not None:
                assert torch.isfinite(dense(term)).all() and float(dense(term).norm()) == 0.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.module:rule", "no module named 'nowhere'"),
        ("hsplit.lora.low_rank:nothing", "has no 'nothing'"),
        ("hsplit.lora.optimizer:MOMENT_BLOCK", "must be a function"),
        ("medians", "must be one of concat, fedavg"),
    ],
)
def test_an_aggregation_that_cannot_be_found_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"policy: aggregation: .*{reason}"):
        find_aggregation(name)
