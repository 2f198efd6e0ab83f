"""A holder: one segment with its adapters and their optimizer. Clients and servers are both holders.

A holder counts the tokens that each of its layers was trained on in a round: the weights of aggregation (METHOD 6).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsplit.config import Job, Policy
from hsplit.errors import NO_NUMBERS
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.carried_moments import CarriedMoments, carried_moments, resume_moments
from hsplit.lora.direction_steps import DirectionSteps
from hsplit.lora.learned import OPTIMIZER, of_kind, with_kind
from hsplit.lora.optimizer import (
    NOT_SCALED,
    as_parameters,
    clip_each,
    clip_limits,
    kept_state,
    learning_rate,
    new_optimizer,
    restore_state,
    without_moments,
)
from hsplit.lora.residual import ResidualUpdate
from hsplit.lora.self_pruning import RankPruner
from hsplit.models.factors import LowRank
from hsplit.models.segment import Segment, set_adapter_dropout
from hsplit.models.spec import LinearShape
from hsplit.seeds import hash_seed

SWAPPED_AT_ONCE = 1 << 18
"""Entries of two copies of the adapters that are exchanged at once."""


class TokenCounts:
    """Supervised tokens that passed through each layer since the round began, each with the weight of its loss."""

    def __init__(self) -> None:
        self._by_layer: defaultdict[int, float] = defaultdict(float)

    def add(self, layers: Iterable[int], tokens: float) -> None:
        """Add ``tokens`` to the count of each of ``layers``."""
        for layer in layers:
            self._by_layer[layer] += tokens

    def clear(self) -> None:
        """Begin another round."""
        self._by_layer.clear()

    def by_layer(self) -> dict[int, float]:
        """Return a copy of the counts, by layer."""
        return dict(self._by_layer)

    def state(self) -> Tensor:
        """Return layer and tokens, ``(n, 2)``, for a checkpoint."""
        return torch.tensor(sorted(self._by_layer.items()), dtype=torch.float64).reshape(-1, 2)

    def load_state(self, state: Tensor) -> None:
        """Load the result of :meth:`state`."""
        self._by_layer = defaultdict(float, {int(layer): float(count) for layer, count in state.reshape(-1, 2)})


@dataclass(frozen=True)
class HeldAdapters:
    """Adapters of one holder at a round's end, for aggregation.

    Attributes:
        holder: its name.
        terms: live term ``s B A`` by weight name.
        tokens: supervised tokens that it trained each layer on in this round, by layer.
        layers: layer by weight name.
    """

    holder: str
    terms: dict[str, LowRank]
    tokens: dict[int, float]
    layers: dict[str, int]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by weight name."""
        return {name: term.rank for name, term in self.terms.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(term.nbytes for term in self.terms.values())

    def flaw(self, ranks: Mapping[str, int], shapes: Mapping[str, LinearShape]) -> str | None:
        """Describe why these adapters are invalid; ``None`` if they are not.

        Args:
            ranks: the holder's by the plan, the largest allowed, by weight name.
            shapes: of the adapted weights, by name.
        """
        if any(count < 0 for count in self.tokens.values()):
            return "a negative number of tokens"
        for name, term in self.terms.items():
            if name not in ranks:
                return f"an adapter of {name}, which it does not hold"
            shape, rank = shapes[name], term.A.shape[0]
            if (term.B.shape, term.A.shape) != ((shape.d_out, rank), (rank, shape.d_in)) or rank > ranks[name]:
                return f"factors of shapes {tuple(term.B.shape)} and {tuple(term.A.shape)} for {name}"
            if not (torch.isfinite(term.A).all() and torch.isfinite(term.B).all()):
                return f"an adapter of {name} with entries {NO_NUMBERS}"
        return None


@dataclass(frozen=True)
class RoundUpdate:
    """A holder's message to begin the next round.

    Attributes:
        round: the round that begins.
        residuals: change of the residual by weight name.
        common: factors that the live adapter restarts with, by weight name.
    """

    round: int
    residuals: dict[str, ResidualUpdate]
    common: dict[str, LowRank]

    @property
    def nbytes(self) -> int:
        """Bytes of residuals and restarts."""
        return sum(u.nbytes for u in self.residuals.values()) + sum(c.nbytes for c in self.common.values())


def exchange_dtype(policy: Policy, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of adapters on their way; ``None``: that in which they are trained.

    Args:
        policy: its ``pace.exchange``.
        dtype: compute dtype.
    """
    narrower = dtype != torch.promote_types(dtype, torch.float32)
    return dtype if policy.pace.exchange == "compute" and narrower else None


class Holder:
    """Trains the adapters of a segment.

    Args:
        name: client name or ``server``.
        segment: its part of the model.
        shapes: every adapted weight of the model, in layer order; gradients are clipped by their shares of these.
        ranks: rank by weight name, for the weights that it holds.
        job, policy: the run's settings.
    """

    def __init__(
        self,
        name: str,
        segment: Segment,
        shapes: Sequence[LinearShape],
        ranks: Mapping[str, int],
        job: Job,
        policy: Policy,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.segment = segment
        self._job, self._policy = job, policy
        self._sent = exchange_dtype(policy, dtype)
        master = torch.promote_types(dtype, torch.float32)
        self.adapters = AdapterSet(shapes, ranks, job.alpha, master, device)
        self.adapters.attach(segment, job.dropout)
        segment.short_attention = job.fast.short_attention
        for linear in segment.linears.values():
            linear.fused = job.fast.fused_lora
        self._pruner = None if policy.self_pruning is None else RankPruner(policy.self_pruning, self.adapters)
        self.tokens = TokenCounts()
        self._limits = None if job.clip is None else clip_limits(shapes, job.clip)
        self._optimizer = self._new_optimizer()
        self._steps = DirectionSteps(self.adapters)
        # The adapters' values before the last optimizer step, (n,), where they are kept.
        self._earlier: Tensor | None = None

    def _new_optimizer(self) -> torch.optim.Optimizer:
        if self._job.fast.flat_optimizer or not self.adapters.names:
            return new_optimizer(self._job, as_parameters(self._job, self.adapters.flat))
        # Views of the flat buffer in its order, so that the optimizer's state has the same layout.
        return new_optimizer(
            self._job, [f for n in self.adapters.names for f in (self.adapters.A(n), self.adapters.B(n))]
        )

    def begin_phase(self, step: int, training: bool) -> None:
        """Set the adapters' dropout; its random numbers depend on run, holder and step alone."""
        set_adapter_dropout(self.segment, training)
        if training and self._job.dropout:
            torch.manual_seed(hash_seed(self._job.seed, self.name, step))

    def step(self, step: int, lr_scales: Mapping[int, float] = NOT_SCALED) -> None:
        """Make one optimizer step from the gradients accumulated since the last one.

        Args:
            step: counts from 0 over the run.
            lr_scales: factors of the job's learning rate, by layer; 1 where not named.
        """
        flat = self.adapters.flat
        if flat.numel() == 0:
            return
        job = self._job
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, job.total_steps, job.lr, job.schedule, job.warmup)
        assert flat.grad is not None
        if self._pruner is not None:
            self._pruner.add_gradient()
        if self._limits is not None:
            clip_each(self.adapters.gradients(), self._limits)
        # A step of AdamW is in proportion to its rate, so that the optimizer needs no groups by layer. The copy is less
        # than what a resumption has to hold.
        before = flat.detach().clone() if any(scale != 1 for scale in lr_scales.values()) else None
        with self._unnoticed_by_autograd():
            self._optimizer.step()
            self._steps.correct(self._optimizer)
            if before is not None:
                self.adapters.lengthen_steps(before, lr_scales)
        flat.grad.zero_()

    # -- a step behind --------------------------------------------------------------------------------------------

    def keep_earlier(self) -> None:
        """Keep a copy of the adapters, ahead of :meth:`step`, for :meth:`earlier`; the last copy goes."""
        values = self.adapters.flat.detach()
        if self._earlier is None:
            self._earlier = values.clone()
        else:
            self._earlier.copy_(values)

    @property
    def has_earlier(self) -> bool:
        """True if :meth:`keep_earlier` has kept something in this round."""
        return self._earlier is not None

    @contextmanager
    def earlier(self) -> Iterator[None]:
        """Compute with the adapters that were kept: forward, or the backward of a forward that was computed so."""
        self._swap_earlier()
        try:
            yield
        finally:
            self._swap_earlier()

    def _swap_earlier(self) -> None:
        assert self._earlier is not None
        # Through .data, which autograd does not watch: what a backward reads is what its forward has read.
        for now, then in zip(
            self.adapters.flat.data.split(SWAPPED_AT_ONCE), self._earlier.split(SWAPPED_AT_ONCE), strict=True
        ):
            kept = now.clone()
            now.copy_(then)
            then.copy_(kept)

    def _unnoticed_by_autograd(self) -> AbstractContextManager[Any]:
        """Where a graph may be under way, change the adapters without a notice to it: they are put back for it."""
        if self._earlier is None:
            return nullcontext()
        leaves = tuple(factor for n in self.adapters.names for factor in (self.adapters.A(n), self.adapters.B(n)))
        return torch.autograd._unsafe_preserve_version_counter(leaves)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def drop_gradient(self) -> None:
        """Discard the gradients of a step that is not made."""
        if self.adapters.flat.grad is not None:
            self.adapters.flat.grad.zero_()

    def held(self) -> HeldAdapters:
        """Return the live adapters at the round's end, which are rounded to the exchange's format first.

        They are on the CPU, whatever the holder computes on: a tensor on a GPU is unpickled onto a GPU, which takes
        memory of the receiver's, and fails where that has none.
        """
        names, sent = self.adapters.names, self._sent
        if self._pruner is not None:
            self._pruner.end_round()
        ranks = self.adapters.ranks if self._pruner is None else self._pruner.ranks
        if sent is not None:
            self.adapters.round_live(sent)
        return HeldAdapters(
            self.name,
            {n: self.adapters.live(n, ranks[n], sent).on("cpu") for n in names},
            self.tokens.by_layer(),
            {n: self.adapters.layer(n) for n in names},
        )

    def restart(self, update: RoundUpdate) -> None:
        """Begin a round: follow the residual, restart the adapters, keep or drop the optimizer's moments."""
        self.follow_residual(update.residuals)
        scope = self.name if self._policy.init == "independent" else "shared"
        keys = {n: f"{self._job.seed}|{scope}|{n}|{update.round}" for n in self.adapters.names}
        changed = self.adapters.restart(keys, update.common)
        if self._pruner is not None:
            self._pruner.begin_round()
        self.tokens.clear()
        self._earlier = None
        self._restart_moments({name: common.rank for name, common in update.common.items()}, changed)

    def _restart_moments(self, stay: Mapping[str, int], changed: Sequence[str]) -> None:
        """Keep, fit or drop the optimizer's moments; those of directions that restart always begin again.

        Args:
            stay: number of leading directions of each weight that do not restart, by name.
            changed: weights whose factors have changed.
        """
        moments = self._policy.moments
        restarting = any(stay.get(name, 0) < rank for name, rank in self.adapters.ranks.items())
        if isinstance(self._optimizer, torch.optim.AdamW):
            drop = moments == "drop" or not any(stay.get(name, 0) for name in self.adapters.names)
        else:
            # Codes of bitsandbytes are not separable by direction: when one begins again, all do.
            drop = moments != "keep" or restarting
        if drop:
            self._optimizer = without_moments(self._job, self._optimizer)
            self._steps.clear()
            return
        if moments == "fit":
            self._steps.fit(self._optimizer, changed)
        if restarting:
            self._steps.begin(self._optimizer, stay)

    def carried_moments(self, ranks: Mapping[str, int]) -> CarriedMoments | None:
        """Copy the moments that a holder of other ``ranks`` can take over from this one."""
        if self._policy.moments == "drop":
            return None
        return carried_moments(self.adapters, self._optimizer, self._steps, ranks)

    def resume_moments(self, carried: CarriedMoments, update: RoundUpdate) -> None:
        """Take over the moments of this holder's predecessor, after :meth:`restart` with ``update``.

        Directions that the update restarts begin without moments. ``carried`` is used up.
        """
        stay = {name: common.rank for name, common in update.common.items()}
        resume_moments(carried, self.adapters, self._optimizer, self._steps, stay)

    def follow_residual(self, residuals: Mapping[str, ResidualUpdate]) -> None:
        """Apply changes of ``R_w``, by weight name; adapters stay as they are."""
        linears = self.segment.linears
        for name, change in residuals.items():
            device = linears[name].device
            if change.matrix is not None:
                linears[name].set_residual_matrix(change.matrix.to(device))
            elif change.factors is not None:
                linears[name].append_residual(change.start_rank, change.factors.on(device))

    def state(self) -> dict[str, Tensor]:
        """Return factors, moments, the directions' ages and the round's token counts, for a checkpoint."""
        tensors = {
            "parameters": self.adapters.flat.detach().cpu().clone(),
            "tokens": self.tokens.state(),
            "begun": self._steps.state(),
        }
        if self._pruner is not None:
            tensors["pruning"] = self._pruner.state()
        if self._earlier is not None:
            tensors["earlier"] = self._earlier.cpu().clone()
        return tensors | with_kind(OPTIMIZER, kept_state(self._optimizer))

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Check whether ``tensors`` are the state of a holder of the same ranks."""
        return "parameters" in tensors and tensors["parameters"].numel() == self.adapters.flat.numel()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state`; the residual arrives separately."""
        flat = self.adapters.flat
        with torch.no_grad():
            flat.copy_(tensors["parameters"])
        if self._pruner is not None:
            self._pruner.load_state(tensors["pruning"])
        self.tokens.load_state(tensors["tokens"])
        self._steps.load_state(tensors.get("begun"))
        self._earlier = tensors["earlier"].to(flat.device, copy=True) if "earlier" in tensors else None
        self._optimizer = self._new_optimizer()
        restore_state(self._optimizer, of_kind(OPTIMIZER, tensors))
