"""One planning problem: the objective of any splits, with all that can be computed beforehand (METHOD 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.rank_rules import RankRule
from hsplit.planning.ranks import Ladder, Levels, captured_by


def minimal_bytes(cost: CostModel, rank: int) -> Floats:
    """What each split needs of a client with every weight at ``rank``: ``(L + 1,)``."""
    held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
    needed: Floats = cost.client.constant + rank * (held @ cost.client.per_rank)
    return needed


UP, TURN, DOWN, AHEAD, EXCHANGE = range(5)
PHASES = 5
"""Up, turn and down of a local step, up of those who are a step ahead, and the part of the exchange at the round's end.
"""


@dataclass(frozen=True)
class State:
    """What the objective of some splits depends on, one row a variant.

    Attributes:
        counts: clients at each split, ``(M, L + 1)``.
        gain: importance that the clients capture, summed over them, ``(M,)``.
        slowest: largest time of a client in each phase, ``(M, PHASES)``.
        level: with one rank for all, the largest that every client fits, as index, ``(M,)``.
    """

    counts: Ints
    gain: Floats
    slowest: Floats
    level: Ints


class Problem:
    """One planning problem over the available clients, with all that can be computed before searching.

    Clients of equal budgets are one **kind**; every table is over kinds.

    Args:
        clients: the available clients, ``N`` of them.
        server, cost, importance: as for :func:`plan`.
        rank_set: ranks to choose from, ``(Q,)``.
        rule: how ranks are chosen.
        frozen: names of clients that only compute forward.

    Attributes:
        frozen: which kinds only compute forward, ``(K,)``.
        coupled: one rank for all weights and holders.
        kind: each client's kind, ``(N,)``.
        members: how many clients each kind has, ``(K,)``.
        memory: their bytes, ``(K,)``.
        times: seconds of their phases at each split, ``(K, L + 1, PHASES)``; they never fall with the split.
        needed: bytes that each split takes at the smallest rank, ``(L + 1,)``.
        deepest_of_kind: the deepest split that each kind fits, ``(K,)``.
        worth: importance of each weight, ``(W,)``.
    """

    def __init__(
        self,
        clients: Sequence[ClientBudget],
        server: ServerBudget,
        cost: CostModel,
        importance: Mapping[str, float],
        rank_set: Ints,
        rule: RankRule,
        frozen: Collection[str] = (),
    ) -> None:
        self.clients, self.server, self.cost = clients, server, cost
        self.rank_set, self.coupled, self._rule = rank_set, rule.coupled, rule
        scores = np.array([importance[w.name] for w in cost.model.weights], dtype=np.float64)
        # Only proportions matter; shares make what plans capture comparable, whatever the scores' unit.
        self.worth: Floats = scores / scores.sum()
        self._ladders: dict[int, Ladder] = {}
        kinds: dict[tuple[float, ...], int] = {}
        keys = [(*budget_of(c), c.name in frozen) for c in clients]
        self.kind: Ints = np.array([kinds.setdefault(key, len(kinds)) for key in keys], dtype=np.int64)
        first = np.unique(self.kind, return_index=True)[1].tolist()
        self.members: Ints = np.bincount(self.kind)
        self.memory: Floats = np.array([clients[i].memory_bytes for i in first], dtype=np.float64)
        distinct = [clients[i] for i in first]
        self.frozen: NDArray[np.bool_] = np.array([clients[i].name in frozen for i in first], dtype=bool)
        self.times: Floats = np.zeros((len(distinct), cost.model.layers + 1, PHASES))
        self.times[:, :, [UP, TURN, DOWN]] = cost.times.all_client_times(distinct)
        self.times[:, :, EXCHANGE] = cost.times.exchange_times(distinct)
        self.times[self.frozen, :, DOWN] = 0.0
        if cost.model.job.runs_ahead:
            self.times[self.frozen, :, AHEAD] = self.times[self.frozen, :, UP]
            self.times[self.frozen, :, UP] = 0.0
        self.times[self.frozen, :, EXCHANGE] = self.frozen_exchange(bool(self.frozen.all()))[self.frozen]
        self.needed = minimal_bytes(cost, int(rank_set[0]))
        # Bytes grow with the split, so the splits that fit are those up to the deepest.
        self.deepest_of_kind: Ints = (self.needed <= self.memory[:, None]).sum(axis=1) - 1

    @property
    def deepest(self) -> Ints:
        """Deepest split that each client fits, ``(N,)``."""
        return self.deepest_of_kind[self.kind]

    @cached_property
    def fits(self) -> NDArray[np.bool_]:
        """Which splits from 1 each kind fits, ``(K, L + 1)``: those that planning chooses from."""
        splits = np.arange(self.cost.model.layers + 1)
        fits: NDArray[np.bool_] = (splits >= 1) & (splits <= self.deepest_of_kind[:, None])
        return fits

    @cached_property
    def held(self) -> NDArray[np.bool_]:
        """Which weights a client holds at each split, ``(L + 1, W)``."""
        splits = np.arange(self.cost.model.layers + 1)
        held: NDArray[np.bool_] = splits[:, None] > self.cost.model.weight_layer
        return held

    @cached_property
    def client_levels(self) -> Ints:
        """With one rank for all: index of the largest that each kind fits at each split, ``(K, L + 1)``."""
        unit = self.held @ self.cost.client.per_rank
        needed = self.cost.client.constant[:, None] + unit[:, None] * self.rank_set
        levels: Ints = (needed[None] <= self.memory[:, None, None]).sum(axis=2) - 1
        return levels

    @cached_property
    def client_gains(self) -> Floats:
        """Importance that each kind captures at each split if all tokens were its own, ``(K, L + 1)``.

        With one rank for all, which captures the same wherever the model is split: what is lost where layers are
        frozen, at ``g`` of 1.
        """
        if self.coupled:
            return np.where(self.frozen[:, None], -(self.held @ self.worth), 0.0)
        return np.where(self.frozen[:, None], 0.0, self._rule.client_gains(self))

    def frozen_exchange(self, everybody: bool) -> Floats:
        """Each kind's last phase at each split if it only computed forward, ``(K, L + 1)``.

        Args:
            everybody: all clients do, so that nobody learns layer 0, which all of them have.
        """
        first = np.unique(self.kind, return_index=True)[1].tolist()
        kinds = [self.clients[i] for i in first]
        return self.cost.times.exchange_times(kinds, forward_only=True, learned_from=int(everybody))

    def client_ranks_at(self, kinds: Ints, split: int) -> Levels:
        """Levels of clients of ``kinds`` at ``split``, ``(len(kinds), W)``; 0 where a weight is not held."""
        return self._rule.client_levels(self, kinds, split)

    def ladder(self, split: int) -> Ladder:
        """What memory captures of the weights that a client holds at ``split``."""
        if split not in self._ladders:
            held = self.held[split]
            self._ladders[split] = Ladder(self.cost.client.per_rank[held], self.worth[held], self.rank_set)
        return self._ladders[split]

    def state(self, splits: Ints) -> State:
        """The state of one assignment ``(N,)`` as a single row, or of several ``(M, N)``."""
        splits = np.atleast_2d(splits)
        width = self.cost.model.layers + 1
        rows = np.arange(len(splits))[:, None]
        counts = np.bincount((splits + rows * width).ravel(), minlength=len(splits) * width)
        return State(
            counts.reshape(len(splits), width),
            self.client_gains[self.kind, splits].sum(axis=1),
            # Phase by phase takes less memory.
            np.stack([self.times[self.kind, splits, phase].max(axis=1) for phase in range(PHASES)], axis=1),
            self.client_levels[self.kind, splits].min(axis=1)
            if self.coupled
            else np.zeros(len(splits), dtype=np.int64),
        )

    def objective(self, state: State) -> Floats:
        """Captured importance per second, ``(M,)``; without room at the server, minus the bytes lacking."""
        lacking = self.server_minimal(state.counts) - self.server.memory_bytes
        server_s = self.cost.times.server_times(self.server, state.counts)
        return np.where(lacking > 0, -lacking, self.captured(state) / self.pace(state.slowest, server_s))

    def pace(self, slowest: Floats, server_s: Floats) -> Floats:
        """Seconds of a local step with its part of the exchange at the round's end (virtual).

        Args:
            slowest: longest phases, ``(..., PHASES)``.
            server_s: the server's phase, ``(...)``.
        """
        return self.cost.times.makespan(slowest[..., :-1], server_s) + slowest[..., -1]

    def makespan(self, state: State) -> Floats:
        """METHOD 5's ``makespan(K)``, seconds (virtual)."""
        server_s = self.cost.times.server_times(self.server, state.counts)
        return self.cost.times.makespan(state.slowest[:, :-1], server_s)

    def captured(self, state: State) -> Floats:
        """METHOD 5's ``captured(K, r)``."""
        if self.coupled:
            level = np.maximum(np.minimum(state.level, self.server_level(state.counts)), 0)
            captured: Floats = captured_by(self.rank_set)[level] * (self.worth.sum() + state.gain / len(self.clients))
            return captured
        total: Floats = state.gain / len(self.clients) + self.server_captured(state.counts)
        return total

    def uniform_levels(self, state: State) -> Ints:
        """With one rank for all: the level of every weight under the first row of ``state``, ``(W,)``."""
        level = min(int(state.level[0]), int(self.server_level(state.counts)[0]))
        return np.full(len(self.worth), max(level, 0), dtype=np.int64)

    def server_captured(self, counts: Ints) -> Floats:
        """The server's part of the captured importance, ``(M,)``."""
        share = self.cost.model.joined_clients(counts)[:, self.cost.model.weight_layer] / len(self.clients)
        own: Floats = (captured_by(self.rank_set)[self.server_levels(counts)] * share) @ self.worth
        return own

    def server_minimal(self, counts: Ints) -> Floats:
        """Bytes of the server with every weight at the smallest rank, ``(M,)``."""
        unit = self.cost.server.per_rank(counts).sum(axis=1)
        total: Floats = self.cost.server.constant(counts) + self.rank_set[0] * unit
        return total

    def server_levels(self, counts: Ints) -> Levels:
        """Levels of the server, ``(M, W)``."""
        return self._rule.server_levels(self, counts)

    def server_level(self, counts: Ints) -> Ints:
        """With one rank for all: index of the largest that the server fits, ``(M,)``."""
        unit = self.cost.server.per_rank(counts).sum(axis=1)
        needed = self.cost.server.constant(counts)[:, None] + unit[:, None] * self.rank_set
        levels: Ints = (needed <= self.server.memory_bytes).sum(axis=1) - 1
        return levels


def budget_of(client: ClientBudget) -> tuple[float, float, float, float]:
    """What makes two clients the same to the planner: memory, compute, bandwidth and latency."""
    return client.memory_bytes, client.flops, client.bandwidth_bps, client.latency_s
