"""One planning problem: the objective of any splits, with all that can be computed beforehand (METHOD 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.scheduling.budgets import ClientBudget, ServerBudget
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.counted_model import Floats, Ints
from hsplit.scheduling.ranks import captured_by, greedy_levels


def minimal_bytes(cost: CostModel, rank: int) -> Floats:
    """What each split needs of a client with every weight at ``rank``: ``(L + 1,)``."""
    held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
    needed: Floats = cost.client.constant + rank * (held @ cost.client.per_rank)
    return needed


@dataclass(frozen=True)
class State:
    """What the objective of some splits depends on, one row a variant.

    Attributes:
        counts: clients at each split, ``(M, L + 1)``.
        gain: importance that the clients capture, summed over them, ``(M,)``.
        slowest: largest up, turn and down time of a client, ``(M, 3)``.
        level: with one rank for all, the largest that every client fits, as index, ``(M,)``.
    """

    counts: Ints
    gain: Floats
    slowest: Floats
    level: Ints


class Problem:
    """One planning problem over the available clients, with all that can be computed before searching.

    Args:
        clients: the available clients, ``N`` of them.
        server, cost, importance: as for :func:`plan`.
        rank_set: ranks to choose from, ``(Q,)``.
        coupled: one rank for all weights and holders instead of greedy ones.
    """

    def __init__(
        self,
        clients: Sequence[ClientBudget],
        server: ServerBudget,
        cost: CostModel,
        importance: Mapping[str, float],
        rank_set: Ints,
        coupled: bool,
    ) -> None:
        self.clients, self.server, self.cost = clients, server, cost
        self.rank_set, self.coupled = rank_set, coupled
        self.worth: Floats = np.array([importance[w.name] for w in cost.model.weights], dtype=np.float64)
        kinds: dict[tuple[float, ...], int] = {}
        self.kind: Ints = np.array(
            [kinds.setdefault((c.memory_bytes, c.flops, c.bandwidth_bps, c.latency_s), len(kinds)) for c in clients]
        )
        first = [int(np.flatnonzero(self.kind == k)[0]) for k in range(len(kinds))]
        self.memory: Floats = np.array([clients[i].memory_bytes for i in first], dtype=np.float64)
        self.times: Floats = np.stack([cost.times.client_times(clients[i]) for i in first])
        self.needed = minimal_bytes(cost, int(rank_set[0]))
        # Bytes grow with the split, so the splits that fit are those up to the deepest.
        self.deepest_of_kind: Ints = (self.needed <= self.memory[:, None]).sum(axis=1) - 1

    @property
    def deepest(self) -> Ints:
        """Deepest split that each client fits, ``(N,)``."""
        return self.deepest_of_kind[self.kind]

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
        """Importance that each kind captures at each split if all tokens were its own, ``(K, L + 1)``."""
        kinds, splits = len(self.memory), self.cost.model.layers + 1
        if self.coupled:
            return np.zeros((kinds, splits))
        table = np.zeros((kinds, splits))
        for split in range(1, splits):
            fitting = np.flatnonzero(self.deepest_of_kind >= split)
            if len(fitting):
                levels = self.client_ranks_at(fitting, split)
                table[fitting, split] = (captured_by(self.rank_set)[levels] * self.held[split]) @ self.worth
        return table

    def client_ranks_at(self, kinds: Ints, split: int) -> NDArray[np.int8]:
        """Greedy levels of clients of ``kinds`` at ``split``, ``(len(kinds), W)``."""
        held = np.broadcast_to(self.held[split], (len(kinds), len(self.worth)))
        slack = self.memory[kinds] - self.needed[split]
        return greedy_levels(slack, held, self.cost.client.per_rank, self.worth, self.rank_set)

    def state(self, splits: Ints) -> State:
        """The state of one assignment ``(N,)``, as a single row."""
        times = self.times[self.kind, splits]
        return State(
            self.cost.model.clients_at(splits)[None],
            np.array([self.client_gains[self.kind, splits].sum()]),
            times.max(axis=0)[None],
            np.array([self.client_levels[self.kind, splits].min()]),
        )

    def moves(self, splits: Ints, members: Ints, targets: Ints) -> State:
        """The states after moving ``members``, alike and at one split, to each of ``targets`` ``(M,)``."""
        kind, now = int(self.kind[members[0]]), int(splits[members[0]])
        others = np.ones(len(splits), dtype=bool)
        others[members] = False
        counts = np.repeat(self.cost.model.clients_at(splits)[None], len(targets), axis=0)
        counts[:, now] -= len(members)
        counts[np.arange(len(targets)), targets] += len(members)
        gains = self.client_gains
        rest = gains[self.kind[others], splits[others]].sum()
        slowest = self.times[self.kind[others], splits[others]].max(axis=0, initial=0.0)
        level = self.client_levels[self.kind[others], splits[others]].min(initial=len(self.rank_set))
        return State(
            counts,
            rest + len(members) * gains[kind, targets],
            np.maximum(slowest, self.times[kind, targets]),
            np.minimum(level, self.client_levels[kind, targets]),
        )

    def objective(self, state: State) -> Floats:
        """Captured importance per second, ``(M,)``; without room at the server, minus the bytes lacking."""
        lacking = self.server_minimal(state.counts) - self.server.memory_bytes
        return np.where(lacking > 0, -lacking, self.captured(state) / self.makespan(state))

    def makespan(self, state: State) -> Floats:
        """METHOD 5's ``makespan(K)``, seconds (virtual)."""
        total: Floats = state.slowest.sum(axis=1) + self.cost.times.server_times(self.server, state.counts)
        return total

    def captured(self, state: State) -> Floats:
        """METHOD 5's ``captured(K, r)``."""
        if self.coupled:
            level = np.maximum(np.minimum(state.level, self.server_level(state.counts)), 0)
            captured: Floats = captured_by(self.rank_set)[level] * self.worth.sum()
            return captured
        clients = len(self.clients)
        share = self.cost.model.joined_clients(state.counts)[:, self.cost.model.weight_layer] / clients
        own = (captured_by(self.rank_set)[self.server_levels(state.counts)] * share) @ self.worth
        total: Floats = state.gain / clients + own
        return total

    def server_minimal(self, counts: Ints) -> Floats:
        """Bytes of the server with every weight at the smallest rank, ``(M,)``."""
        unit = self.cost.server.per_rank(counts).sum(axis=1)
        total: Floats = self.cost.server.constant(counts) + self.rank_set[0] * unit
        return total

    def server_levels(self, counts: Ints) -> NDArray[np.int8]:
        """Greedy levels of the server, ``(M, W)``."""
        unit = self.cost.server.per_rank(counts)
        joined = self.cost.model.joined_clients(counts)[:, self.cost.model.weight_layer]
        slack = self.server.memory_bytes - self.server_minimal(counts)
        return greedy_levels(slack, joined > 0, unit, self.worth * joined, self.rank_set)

    def server_level(self, counts: Ints) -> Ints:
        """With one rank for all: index of the largest that the server fits, ``(M,)``."""
        unit = self.cost.server.per_rank(counts).sum(axis=1)
        needed = self.cost.server.constant(counts)[:, None] + unit[:, None] * self.rank_set
        levels: Ints = (needed <= self.server.memory_bytes).sum(axis=1) - 1
        return levels
