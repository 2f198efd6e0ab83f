"""Plans in which splits, rows, periods, stored forms and wire formats are chosen together (METHOD 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hsplit.config import Policy
from hsplit.config.job import wires_up_to
from hsplit.extension import is_reference
from hsplit.planning.bound import speed_bound
from hsplit.planning.budgets import Budget, ClientBudget, ServerBudget
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.one_rank import OneRankProblem
from hsplit.planning.pace import Choice, Flags, PacedProblem
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.problem import Problem, minimal_bytes
from hsplit.planning.rank_rules import Holders, RankRule, find_rank_rule
from hsplit.planning.ranks import captured_by
from hsplit.planning.split_rules import find_split_rule

# Most seconds of a client's link, in those that the fleet needs for a step if nothing waits, for its fair share of the
# rows: beyond, the link binds, and the next narrower format is taken.
_LINK_PART = 0.5


@dataclass(frozen=True)
class Fit:
    """What the policy's stored forms leave of a client's memory.

    Attributes:
        needed: bytes of a client with one example a batch at each split, at the smallest ranks, ``(L + 1,)``.
        usual: the same with ``job.batch_size``.
        unread: bytes of the embedding that each client does not hold, ``(N,)``.
    """

    needed: Floats
    usual: Floats
    unread: Floats
