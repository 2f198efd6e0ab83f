"""Base of clients and servers: a segment with adapters, its rounds, its state and its measurements. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hsplit.actors.gpu_memory import GpuMemory
from hsplit.actors.profiling import PeakMemory, measured, measured_with_part, measured_with_round
from hsplit.config import Job, Policy
from hsplit.lora.holder import HeldAdapters, Holder, RoundUpdate
from hsplit.lora.importance_probe import ImportanceProbe
from hsplit.lora.optimizer import NOT_SCALED
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.segment import BaseModel
from hsplit.models.spec import LinearShape
from hsplit.planning.importance import ImportanceReport

Held = TypeVar("Held", bound=Holder | WeightHolder)


class HolderActor(Generic[Held]):
    """An actor around one holder, which changes with the plan.

    Args:
        name: its name.
        job, policy: the run's settings.
        base: the base model as this actor reads it.
        device: where it computes.
        measure: follow the peak of allocated memory, see :meth:`peak_bytes`.

    Attributes:
        gpu_memory: of its process, where it computes on a GPU.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        self.name = name
        self._job, self._policy, self._base = job, policy, base
        self._device = torch.device(device)
        self._memory = PeakMemory(self._device, measure)
        self.gpu_memory = GpuMemory(self._device)
        self._holder: Held | None = None
        self._shapes: list[LinearShape] = []
        self._pace: Mapping[str, float] = {}
        self._lr_scales: Mapping[int, float] = NOT_SCALED
        self._scores: dict[str, ImportanceReport] = {}

    @property
    def holder(self) -> Held:
        """The trained part of the model; a RuntimeError before :meth:`configure`."""
        if self._holder is None:
            raise RuntimeError(f"{self.name} has not been configured")
        return self._holder

    def _new_probe(self, training: bool = False, draw: int = 0) -> ImportanceProbe:
        """Make a probe of the adapted weights held here; arguments as for it."""
        assert isinstance(self.holder, Holder)
        spectral = self._policy.importance.spectral
        return ImportanceProbe(self.holder.segment, self.holder.adapters, self._shapes, training, draw, spectral)

    @measured
    def collect(self) -> tuple[int, HeldAdapters]:
        """Return the live adapters at the round's end, and before them their bytes, which the driver reads alone."""
        held = self.holder.held()
        return held.nbytes, held

    @measured_with_round
    def restart(self, update: RoundUpdate) -> None:
        """Begin a round with the result of the last one's aggregation."""
        self.holder.restart(update)

    @measured
    def state(self) -> dict[str, Tensor]:
        """Return the trained tensors and the optimizer's moments, for a checkpoint."""
        return self.holder.state()

    @measured_with_part
    def resume_state(self, tensors: dict[str, Tensor], update: RoundUpdate) -> None:
        """Resume from a checkpoint: follow the residual in ``update`` and load the result of :meth:`state`."""
        self.holder.follow_residual(update.residuals)
        self.holder.load_state(tensors)

    def set_pace(self, seconds: Mapping[str, float]) -> None:
        """Set the seconds that each call of a step is to take from now on (METHOD 8).

        Args:
            seconds: by call, see :meth:`hsplit.planning.cost.clock.VirtualClock.call_s`.
        """
        self._pace = dict(seconds)

    def set_lr_scales(self, scales: Mapping[int, float]) -> None:
        """Step each layer with so many times the job's learning rate from now on; not named is 1."""
        self._lr_scales = scales

    def take_scores(self) -> list[ImportanceReport]:
        """Return what was scored in training backwards since the last call, one report for each client."""
        found, self._scores = list(self._scores.values()), {}
        return found

    def peak_bytes(self) -> int:
        """Return the most bytes allocated since the last call, see :meth:`PeakMemory.peak_bytes`."""
        return self._memory.peak_bytes()

    def parameters_held(self) -> dict[str, int]:
        """Count the frozen values held, by module path within the segment (for tests and reports)."""
        segment = self.holder.segment
        named: list[tuple[str, Any]] = [*segment.named_parameters(), *segment.named_buffers()]
        return {name: tensor.numel() for name, tensor in named}
