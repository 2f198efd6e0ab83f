"""Properties of paced plans on small random instances (METHOD 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hsplit.config import Job, Pace, Policy, RunConfig
from hsplit.errors import InputError
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import equal_importance
from hsplit.planning.paced_plan import needed_bytes, unread_bytes
from hsplit.planning.plan import Plan
from hsplit.planning.planner import make_plan
from hsplit.planning.planning_state import Fleet, PlanningState, Shortage
from hsplit.planning.scheduler import Scheduler
from tests.planning.test_planner import DEEP, JOB, LARGEST, SMALLEST, between, client, server
from tests.tiny import spec_of, tiny_spec

ALL: dict[str, Any] = {"batch_size": "planned", "periods": "planned", "stored": "planned", "wire": "planned"}
PACES = [
    ALL,
    {"batch_size": "planned"},
    {"periods": "planned"},
    {"periods": 2},
    {"stored": "planned"},
    {"stored": "codes", "batch_size": "planned", "periods": "planned"},
]
POLICIES: list[dict[str, Any]] = [
    {},
    {"freeze": "never"},
    {"split": "uniform", "ranks": "uniform", "aggregation": "fedavg"},
    {"split": 1},
    {"ranks": "budget"},
]


@lru_cache
def cost(labels: str, base: str, **pace: Any) -> CostModel:
    job = JOB.model_copy(update={"base": base, "privacy": JOB.privacy.model_copy(update={"labels": labels})})
    return CostModel(tiny_spec("llama"), job, Pace.model_validate(pace))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Any], Any, CostModel, Policy]:
    count = draw(st.integers(1, 5))
    clients = [
        client(
            f"c{i}",
            draw(between(SMALLEST * 0.8, LARGEST * 1.2)),
            draw(between(1e8, 1e10)),
            draw(between(1e6, 1e9)),
        )
        for i in range(count)
    ]
    pace = draw(st.sampled_from(PACES))
    base, labels = draw(st.sampled_from(["nf4", "fp32"])), draw(st.sampled_from(["server", "client"]))
    policy = Policy.model_validate({**draw(st.sampled_from(POLICIES)), "pace": pace})
    return (
        clients,
        server(draw(between(DEEP * 0.7, DEEP * 6)), draw(between(1e9, 1e11))),
        cost(labels, base, **pace),
        policy,
    )


def made(case: tuple[list[Any], Any, CostModel, Policy], current: Plan | None = None) -> Plan | None:
    clients, deep, model, policy = case
    try:
        return make_plan(clients, deep, model, equal_importance(model.model.weights), policy, current)
    except InputError as error:
        assert str(error).startswith(("clients: none has the memory", "server: memory_gb")), error
        return None


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_a_paced_plan_keeps_what_it_promises(case: tuple[list[Any], Any, CostModel, Policy]) -> None:
    plan = made(case)
    if plan is None:
        return
    clients, deep, model, policy = case
    pace, own, batch = policy.pace, plan.available, model.model.job.batch_size
    plan.check()
    for part in own:
        assert part.predicted_bytes <= part.declared_bytes
        assert part.predicted_bytes == model.client_bytes(part.split or 0, part.ranks, part.rows, part.stored)
        assert part.stored == "dense" or model.model.quantized
    assert plan.server.predicted_bytes <= plan.server.declared_bytes
    # The rows' sum is that of equal ones, where all have the memory for these, and nobody brings less than the floor.
    rows = np.array([part.rows / part.every for part in own])
    least = needed_bytes(model, JOB.rank_set[0], batch)[1:].min()
    if all(client.memory_bytes >= least for client in clients if client.name in {part.name for part in own}):
        assert rows.sum() == pytest.approx(batch * len(own))
    assert 0 < rows.sum() <= batch * len(own) + 1e-9
    assert (rows >= pace.min_share * rows.sum() / len(own) - 1e-9).all()
    if pace.batch_size == "equal":
        assert {part.rows for part in own} == {batch}
    assert plan.captured_importance > 0 and any(any(part.ranks.values()) for part in (plan.server, *own))
    assert plan.groups == 1 or pace.periods != "none"
    assert plan.groups <= (2 if pace.periods == 2 else len(own))
    if policy.split == "uniform":
        assert len({part.split for part in own}) == 1
        assert len({rank for part in (plan.server, *own) for rank in part.ranks.values()}) == 1
    assert sum(part.captured_share for part in (plan.server, *own)) == pytest.approx(1.0)
    # The seconds are the virtual clock's, and below the bound.
    clock = VirtualClock(model, clients, deep)
    assert plan.makespan_s == pytest.approx(clock.step_s(plan))
    assert plan.speed is not None and (plan.speed.share <= 1 + 1e-9 or plan.forward_only)
    assert made(case) == plan, "the same input gives the same plan"


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_the_plan_in_force_is_left_only_for_a_better_one(case: tuple[list[Any], Any, CostModel, Policy]) -> None:
    plan = made(case)
    if plan is None:
        return
    again = made(case, plan)
    assert again is not None and again.objective >= plan.objective * (1 - 1e-9)


@settings(deadline=None, max_examples=25)
@given(case=cases())
def test_no_plan_in_which_all_wait_is_better(case: tuple[list[Any], Any, CostModel, Policy]) -> None:
    """What the levers are for: with the same splits rule and ranks, the plan without them is one of the choices."""
    clients, deep, model, policy = case
    if not policy.freezes or policy.split != "planned":
        return
    case = clients, deep, cost("server", model.model.job.base, **ALL), policy.model_copy(update={"pace": Pace(**ALL)})
    plan = made(case)
    still = cost("server", model.model.job.base)
    try:
        waiting = make_plan(clients, deep, still, equal_importance(still.model.weights), Policy(ranks=policy.ranks))
    except InputError:
        return
    assert plan is not None, "the server has room for the other one"
    if len(plan.available) != len(waiting.available):
        return
    assert plan.objective >= 0.97 * waiting.objective


def test_codes_are_stored_where_they_leave_memory_for_ranks() -> None:
    """Though dense layers would fit, and take less time."""
    fleet = [client(f"c{i}", SMALLEST * 1.5, 1e10, 1e9) for i in range(3)]

    def plan_with(stored: str) -> Plan:
        pace = ALL | {"stored": stored}
        model, policy = cost("server", "nf4", **pace), Policy(pace=Pace.model_validate(pace), freeze="never")
        return make_plan(fleet, server(DEEP, 1e9), model, equal_importance(model.model.weights), policy)

    chosen, dense, codes = map(plan_with, ("planned", "dense", "codes"))
    assert {part.stored for part in chosen.available} == {"codes"}
    assert chosen.objective == pytest.approx(codes.objective) and codes.objective > 1.02 * dense.objective


@pytest.mark.parametrize("seed", [0, 3, 13, 22])
def test_a_server_short_of_memory_has_a_plan_with_fewer_rows_at_a_time(seed: int) -> None:
    model, draw = cost("server", "nf4", **ALL), np.random.default_rng(seed)
    fleet = [
        client(f"c{i}", SMALLEST * draw.uniform(1, 4), 10 ** draw.uniform(8, 10), 10 ** draw.uniform(7, 9))
        for i in range(5)
    ]
    scores, policy = equal_importance(model.model.weights), Policy(pace=Pace(**ALL))
    plan = make_plan(fleet, server(DEEP * 0.75, 1e9), model, scores, policy)
    assert len(plan.available) == 5 and plan.groups > 1
    assert plan.server.predicted_bytes <= plan.server.declared_bytes


def test_a_client_behind_a_slow_link_sends_narrower_messages_and_less_often() -> None:
    model = cost("server", "nf4", **ALL)
    clients = [client("slow", LARGEST, 1e9, 2e5), *(client(f"c{i}", LARGEST, 1e9, 1e9) for i in range(3))]
    plan = make_plan(clients, server(flops=3e9), model, equal_importance(model.model.weights), Policy(pace=Pace(**ALL)))
    slow = plan.client("slow")
    assert slow.wire == "int4" and {part.wire for part in plan.available if part.name != "slow"} == {"bf16"}
    assert slow.rows / slow.every < 2


def test_clients_with_memory_for_fewer_rows_bring_what_they_can() -> None:
    """A fleet that cannot hold the rows of equal clients has a smaller step, and is not refused."""
    model = cost("server", "nf4", batch_size="planned")
    one = float(needed_bytes(model, JOB.rank_set[0], 1)[1])
    fleet, policy = [client(f"c{i}", one * 1.001) for i in range(3)], Policy(pace=Pace(batch_size="planned"))
    plan = make_plan(fleet, server(DEEP * 4, 1e10), model, equal_importance(model.model.weights), policy)
    assert [part.rows for part in plan.available] == [1, 1, 1] and model.model.job.batch_size == 2


def test_weights_by_data_make_up_for_rows_up_to_four_times() -> None:
    pace = {**ALL, "weights": "data"}
    model = cost("server", "nf4", **pace)
    clients = [client("slow", LARGEST, 1e8, 1e7), client("fast", LARGEST, 1e10, 1e9)]
    policy = Policy(pace=Pace(**pace))
    plan = make_plan(clients, server(flops=1e10), model, equal_importance(model.model.weights), policy)
    shares = {part.name: part.rows / part.every / 4 for part in plan.available}
    for part in plan.available:
        assert part.weight == pytest.approx(min(4.0, 0.5 / shares[part.name]))
    assert plan.client("slow").weight > 1 > plan.client("fast").weight
    assert replace(plan.client("slow"), weight=1.0).given != plan.client("slow").given


def test_a_client_that_is_a_batch_ahead_has_room_for_two() -> None:
    ahead, still = cost("server", "nf4", **ALL, ahead=True), cost("server", "nf4", **ALL)
    ranks = {w.name: 4 for w in still.model.weights if w.layer < 2}
    adapters = sum(4 * 4 * (w.d_out + w.d_in) for w in still.model.weights if w.layer < 2)
    assert ahead.client_bytes(2, ranks, 1) >= still.client_bytes(2, ranks, 2) + adapters


def test_a_client_short_of_memory_has_a_smaller_part_though_the_whole_embedding_would_not_fit() -> None:
    """What it does not read of the embedding counts for the smallest part that it keeps, too."""
    spec, pace = tiny_spec("llama"), {"batch_size": "planned", "embedding": "own"}
    own = {"c0": 8, "c1": 8}
    unread = float(unread_bytes(CostModel(spec, JOB, Pace.model_validate(pace)), [client("c0", 1)], own)[0])
    small = float(needed_bytes(CostModel(spec, JOB, Pace.model_validate(pace)), JOB.rank_set[0], 1)[1])
    memory = small - unread / 2
    run = RunConfig(
        server=server(DEEP * 4, 1e10),
        clients=(client("c0", memory), client("c1", memory)),
        job=JOB,
        policy=Policy(freeze="never", pace=Pace.model_validate(pace)),
    )
    scheduler, fleet = Scheduler(run, spec), Fleet(run.clients, vocabulary=own)
    first = scheduler.first(fleet, PlanningState())
    held = first.made.client("c0").predicted_bytes
    short = replace(fleet, shortages={"c0": Shortage(1, held)})
    after = scheduler.review(1, first.made, short, first.state, (), {}, ())
    assert after.plan is not None and after.plan.client("c0").available
    assert after.plan.client("c0").predicted_bytes < held == after.plan.client("c1").predicted_bytes


@pytest.mark.parametrize("pace", [{}, {"batch_size": "planned"}, {"wire": "planned"}])
def test_only_a_plan_that_chooses_formats_names_them(pace: dict[str, Any]) -> None:
    """Elsewhere the job's format is in force, whatever it becomes."""
    model = cost("server", "nf4", **pace)
    fleet, policy = [client("c0", LARGEST), client("c1", LARGEST)], Policy(pace=Pace.model_validate(pace))
    plan = make_plan(fleet, server(), model, equal_importance(model.model.weights), policy)
    assert {part.wire for part in plan.available} == ({model.model.job.wire} if "wire" in pace else {""})


