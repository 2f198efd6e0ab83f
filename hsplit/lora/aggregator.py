"""The aggregator: what earlier rounds have learned, weight by weight, and what every holder goes on with (METHOD 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hsplit.config import Job, Policy
from hsplit.lora.aggregation import Contribution, Restart, find_aggregation
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.lora.low_rank import LowRank
from hsplit.lora.residual import Residual
from hsplit.models.segment import LinearShape

Ranks = Mapping[str, Mapping[str, int]]
"""Ranks by holder and weight."""


class Aggregator:
    """Keeps ``R_w`` and the common restart of every adapted weight.

    Args:
        shapes: every adapted weight of the model.
        job, policy: the run's settings.
        master: dtype of what is kept: fp32, or fp64 in fp64 runs.
        merges: whether holders merge the residual into a working weight, so that they need it whole at each change.
    """

    def __init__(
        self, shapes: Sequence[LinearShape], job: Job, policy: Policy, master: torch.dtype, *, merges: bool
    ) -> None:
        self._reinit, self._merges = policy.reinit, merges
        self._aggregation = find_aggregation(policy.aggregation)
        cap = None if job.residual.max_rank == "full" else job.residual.max_rank
        self.residuals = {shape.name: Residual(shape.d_out, shape.d_in, cap, master) for shape in shapes}
        self._common: dict[str, LowRank] = {}

    def aggregate(self, held: Sequence[HeldAdapters], absent: Ranks | None = None) -> float:
        """Aggregate every weight over its holders.

        Args:
            held: every holder's adapters at the end of the round; the same holders go on at the same ranks.
            absent: ranks, by holder and weight, where nothing was handed in and what the others have learned is
                followed all the same; 0 of a client that computes with a weight and does not train it.

        Returns:
            The largest part of a residual that its cap cut, as a relative Frobenius norm.
        """
        cut = 0.0
        before, self._common = self._common, {}
        for name, residual in self.residuals.items():
            holders = [h for h in held if name in h.terms]
            tokens = [h.tokens.get(h.layers[name], 0) for h in holders]
            total = sum(tokens)
            if total == 0:
                # Nobody trained it: the adapters still are what they restarted with, and do so again.
                if name in before:
                    self._common[name] = before[name]
                continue
            # Gone before the next one is made, so that two sets of restarts never are in memory together.
            began = before.pop(name, None)
            contributions = [
                Contribution(_on_cpu(h.terms[name]), count / total)
                for h, count in zip(holders, tokens, strict=True)
                if count
            ]
            if began is not None and self._aggregation.freezes:
                contributions += _frozen(began, contributions)
            others = _ranks_of(name, absent or {})
            ranks = (*(h.terms[name].rank for h in holders), *others)
            outcome = self._aggregation.rule(contributions, self._restart(residual, ranks))
            cut = max(cut, residual.add(outcome.residual, self._beside(outcome.common, ranks)))
            if outcome.common is not None:
                self._common[name] = outcome.common
        return cut

    def fit_restarts(self, next_ranks: Ranks) -> tuple[float, set[str]]:
        """Make the common restarts fit holders of other ranks: what no longer fits joins the residual (law E4).

        An aggregation that truncates leaves them as they are: its holders take what their ranks have room for.

        Args:
            next_ranks: of those who hold the weights from now on; their adapters have not been trained since the
                last aggregation.

        Returns:
            What caps cut, as :meth:`aggregate` does, and the weights that change for every holder.
        """
        cut, changed = 0.0, set[str]()
        if self._aggregation.truncates:
            return cut, changed
        for name, common in list(self._common.items()):
            residual, ranks = self.residuals[name], _ranks_of(name, next_ranks)
            room = self._restart(residual, ranks).kept
            # Exact for any factors: the sum of what stays and what joins the residual is what was there.
            stays, joins = (common, None) if common.rank <= room else (common.up_to_rank(room), common.from_rank(room))
            beside = self._beside(stays, ranks)
            if joins is None and residual.has_room(beside):
                continue
            cut = max(cut, residual.add(joins, beside))
            changed.add(name)
            if room:
                self._common[name] = stays
            else:
                del self._common[name]
        return cut, changed

    def _restart(self, residual: Residual, ranks: tuple[int, ...]) -> Restart:
        # Half of the directions that holders keep room for: what restarts is the leading part.
        spare = (residual.cap or 0) // 2 if self._aggregation.freezes else 0
        return Restart(self._reinit, ranks, spare)

    def _beside(self, common: LowRank | None, ranks: tuple[int, ...]) -> int:
        """Most directions of ``common`` that a holder keeps frozen beside the residual."""
        if common is None or not ranks or not self._aggregation.freezes:
            return 0
        return max(0, common.rank - min(ranks))

    def update_for(self, round_: int, ranks: Mapping[str, int], whole: Iterable[str] = ()) -> RoundUpdate:
        """What a holder needs to begin ``round_``: changes since :meth:`mark_sent` and restarts.

        Args:
            ranks: its rank by weight name.
            whole: those of its weights whose residual it does not have yet.
        """
        new = set(whole)
        freezes = self._aggregation.freezes
        changes = {
            n: self.residuals[n].update(self._merges or n in new, self._common.get(n) if freezes else None, rank)
            for n, rank in ranks.items()
        }
        common = {n: _leading(self._common[n], rank) for n, rank in ranks.items() if rank and n in self._common}
        return RoundUpdate(round_, {n: change for n, change in changes.items() if change is not None}, common)

    def mark_sent(self) -> None:
        """Every holder now follows every residual."""
        for residual in self.residuals.values():
            residual.mark_sent()

    def state(self) -> dict[str, Tensor]:
        """Every residual and every common restart, for a checkpoint."""
        tensors = {}
        for name, residual in self.residuals.items():
            if residual.matrix is not None:
                tensors[f"residual.{name}.matrix"] = residual.matrix
            elif residual.rank:
                tensors[f"residual.{name}.B"] = residual.factors.B.contiguous()
                tensors[f"residual.{name}.A"] = residual.factors.A.contiguous()
        for name, common in self._common.items():
            tensors[f"common.{name}.B"] = common.B.contiguous()
            tensors[f"common.{name}.A"] = common.A.contiguous()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        for name, residual in self.residuals.items():
            matrix, B = tensors.get(f"residual.{name}.matrix"), tensors.get(f"residual.{name}.B")
            factors = None if B is None else LowRank(B, tensors[f"residual.{name}.A"])
            residual.restore(factors, matrix)
            if f"common.{name}.B" in tensors:
                self._common[name] = LowRank(tensors[f"common.{name}.B"], tensors[f"common.{name}.A"])


def _ranks_of(name: str, ranks: Ranks) -> tuple[int, ...]:
    return tuple(own[name] for own in ranks.values() if name in own)


def _frozen(began: LowRank, contributions: Sequence[Contribution]) -> list[Contribution]:
    """What holders had frozen of the restart that they began with, by reference: slices between their ranks."""
    ranks = {c.term.rank for c in contributions}
    stops = sorted(rank for rank in ranks | {began.rank} if rank <= began.rank)
    return [
        Contribution(
            LowRank(began.B[:, start:stop], began.A[start:stop]),
            sum(c.share for c in contributions if c.term.rank <= start),
            start,
        )
        for start, stop in pairwise(stops)
    ]


def _leading(common: LowRank, rank: int) -> LowRank:
    return common if common.rank <= rank else common.up_to_rank(rank)


def _on_cpu(term: LowRank) -> LowRank:
    return LowRank(term.B.cpu(), term.A.cpu())
