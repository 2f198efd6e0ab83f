"""The planning problem: the objective of any splits, with all that can be computed beforehand (METHOD 5)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Objective
from hsplit.planning.budgets import ClientBudget, ServerBudget, budget_of
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import Score
from hsplit.planning.rank_rules import Holders, RankRule
from hsplit.planning.ranks import Levels, at_levels, captured_by, gain_table


def minimal_bytes(cost: CostModel, rank: int) -> Floats:
    """Bytes of a client at each split with every weight at ``rank``: ``(L + 1,)``."""
    held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
    needed: Floats = cost.client.constant + rank * (held @ cost.client.per_rank)
    return needed


UP, TURN, DOWN, AHEAD, EXCHANGE = range(5)
PHASES = 5
"""Up, turn and down of a local step, up of clients that are a step ahead, and a step's part of the exchange at the
round's end."""


@dataclass(frozen=True)
class State:
    """All that the objective of some splits depends on, one row a variant.

    Attributes:
        counts: clients at each split, ``(M, L + 1)``.
        training: those of them that train, ``(M, L + 1)``.
        gain: sum of the clients' ``client_gains`` by their splits, ``(M, L + 1)``.
        slowest: longest time of any client in each phase, ``(M, PHASES)``.
        level: least :attr:`Problem.common_levels` of the clients, ``(M,)``.
    """

    counts: Ints
    training: Ints
    gain: Floats
    slowest: Floats
    level: Ints


