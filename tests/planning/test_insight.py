"""Whom a plan waits for, and what one more GB would buy."""

from typing import Any

import numpy as np
import pytest

import hsplit.planning.insight as insight
from hsplit.config import Policy
from hsplit.planning.insight import GIGABYTE, bottleneck, explained
from hsplit.planning.planner import make_plan
from tests.planning.test_planner import LARGEST, SMALLEST, client, cost, importance, objective, server


def explained_plan(clients: list, deep: Any, policy: Policy | None = None) -> tuple[Any, insight.Insight]:
    policy = policy or Policy()
    made = make_plan(clients, deep, cost(), importance(0), policy)
    return made, explained(made, clients, deep, cost(), importance(0), policy)


def test_the_bottleneck_is_who_would_shorten_the_step_most() -> None:
    fast, slow = client("fast", LARGEST, 1e11, 1e10), client("slow", LARGEST, 1e6, 1e10)
    clients = [fast, slow]
    made = make_plan(clients, server(), cost(), importance(0), Policy())
    waits = bottleneck(made, clients, cost())
    assert (waits.name, waits.kind, waits.alike) == ("slow", "client", 1)
    rest = cost().times.client_times(fast)[made.client("fast").split].sum()
    assert made.makespan_s - waits.shortens_s == pytest.approx(made.server.step_time_s + rest)


def test_equal_clients_are_one_bottleneck() -> None:
    clients = [client(f"slow-{i}", LARGEST, 1e6) for i in range(3)]
    made = make_plan(clients, server(), cost(), importance(0), Policy())
    waits = bottleneck(made, clients, cost())
    assert (waits.name, waits.alike) == ("slow-0", 3)
    assert waits.shortens_s == pytest.approx(made.makespan_s - made.server.step_time_s)


def test_a_slow_server_is_the_bottleneck() -> None:
    clients = [client("one", SMALLEST * 1.1, 1e12, 1e12)]
    made = make_plan(clients, server(flops=1e6), cost(), importance(0), Policy())
    waits = bottleneck(made, clients, cost())
    assert (waits.name, waits.kind, waits.shortens_s) == ("server", "server", made.server.step_time_s)


@pytest.mark.parametrize("policy", [Policy(), Policy(split="uniform", ranks="uniform"), Policy(ranks=4)])
def test_one_more_gb_is_what_planning_anew_gives(policy: Policy) -> None:
    clients = [client(f"phone-{i}", SMALLEST * 1.2) for i in range(2)] + [client("large", LARGEST, 1e10)]
    deep = server(1e9, 1e9)
    made, told = explained_plan(clients, deep, policy)
    assert {(g.name, g.alike) for g in told.one_more_gb} == {("phone-0", 2), ("large", 1), ("server", 1)}
    grown = [clients[0].model_copy(update={"memory_gb": clients[0].memory_gb + GIGABYTE / 1e9}), *clients[1:]]
    after = make_plan(grown, deep, cost(), importance(0), policy, made)
    (phone,) = (g for g in told.one_more_gb if g.name == "phone-0")
    assert not phone.joins
    assert phone.objective_change == pytest.approx(objective(after) - objective(made))
    assert phone.captured_importance_change == pytest.approx(after.captured_importance - made.captured_importance)
    assert phone.makespan_change_s == pytest.approx(after.makespan_s - made.makespan_s)
    changes = [g.objective_change for g in told.one_more_gb]
    assert changes == sorted(changes, reverse=True)
    if policy.split == "planned":
        assert min(changes) >= -1e-9 * objective(made)


def test_what_one_more_gb_brings_is_in_proportion_whatever_the_scale_of_the_importance() -> None:
    clients = [client("small", SMALLEST * 1.2), client("large", LARGEST, 1e10)]
    made, told = explained_plan(clients, server())
    scaled = {name: 1000 * score for name, score in importance(0).items()}
    again = explained(made, clients, server(), cost(), scaled, Policy())
    changes = [g.objective_change for g in told.one_more_gb]
    assert [g.objective_change for g in again.one_more_gb] == pytest.approx(changes)


def test_one_more_gb_lets_an_unavailable_client_take_part() -> None:
    clients = [client("watch", SMALLEST / 2), client("large", LARGEST)]
    _, told = explained_plan(clients, server())
    assert {g.name: g.joins for g in told.one_more_gb} == {"watch": True, "large": False, "server": False}


def test_of_many_kinds_the_most_promising_are_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    clients = [client(f"c{i}", SMALLEST * (1.05 + 0.1 * i), 10 ** draw.uniform(8, 10)) for i in range(7)]
    monkeypatch.setattr(insight, "MAX_KINDS", 7)
    _, every = explained_plan(clients, server())
    monkeypatch.setattr(insight, "MAX_KINDS", 3)
    _, some = explained_plan(clients, server())
    assert some.kinds_left_out == 4 and every.kinds_left_out == 0
    assert len(some.one_more_gb) == 4
    best = next(g for g in every.one_more_gb if g.kind == "client")
    assert best in some.one_more_gb
