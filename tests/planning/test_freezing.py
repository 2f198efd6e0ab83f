"""Clients behind slow links only compute forward where that is worth more than training their layers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.config import Job, Policy
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.model import CostModel
from hsplit.planning.freezing import FREEZABLE, worth_freezing
from hsplit.planning.importance import equal_importance
from hsplit.planning.insight import bottleneck
from hsplit.planning.planner import make_plan
from hsplit.planning.problem import Problem
from tests.planning.test_planner import JOB, client, cost, problem_of, server
from tests.tiny import spec_of, tiny_config

NEVER = Policy(freeze="never")


def deep_cost(**job: object) -> CostModel:
    """Of a model with so many layers that one of them is a small part of it."""
    config = tiny_config("llama")
    config.num_hidden_layers = 16
    return CostModel(spec_of(config), Job.model_validate(JOB.model_dump() | job))


MODEL = deep_cost()
AHEAD = deep_cost(pipeline={"ahead": True})
EQUAL = equal_importance(MODEL.model.weights)
SLOW = [client("slow", 1e9, bandwidth_bps=2e5), client("a", 1e9), client("b", 1e9)]


def test_a_client_behind_a_slow_link_only_computes_forward() -> None:
    made, without = (make_plan(SLOW, server(), MODEL, EQUAL, policy) for policy in (Policy(), NEVER))
    slow = made.client("slow")
    assert slow.forward_only and slow.split == 1 and set(slow.ranks.values()) == {0} and len(slow.ranks) > 0
    assert made.objective > 1.3 * without.objective
    assert slow.captured_share == 0.0
    clock = VirtualClock(MODEL, SLOW, server())
    assert clock.call_s(made)["slow"]["down"] == 0.0 < clock.call_s(without)["slow"]["down"]
    assert clock.step_s(made) == pytest.approx(made.makespan_s)
    assert clock.step_s(made) < 0.7 * clock.step_s(without)
    # As a start for the next plan it stays.
    assert make_plan(SLOW, server(), MODEL, EQUAL, Policy(), made) == made


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("link", [2e5, 1e6, 1e8])
@pytest.mark.parametrize("server_flops", [1e8, 1e9, 1e10])
def test_a_round_takes_as_long_as_its_events(microbatches: int, link: float, server_flops: float) -> None:
    """Against everybody's calls one by one, in the order in which they are asked for."""
    model = deep_cost(local_steps=6, pipeline={"microbatches": microbatches, "ahead": True})
    clients = [client("slow", 1e9, bandwidth_bps=link), client("a", 1e9, 2e9)]
    made = make_plan(clients, server(flops=server_flops), model, EQUAL, NEVER)
    frozen = replace(made.client("slow"), ranks=dict.fromkeys(made.client("slow").ranks, 0))
    made = replace(made, clients=(frozen, made.client("a")))
    clock = VirtualClock(model, clients, server(flops=server_flops))
    calls = clock.call_s(made)
    up, down = calls["slow"]["up"], calls["a"]["down"]
    deep = sum(calls["server"][what] for what in ("step", "step slow", "step a"))
    ends, sent, server_free = [0.0, 0.0], 0.0, 0.0
    for _ in range(6):
        # What was asked for when the step before began goes out one after another.
        begun, own = ends[-1], ends[-1]
        sent = max(sent, ends[-2])
        server_free, parts = ends[-1], []
        for part in range(microbatches):
            sent += up
            server_free = max(server_free, begun + (part + 1) * calls["a"]["up"], sent) + deep
            parts.append(server_free)
        own = begun + microbatches * calls["a"]["up"]
        for ready in parts:
            own = max(own, ready) + down
        ends.append(own)
    steps = clock.steps_s(made)
    assert sum(steps) == pytest.approx(ends[-1])
    assert steps[0] >= steps[1] - 1e-12 and steps[1] == pytest.approx(clock.step_s(made))
    in_turn = deep_cost(local_steps=6, pipeline={"microbatches": microbatches})
    assert VirtualClock(in_turn, clients, server(flops=server_flops)).steps_s(made) == pytest.approx([steps[0]] * 6)


