"""Planning with one rank for all weights and holders: the largest that every holder fits (SplitLoRA, FedLoRA)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.problem import Problem, State
from hsplit.planning.ranks import Levels


class OneRankProblem(Problem):
    """A planning problem whose holders all have one rank.

    The common rank alone decides what is captured, wherever the model is split. So no client gains anything by its
    split; ``client_gains`` is what is lost where layers are frozen, at ``g`` of 1. Weights have their proportions at
    the largest rank.
    """

    one_rank = True

    @cached_property
    def _curve(self) -> Floats:
        """``g`` of all weights together at each rank, ``(Q,)``."""
        curve: Floats = self.values.sum(axis=0)
        return curve

    @cached_property
    def common_levels(self) -> Ints:
        """Level of the largest rank that each kind fits at each split, ``(K, L + 1)``; -1 where none fits."""
        kinds = np.arange(len(self.members))
        by_split = [self.clients_as_holders(kinds, split) for split in range(self.cost.model.layers + 1)]
        return np.stack([clients.largest_common_levels() for clients in by_split], axis=1)

    @cached_property
    def client_gains(self) -> Floats:
        """Importance lost at each split where a kind is frozen, at ``g`` of 1, ``(K, L + 1)``."""
        return np.where(self.frozen[:, None], -(self.held @ self.worth), 0.0)

    def captured(self, state: State) -> Floats:
        """METHOD 5's ``learning``, ``(M,)``: captured importance, with the discount of what is learned apart."""
        rank = self._curve[self._level(state)]
        if self.constants.kappa == 0.0:
            captured: Floats = rank * (self.worth.sum() + state.gain.sum(axis=1) / len(self.clients))
            return captured
        model, passed = self.cost.model, state.counts - state.training
        frozen = passed[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] / len(self.clients)
        worth = np.bincount(model.weight_layer, weights=self.worth, minlength=model.layers)
        discounted: Floats = rank * ((1 - frozen) * self.discounts(state) @ worth)
        return discounted

    def client_captured(self, splits: Ints) -> Floats:
        """Importance that each client's own layers capture of its own tokens, ``(N,)`` for ``splits`` ``(N,)``."""
        state = self.state(splits)
        front = (self.held @ self.worth) * self.of_front(self.discounts(state))[0]
        captured: Floats = front[splits] * self._curve[self._level(state)]
        return captured

    def client_levels(self, state: State, kinds: Ints, split: int) -> Levels:
        """The common level for each weight, ``(len(kinds), W)``."""
        return np.full((len(kinds), len(self.worth)), self._level(state)[0], dtype=np.int8)

    def server_levels(self, state: State) -> Levels:
        """The common level for each weight, ``(M, W)``."""
        return np.repeat(self._level(state)[:, None], len(self.worth), axis=1).astype(np.int8)

    def joint_gains(self, by_server: Floats, discount: Floats) -> Floats:
        """No gain by a split, but what is lost by learning apart, at the largest rank, ``(K, L + 1)``."""
        if self.constants.kappa == 0.0:
            return np.zeros(self.fits.shape)
        lost = (self.held @ self.worth) * (self.of_front(discount[None])[0] - 1.0)
        return np.repeat(self._curve[-1] * lost[None], len(self.members), axis=0)

    def common_gain(self, level: Ints | int) -> Floats:
        """Importance that is captured by a common ``level``, were no layers frozen."""
        gain: Floats = self._curve[level] * self.worth.sum()
        return gain

    def captured_at(self, state: State, level: Ints) -> Floats:
        """:meth:`common_gain` of ``level``, or of what the server fits where that is less."""
        gain = self.common_gain(np.clip(level, 0, max(int(self._server_level(state)[0]), 0)))
        if self.constants.kappa == 0.0:
            return gain
        # As much of it as the state has by learning apart; a move changes its client's part.
        whole = float(self.common_gain(self._level(state))[0])
        return gain * (float(self.captured(state)[0]) / whole if whole else 1.0)

    def _server_level(self, state: State) -> Ints:
        return self.servers_as_holders(state.counts).largest_common_levels()

    def _level(self, state: State) -> Ints:
        """The common level, ``(M,)``; 0 where no rank fits."""
        return np.maximum(np.minimum(state.level, self._server_level(state)), 0)
