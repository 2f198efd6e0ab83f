"""Ranks of each weight of a holder, from the memory that is left. A new rule is one class and one registry line.

A user's own rule is a function from a :class:`RankRequest` to ranks, given as ``package.module:name``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsplit.errors import InputError
from hsplit.extension import find_part
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.ranks import Ladder, Levels, at_levels, greedy_levels


@dataclass(frozen=True)
class Holders:
    """Clients at one split, or variants of the server, as a rank rule sees them.

    Clients at one split hold the same weights, which cost all of them the same: ``tokens`` and ``bytes_per_rank`` are
    ``(W,)`` then, and ``(M, W)`` for the server.

    Attributes:
        kind: ``client`` or ``server``.
        weights: names of the model's weights, in layer order, ``W`` of them.
        values: captured by each weight at each rank, ``(W, Q)``.
        importance: of each weight, as a share of the whole model's, ``(W,)``.
        tokens: number of clients whose tokens pass through each weight here; 0: it is not held.
        bytes_per_rank: of each weight for one more unit of rank; 0 where it is not held.
        slack_bytes: memory left when every weight has the smallest rank, ``(M,)``.
        rank_set: ranks to choose from, increasing, ``(Q,)``.
    """

    kind: str
    weights: tuple[str, ...]
    values: Floats
    importance: Floats
    tokens: Ints
    bytes_per_rank: Floats
    slack_bytes: Floats
    rank_set: Ints

    def largest_common_levels(self) -> Ints:
        """Level of the largest rank that each holder fits for all its weights, ``(M,)``; -1 where none fits."""
        more_bytes = np.multiply.outer(self.bytes_per_rank.sum(axis=-1), self.rank_set - self.rank_set[0])
        levels: Ints = (more_bytes <= self.slack_bytes[:, None]).sum(axis=1) - 1
        return levels


class RankRule(ABC):
    """A rule for ranks, which it gives as indices into the rank set (**levels**).

    Attributes:
        one_for_all: all holders get the smallest of their ranks.
    """

    one_for_all = False

    @abstractmethod
    def levels(self, holders: Holders) -> Levels:
        """Level of each weight, ``(M, W)``; 0 where it is not held, or nothing is left."""

    def captured(self, holders: Holders) -> Floats:
        """Importance that clients at one split capture with these levels if all tokens were their own, ``(M,)``."""
        captured: Floats = (at_levels(holders.values, self.levels(holders)) * holders.tokens).sum(axis=1)
        return captured


class ByImportance(RankRule):
    """Each weight its own rank: where the memory that is left captures most importance (METHOD 5)."""

    def levels(self, holders: Holders) -> Levels:
        held = holders.tokens > 0
        if held.ndim > 1:
            values = holders.values * holders.tokens[:, :, None]
            return greedy_levels(holders.slack_bytes, held, holders.bytes_per_rank, values, holders.rank_set)
        levels = np.zeros((len(holders.slack_bytes), len(held)), dtype=np.int8)
        levels[:, held] = self._ladder(holders).levels(holders.slack_bytes)
        return levels

    def captured(self, holders: Holders) -> Floats:
        # Faster than by the levels of thousands of clients.
        return self._ladder(holders).captured(holders.slack_bytes)

    def _ladder(self, clients: Holders) -> Ladder:
        held = clients.tokens > 0
        return Ladder(clients.bytes_per_rank[held], clients.values[held], clients.rank_set)


@dataclass(frozen=True)
class ByBudget(RankRule):
    """Each holder one rank for all its weights: the largest that it fits, or that all holders fit."""

    one_for_all: bool = False

    def levels(self, holders: Holders) -> Levels:
        own = np.maximum(holders.largest_common_levels(), 0)
        levels: Levels = (own[:, None] * (holders.tokens > 0)).astype(np.int8)
        return levels

    def captured(self, holders: Holders) -> Floats:
        own = np.maximum(holders.largest_common_levels(), 0)
        by_level = holders.values.T[own]
        captured: Floats = (by_level * holders.tokens).sum(axis=1)
        return captured


@dataclass(frozen=True)
class RankRequest:
    """One holder's weights, on which a user's own rank rule decides.

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


@dataclass(frozen=True)
class Own(RankRule):
    """A user's own rule, called once for each kind of holder that could be; its ranks are checked.

    Attributes:
        name: as the policy gives it.
        rule: the function.
    """

    name: str
    rule: OwnRule

    def levels(self, holders: Holders) -> Levels:
        levels = np.zeros((len(holders.slack_bytes), len(holders.weights)), dtype=np.int8)
        tokens, prices = (np.broadcast_to(a, levels.shape) for a in (holders.tokens, holders.bytes_per_rank))
        for row, slack in enumerate(holders.slack_bytes.tolist()):
            # A server without room for the smallest ranks is refused later, with the bytes that it lacks.
            if slack >= 0:
                at = np.flatnonzero(tokens[row])
                request = RankRequest(
                    holders.kind,
                    tuple(holders.weights[w] for w in at),
                    tuple(holders.importance[at].tolist()),
                    tuple(tokens[row, at].tolist()),
                    tuple(prices[row, at].tolist()),
                    slack,
                    tuple(holders.rank_set.tolist()),
                )
                levels[row, at] = self._checked_levels(request)
        return levels

    def _checked_levels(self, request: RankRequest) -> list[int]:
        level_of = {rank: level for level, rank in enumerate(request.rank_set)}
        try:
            ranks = dict(self.rule(request))
            levels = [level_of[int(ranks[name])] for name in request.weights]
        except Exception as error:
            raise InputError(
                f"policy: ranks: {self.name} must give every weight a rank out of {list(request.rank_set)}"
                f" ({type(error).__name__}: {error})"
            ) from error
        smallest = request.rank_set[0]
        spent = sum(
            (request.rank_set[level] - smallest) * price
            for level, price in zip(levels, request.bytes_per_rank, strict=True)
        )
        if spent > request.slack_bytes:
            raise InputError(
                f"policy: ranks: {self.name} gives a {request.holder} ranks that take {spent / 1e6:.1f} MB more than"
                f" the smallest, {request.slack_bytes / 1e6:.1f} are left"
            )
        return levels


RANK_RULES: dict[str, RankRule] = {
    "importance": ByImportance(),
    "budget": ByBudget(),
    "uniform": ByBudget(one_for_all=True),
}


def find_rank_rule(ranks: str | int) -> RankRule:
    """Find the rule that a policy's ``ranks`` names; a number is one rank for all.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(ranks, int):
        return RANK_RULES["uniform"]
    if ranks in RANK_RULES:
        return RANK_RULES[ranks]
    own: Any = find_part(ranks, RANK_RULES, "policy: ranks")
    return Own(ranks, own)
