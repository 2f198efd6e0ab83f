"""Base of both kinds of client: data, and a part of the model that begins with the embedding. Ray-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.profiling import measured_with_part
from hsplit.actors.training_data import DataReport, TrainingData
from hsplit.config import Job, Policy
from hsplit.data import Batch, Example
from hsplit.lora.carried_moments import CarriedMoments
from hsplit.lora.holder import Holder, RoundUpdate
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing, pack_rows
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.weights import is_quantized
from hsplit.planning.plan import HolderPlan


class Participant(HolderActor[Holder | WeightHolder], ABC):
    """Holds data and a segment that begins with the embedding; arguments as :class:`HolderActor`.

    Attributes:
        data: what it trains and validates on.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        super().__init__(name, job, policy, base, device, measure)
        # The pipeline is between client and server: a whole model trains on whole batches.
        self.data = TrainingData(name, job, base.spec, cuts=policy.placement == "split")
        self._kept: Segment | None = None
        self._carried: CarriedMoments | None = None
        self._part: HolderPlan | None = None
        self._split = 0

    # -- set-up ---------------------------------------------------------------------------------------------------

    def load_data(self, shares: Mapping[str, Sequence[Example] | None], own: str | None) -> DataReport:
        """Tokenize data and hold out a validation share of it; see :meth:`TrainingData.load`."""
        return self.data.load(shares, own)

    @measured_with_part
    def configure(self, part: HolderPlan) -> None:
        """Read the layers that a plan gives it and make adapters of its ranks; :meth:`restart` begins the round.

        Everything held before, and every step begun, is dropped.
        """
        self._drop()
        self._take(part, None)

    @measured_with_part
    def release(self) -> None:
        """Drop every layer and adapter: the client has no part in the rounds that follow."""
        self._drop()
        self.gpu_memory.give_back()

    def _drop(self) -> None:
        self._holder = self._kept = self._carried = None
        self.data.drop()

    @measured_with_part
    def shrink(self, part: HolderPlan) -> None:
        """Drop the adapters, and the layers that ``part`` does not have, ahead of :meth:`reconfigure` to it.

        A step of its own, so that what an old plan held does not count as the new one's memory.
        """
        self._carried = None
        if self._holder is not None:
            if isinstance(self._holder, Holder):
                self._carried = self._holder.carried_moments(part.ranks)
            held, self._holder = self._holder.segment, None
            held.remove_adapters()
            last = min(part.held_layers, held.spec.last)
            self._kept = self._load(replace(held.spec, last=last), part, held)
            del held
            self.gpu_memory.give_back()

    @measured_with_part
    def reconfigure(self, part: HolderPlan, update: RoundUpdate) -> None:
        """Follow a change of plan between two rounds: read new layers, change ranks (law E4).

        Call it after :meth:`shrink`. A client that had no part so far may join like this too.
        """
        kept, self._kept = self._kept, None
        carried, self._carried = self._carried, None
        self._take(part, kept)
        self.holder.restart(update)
        if carried is not None and isinstance(self.holder, Holder):
            self.holder.resume_moments(carried, update)

    @measured_with_part
    def rejoin(self, tensors: dict[str, Tensor] | None, update: RoundUpdate) -> None:
        """Begin a round after a failure, with the optimizer's moments as they were last kept.

        Args:
            tensors: the last result of :meth:`state`; used where the ranks are still the same.
            update: the whole residual and what the adapters restart with.
        """
        if tensors is not None and self.holder.fits(tensors):
            self.holder.load_state(tensors)
        self.holder.restart(update)

    def begin_round(self, step: int, examples: int) -> None:
        """Set the place in its data that a round begins at.

        Args:
            step: the round's first local step, counted over the run.
            examples: of each client whose data is here, passed over by the rounds before.
        """
        self.data.begin_round(step, examples)

    def _take(self, part: HolderPlan, kept: Segment | None) -> None:
        if part.stored == "codes" and not is_quantized(self._base.base):
            raise ValueError(f"{self.name}: a plan says codes, and a base in {self._base.base} has none")
        self._part = part
        self.gpu_memory.allow(part.declared_bytes)
        self.data.follow(part)
        self._hold(part, kept)

    def _keeps_codes(self, part: HolderPlan) -> bool:
        """True if it stores a quantized base as codes."""
        return part.stored == "codes"

    @abstractmethod
    def _hold(self, part: HolderPlan, kept: Segment | None) -> None:
        """Hold the layers of ``part``; those of ``kept`` are not read again."""

    def _hold_segment(self, spec: SegmentSpec, part: HolderPlan, kept: Segment | None) -> None:
        segment = self._load(spec, part, kept)
        shapes = self._base.spec.targeted(self._job.targets)
        self._split, self._shapes = spec.last, shapes
        self._holder = Holder(
            self.name, segment, shapes, part.ranks, self._job, self._policy, self._base.dtype, self._device
        )

    def _load(self, spec: SegmentSpec, part: HolderPlan, kept: Segment | None) -> Segment:
        # A tail has the whole embedding as its head, or as much beside it.
        own = self._policy.pace.embedding == "own" and not spec.tail
        return load_segment(
            self._base,
            spec,
            quantized=self._keeps_codes(part),
            device=self._device,
            kept=kept,
            vocabulary=self.data.vocabulary if own else None,
        )

    # -- computation ------------------------------------------------------------------------------------------------

    def _front(self, batch: Batch, probing: bool = False) -> Tensor:
        """Embed ``batch`` and run layers ``[0, split)``: hidden states ``(n, d)``."""
        segment = self.holder.segment
        packing = Packing.of(batch.lengths, self._device)
        ids = pack_rows(batch.ids, batch.lengths).to(self._device)
        embedded = segment.embed(ids, packing)
        if probing:
            # The embedding is frozen: otherwise no gradient would reach the first layer's first linears.
            embedded.requires_grad_()
        return segment.run(embedded, packing, 0, self._split)

    def _loss_sum(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy summed over the supervised tokens, from the last layer's output ``(n, d)``."""
        tail = self.holder.segment.tail
        assert tail is not None
        targets = pack_rows(batch.targets, batch.lengths).to(self._device)
        return tail.supervised_losses(hidden, targets, self._job.fast.loss_rows).sum()
