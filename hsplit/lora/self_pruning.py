"""Self-pruning of HetLoRA (arXiv 2401.06432): a holder drops trailing directions that its data does not need."""

from __future__ import annotations

import torch
from torch import Tensor

from hsplit.config import SelfPruning
from hsplit.lora.adapters import AdapterSet


class RankPruner:
    """Prunes the trailing directions of every adapter: those from ``floor(decay * rank)`` on, at least one kept.

    While training, ``penalty * ||B_tail|| ||A_tail||`` is added to the loss of every weight. Where that product is
    smaller at a round's end than at its start, the holder continues without those directions: they are zero from then
    on, get no gradient, and are not sent.

    Args:
        settings: the policy's.
        adapters: the holder's.
    """

    def __init__(self, settings: SelfPruning, adapters: AdapterSet) -> None:
        self._settings, self._adapters = settings, adapters
        self.ranks: dict[str, int] = dict(adapters.ranks)
        self._at_start: dict[str, float] = dict.fromkeys(self.ranks, 0.0)

    @torch.no_grad()
    def begin_round(self) -> None:
        """Clear the pruned directions, and record the size of the trailing ones."""
        for name, rank in self.ranks.items():
            self._adapters.A(name)[rank:].zero_()
            self._adapters.B(name)[:, rank:].zero_()
            self._at_start[name] = self._tail_product(name)

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to that of the adapters."""
        for name in self.ranks:
            A, B = self._tail(name)
            begin, end = self._kept(name), self.ranks[name]
            norm_A, norm_B = A.norm(), B.norm()
            if end == begin or not (norm_A > 0 and norm_B > 0):
                continue
            grad_A, grad_B = self._adapters.A(name).grad, self._adapters.B(name).grad
            assert grad_A is not None and grad_B is not None
            grad_A[begin:end].add_(A * (self._settings.penalty * norm_B / norm_A))
            grad_B[:, begin:end].add_(B * (self._settings.penalty * norm_A / norm_B))

    def end_round(self) -> None:
        """Prune the trailing directions that have become smaller; values stay until the next round begins."""
        for name in self.ranks:
            now = self._tail_product(name)
            if now < self._at_start[name]:
                self.ranks[name] = self._kept(name)
                # A second call in the same round prunes nothing more.
                self._at_start[name] = 0.0

    def state(self) -> Tensor:
        """Return rank and size of the trailing directions at the round's start, by weight: ``(W, 2)``, fp64."""
        return torch.tensor([[self.ranks[n], self._at_start[n]] for n in self.ranks], dtype=torch.float64)

    def load_state(self, state: Tensor) -> None:
        """Load the result of :meth:`state`."""
        for name, (rank, size) in zip(list(self.ranks), state.tolist(), strict=True):
            self.ranks[name], self._at_start[name] = int(rank), size

    def _kept(self, name: str) -> int:
        return max(1, int(self._settings.decay * self.ranks[name]))

    def _tail(self, name: str) -> tuple[Tensor, Tensor]:
        begin, end = self._kept(name), self.ranks[name]
        return self._adapters.A(name)[begin:end], self._adapters.B(name)[:, begin:end]

    def _tail_product(self, name: str) -> float:
        A, B = self._tail(name)
        return float(A.detach().norm() * B.detach().norm())
