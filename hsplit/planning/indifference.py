"""Fleets whose plans no importance score can change, so that none has to be probed (METHOD 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsplit.config import Policy
from hsplit.config.policy import Pace
from hsplit.config.section import is_reference
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import Score, equal_importance, size_of
from hsplit.planning.planner import rank_choices, smallest_split
from hsplit.planning.problem import Problem, minimal_bytes
from hsplit.planning.rank_rules import find_rank_rule


def indifferent_to_scores(
    clients: Sequence[ClientBudget], server: ServerBudget, cost: CostModel, policy: Policy
) -> bool:
    """True if :func:`~hsplit.planning.planner.make_plan` gives everybody the same layers and ranks by any scores.

    It is certain where every holder has memory for the largest rank of every weight at every split that the policy may
    choose, and there is either one such split for each client, or a plan captures the same at all of them. Clients that
    may be frozen, rows and turns that are planned, and a user's own rules may depend on scores in any way: false.

    Args:
        clients, server, cost, policy: as for the plan.
    """
    if policy.freezes or policy.pace != Pace() or policy.train == "weights":
        return False
    if is_reference(policy.ranks) or is_reference(policy.split):
        return False
    ranks, first = rank_choices(cost, policy), smallest_split(cost, policy)
    available = [c for c in clients if c.memory_bytes >= minimal_bytes(cost, int(ranks[0]))[first]]
    if not available:
        return False
    memory = np.array([client.memory_bytes for client in available])[:, None]
    largest = (minimal_bytes(cost, int(ranks[0])) <= memory).sum(axis=1) - 1
    if policy.placement != "split" or policy.split != "planned":
        last = np.full(len(available), largest.min() if policy.split == "uniform" else first)
    else:
        last = largest
    # Bytes grow with the split.
    if (minimal_bytes(cost, int(ranks[-1]))[last] > memory[:, 0]).any():
        return False
    if _most_server_bytes(cost, np.full(len(available), first), last, int(ranks[-1])) > server.memory_bytes:
        return False
    return bool((last == first).all()) or _captures_the_same(available, server, cost, policy, last)


def _most_server_bytes(cost: CostModel, first: Ints, last: Ints, rank: int) -> float:
    """At least the bytes of a server with all weights at ``rank``, by any splits of clients from ``first`` to ``last``.

    Shallower clients leave the server more layers and more rows; deeper ones send it more adapters at a round's end,
    which come on top at most.
    """
    shallow, deep = (cost.model.clients_at(splits.tolist())[None] for splits in (first, last))
    most = float((cost.server.constant(shallow) + rank * cost.server.per_rank(shallow).sum(axis=1))[0])
    return most if (first == last).all() else most + float(cost.server.constant(deep)[0])


def _captures_the_same(
    clients: Sequence[ClientBudget], server: ServerBudget, cost: CostModel, policy: Policy, last: Ints
) -> bool:
    """True if a plan with the largest ranks captures the same, by unequal scores, however deep its clients are."""
    ranks = rank_choices(cost, policy)
    # Later layers matter more, so that what moves between client and server would show.
    equal = equal_importance(cost.model.weights)
    scores: dict[str, Score] = {w.name: (1 + w.layer) * size_of(equal[w.name]) for w in cost.model.weights}
    rule = find_rank_rule(policy.ranks)
    problem = Problem(clients, server, cost, scores, ranks, rule, constants=policy.objective)
    splits = np.minimum(np.arange(1, int(last.max()) + 1)[:, None], last)
    captured: Floats = problem.captured(problem.state(splits))
    return bool(np.ptp(captured) <= 1e-9 * captured.max())
