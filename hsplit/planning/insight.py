"""The bottleneck of a plan, and the gain of more memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsplit.config import Policy
from hsplit.errors import InputError
from hsplit.planning.budgets import Budget, ClientBudget, ServerBudget, budget_of
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import Score
from hsplit.planning.moves import Prices, largest_of_others, server_prices
from hsplit.planning.plan import Plan
from hsplit.planning.planner import make_plan, rank_choices
from hsplit.planning.planning_state import Fleet
from hsplit.planning.problem import AHEAD, DOWN, EXCHANGE, UP, Problem
from hsplit.planning.rank_rules import RANK_RULES

GIGABYTE = 10**9
# Kinds of clients that are planned again with one more GB; of more kinds, those that promise most.
MAX_KINDS = 6
# As good as infinitely fast.
_FAST = 1e9


@dataclass(frozen=True)
class Bottleneck:
    """The holder that would shorten the makespan most if it and its link were infinitely fast.

    Clients of equal budgets count as one: speeding up one of them alone would shorten nothing.

    Attributes:
        name: client name or ``server``; of several alike, the first.
        kind: ``client`` or ``server``.
        alike: number of holders with this budget.
        shortens_s: seconds by which the makespan would be shorter (virtual).
    """

    name: str
    kind: str
    alike: int
    shortens_s: float


@dataclass(frozen=True)
class OneMoreGB:
    """Change of the plan if one holder has 1 GB more memory.

    Attributes:
        name: client name or ``server``; of several alike, the first.
        kind: ``client`` or ``server``.
        alike: number of holders with this budget; the gain is for one of them.
        joins: an unavailable client takes part then.
        objective_change: change of what plans maximize, captured importance times examples a second.
        captured_importance_change: change of captured importance.
        makespan_change_s: change of the makespan, seconds (virtual).
    """

    name: str
    kind: str
    alike: int
    joins: bool
    objective_change: float
    captured_importance_change: float
    makespan_change_s: float


@dataclass(frozen=True)
class Insight:
    """Figures that ``hsplit plan`` prints beside the plan.

    Attributes:
        bottleneck: the holder that the step waits for most.
        one_more_gb: by holder, the largest change of the objective first; equal clients once.
        kinds_left_out: number of kinds of clients beyond ``MAX_KINDS``, which were not tried.
    """

    bottleneck: Bottleneck
    one_more_gb: tuple[OneMoreGB, ...]
    kinds_left_out: int


def explained(
    made: Plan,
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    policy: Policy,
    fleet: Fleet | None = None,
) -> Insight:
    """Find the bottleneck of a plan and the gain of one more GB.

    Plans again, around ``made``, for the server and for each of at most ``MAX_KINDS`` kinds of clients. Of more kinds,
    it takes those with the largest gain if no other holder's part changed.

    Args:
        made: the plan.
        clients, server, cost, importance, policy: arguments of :func:`~hsplit.planning.planner.make_plan` that it was
            made with; of the importance only the proportions matter.
        fleet: what was known of the clients' data.
    """
    known = fleet or Fleet(())
    gains: list[OneMoreGB] = []

    def try_plan(name: str, alike: int, clients: Sequence[ClientBudget], server: ServerBudget) -> None:
        try:
            after = make_plan(
                clients,
                server,
                cost,
                importance,
                policy,
                made,
                vocabulary=known.vocabulary,
                examples=known.examples,
                near=True,
            )
        except InputError:
            # More memory can leave no plan at all: a client that joins may be one too many for the server.
            return
        is_client = name != "server"
        gain = OneMoreGB(
            name,
            "client" if is_client else "server",
            alike,
            is_client and after.client(name).available and not made.client(name).available,
            after.objective - made.objective,
            after.captured_importance - made.captured_importance,
            after.makespan_s - made.makespan_s,
        )
        gains.append(gain)

    first = _first_of_kind(clients)
    tried = _most_promising(made, clients, server, cost, importance, policy, list(first)) if first else []
    for index in tried:
        grown = [*clients[:index], _grown(clients[index]), *clients[index + 1 :]]
        try_plan(clients[index].name, first[index], grown, server)
    if policy.placement != "single":
        # The single node is the server's, and has been tried.
        try_plan("server", 1, clients, Budget("server", server.memory_bytes + GIGABYTE, server.flops))
    gains.sort(key=lambda g: -g.objective_change)
    holder = simulated_bottleneck(made, clients, server, cost) if overlaps(cost) else bottleneck(made, clients, cost)
    return Insight(holder, tuple(gains), len(first) - len(tried))


def overlaps(cost: CostModel) -> bool:
    """True if clients do not wait for one another in a step."""
    return cost.pace.periods != "none"


def simulated_bottleneck(
    made: Plan, clients: Sequence[ClientBudget], server: ServerBudget, cost: CostModel
) -> Bottleneck:
    """Find the holder that would shorten a step of overlapping turns most, by simulating without its seconds.

    Args:
        made: the plan.
        clients, server: the budgets that it was made with.
        cost: what steps cost.
    """
    taking_part = [next(c for c in clients if c.name == part.name) for part in made.available]
    makespan = VirtualClock(cost, taking_part, server).step_s(made)
    fast = Budget("server", server.memory_bytes, server.flops * _FAST)
    best = Bottleneck("server", "server", 1, makespan - VirtualClock(cost, taking_part, fast).step_s(made))
    first = _first_of_kind(taking_part)
    busiest = sorted(first, key=lambda i: -made.available[i].step_time_s)[:MAX_KINDS]
    for index in busiest:
        alike = budget_of(taking_part[index])
        faster: list[ClientBudget] = [
            Budget(c.name, c.memory_bytes, c.flops * _FAST, c.bandwidth_bps * _FAST, 0.0)
            if budget_of(c) == alike
            else c
            for c in taking_part
        ]
        shortens = makespan - VirtualClock(cost, faster, server).step_s(made)
        if shortens > best.shortens_s:
            best = Bottleneck(taking_part[index].name, "client", first[index], shortens)
    return best


def bottleneck(made: Plan, clients: Sequence[ClientBudget], cost: CostModel) -> Bottleneck:
    """Find the holder that the makespan waits for most.

    Args:
        made: the plan.
        clients: the budgets that it was made with.
        cost: what steps cost.
    """
    budgets = {c.name: c for c in clients}
    taking_part = [budgets[part.name] for part in made.available]
    splits = [part.split or 0 for part in made.available]
    # Phases of a step alone, without the exchange at a round's end.
    times = np.zeros((len(splits), EXCHANGE))
    times[:, :AHEAD] = cost.times.all_client_times(taking_part)[np.arange(len(splits)), splits]
    forward_only = [part.forward_only for part in made.available]
    times[forward_only, DOWN] = 0.0
    if cost.model.job.runs_ahead:
        times[forward_only, AHEAD] = times[forward_only, UP]
        times[forward_only, UP] = 0.0
    first = _first_of_kind(taking_part)
    kinds = {budget_of(taking_part[i]): k for k, i in enumerate(first)}
    kind = np.array([kinds[budget_of(c)] for c in taking_part])
    slowest = np.zeros((len(first), EXCHANGE))
    np.maximum.at(slowest, kind, times)
    without = np.stack([largest_of_others(slowest[:, phase], 0.0) for phase in range(EXCHANGE)], axis=1)
    now, server_s = slowest.max(axis=0), np.array(made.server.step_time_s)
    makespan = cost.times.makespan(now, server_s)
    shortens = makespan - cost.times.makespan(without, server_s)
    by_server = float(makespan - cost.times.makespan(now, np.array(0.0)))
    top = int(shortens.argmax())
    if shortens[top] <= by_server:
        return Bottleneck("server", "server", 1, by_server)
    index = list(first)[top]
    return Bottleneck(taking_part[index].name, "client", first[index], float(shortens[top]))


def _first_of_kind(clients: Sequence[ClientBudget]) -> dict[int, int]:
    """Index of the first client of each kind, with the number of clients of that kind."""
    indices: dict[tuple[float, ...], int] = {}
    sizes: dict[int, int] = {}
    for i, client in enumerate(clients):
        first = indices.setdefault(budget_of(client), i)
        sizes[first] = sizes.get(first, 0) + 1
    return sizes


def _grown(client: ClientBudget) -> Budget:
    memory_bytes = client.memory_bytes + GIGABYTE
    return Budget(client.name, memory_bytes, client.flops, client.bandwidth_bps, client.latency_s)


def _most_promising(
    made: Plan,
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    policy: Policy,
    indices: list[int],
) -> list[int]:
    """At most ``MAX_KINDS`` of ``indices``: those with the largest gain by one more GB if no other part changed."""
    if len(indices) <= MAX_KINDS:
        return indices
    ranks = rank_choices(cost, policy)
    now = np.array([made.clients[i].split or 0 for i in indices])
    given = server, cost, importance, ranks, RANK_RULES["importance"]
    before = Problem([clients[i] for i in indices], *given, constants=policy.objective)
    after = Problem([_grown(clients[i]) for i in indices], *given, constants=policy.objective)
    splits = np.array([part.split or 0 for part in made.available], dtype=np.int64)
    alike, frozen = np.ones(len(splits)), np.array([part.forward_only for part in made.available], dtype=bool)
    discount = after.discounts_of(splits[None], alike[None], frozen[None])[0]
    counts = cost.model.clients_at(splits.tolist())
    prices = server_prices(after, counts, np.full(len(after.worth), len(ranks) - 1), discount)
    worth_before = _worth(made, before, prices, discount)[before.kind, now]
    # A client that takes no part yet brings nothing.
    worth_before = np.where([made.clients[i].available for i in indices], worth_before, 0.0)
    worth_after = np.where(after.fits, _worth(made, after, prices, discount), -np.inf).max(axis=1)[after.kind]
    order = np.argsort(worth_before - worth_after, kind="stable")[:MAX_KINDS]
    return [indices[i] for i in order]


def _worth(made: Plan, problem: Problem, prices: Prices, discount: Floats) -> Floats:
    """Importance that a client of each kind brings at each split, less that of the seconds it takes, ``(K, L + 1)``."""
    taking_part = {part.name: part.split or 0 for part in made.available}
    members: Ints = np.array([i for i, c in enumerate(problem.clients) if c.name in taking_part], dtype=np.int64)
    splits = [taking_part[problem.clients[i].name] for i in members]
    slowest = problem.times[problem.kind[members], splits].max(axis=0, initial=0.0)
    beyond = np.maximum(problem.times - slowest, 0.0).sum(axis=2)
    captured = problem.joint_gains(prices.captured, discount) / len(made.available)
    worth: Floats = captured - made.price_of_a_second * (prices.seconds + beyond)
    return worth
