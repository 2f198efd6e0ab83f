"""Clients that only compute forward, where that is worth more than training their layers.

METHOD 1 lets a client hold layers without adapting them. Such a client sends its hidden states and gets no gradient
back, uploads no adapters at the round's end, and only follows what others have learned of its layers. Behind a slow
link a step takes half as long then, and training its few layers captures little.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.plan import Plan
from hsplit.planning.problem import AHEAD, DOWN, EXCHANGE, PHASES, TURN, UP, Problem
from hsplit.planning.search import TOLERANCE
from hsplit.planning.split_rules import SplitRule

FREEZABLE = 0.1
"""Largest part of what a plan captures that may be given up for time: what is never trained is missing at the end too.
"""
# Most times that splits are chosen again with other clients frozen; each takes as long as a plan.
MAX_FREEZES = 4


def with_frozen(
    problem: Problem,
    splits: Ints,
    problem_of: Callable[[Collection[str]], Problem],
    split_rule: SplitRule,
    current: Plan | None,
) -> tuple[Problem, Ints]:
    """Freeze clients and choose the splits again with them frozen, in turns while the objective grows.

    Args:
        problem: with no client frozen.
        splits: chosen for it, ``(N,)``.
        problem_of: the problem with some clients frozen.
        split_rule: chooses splits.
        current: the plan in force; the clients that are frozen in it are tried first.

    Returns:
        The problem with the frozen clients, and the splits for it.
    """
    names = np.array([client.name for client in problem.clients], dtype=object)
    best, best_splits, objective = problem, splits, _objective(problem, splits)
    # New splits may not give up more than freezing itself may. Clients frozen in force may stay so: a larger budget
    # never makes a plan worse.
    least = (1 - FREEZABLE) * float(problem.captured(problem.state(splits))[0])
    in_force = current.forward_only if current is not None else frozenset()
    tried: set[frozenset[str]] = {frozenset()}
    frozen = in_force & set(names)
    for _ in range(MAX_FREEZES):
        if frozen not in tried:
            tried.add(frozen)
            candidate = problem_of(frozen)
            for chosen in (best_splits, split_rule(candidate, current)):
                value, captured = _objective(candidate, chosen), float(candidate.captured(candidate.state(chosen))[0])
                if value > objective * (1 + TOLERANCE) and (captured >= least or frozen == in_force):
                    best, best_splits, objective = candidate, chosen, value
        frozen = frozenset(names[worth_freezing(problem, best_splits)].tolist())
        if frozen in tried:
            break
    return best, best_splits


def _objective(problem: Problem, splits: Ints) -> float:
    return float(problem.objective(problem.state(splits))[0])


def worth_freezing(problem: Problem, splits: Ints) -> NDArray[np.bool_]:
    """Find the clients to freeze for the largest objective, ``(N,)``.

    Freezing saves time with the clients that all others wait for. So clients are ordered by the time that it saves,
    and the best number of them is found in one pass; equal ones are frozen together.

    Args:
        problem: with no client frozen.
        splits: of all clients, ``(N,)``.
    """
    cost, kind, count = problem.cost, problem.kind, len(splits)
    chosen = np.zeros(count, dtype=bool)
    if cost.model.job.residual.max_rank == "full":
        # A residual without a cap has no room set aside for what a frozen client would keep of the restarts.
        return chosen
    state = problem.state(splits)
    phases, gains = problem.times[kind, splits], problem.client_captured(splits)
    frozen_exchange_s = problem.frozen_exchange(all_clients=False)[kind, splits]
    ahead = cost.model.job.runs_ahead
    saved_phases = (UP, DOWN, EXCHANGE) if ahead else (DOWN, EXCHANGE)
    saved_s = phases[:, saved_phases].sum(axis=1) - frozen_exchange_s
    order = np.argsort(-saved_s, kind="stable")
    # Row n: the longest phases with the first n clients of the order frozen.
    slowest: Floats = np.zeros((count + 1, PHASES))
    slowest[:, [UP, TURN]] = phases[:, [UP, TURN]].max(axis=0)
    slowest[-1, saved_phases] = 0.0
    slowest[:-1, saved_phases] = np.maximum.accumulate(phases[order[::-1]][:, saved_phases], axis=0)[::-1]
    if ahead:
        slowest[1:, AHEAD] = np.maximum.accumulate(phases[order, UP])
    slowest[1:, EXCHANGE] = np.maximum(slowest[1:, EXCHANGE], np.maximum.accumulate(frozen_exchange_s[order]))
    slowest[-1, EXCHANGE] = problem.frozen_exchange(all_clients=True)[kind, splits].max()
    lost = np.concatenate([[0.0], np.cumsum(gains[order])]) / count
    captured = problem.captured(state)[0] - lost
    server_s = float(cost.times.server_times(problem.server, state.counts)[0])
    objective = problem.per_second(captured, problem.pace(slowest, np.full(count + 1, server_s)))
    objective[lost > FREEZABLE * captured[0]] = -np.inf
    # A number of clients may not divide equal ones, or count one that saves nothing.
    ordered = saved_s[order]
    allowed = np.concatenate([[True], ordered[1:] < ordered[:-1], [True]]) & np.concatenate([[True], ordered > 0])
    best = int(np.where(allowed, objective, -np.inf).argmax())
    chosen[order[:best]] = True
    return chosen