def test_one_who_is_ahead_is_waited_for_only_beyond_all_the_rest() -> None:
    fleet = [SLOW[0], client("a", 1e9, 2e9), client("b", 1e9, 2e9)]
    made = make_plan(fleet, server(), AHEAD, EQUAL, Policy())
    assert made.forward_only == {"slow"}
    sends_s = float(AHEAD.times.client_times(fleet[0])[1, 0])
    assert made.makespan_s == pytest.approx(sends_s)
    waits = bottleneck(made, fleet, AHEAD)
    assert waits.name == "slow"
    rest_s = made.server.step_time_s + float(AHEAD.times.client_times(fleet[1])[made.client("a").split or 0].sum())
    assert waits.shortens_s == pytest.approx(sends_s - rest_s)
    waits_s = VirtualClock(AHEAD, fleet, server()).waits_s(made)
    assert sum(seconds for _, seconds in waits_s.values()) == pytest.approx(made.makespan_s)


def test_nobody_is_frozen_where_links_are_fast() -> None:
    clients = [client(name, 1e9, 1e13, 1e12) for name in "abc"]
    assert not any(part.forward_only for part in make_plan(clients, server(), MODEL, EQUAL, Policy()).clients)


@pytest.mark.parametrize("server_flops", [1e8, 1e9, 1e10])
@pytest.mark.parametrize("slow", [1, 2, 3])
def test_no_more_than_a_tenth_of_what_is_captured_is_given_up(slow: int, server_flops: float) -> None:
    # With four layers the first is a fourth of it; a slow server would have frozen clients hold more of the model.
    for model in (cost(), MODEL):
        equal = equal_importance(model.model.weights)
        clients = [client(f"c{i}", 1e9, bandwidth_bps=2e5 if i < slow else 1e8) for i in range(3)]
        made, without = (make_plan(clients, server(flops=server_flops), model, equal, p) for p in (Policy(), NEVER))
        assert made.captured_importance >= 0.9 * without.captured_importance


def test_a_residual_without_a_cap_leaves_no_room_for_frozen_restarts() -> None:
    whole = deep_cost(residual={"max_rank": "full"})
    assert not any(part.forward_only for part in make_plan(SLOW, server(), whole, EQUAL, Policy()).clients)


@pytest.mark.parametrize(
    "changes",
    [
        {"placement": "full"},
        {"aggregation": "fedavg", "ranks": "uniform"},
        {"freeze": "never"},
    ],
)
def test_only_where_the_aggregation_can_freeze(changes: dict[str, str]) -> None:
    policy = Policy.model_validate(changes)
    assert not policy.freezes
    assert not any(part.forward_only for part in make_plan(SLOW, server(), MODEL, EQUAL, policy).clients)


@settings(max_examples=60, deadline=None)
@given(
    links=st.lists(st.floats(4, 9).map(lambda x: 10**x), min_size=1, max_size=5),
    splits=st.lists(st.integers(1, 3), min_size=5, max_size=5),
    ranks=st.sampled_from(["importance", "budget", "uniform"]),
    seed=st.integers(0, 99),
    ahead=st.booleans(),
)
def test_whom_it_freezes_is_the_best_choice(
    links: list[float], splits: list[int], ranks: str, seed: int, ahead: bool
) -> None:
    """Against every set of clients that gives up no more than is allowed."""
    clients = [client(f"c{i}", 1e9, bandwidth_bps=link) for i, link in enumerate(links)]
    spread = np.random.default_rng(seed).lognormal(0.0, 1.0, len(EQUAL))
    scores = {name: value * float(s) for (name, value), s in zip(EQUAL.items(), spread, strict=True)}
    chosen = np.array(splits[: len(clients)])

    def problem(frozen: tuple[str, ...]) -> Problem:
        model = AHEAD if ahead else MODEL
        return problem_of(ranks, clients, server(), model, scores, np.array([1, 2, 4, 8]), frozen=frozen)

    base = problem(())
    captured = float(base.captured(base.state(chosen))[0])

    def value(frozen: tuple[str, ...]) -> float:
        made = problem(frozen)
        state = made.state(chosen)
        if float(made.captured(state)[0]) < (1 - FREEZABLE) * captured - 1e-12:
            return -np.inf
        return float(made.objective(state)[0])

    found = tuple(c.name for c, frozen in zip(clients, worth_freezing(base, chosen), strict=True) if frozen)
    names = [c.name for c in clients]
    every = [value(some) for count in range(len(names) + 1) for some in itertools.combinations(names, count)]
    assert value(found) >= value(())
    assert value(found) >= 0.95 * max(every)
