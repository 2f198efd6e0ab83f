"""Rules for the split point of each client. A new rule is one function and one registry line.

A user's own rule has the same form and is given as ``package.module:name``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hsplit.errors import InputError
from hsplit.extension import find_part
from hsplit.planning.cost.counted_model import Ints
from hsplit.planning.plan import Plan
from hsplit.planning.problem import Problem
from hsplit.planning.search import best_splits, searched_splits

SplitRule = Callable[[Problem, Plan | None], Ints]
"""Gives the clients' split points, ``(N,)``, by a planning problem and the plan in force: in the order of
``problem.clients``, each from 1 to ``problem.deepest``. ``problem.objective(problem.state(splits))`` is METHOD 5's."""


def uniform_splits(problem: Problem, current: Plan | None) -> Ints:
    """Choose one split for all: the best of those that the weakest client fits (SplitLoRA)."""
    candidates = [np.full(len(problem.clients), k) for k in range(1, int(problem.deepest.min()) + 1)]
    return best_splits(candidates, problem)


SPLIT_RULES: dict[str, SplitRule] = {"planned": searched_splits, "uniform": uniform_splits}


def find_split_rule(split: str | int) -> SplitRule:
    """Find the rule that a policy's ``split`` names; a number is the same split for all.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(split, int):
        return lambda problem, current: np.full(len(problem.clients), split)
    found = find_part(split, SPLIT_RULES, "policy: split")
    return found if split in SPLIT_RULES else _checked(split, found)


def _checked(name: str, rule: SplitRule) -> SplitRule:
    def checked(problem: Problem, current: Plan | None) -> Ints:
        try:
            splits: Ints = np.array(rule(problem, current)).astype(np.int64, casting="safe")
        except Exception as error:
            raise InputError(f"policy: split: {name} failed: {type(error).__name__}: {error}") from error
        if splits.shape != (len(problem.clients),):
            raise InputError(
                f"policy: split: {name} must give one split for each of {len(problem.clients)} clients"
                f" (got {splits.shape[0] if splits.ndim else 0})"
            )
        for client, split, deepest in zip(problem.clients, splits.tolist(), problem.deepest.tolist(), strict=True):
            if not 1 <= split <= deepest:
                raise InputError(
                    f"policy: split: {name} gives {client.name} a split at {split}; it must be from 1 to {deepest},"
                    " the deepest that it fits"
                )
        return splits

    return checked