def smollm2(pace: Pace, **job: Any) -> CostModel:
    """Costs of a model of SmolLM2-135M's shape."""
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return CostModel(spec_of(LlamaConfig(**sizes, **heads)), Job.model_validate(job), pace)


def test_equal_clients_go_as_deep_whatever_rows_of_the_embedding_each_one_reads() -> None:
    """Budgets that differ by the size of a vocabulary are moved together, as equal ones are."""
    settings = {"base": "bf16", "dtype": "bf16", "rank_set": [1, 2, 4, 8]}
    policy = Policy(freeze="planned", pace=Pace(**ALL, embedding="own"))
    model = smollm2(policy.pace, **settings, residual={"max_rank": 8}, pipeline={"microbatches": 2})
    clients = [client(f"c{i}", 249_471_454, 5e11, 2e8).model_copy(update={"latency_ms": 5.0}) for i in range(5)]

    def splits(vocabulary: Sequence[int]) -> list[int | None]:
        own = {c.name: count for c, count in zip(clients, vocabulary, strict=True)}
        scores = equal_importance(model.model.weights)
        plan = make_plan(clients, server(64e9, 2e12), model, scores, policy, vocabulary=own)
        return [part.split for part in plan.available]

    assert splits([1800, 1810, 1820, 1830, 1840]) == splits([1840] * 5)
