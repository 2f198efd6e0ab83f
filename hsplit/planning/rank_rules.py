"""Which rank each weight of a holder gets from the memory that is left. A new rule is one class and one registry line.

A user's own rule is a function from a :class:`RankRequest` to ranks, given as ``package.module:name``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hsplit.errors import InputError
from hsplit.extension import find_part
from hsplit.planning.ranks import Levels, captured_by, greedy_levels

if TYPE_CHECKING:
    from hsplit.planning.cost.counted_model import Floats, Ints
    from hsplit.planning.problem import Problem


class RankRule(Protocol):
    """How a planning problem gives ranks, as indices into its rank set (**levels**).

    Attributes:
        coupled: all holders and weights have one rank, so that nobody's can be chosen alone.
    """

    coupled: bool

    def client_gains(self, problem: Problem) -> Floats:
        """Importance that each kind of client captures at each split if all tokens were its own, ``(K, L + 1)``."""

    def client_levels(self, problem: Problem, kinds: Ints, split: int) -> Levels:
        """Levels of clients of ``kinds`` at ``split``, ``(len(kinds), W)``; 0 where a weight is not held."""

    def server_levels(self, problem: Problem, counts: Ints) -> Levels:
        """Levels of the server beside clients at ``counts`` ``(M, L + 1)``: ``(M, W)``."""


class ByImportance:
    """Each weight its own: where the memory that is left captures most importance (METHOD 5)."""

    coupled = False

    def client_gains(self, problem: Problem) -> Floats:
        table: Floats = np.zeros(problem.fits.shape)
        for split in range(1, problem.cost.model.layers + 1):
            fitting = np.flatnonzero(problem.deepest_of_kind >= split)
            if len(fitting):
                slack = problem.memory[fitting] - problem.needed[split]
                table[fitting, split] = problem.ladder(split).captured(slack)
        return table

    def client_levels(self, problem: Problem, kinds: Ints, split: int) -> Levels:
        levels = np.zeros((len(kinds), len(problem.worth)), dtype=np.int8)
        slack = problem.memory[kinds] - problem.needed[split]
        levels[:, problem.held[split]] = problem.ladder(split).levels(slack)
        return levels

    def server_levels(self, problem: Problem, counts: Ints) -> Levels:
        unit = problem.cost.server.per_rank(counts)
        joined = problem.cost.model.joined_clients(counts)[:, problem.cost.model.weight_layer]
        slack = problem.server.memory_bytes - problem.server_minimal(counts)
        return greedy_levels(slack, joined > 0, unit, problem.worth * joined, problem.rank_set)


class ByBudget:
    """Each holder one rank for all its weights: the largest that it fits."""

    coupled = False

    def client_gains(self, problem: Problem) -> Floats:
        gains: Floats = captured_by(problem.rank_set)[np.maximum(problem.client_levels, 0)]
        return gains * (problem.held @ problem.worth) * problem.fits

    def client_levels(self, problem: Problem, kinds: Ints, split: int) -> Levels:
        own = np.maximum(problem.client_levels[kinds, split], 0)
        levels: Levels = (own[:, None] * problem.held[split]).astype(np.int8)
        return levels

    def server_levels(self, problem: Problem, counts: Ints) -> Levels:
        joined = problem.cost.model.joined_clients(counts)[:, problem.cost.model.weight_layer]
        levels: Levels = (np.maximum(problem.server_level(counts), 0)[:, None] * (joined > 0)).astype(np.int8)
        return levels


class OneForAll:
    """One rank for all weights and holders: the largest that everybody fits."""

    coupled = True

    def client_gains(self, problem: Problem) -> Floats:
        # What is captured depends on the common level alone.
        return np.zeros(problem.fits.shape)

    def client_levels(self, problem: Problem, kinds: Ints, split: int) -> Levels:
        raise NotImplementedError("the level is everybody's, see Problem.uniform_levels")

    def server_levels(self, problem: Problem, counts: Ints) -> Levels:
        raise NotImplementedError("the level is everybody's, see Problem.uniform_levels")


@dataclass(frozen=True)
class RankRequest:
    """What a user's own rank rule decides on: the weights of one holder.

    Attributes:
        holder: ``client`` or ``server``.
        weights: their names, in layer order.
        importance: of each, as a share of the whole model's.
        tokens: number of clients whose tokens pass through each weight here (1 at a client).
        bytes_per_rank: of each, for one more unit of rank.
        slack_bytes: memory left when every weight has the smallest rank.
        rank_set: ranks to choose from, increasing.
    """

    holder: str
    weights: tuple[str, ...]
    importance: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes_per_rank: tuple[float, ...]
    slack_bytes: float
    rank_set: tuple[int, ...]


OwnRule = Callable[[RankRequest], Mapping[str, int]]
"""Gives a rank out of ``rank_set`` by weight name, for every weight, within ``slack_bytes``."""


class Own:
    """A user's own rule, asked once for each kind of holder that could be; what it gives is checked.

    Args:
        name: as the policy gives it.
        rule: the function.
    """

    coupled = False

    def __init__(self, name: str, rule: OwnRule) -> None:
        self._name, self._rule = name, rule

    def client_gains(self, problem: Problem) -> Floats:
        table: Floats = np.zeros(problem.fits.shape)
        gained = captured_by(problem.rank_set)
        for split in range(1, problem.cost.model.layers + 1):
            fitting = np.flatnonzero(problem.deepest_of_kind >= split)
            levels = self.client_levels(problem, fitting, split)
            table[fitting, split] = (gained[levels] * problem.held[split]) @ problem.worth
        return table

    def client_levels(self, problem: Problem, kinds: Ints, split: int) -> Levels:
        held, unit = problem.held[split], problem.cost.client.per_rank
        levels = np.zeros((len(kinds), len(held)), dtype=np.int8)
        for row, kind in enumerate(kinds.tolist()):
            slack = float(problem.memory[kind] - problem.needed[split])
            levels[row] = self._asked(problem, "client", held.astype(np.int64), unit, slack)
        return levels

    def server_levels(self, problem: Problem, counts: Ints) -> Levels:
        unit = problem.cost.server.per_rank(counts)
        joined = problem.cost.model.joined_clients(counts)[:, problem.cost.model.weight_layer]
        slack = problem.server.memory_bytes - problem.server_minimal(counts)
        rows = [
            self._asked(problem, "server", tokens, prices, float(left))
            # A server without room for the smallest ranks is refused later, with the bytes that it lacks.
            if left >= 0
            else np.zeros(len(tokens), dtype=np.int8)
            for tokens, prices, left in zip(joined, unit, slack, strict=True)
        ]
        return np.stack(rows)

    def _asked(self, problem: Problem, holder: str, tokens: Ints, unit: Floats, slack: float) -> Levels:
        at = np.flatnonzero(tokens > 0)
        names = tuple(problem.cost.model.weights[w].name for w in at)
        request = RankRequest(
            holder,
            names,
            tuple(problem.worth[at].tolist()),
            tuple(tokens[at].tolist()),
            tuple(unit[at].tolist()),
            slack,
            tuple(problem.rank_set.tolist()),
        )
        try:
            given = dict(self._rule(request))
            ranks = [int(given[name]) for name in names]
            level_of = {rank: level for level, rank in enumerate(request.rank_set)}
            levels = [level_of[rank] for rank in ranks]
        except Exception as error:
            raise InputError(
                f"policy: ranks: {self._name} must give every weight a rank out of {list(request.rank_set)}"
                f" ({type(error).__name__}: {error})"
            ) from error
        spent = sum((rank - request.rank_set[0]) * price for rank, price in zip(ranks, unit[at], strict=True))
        if spent > slack:
            raise InputError(
                f"policy: ranks: {self._name} gives a {holder} ranks that take {spent / 1e6:.1f} MB more than the"
                f" smallest, {slack / 1e6:.1f} are left"
            )
        found = np.zeros(len(tokens), dtype=np.int8)
        found[at] = levels
        return found


RANK_RULES: dict[str, RankRule] = {
    "importance": ByImportance(),
    "budget": ByBudget(),
    "uniform": OneForAll(),
}


def find_rank_rule(ranks: str | int) -> RankRule:
    """The rule that a policy's ``ranks`` means; a number is one rank for all.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(ranks, int):
        return RANK_RULES["uniform"]
    if ranks in RANK_RULES:
        return RANK_RULES[ranks]
    own: Any = find_part(ranks, RANK_RULES, "policy: ranks")
    return Own(ranks, own)
