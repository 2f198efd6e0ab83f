"""Split points and ranks of all holders, for most captured importance times examples a second (METHOD 5).

Seconds are those of a local step's makespan and of its part of the exchange at the round's end. METHOD 5 leaves the
exchange out, but layers on a client behind a slow link cost more to aggregate than they save the server.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hsplit.config import Policy
from hsplit.errors import InputError
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.counted_model import Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.freezing import with_frozen
from hsplit.planning.holder_plans import planned, whole_model
from hsplit.planning.importance import Score
from hsplit.planning.one_rank import OneRankProblem
from hsplit.planning.paced_plan import PacedPlanner, fleet_bound, paces
from hsplit.planning.plan import Plan, Speed
from hsplit.planning.problem import Problem, minimal_bytes
from hsplit.planning.rank_rules import find_rank_rule
from hsplit.planning.split_rules import find_split_rule

EQUAL = "equal importance per parameter (no score yet)"


def make_plan(
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    policy: Policy,
    current: Plan | None = None,
    source: str = EQUAL,
    vocabulary: Mapping[str, int] | None = None,
    examples: Mapping[str, int] | None = None,
    near: bool = False,
) -> Plan:
    """Give every holder its layers and ranks.

    Args:
        clients: every declared client; one without memory for the smallest part is in the plan as unavailable.
        server: the server's budget.
        cost: what splits and ranks cost.
        importance: ``H_w`` by weight name, for every adapted weight.
        policy: its ``placement``, ``train``, ``split`` and ``ranks``.
        current: the plan in force, a start of the search.
        source: where the importance comes from, in words.
        vocabulary: distinct token ids in each client's texts by name, where known: rows of the embedding to hold.
        examples: number of each client's examples by name, where known.
        near: a paced plan of few clients is only looked for around the plan in force, which is quick.

    Raises:
        InputError: the policy's split is no layer of the model, no client fits, or the server does not.
    """
    if policy.train == "weights":
        return whole_model(clients, server, cost, importance, policy.objective)
    smallest, layers = smallest_split(cost, policy), cost.model.layers
    if policy.placement == "split" and paces(policy.pace):
        known = vocabulary or {}, examples or {}
        return _paced_planner(clients, server, cost, importance, policy, *known, source).plan(current, near)
    ranks, rule = rank_choices(cost, policy), find_rank_rule(policy.ranks)
    needed = minimal_bytes(cost, int(ranks[0]))
    available = [c for c in clients if c.memory_bytes >= needed[smallest]]
    if not available:
        raise _no_client(clients, float(needed[smallest]), smallest, int(ranks[0]), policy)

    def problem_of(frozen: Collection[str]) -> Problem:
        kind = OneRankProblem if rule.one_for_all else Problem
        return kind(available, server, cost, importance, ranks, rule, frozen, constants=policy.objective)

    # A client with the full model holds every layer.
    split_rule = find_split_rule(policy.split if policy.placement == "split" else layers)
    problem = problem_of(())
    splits = split_rule(problem, current)
    _check_server(problem, splits)
    if policy.freezes:
        problem, splits = with_frozen(problem, splits, problem_of, split_rule, current)
    made = planned(problem, splits, clients, int(needed[smallest]), source)
    if policy.placement != "split":
        return made
    even, wires = np.full(len(available), 1 / len(available)), [cost.model.job.wire] * len(problem.distinct)
    bound = fleet_bound(cost, problem, int(ranks[0]), wires, even)
    binding = VirtualClock(cost, clients, server).binding(made)
    return replace(made, speed=Speed(made.rows / made.makespan_s, bound, binding))


def check_plan(
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    policy: Policy,
    vocabulary: Mapping[str, int],
) -> None:
    """Check that there is a plan, which is quicker than to make the best; arguments and errors as :func:`make_plan`."""
    if policy.placement == "split" and paces(policy.pace):
        _paced_planner(clients, server, cost, importance, policy, vocabulary, {}, EQUAL).check()
    else:
        make_plan(clients, server, cost, importance, policy, vocabulary=vocabulary)


def _paced_planner(
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    policy: Policy,
    vocabulary: Mapping[str, int],
    examples: Mapping[str, int],
    source: str,
) -> PacedPlanner:
    smallest, ranks, rule = smallest_split(cost, policy), rank_choices(cost, policy), find_rank_rule(policy.ranks)
    paced = PacedPlanner(clients, server, cost, importance, policy, ranks, rule, vocabulary, examples, source)
    if not paced.available:
        raise _no_client(clients, float(paced.needed[smallest]), smallest, int(ranks[0]), policy)
    return paced


def smallest_split(cost: CostModel, policy: Policy) -> int:
    """Fewest layers that a client holds under ``policy``.

    Raises:
        InputError: the model has fewer.
    """
    layers = cost.model.layers
    if policy.placement != "split":
        return layers
    if isinstance(policy.split, int) and policy.split > layers:
        raise InputError(f"policy: split: must be at most {layers}, the number of layers (got {policy.split})")
    return policy.split if isinstance(policy.split, int) else 1


def smallest_part_bytes(cost: CostModel, policy: Policy) -> int:
    """Memory that a client needs for the smallest part of the model under ``policy``."""
    if policy.train == "weights":
        return cost.training_bytes
    # One more byte, since a budget in GB is rounded to bytes.
    return 1 + int(np.ceil(minimal_bytes(cost, int(rank_choices(cost, policy)[0]))[smallest_split(cost, policy)]))


def rank_choices(cost: CostModel, policy: Policy) -> Ints:
    """Ranks that a plan under ``policy`` chooses from, ``(Q,)``."""
    if isinstance(policy.ranks, int):
        return np.array([policy.ranks], dtype=np.int64)
    return np.array(cost.rank_set, dtype=np.int64)


def _no_client(clients: Sequence[ClientBudget], needed: float, split: int, rank: int, policy: Policy) -> InputError:
    closest = max(clients, key=lambda c: c.memory_bytes)
    has = closest.memory_bytes / 1e9
    part = f"{split} layer{'' if split == 1 else 's'}" if policy.placement == "split" else "the full model"
    reason = "server: memory_gb: too small" if policy.placement == "single" else "clients: none has the memory"
    return InputError(
        f"{reason} for {part} at rank {rank}:"
        f" that takes {needed / 1e9:.3f} GB, and {closest.name} has the most with {has:.3f};"
        " raise memory_gb, or lower job.batch_size, job.max_length or job.residual.max_rank"
    )


def _check_server(problem: Problem, splits: Ints) -> None:
    lacking = float(problem.server_lacking(problem.state(splits).counts)[0])
    if lacking > 0:
        raise InputError(
            f"server: memory_gb: {problem.server.memory_bytes / 1e9:.3f} is {lacking / 1e9:.3f} GB too little"
            f" for its layers and {len(problem.clients)} clients; raise it, or lower job.batch_size,"
            " job.max_length or job.residual.max_rank"
        )
