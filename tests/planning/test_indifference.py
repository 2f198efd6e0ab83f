"""Plans that no importance score can change: the probe before such a plan is not made."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hsplit.config import Policy
from hsplit.errors import InputError
from hsplit.planning.cost.model import CostModel
from hsplit.planning.indifference import _most_server_bytes, indifferent_to_scores
from tests.planning.test_planner import (
    DEEP,
    JOB,
    LARGEST,
    SMALLEST,
    Instance,
    between,
    client,
    cost,
    importance,
    server,
)
from tests.tiny import LAYERS, tiny_spec

POLICIES = [
    Policy(freeze="never"),
    Policy(freeze="never", ranks="budget"),
    Policy(freeze="never", split="uniform"),
    Policy(freeze="never", split=2),
    Policy(freeze="never", placement="full"),
]


@st.composite
def ample(draw: st.DrawFn) -> Instance:
    """Instances in which about half of the holders have room for all ranks."""
    clients = tuple(
        client(f"c{i}", draw(between(SMALLEST * 1.01, LARGEST * 4)), draw(between(1e8, 1e10)), draw(between(1e6, 1e9)))
        for i in range(draw(st.integers(1, 4)))
    )
    return Instance(clients, server(draw(between(DEEP * 2, DEEP * 100)), draw(between(1e9, 1e11))), importance(0))


def extreme(seed: int) -> dict[str, float]:
    """Scores over ten orders of magnitude, one weight in three without any."""
    draw = np.random.default_rng(seed)
    return {w.name: float(10 ** draw.uniform(-5, 5) * (draw.random() > 1 / 3)) + 1e-9 for w in cost().model.weights}


def the_same_by_any_scores(given_: Instance, policy: Policy, seeds: range) -> bool:
    before = given_.make_plan(policy)
    return all(
        dataclasses.replace(given_, scores=extreme(seed)).make_plan(policy, before).gives_the_same_as(before)
        for seed in seeds
    )


@settings(max_examples=150, deadline=None)
@given(ample(), st.sampled_from(POLICIES), st.integers(0, 2**16))
def test_a_probe_that_is_left_out_would_never_have_changed_the_plan(
    given_: Instance, policy: Policy, seed: int
) -> None:
    assume(indifferent_to_scores(given_.clients, given_.server, cost(), policy))
    try:
        assert the_same_by_any_scores(given_, policy, range(seed, seed + 5))
    except InputError:
        # Nobody fits the only split.
        return


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.placement}-{policy.split}-{policy.ranks}")
def test_with_room_for_every_rank_no_probe_matters(policy: Policy) -> None:
    rich = Instance((client("a", 4 * LARGEST), client("b", 9 * LARGEST, 1e10)), server(DEEP * 100), importance(0))
    assert indifferent_to_scores(rich.clients, rich.server, cost(), policy)
    assert the_same_by_any_scores(rich, policy, range(20))


def test_where_memory_is_short_or_clients_may_be_frozen_scores_decide() -> None:
    poor = Instance((client("a", LARGEST / 2), client("b", LARGEST * 4)), server(DEEP * 100), importance(0))
    never = Policy(freeze="never")
    assert not indifferent_to_scores(poor.clients, poor.server, cost(), never)
    assert not the_same_by_any_scores(poor, never, range(20))
    rich = (client("a", 4 * LARGEST),)
    assert not indifferent_to_scores(rich, server(DEEP * 1.2), cost(), never)
    assert not indifferent_to_scores(rich, server(DEEP * 100), cost(), Policy())
    assert not indifferent_to_scores(rich, server(DEEP * 100), cost(), Policy(freeze="never", ranks="tests.some:rule"))


def test_with_one_rank_to_choose_from_everybody_has_the_largest() -> None:
    model = CostModel(tiny_spec("llama"), JOB.model_copy(update={"rank_set": (4,)}))
    poor = (client("a", LARGEST / 2), client("b", LARGEST * 4))
    assert indifferent_to_scores(poor, server(DEEP * 100), model, Policy(freeze="never"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, LAYERS), st.integers(1, LAYERS)), min_size=1, max_size=6), st.randoms())
def test_a_server_never_takes_more_than_its_bound(ends: list[tuple[int, int]], draw: object) -> None:
    first, last = np.sort(np.array(ends), axis=1).T
    rank = JOB.rank_set[-1]
    most = _most_server_bytes(cost(), first, last, rank)
    between_ = np.random.default_rng(len(ends)).integers(first, last + 1, (20, len(ends)))
    for splits in between_:
        held = {w.name: rank for w in cost().model.weights if w.layer >= splits.min()}
        assert cost().server_bytes(splits.tolist(), held) <= most + 1
