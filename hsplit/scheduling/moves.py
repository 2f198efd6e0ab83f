"""Moving one client, or all equal clients at one split together, to another split (METHOD 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.scheduling.counted_model import Floats, Ints
from hsplit.scheduling.prices import next_byte, server_prices
from hsplit.scheduling.problem import PHASES, Problem, State
from hsplit.scheduling.ranks import captured_by


@dataclass(frozen=True)
class Group:
    """Arrays over the groups of clients that are alike and at one split.

    Attributes:
        kind, split, size: of each group, ``(G,)``.
        first: the first client of each, ``(G,)``.
        of_client: which group each client is in, ``(N,)``.
    """

    kind: Ints
    split: Ints
    size: Ints
    first: Ints
    of_client: Ints


class Moves:
    """Every move from given splits: each group as a whole, and one of each group of several.

    Args:
        problem: what the splits are of.
        splits: each client's split, ``(N,)``.

    Attributes:
        state: of ``splits``.
        group: the group that each row moves, ``(V,)``.
        alone: whether it moves one client only, ``(V,)``.
        estimate: the objective after each move with the server's ranks held, ``(V, L + 1)``; ``-inf`` where the
            client does not fit, or is already.
    """

    def __init__(self, problem: Problem, splits: Ints) -> None:
        self._problem, self._splits = problem, splits
        self.state = problem.state(splits)
        self._groups = _groups(problem, splits)
        several = np.flatnonzero(self._groups.size > 1)
        count = len(self._groups.size)
        self.group: Ints = np.concatenate([np.arange(count), several])
        self.alone: NDArray[np.bool_] = np.arange(len(self.group)) >= count
        self._kind, self._now = self._groups.kind[self.group], self._groups.split[self.group]
        self._size: Ints = np.where(self.alone, 1, self._groups.size[self.group])
        counts, coupled = self.state.counts, problem.coupled
        levels = problem.uniform_levels(self.state) if coupled else problem.server_levels(counts)[0].astype(np.int64)
        self._prices = server_prices(problem, counts[0], levels)
        self._per_byte = 0.0 if coupled else next_byte(problem, counts[0], levels)

    @property
    def pairs(self) -> int:
        """How many moves there are, those that do not fit included."""
        return len(self.group) * self._problem.fits.shape[1]

    @cached_property
    def estimate(self) -> Floats:
        """The objective after each move, estimated, ``(groups, splits)``; minus infinity where one does not fit."""
        problem, prices, kind, now = self._problem, self._prices, self._kind, self._now
        size = self._size[:, None]
        lacking = float(problem.server_minimal(self.state.counts)[0]) - problem.server.memory_bytes
        if lacking > 0:
            score = -(lacking + size * (prices.bytes - prices.bytes[now][:, None]))
        else:
            server_s = problem.cost.times.server_times(problem.server, self.state.counts)[0]
            server_s = server_s + size * (prices.seconds - prices.seconds[now][:, None])
            slowest = np.maximum(self._others_slowest[:, None], problem.times[kind])
            score = self._captured() / problem.pace(slowest, server_s)
        score = np.where(problem.fits[kind], score, -np.inf)
        score[np.arange(len(now)), now] = -np.inf
        return score

    def _captured(self) -> Floats:
        problem, prices, kind, now = self._problem, self._prices, self._kind, self._now
        if problem.coupled:
            server = int(problem.server_level(self.state.counts)[0])
            level = np.minimum(self._others_level[:, None], problem.client_levels[kind])
            return captured_by(problem.rank_set)[np.clip(level, 0, max(server, 0))] * problem.worth.sum()
        clients = len(problem.clients)
        gain = problem.client_gains[kind] + prices.captured - clients * self._per_byte * prices.bytes
        before = gain[np.arange(len(now)), now]
        return float(problem.captured(self.state)[0]) + (self._size / clients)[:, None] * (gain - before[:, None])

    @cached_property
    def _others_slowest(self) -> Floats:
        """Largest time in each phase of the clients that each row does not move, ``(V, PHASES)``."""
        times = self._problem.times[self._groups.kind, self._groups.split]
        rest = np.stack([largest_of_others(times[:, phase], 0.0) for phase in range(PHASES)], axis=1)
        return np.where(self.alone[:, None], self.state.slowest, rest[self.group])

    @cached_property
    def _others_level(self) -> Ints:
        """With one rank for all: the largest that the clients fit which each row does not move, ``(V,)``."""
        levels = self._problem.client_levels[self._groups.kind, self._groups.split]
        rest = -largest_of_others(-levels, -len(self._problem.rank_set))
        return np.where(self.alone, self.state.level, rest[self.group])

    def states(self, rows: Ints, targets: Ints) -> State:
        """The states after moving ``rows`` to ``targets``, each ``(M,)``, one at a time."""
        problem, kind, now, size = self._problem, self._kind[rows], self._now[rows], self._size[rows]
        counts = np.repeat(self.state.counts, len(rows), axis=0)
        each = np.arange(len(rows))
        counts[each, now] -= size
        counts[each, targets] += size
        gain = problem.client_gains
        return State(
            counts,
            self.state.gain + size * (gain[kind, targets] - gain[kind, now]),
            np.maximum(self._others_slowest[rows], problem.times[kind, targets]),
            np.minimum(self._others_level[rows], problem.client_levels[kind, targets])
            if problem.coupled
            else np.zeros(len(rows), dtype=np.int64),
        )

    def together(self, rows: Ints, targets: Ints) -> Ints:
        """The splits ``(N,)`` after moving ``rows`` to ``targets``, all at once; of a group's rows the first counts."""
        rows, targets = rows[::-1], targets[::-1]
        of_group = self._groups.split.copy()
        whole = ~self.alone[rows]
        of_group[self.group[rows[whole]]] = targets[whole]
        splits = of_group[self._groups.of_client]
        splits[self._groups.first[self.group[rows[~whole]]]] = targets[~whole]
        return splits


def _groups(problem: Problem, splits: Ints) -> Group:
    width = problem.fits.shape[1]
    keys, first, of_client, size = np.unique(
        problem.kind * width + splits, return_index=True, return_inverse=True, return_counts=True
    )
    kind, split = np.divmod(keys, width)
    return Group(kind, split, size, first, of_client)


def largest_of_others(values: NDArray, without: float) -> NDArray:
    """For each of ``values`` ``(G,)`` the largest of the others; ``without`` any."""
    if len(values) == 1:
        return np.full(1, without, dtype=values.dtype)
    top = int(values.argmax())
    rest = np.full(len(values), values[top])
    rest[top] = max(values[:top].max(initial=without), values[top + 1 :].max(initial=without))
    return rest
