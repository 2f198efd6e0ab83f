"""The virtual clock: everything that a run does has its time at the declared budgets (METHOD 8)."""

from dataclasses import replace

import pytest

from hsplit.config import Policy
from hsplit.scheduling.clock import VirtualClock
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.importance import equal_importance
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.planner import plan
from tests.scheduling.test_planner import JOB, client, cost, server
from tests.tiny import LAYERS, tiny_config

MODEL = cost()
CLIENTS = [client("one", 1e9), client("two", 1e9, 2e9)]
PLAN = plan(CLIENTS, server(), MODEL, equal_importance(MODEL.model.weights), Policy())
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
    model = CostModel(tiny_config("llama"), JOB, residual=False, decomposes=False)
    averaging = VirtualClock(model, CLIENTS, server())
    averaged = averaging.aggregation_s(PLAN, Policy(aggregation="fedavg", ranks="uniform"), up, down)
    fresh = CLOCK.aggregation_s(PLAN, Policy(reinit="random"), up, down)
    restarted = CLOCK.aggregation_s(PLAN, Policy(), up, down)
    assert sent == pytest.approx(averaged)
    assert averaged < fresh < restarted


def test_validation_joins_the_clients_that_still_have_batches() -> None:
    single = CLOCK.validation_s(PLAN, {"one": 1, "two": 1})
    assert 0 < single < PLAN.makespan_s
    alone = CLOCK.validation_s(PLAN, {"one": 1, "two": 0})
    assert CLOCK.validation_s(PLAN, {"one": 2, "two": 1}) == pytest.approx(single + alone)
    assert CLOCK.validation_s(PLAN, {"one": 2, "two": 2}) == pytest.approx(2 * single)


def test_a_probe_is_a_batch_and_the_gradients_of_its_weights() -> None:
    assert PLAN.makespan_s < CLOCK.probe_s(PLAN) < 2 * PLAN.makespan_s


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
