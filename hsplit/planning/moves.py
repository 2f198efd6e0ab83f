"""Moves of the search: one client, or all equal clients at one split together, to another split (METHOD 5).

With the server's ranks held fixed, captured importance, server seconds and server bytes are sums over clients, so that
the best split of each client can be found without regard to the others. The search proposes moves by these sums and
decides by the exact objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.problem import PHASES, Problem, State
from hsplit.planning.ranks import at_levels, steps_of


@dataclass(frozen=True)
class Prices:
    """Effect of one client on the server, by its split.

    Attributes:
        captured: importance that the server captures if all tokens were the client's, ``(L + 1,)``.
        seconds: of the server's phase; only differences between splits mean something, ``(L + 1,)``.
        bytes: of the server, likewise, ``(L + 1,)``.
        fixed_bytes: bytes of the server beside those of all clients.
    """

    captured: Floats
    seconds: Floats
    bytes: Floats
    fixed_bytes: float


def server_prices(problem: Problem, counts: Ints, levels: Ints, discount: Floats) -> Prices:
    """Find the prices at ``counts`` ``(L + 1,)``, from the change when one client is moved to each split.

    Args:
        problem: with the server.
        counts: clients at each split.
        levels: the server's ranks, as indices into the rank set, ``(W,)``.
        discount: of each layer's learning, ``(L,)``.
    """
    cost = problem.cost
    layers, servers = cost.model.layers, cost.model.servers
    splits = np.arange(layers + 1)
    # Every server gets the first one's load and a moved client: a single moved client need not change the first server.
    own = cost.model.served(counts[None])
    base = servers * own
    moved = np.repeat(base, layers + 1, axis=0)
    moved[:, int(own.argmax())] -= servers
    moved[splits, splits] += servers
    # One client's part of the change, where not all train or each server serves some of them.
    share = own.sum() / counts.sum()
    rows, ranks = np.concatenate([base, moved]), problem.rank_set[levels]
    seconds = cost.times.server_times(problem.server, rows)
    size = cost.server.constant(rows) + cost.server.per_rank(rows) @ ranks
    by_layer = np.bincount(cost.model.weight_layer, weights=at_levels(problem.values, levels), minlength=layers)
    worth = by_layer * discount
    # A client at split k has its rows joined at the layers from k on.
    captured = np.append(np.cumsum(worth[::-1])[::-1], 0.0)
    relative = share * (size[1:] - size[0])
    return Prices(captured, share * (seconds[1:] - seconds[0]), relative, float(size[0] - counts @ relative))


def next_byte(problem: Problem, counts: Ints, levels: Ints) -> float:
    """Importance that one more byte at the server would capture if ranks were fractions; 0 with all at the top."""
    steps, gains = steps_of(problem.rank_set), np.diff(problem.values, axis=1)
    unit = problem.cost.server.per_rank(counts[None])[0]
    joined = problem.cost.model.joined_clients(counts[None])[0][problem.cost.model.weight_layer]
    open_ = np.flatnonzero((joined > 0) & (levels < len(steps)))
    if not len(open_):
        return 0.0
    next_ = levels[open_]
    gain = gains[open_, next_] * joined[open_] / len(problem.clients)
    return float((gain / (unit[open_] * steps[next_])).max())


@dataclass(frozen=True)
class Group:
    """Groups of clients that are alike and at one split, as arrays.

    Attributes:
        kind, split, size: of each group, ``(G,)``.
        first: the first client of each, ``(G,)``.
        of_client: index of each client's group, ``(N,)``.
    """

    kind: Ints
    split: Ints
    size: Ints
    first: Ints
    of_client: Ints


class Moves:
    """Every move from some splits: each group as a whole, and one client of each group of several.

    Args:
        problem: that of the splits.
        splits: each client's split, ``(N,)``.

    Attributes:
        state: of ``splits``.
        group: index of the group that each row moves, ``(V,)``.
        alone: rows that move one client only, ``(V,)``.
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
        levels, counts = problem.server_levels(self.state)[0], self.state.counts[0]
        self._discount: Floats = problem.discounts(self.state)[0]
        self._prices = server_prices(problem, counts, levels, self._discount)
        self._per_byte = next_byte(problem, counts, levels)

    @property
    def pairs(self) -> int:
        """Number of moves, those that do not fit included."""
        return len(self.group) * self._problem.fits.shape[1]

    @cached_property
    def estimate(self) -> Floats:
        """Objective after each move with the server's ranks held fixed, ``(V, L + 1)``; ``-inf``: impossible."""
        problem, prices, kind, now = self._problem, self._prices, self._kind, self._now
        size = self._size[:, None]
        lacking = float(problem.server_lacking(self.state.counts)[0])
        if lacking > 0:
            score = -(lacking + size * (prices.bytes - prices.bytes[now][:, None]))
        else:
            server_s = problem.cost.times.server_times(problem.server, self.state.counts)[0]
            server_s = server_s + size * (prices.seconds - prices.seconds[now][:, None])
            slowest = np.maximum(self._others_slowest[:, None], problem.times[kind])
            score = problem.per_second(self._captured(), problem.pace(slowest, server_s))
        score = np.where(problem.fits[kind], score, -np.inf)
        score[np.arange(len(now)), now] = -np.inf
        return score

    def _captured(self) -> Floats:
        problem, prices, kind, now = self._problem, self._prices, self._kind, self._now
        clients = len(problem.clients)
        by_server = prices.captured - clients * self._per_byte * prices.bytes
        gain = problem.joint_gains(by_server, self._discount)[kind]
        before = gain[np.arange(len(now)), now]
        level = np.minimum(self._others_level[:, None], problem.common_levels[kind])
        return problem.captured_at(self.state, level) + (self._size / clients)[:, None] * (gain - before[:, None])

    @cached_property
    def _others_slowest(self) -> Floats:
        """Longest phases of the clients that each row leaves where they are, ``(V, PHASES)``."""
        times = self._problem.times[self._groups.kind, self._groups.split]
        rest = np.stack([largest_of_others(times[:, phase], 0.0) for phase in range(PHASES)], axis=1)
        return np.where(self.alone[:, None], self.state.slowest, rest[self.group])

    @cached_property
    def _others_level(self) -> Ints:
        """Least common level of the clients that each row leaves where they are, ``(V,)``."""
        levels = self._problem.common_levels[self._groups.kind, self._groups.split]
        rest = -largest_of_others(-levels, -len(self._problem.rank_set))
        return np.where(self.alone, self.state.level, rest[self.group])

    def states(self, rows: Ints, targets: Ints) -> State:
        """States after each single move of ``rows`` to ``targets``, both ``(M,)``."""
        problem, kind, now, size = self._problem, self._kind[rows], self._now[rows], self._size[rows]
        counts = np.repeat(self.state.counts, len(rows), axis=0)
        each = np.arange(len(rows))
        counts[each, now] -= size
        counts[each, targets] += size
        gain, trains = problem.client_gains, ~problem.frozen[kind]
        training = np.repeat(self.state.training, len(rows), axis=0)
        training[each, now] -= size * trains
        training[each, targets] += size * trains
        gains = np.repeat(self.state.gain, len(rows), axis=0)
        gains[each, now] -= size * gain[kind, now]
        gains[each, targets] += size * gain[kind, targets]
        return State(
            counts,
            training,
            gains,
            np.maximum(self._others_slowest[rows], problem.times[kind, targets]),
            np.minimum(self._others_level[rows], problem.common_levels[kind, targets]),
        )

    def together(self, rows: Ints, targets: Ints) -> Ints:
        """Splits ``(N,)`` after all moves of ``rows`` to ``targets``; of several rows of a group the first counts."""
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
    """Largest of the other values for each of ``values`` ``(G,)``; ``without`` where there are none."""
    if len(values) == 1:
        return np.full(1, without, dtype=values.dtype)
    top = int(values.argmax())
    rest = np.full(len(values), values[top])
    rest[top] = max(values[:top].max(initial=without), values[top + 1 :].max(initial=without))
    return rest