class Problem:
    """One planning problem over the available clients, with all that can be computed before searching.

    Clients of equal budgets are one **kind**; every table is over kinds. Each holder has ranks of its own;
    :class:`~hsplit.planning.one_rank.OneRankProblem` is the one with a single rank for all.

    Args:
        clients: the available clients, ``N`` of them.
        server, cost, importance: as for :func:`~hsplit.planning.planner.make_plan`.
        rank_set: ranks to choose from, ``(Q,)``.
        rule: chooses the ranks of each holder.
        frozen: names of clients that only compute forward.
        needed: bytes of a client at each split with the smallest ranks; by default those of one that stores its layers
            dense, with the whole embedding.
        apart: each client is a kind of its own.
        constants: of the objective; by default all that is captured counts alike, and in full.

    Attributes:
        one_rank: all holders and weights have one rank.
        frozen: kinds that only compute forward, ``(K,)``.
        kind: each client's kind, ``(N,)``.
        members: number of clients of each kind, ``(K,)``.
        memory: bytes of a client of each kind, ``(K,)``.
        times: seconds of its phases at each split, ``(K, L + 1, PHASES)``; they never fall with the split.
        needed: bytes of a client at each split with the smallest ranks, ``(L + 1,)``.
        deepest_of_kind: the deepest split that each kind fits, ``(K,)``.
        values: captured by each weight at each rank, ``(W, Q)``.
        worth: importance of each weight, as a share of the whole model's: that at the largest rank, ``(W,)``.
    """

    one_rank = False

    def __init__(
        self,
        clients: Sequence[ClientBudget],
        server: ServerBudget,
        cost: CostModel,
        importance: Mapping[str, Score],
        rank_set: Ints,
        rule: RankRule,
        frozen: Collection[str] = (),
        needed: Floats | None = None,
        apart: bool = False,
        constants: Objective | None = None,
    ) -> None:
        self.constants = constants or Objective()
        self.clients, self.server, self.cost = clients, server, cost
        self.rank_set, self._rule = rank_set, rule
        self._names = tuple(w.name for w in cost.model.weights)
        self.values: Floats = gain_table(importance, self._names, rank_set, self.constants.rho)
        self.worth: Floats = self.values[:, -1] / captured_by(rank_set[-1], self.constants.rho)
        kinds: dict[tuple[float, ...], int] = {}
        keys = [(*budget_of(c), c.name in frozen, i * apart) for i, c in enumerate(clients)]
        self.kind: Ints = np.array([kinds.setdefault(key, len(kinds)) for key in keys], dtype=np.int64)
        first = np.unique(self.kind, return_index=True)[1].tolist()
        self.distinct = [clients[i] for i in first]
        self.members: Ints = np.bincount(self.kind)
        self.memory: Floats = np.array([c.memory_bytes for c in self.distinct], dtype=np.float64)
        self.frozen: NDArray[np.bool_] = np.array([c.name in frozen for c in self.distinct], dtype=bool)
        self.times: Floats = np.zeros((len(self.distinct), cost.model.layers + 1, PHASES))
        self.times[:, :, [UP, TURN, DOWN]] = cost.times.all_client_times(self.distinct)
        self.times[:, :, EXCHANGE] = cost.times.exchange_times(self.distinct)
        self.times[self.frozen, :, DOWN] = 0.0
        if cost.model.job.runs_ahead:
            self.times[self.frozen, :, AHEAD] = self.times[self.frozen, :, UP]
            self.times[self.frozen, :, UP] = 0.0
        self.times[self.frozen, :, EXCHANGE] = self.frozen_exchange(bool(self.frozen.all()))[self.frozen]
        self.needed = minimal_bytes(cost, int(rank_set[0])) if needed is None else needed
        # Bytes grow with the split, so the splits that fit are those up to the deepest.
        self.deepest_of_kind: Ints = (self.needed <= self.memory[:, None]).sum(axis=1) - 1

    @property
    def deepest(self) -> Ints:
        """Deepest split that each client fits, ``(N,)``."""
        return self.deepest_of_kind[self.kind]

    @cached_property
    def fits(self) -> NDArray[np.bool_]:
        """Splits from 1 that each kind fits, ``(K, L + 1)``: those that planning chooses from."""
        splits = np.arange(self.cost.model.layers + 1)
        fits: NDArray[np.bool_] = (splits >= 1) & (splits <= self.deepest_of_kind[:, None])
        return fits

    @cached_property
    def held(self) -> NDArray[np.bool_]:
        """Weights that a client holds at each split, ``(L + 1, W)``."""
        splits = np.arange(self.cost.model.layers + 1)
        held: NDArray[np.bool_] = splits[:, None] > self.cost.model.weight_layer
        return held

    @cached_property
    def common_levels(self) -> Ints:
        """Level that the memory of each kind sets at each split to all holders, ``(K, L + 1)``: here none, the top."""
        return np.full(self.fits.shape, len(self.rank_set) - 1)

    @cached_property
    def client_gains(self) -> Floats:
        """Importance that each kind captures at each split if all tokens were its own, ``(K, L + 1)``."""
        gains: Floats = np.zeros(self.fits.shape)
        for split in range(1, self.cost.model.layers + 1):
            fitting = np.flatnonzero(self.deepest_of_kind >= split)
            if len(fitting):
                gains[fitting, split] = self._rule.captured(self.clients_as_holders(fitting, split))
        gains[self.frozen] = 0.0
        return gains

    def exchange(self, frozen: bool) -> Floats:
        """Each kind's part of the exchange at the round's end in a step, at each split, ``(K, L + 1)``."""
        return self.cost.times.exchange_times(self.distinct, forward_only=frozen)

    @cached_property
    def deep_gains(self) -> Floats:
        """Importance that the server captures of a client's tokens by the client's split, with the largest ranks that
        it has room for where all clients split alike, ``(L + 1,)``.
        """
        layers = self.cost.model.layers
        alike = len(self.clients) * np.eye(layers + 1, dtype=np.int64)
        shallowest = self.servers_as_holders(alike[1:2])
        levels = self._rule.levels(shallowest)[0]
        by_layer = np.bincount(self.cost.model.weight_layer, weights=at_levels(self.values, levels), minlength=layers)
        deep: Floats = np.concatenate([np.cumsum(by_layer[::-1])[::-1], [0.0]])
        return deep

    def frozen_exchange(self, all_clients: bool) -> Floats:
        """Each kind's last phase at each split if it only computed forward, ``(K, L + 1)``.

        Args:
            all_clients: the others do too, so that layer 0, which all of them have, is never trained.
        """
        return self.cost.times.exchange_times(self.distinct, forward_only=True, learned_from=int(all_clients))

    def clients_as_holders(self, kinds: Ints, split: int) -> Holders:
        """Clients of ``kinds`` at ``split``."""
        held = self.held[split]
        slack = self.memory[kinds] - self.needed[split]
        prices = held * self.cost.client.per_rank
        return Holders(
            "client", self._names, self.values, self.worth, held.astype(np.int64), prices, slack, self.rank_set
        )

    def captured_by_clients(self, held: NDArray[np.bool_], prices: Floats, slack: Floats) -> Floats:
        """Importance that clients capture of their own tokens, ``(M,)``.

        Args:
            held: weights that all of them hold, ``(W,)``.
            prices: bytes a unit of rank of each weight, 0 where it is not held, ``(W,)``.
            slack: bytes left at the smallest ranks, ``(M,)``.
        """
        if not held.any():
            return np.zeros(len(slack))
        weights = held.astype(np.int64)
        return self._rule.captured(
            Holders("client", self._names, self.values, self.worth, weights, prices, slack, self.rank_set)
        )

    def servers_as_holders(self, counts: Ints) -> Holders:
        """The server beside clients at ``counts`` ``(M, L + 1)``."""
        prices = self.cost.server.per_rank(counts)
        minimal = self.cost.server.constant(counts) + self.rank_set[0] * prices.sum(axis=1)
        joined = self.cost.model.joined_clients(counts)[:, self.cost.model.weight_layer]
        slack = self.server.memory_bytes - minimal
        return Holders("server", self._names, self.values, self.worth, joined, prices, slack, self.rank_set)

    def state(self, splits: Ints) -> State:
        """The state of one assignment ``(N,)`` as a single row, or of several ``(M, N)``."""
        splits = np.atleast_2d(splits)
        width = self.cost.model.layers + 1
        rows = np.arange(len(splits))[:, None]
        places, shape = (splits + rows * width).ravel(), (len(splits), width)
        counts = np.bincount(places, minlength=len(splits) * width).reshape(shape)
        trains = np.broadcast_to(~self.frozen[self.kind], splits.shape).ravel()
        training = counts if trains.all() else np.bincount(places[trains], minlength=counts.size).reshape(shape)
        gains = self.client_gains[self.kind, splits].ravel()
        gain = np.bincount(places, weights=gains, minlength=counts.size).reshape(shape).astype(np.float64)
        return State(
            counts,
            training,
            gain,
            # Phase by phase takes less memory.
            np.stack([self.times[self.kind, splits, phase].max(axis=1) for phase in range(PHASES)], axis=1),
            self.common_levels[self.kind, splits].min(axis=1),
        )

    def objective(self, state: State) -> Floats:
        """What is learned, to the power of ``gamma``, per second, ``(M,)``; without room at the server, minus the bytes
        lacking.
        """
        lacking = self.server_lacking(state.counts)
        server_s = self.cost.times.server_times(self.server, state.counts)
        return np.where(
            lacking > 0, -lacking, self.per_second(self.captured(state), self.pace(state.slowest, server_s))
        )

    def per_second(self, captured: Floats, seconds: Floats) -> Floats:
        """Compute the objective, elementwise."""
        if self.constants.gamma == 1.0:
            return captured / seconds
        return np.maximum(captured, 0.0) ** self.constants.gamma / seconds

    def price_of_a_second(self, state: State) -> float:
        """Captured importance that is worth as much as a second, at the only row of ``state``; 0 without room."""
        if self.server_lacking(state.counts)[0] > 0:
            return 0.0
        server_s = self.cost.times.server_times(self.server, state.counts)
        seconds = self.constants.gamma * self.pace(state.slowest, server_s)
        return float((self.captured(state) / seconds)[0])

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
        """METHOD 5's ``learning``, ``(M,)``: captured importance, with the discount of what is learned apart.

        Where the weights of a client's front have unequal ranks, the discount is its layers' average by their worth.
        """
        share = self.cost.model.joined_clients(state.counts)[:, self.cost.model.weight_layer] / len(self.clients)
        gains = at_levels(self.values, self.server_levels(state))
        if self.constants.kappa == 0.0:
            total: Floats = state.gain.sum(axis=1) / len(self.clients) + (gains * share).sum(axis=1)
            return total
        discount = self.discounts(state)
        by_server = (gains * share * discount[:, self.cost.model.weight_layer]).sum(axis=1)
        own: Floats = (state.gain * self.of_front(discount)).sum(axis=1) / len(self.clients) + by_server
        return own

    def client_captured(self, splits: Ints) -> Floats:
        """Importance that each client's own layers capture of its own tokens, ``(N,)`` for ``splits`` ``(N,)``."""
        front = self.of_front(self.discounts(self.state(splits)))[0]
        captured: Floats = self.client_gains[self.kind, splits] * front[splits]
        return captured

    def discounts(self, state: State) -> Floats:
        """Compute METHOD 5's ``e`` of every layer: below 1 where several holders train it apart, ``(M, L)``.

        All clients have equal shares of the tokens; those that pass through a layer without training it do not count.
        """
        model = self.cost.model
        if self.constants.kappa == 0.0:
            return np.ones((len(state.counts), model.layers))
        apart = state.training[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:].astype(np.float64)
        joined = model.joined_clients(state.counts)[:, : model.layers].astype(np.float64)
        return apart_discounts(apart, joined**2 / model.servers, apart + joined, self.constants.kappa)

    def discounts_of(self, splits: Ints, share: Floats, frozen: NDArray[np.bool_]) -> Floats:
        """Compute the discounts of clients of unequal shares of the tokens, ``(M, L)``.

        Args:
            splits, frozen: of each client, ``(M, N)``.
            share: of the tokens, in any unit, ``(M, N)``.
        """
        model, own = self.cost.model, share * ~frozen
        by_split = [model.summed_at(splits, weights) for weights in (own**2, own, share)]
        squares, apart = (values[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] for values in by_split[:2])
        passing = by_split[2].cumsum(axis=1)[:, : model.layers]
        return apart_discounts(squares, passing**2 / model.servers, apart + passing, self.constants.kappa)

    def of_front(self, discount: Floats) -> Floats:
        """Average a discount of layers, ``(M, L)``, over a client's front by the layers' worth, ``(M, L + 1)``."""
        layers = self.cost.model.layers
        worth = np.bincount(self.cost.model.weight_layer, weights=self.worth, minlength=layers)
        return front_means(discount, worth.astype(np.float64))

    def client_levels(self, state: State, kinds: Ints, split: int) -> Levels:
        """Levels of clients of ``kinds`` at ``split``, ``(len(kinds), W)``; 0 where a weight is not held.

        Args:
            state: of all clients' splits, a single row.
            kinds: which kinds.
            split: theirs.
        """
        return self._rule.levels(self.clients_as_holders(kinds, split))

    def server_levels(self, state: State) -> Levels:
        """Levels of the server, ``(M, W)``."""
        return self._rule.levels(self.servers_as_holders(state.counts))

    def server_lacking(self, counts: Ints) -> Floats:
        """Bytes that the server lacks with every weight at the smallest rank, ``(M,)``; below 0 those that are left."""
        lacking: Floats = -self.servers_as_holders(counts).slack_bytes
        return lacking

    # -- estimates of the search, with the server's ranks held ------------------------------------------------------

    def joint_gains(self, by_server: Floats, discount: Floats) -> Floats:
        """Importance that a client's tokens bring at each split, at all holders, ``(K, L + 1)``.

        Args:
            by_server: at the server, ``(L + 1,)``.
            discount: of each layer, ``(L,)``.
        """
        return self.client_gains * self.of_front(discount[None])[0] + by_server

    def common_gain(self, level: Ints | int) -> Floats | float:
        """Importance that is captured by a common ``level`` of all holders: here nothing."""
        return 0.0

    def captured_at(self, state: State, level: Ints) -> Floats:
        """Importance that the only row of ``state`` captures if the clients' common level were ``level``."""
        return self.captured(state)


def apart_discounts(squares: Floats, server_square: Floats, total: Floats, kappa: float) -> Floats:
    """Compute METHOD 5's discount of layers that are learned apart, elementwise.

    Args:
        squares: sum of the squared token shares of the clients that train the layer.
        server_square: that of the servers.
        total: sum of the shares of all that train it; in the same unit, which drops out.
        kappa: the measured constant.
    """
    alike = (squares + server_square) / np.maximum(total, 1e-100) ** 2
    discount: Floats = np.where(total > 0, np.minimum(alike, 1.0), 1.0) ** kappa
    return discount


def front_means(discount: Floats, worth: Floats) -> Floats:
    """Average ``discount`` ``(M, L)`` over a front's layers by their ``worth`` ``(L,)``, by split ``(M, L + 1)``."""
    sums = np.cumsum(discount * worth, axis=1) / np.maximum(np.cumsum(worth), 1e-300)
    means: Floats = np.concatenate([np.ones((len(discount), 1)), sums], axis=1)
    return means
