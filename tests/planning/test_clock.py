"""The virtual clock: everything that a run does has its time at the declared budgets (METHOD 8)."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.config import Policy
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.model import CostModel
from hsplit.planning.cost.step_time import Loads
from hsplit.planning.importance import equal_importance
from hsplit.planning.plan import Plan
from hsplit.planning.planner import make_plan
from tests.planning.test_planner import JOB, client, cost, server
from tests.tiny import LAYERS, tiny_spec

MODEL = cost()
CLIENTS = [client("one", 1e9), client("two", 1e9, 2e9)]
PLAN = make_plan(CLIENTS, server(), MODEL, equal_importance(MODEL.model.weights), Policy())
CLOCK = VirtualClock(MODEL, CLIENTS, server())


def test_a_step_is_the_makespan() -> None:
    assert CLOCK.step_s(PLAN) == pytest.approx(PLAN.makespan_s)


def test_a_slower_budget_makes_the_same_plan_slower() -> None:
    slower = VirtualClock(MODEL, [client("one", 1e9, 1e8), CLIENTS[1]], server())
    assert slower.step_s(PLAN) > CLOCK.step_s(PLAN)


def test_transfers_run_side_by_side_and_the_last_counts() -> None:
    assert CLOCK.transfer_s({"one": 10**6, "two": 2 * 10**6}) == pytest.approx(0.16 + 1e-3)
    assert CLOCK.transfer_s({}) == 0


def test_an_aggregation_is_transfers_and_arithmetic() -> None:
    up, down = {"one": 10**6, "two": 10**5}, {"one": 10**6, "two": 2 * 10**6}
    sent = CLOCK.transfer_s(up) + CLOCK.transfer_s(down)
    model = CostModel(tiny_spec("llama"), JOB, residual=False, decomposes=False)
    averaging = VirtualClock(model, CLIENTS, server())
    averaged = averaging.aggregation_s(PLAN, Policy(aggregation="fedavg", ranks="uniform"), up, down)
    assert sent == pytest.approx(averaged)
    # Both clients hold every weight, so that all are decomposed: once, or with an svd restart twice.
    every = {w.name: 4 for w in MODEL.model.weights}
    shared = replace(PLAN, clients=tuple(replace(c, split=LAYERS, ranks=every) for c in PLAN.clients))
    fresh = CLOCK.aggregation_s(shared, Policy(reinit="random"), up, down)
    restarted = CLOCK.aggregation_s(shared, Policy(reinit="svd"), up, down)
    assert averaged < fresh < restarted


MB = 10**6
TIMES = st.floats(-2, 0)


@settings(max_examples=80, deadline=None)
@given(st.tuples(TIMES, TIMES, TIMES), st.tuples(*[st.integers(0, 8 * MB)] * 4))
def test_adapters_travel_while_others_compute(done: tuple[float, float, float], sizes: tuple[int, ...]) -> None:
    # The step ends when the last of them has finished.
    finished = {name: at - max(done) for name, at in zip(("one", "two", "server"), done, strict=True)}
    up, down = dict(zip(("one", "two"), sizes[:2], strict=True)), dict(zip(("one", "two"), sizes[2:], strict=True))
    model = CostModel(tiny_spec("llama"), JOB, residual=False, decomposes=False)
    clock, policy = VirtualClock(model, CLIENTS, server()), Policy(aggregation="fedavg", ranks="uniform")

    def sent(size: int) -> float:
        return 8 * size / 1e8 + 1e-3

    begun = max(finished["server"], *(finished[name] + sent(size) for name, size in up.items()))
    restarts = clock.restarts_s(PLAN, policy, up, down, None, finished)
    expected = {name: max(finished[name], begun + sent(size)) for name, size in down.items()} | {"server": begun}
    assert restarts == pytest.approx(expected)
    taken = clock.aggregation_s(PLAN, policy, up, down, None, finished)
    at_once = clock.aggregation_s(PLAN, policy, up, down)
    # Nobody begins before its own adapters have travelled, and the end of the step is when all of them are done.
    assert max(expected.values()) == pytest.approx(taken) and 0 <= taken <= at_once
    everybody = dict.fromkeys(finished, 0.0)
    assert clock.aggregation_s(PLAN, policy, up, down, None, everybody) == at_once


def test_validation_takes_up_each_batch_when_the_last_client_has_sent_it() -> None:
    splits = np.array([PLAN.client(c.name).split for c in CLIENTS])
    up = dict(
        zip(
            ("one", "two"),
            MODEL.times.forward_times_at(CLIENTS, splits, Loads.of_plan(PLAN.available, MODEL.model.job))[
                :, 0
            ].tolist(),
            strict=True,
        )
    )

    def deep(*names: str) -> float:
        counts = MODEL.model.clients_at([PLAN.client(name).split or 0 for name in names])
        return MODEL.times.server_forward_s(server(), counts)

    slowest = max(up.values())
    single = CLOCK.validation_s(PLAN, {"one": 1, "two": 1})
    assert single == pytest.approx(slowest + deep("one", "two"))
    # Clients go on while the server computes.
    both = single + max(slowest, deep("one", "two"))
    assert CLOCK.validation_s(PLAN, {"one": 2, "two": 2}) == pytest.approx(both)
    assert CLOCK.validation_s(PLAN, {"one": 2, "two": 1}) == pytest.approx(max(single, 2 * up["one"]) + deep("one"))
    assert CLOCK.validation_s(PLAN, {"one": 1, "two": 0}) == pytest.approx(up["one"] + deep("one"))
    assert CLOCK.validation_s(PLAN, {"one": 0, "two": 0}) == 0


def test_validation_of_labels_at_home_ends_with_the_tails() -> None:
    at_home = cost("client")
    clock = VirtualClock(at_home, CLIENTS, server())
    up, tail = at_home.times.forward_times_at(
        CLIENTS[:1], np.array([PLAN.client("one").split]), Loads.of_plan(PLAN.available[:1], at_home.model.job)
    )[0].tolist()
    deep = at_home.times.server_forward_s(server(), at_home.model.clients_at([PLAN.client("one").split or 0]))
    # The tail of a batch waits until its client has sent all of them.
    ends, free = 3 * up, 0.0
    for index in range(3):
        free = max(free, (index + 1) * up) + deep
        ends = max(ends, free) + tail
    assert clock.validation_s(PLAN, {"one": 3}) == pytest.approx(ends)


def test_a_probe_is_so_much_of_a_batch_and_the_gradients_of_its_weights() -> None:
    batch = JOB.batch_size * JOB.max_length
    whole = CLOCK.probe_s(PLAN, batch)
    assert whole > PLAN.makespan_s
    # Examples are whole, and never more than a batch.
    assert CLOCK.probe_s(PLAN, 10 * batch) == whole
    half = CLOCK.probe_s(PLAN, JOB.max_length)
    assert half == CLOCK.probe_s(PLAN, 1)
    assert whole / 2 < half < whole


def test_a_dense_base_is_formed_anew_at_a_rounds_end() -> None:
    def spent(base: str, policy: Policy) -> float:
        return VirtualClock(cost(base=base), CLIENTS, server()).aggregation_s(PLAN, policy, {}, dict.fromkeys(names, 0))

    names = [c.name for c in PLAN.available]
    fresh = Policy(reinit="random")
    formed = spent("fp32", fresh) - spent("nf4", fresh)
    # Each residual at its cap, factors times one another, at whoever is slower at its layers.
    cap_products = {w.name: 2.0 * w.parameters * min(128, min(w.d_out, w.d_in) // 2) for w in MODEL.model.weights}
    split = PLAN.client("one").split or 0
    mine = sum(cap_products[w.name] for w in MODEL.model.weights if w.layer < split) / CLIENTS[0].flops
    first = PLAN.server.split or 0
    deep = sum(cap_products[w.name] for w in MODEL.model.weights if w.layer >= first) / server().flops
    assert formed == pytest.approx(mine + deep, rel=1e-6)
    average = Policy(aggregation="fedavg", ranks="uniform")
    model = CostModel(tiny_spec("llama"), JOB.model_copy(update={"base": "fp32"}), residual=False, decomposes=False)
    assert VirtualClock(model, CLIENTS, server()).aggregation_s(PLAN, average, {}, {}) == 0


def test_the_only_holder_of_a_weight_has_nothing_to_decompose() -> None:
    def at(split: int) -> Plan:
        ranks = {w.name: 4 for w in MODEL.model.weights if w.layer < split}
        deep = {w.name: 4 for w in MODEL.model.weights if w.layer >= split}
        clients = (replace(PLAN.clients[0], split=split, ranks=ranks),)
        return replace(PLAN, clients=clients, server=replace(PLAN.server, split=split, ranks=deep))

    alone = VirtualClock(MODEL, CLIENTS[:1], server())
    assert alone.aggregation_s(at(2), Policy(), {}, {}) == 0
    # Fresh adapters leave everything to the residual.
    assert alone.aggregation_s(at(2), Policy(reinit="random"), {}, {}) > 0


def test_a_move_costs_the_new_layers_and_what_goes_with_them() -> None:
    def at(split: int) -> Plan:
        return replace(PLAN, clients=tuple(replace(c, split=split) for c in PLAN.clients))

    one, all_ = at(1), at(LAYERS)
    assert CLOCK.reconfiguration_s(one, one, {}) == 0
    deeper = CLOCK.reconfiguration_s(one, all_, {})
    layers = sum(MODEL.model.stored_bytes[1:]) - 4 * MODEL.model.residual_entries[MODEL.model.weight_layer > 0].sum()
    assert deeper == pytest.approx(8 * layers / 1e8 + 1e-3, rel=1e-6)
    assert CLOCK.reconfiguration_s(all_, one, {}) == 0
    assert CLOCK.reconfiguration_s(all_, one, {"one": 10**6}) == pytest.approx(0.08 + 1e-3)
    assert CLOCK.reconfiguration_s(one, all_, {"one": 10**6}) > deeper
