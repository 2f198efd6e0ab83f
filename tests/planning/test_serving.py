"""Several servers: who serves whom, and that planning for the first of them is planning for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.config import ClientConfig, Job, Policy, RunConfig, ServerConfig
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.model import CostModel
from hsplit.planning.cost.serving import cohorts, counts_at_first, counts_of_deepest, served_by
from hsplit.planning.importance import equal_importance
from hsplit.planning.planner import make_plan
from tests.tiny import LAYERS, tiny_spec

JOB = Job(dtype="fp32", base="nf4", batch_size=2, max_length=16)

splits_of = st.lists(st.integers(0, LAYERS), min_size=1, max_size=12)


def _counts(splits: list[int]) -> np.ndarray:
    return np.bincount(splits, minlength=LAYERS + 1)[None]


@given(splits=splits_of, servers=st.integers(1, 5), data=st.data())
def test_no_server_has_more_rows_at_any_layer_than_planned_for_the_first(
    splits: list[int], servers: int, data: st.DataObject
) -> None:
    names = [f"c{i}" for i in range(len(splits))]
    most = data.draw(st.none() | st.integers(1, len(splits)))
    training = data.draw(st.permutations(names))[: most or len(names)]
    of = dict(zip(names, splits, strict=True))
    dealt = served_by(training, of, [f"s{i}" for i in range(servers)])
    assert sorted(name for share in dealt.values() for name in share) == sorted(training)
    planned = np.cumsum(counts_at_first(_counts(splits), most, servers)[0])
    for share in dealt.values():
        assert (np.cumsum(_counts([of[name] for name in share])[0]) <= planned).all()
    if most is None:
        # And the first has exactly so many: nothing is reserved in vain.
        assert (np.cumsum(_counts([of[name] for name in dealt["s0"]])[0]) == planned).all()


@given(splits=splits_of, most=st.integers(1, 12))
def test_the_deepest_are_those_with_the_deepest_splits(splits: list[int], most: int) -> None:
    expected = _counts(sorted(splits)[-most:])
    assert (counts_of_deepest(_counts(splits), most) == expected).all()
    assert (counts_of_deepest(_counts(splits), None) == _counts(splits)).all()


def test_clients_are_dealt_out_in_turn_from_the_shallowest_split() -> None:
    splits = {"a": 3, "b": 1, "c": 2, "d": 1}
    assert served_by("abcd", splits, ["s0", "s1"]) == {"s0": ["b", "c"], "s1": ["d", "a"]}
    assert served_by("a", splits, ["s0", "s1"]) == {"s0": ["a"]}
    assert cohorts("abcde", 2) == ["ab", "cd", "e"]
    assert cohorts("abcde", None) == ["abcde"]


def _run(clients: int, replicas: int = 1, memory_gb: float = 1.0, **job: int) -> RunConfig:
    found = tuple(
        ClientConfig(name=f"c{i}", kind="c", memory_gb=0.0012 + 0.0004 * (i % 3), tflops=1e-3 * (1 + i % 2))
        for i in range(clients)
    )
    server = ServerConfig(memory_gb=memory_gb, tflops=1e-3, replicas=replicas)
    return RunConfig(clients=found, server=server, job=JOB.model_copy(update=job))


def _plan_of(run: RunConfig) -> tuple[CostModel, object]:
    cost = CostModel.of_run(tiny_spec("llama"), run)
    return cost, make_plan(run.clients, run.server, cost, equal_importance(cost.model.weights), Policy())


@pytest.mark.parametrize(("replicas", "training"), [(2, None), (3, None), (1, 4), (2, 5)])
def test_a_servers_part_is_that_of_a_server_with_its_clients_alone(replicas: int, training: int | None) -> None:
    run = _run(7, replicas, clients_per_round=training)
    _, made = _plan_of(run)
    assert made.servers == replicas and len(made.server_names) == replicas
    drawn = sorted(made.clients, key=lambda c: c.split)[: training or 7]
    dealt = served_by([c.name for c in drawn], {c.name: c.split for c in drawn}, made.server_names)
    own = [c.split for c in drawn if c.name in dealt["server"]]
    alone = CostModel.of_run(tiny_spec("llama"), _run(len(own)))
    assert made.server.step_time_s == pytest.approx(float(alone.times.server_times(run.server, _counts(own))[0]))
    # It aggregates for all: what is handed in to it is more than that of its own clients.
    assert made.server.predicted_bytes >= alone.server_bytes(own, made.server.ranks)


def test_more_servers_shorten_a_step_that_waits_for_the_server() -> None:
    steps = []
    for replicas in (1, 2, 4):
        run = _run(8, replicas)
        cost, made = _plan_of(run)
        clock = VirtualClock(cost, run.clients, run.server)
        assert clock.step_s(made) == pytest.approx(made.makespan_s)
        steps.append(clock.step_s(made))
    assert steps[0] > steps[1] > steps[2]


def test_fewer_clients_a_round_need_less_memory_of_the_server() -> None:
    whole, drawn = _run(8), _run(8, clients_per_round=2)
    _, for_all = _plan_of(whole)
    _, for_two = _plan_of(drawn)
    assert for_two.server.predicted_bytes < for_all.server.predicted_bytes


@settings(max_examples=15, deadline=None)
@given(clients=st.integers(1, 9), replicas=st.integers(1, 4), training=st.none() | st.integers(1, 9))
def test_the_search_keeps_to_the_servers_memory(clients: int, replicas: int, training: int | None) -> None:
    run = _run(clients, replicas, clients_per_round=training)
    cost, ample = _plan_of(run)
    spare = ample.server.working_copy * cost.working_copy_bytes(ample.server.split or 0)
    needed = ample.server.predicted_bytes - spare
    tight = run.model_copy(update={"server": run.server.changed({"memory_gb": needed * 0.97 / 1e9})})
    _, made = _plan_of(tight)
    splits = [c.split for c in made.available]
    copies = made.server.working_copy * cost.working_copy_bytes(min(splits, default=0))
    assert made.server.predicted_bytes == cost.server_bytes(splits, made.server.ranks) + copies
    assert made.server.predicted_bytes <= tight.server.memory_bytes


def test_a_plan_with_servers_survives_its_json() -> None:
    _, made = _plan_of(_run(3, 2))
    assert type(made).from_json(made.to_json()) == made
    old = made.to_json()
    del old["servers"]
    assert type(made).from_json(old) == replace(made, servers=1)
