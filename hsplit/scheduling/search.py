"""Split points: starts of least makespan, then local search (METHOD 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsplit.scheduling.counted_model import Ints
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.problem import Problem

# The most deadlines that are scanned; beyond it, evenly spread ones among the distinct client times.
MAX_DEADLINES = 256
# How many of the starts are searched from.
SEARCHED_STARTS = 4
# An improvement smaller than this, relative, is rounding.
TOLERANCE = 1e-9


def searched_splits(problem: Problem, current: Plan | None) -> Ints:
    """Local search from the best starts."""
    shallowest = np.ones(len(problem.clients), dtype=np.int64)
    starts = [shallowest, *_deadline_starts(problem)]
    scores = [float(problem.objective(problem.state(s))[0]) for s in starts]
    chosen = [starts[i] for i in np.argsort(-np.array(scores), kind="stable")[:SEARCHED_STARTS]]
    if current is not None:
        # First, so that among equals the plan in force stays.
        chosen = [_in_force(problem, current), *chosen]
    return best_splits([_improved(problem, start) for start in _distinct(chosen)], problem)


def _deadline_starts(problem: Problem) -> list[Ints]:
    """For every deadline: the deepest split of each client that fits and ends by then, at least 1."""
    totals = problem.times.sum(axis=2)[:, 1:]
    fits = np.arange(1, problem.cost.model.layers + 1) <= problem.deepest_of_kind[:, None]
    deadlines = np.unique(totals[fits])
    if len(deadlines) > MAX_DEADLINES:
        deadlines = deadlines[np.linspace(0, len(deadlines) - 1, MAX_DEADLINES).round().astype(np.int64)]
    # Times grow with the split, so those that end in time are the first ones.
    starts = [np.maximum((fits & (totals <= deadline)).sum(axis=1), 1)[problem.kind] for deadline in deadlines]
    return _distinct(starts)


def _in_force(problem: Problem, current: Plan) -> Ints:
    known = {c.name: c.split for c in current.available}
    splits = np.array([known.get(c.name) or 1 for c in problem.clients], dtype=np.int64)
    return np.clip(splits, 1, problem.deepest)


def _distinct(starts: Sequence[Ints]) -> list[Ints]:
    return list({start.tobytes(): start for start in starts}.values())


def _improved(problem: Problem, start: Ints) -> Ints:
    """Move one kind of clients, or one of them, at a time to its best split while the objective improves."""
    splits = start.copy()
    best = float(problem.objective(problem.state(splits))[0])
    improving = True
    while improving:
        improving = False
        for kind in range(len(problem.memory)):
            members = np.flatnonzero(problem.kind == kind)
            targets = np.arange(1, problem.deepest_of_kind[kind] + 1)
            for now in np.unique(splits[members]):
                together = members[splits[members] == now]
                for group in (together, together[:1]) if len(together) > 1 else (together,):
                    scores = problem.objective(problem.moves(splits, group, targets))
                    top = int(scores.argmax())
                    if scores[top] > best + TOLERANCE * abs(best):
                        best, improving = float(scores[top]), True
                        splits[group] = targets[top]
                        break
    return splits


def best_splits(candidates: Sequence[Ints], problem: Problem) -> Ints:
    """The candidate ``(N,)`` with the largest objective, the first among equals."""
    scores = [float(problem.objective(problem.state(c))[0]) for c in candidates]
    return candidates[int(np.argmax(scores))]
