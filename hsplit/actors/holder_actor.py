"""What clients and servers have in common: a segment with adapters that begins rounds, hands in, is kept. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from hsplit.actors.profiling import PeakMemory, measured, measured_with_part, measured_with_round
from hsplit.config import Job, Policy
from hsplit.lora.holder import HeldAdapters, Holder, RoundUpdate
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.segment import BaseModel, LinearShape

Held = TypeVar("Held", bound=Holder | WeightHolder)


class HolderActor(Generic[Held]):
    """Around one holder, which changes with the plan.

    Args:
        name: its name.
        job, policy: the run's settings.
        base: the base model as it is read here.
        device: where it computes.
        measure: follow the peak of allocated memory, see :meth:`peak_bytes`.
    """

    def __init__(self, name: str, job: Job, policy: Policy, base: BaseModel, device: str, measure: bool) -> None:
        self.name = name
        self._job, self._policy, self._base = job, policy, base
        self._device = torch.device(device)
        self._memory = PeakMemory(self._device, measure)
        self._holder: Held | None = None
        self._shapes: list[LinearShape] = []
        self._pace: Mapping[str, float] = {}
        self._lr_scale = 1.0

    @property
    def holder(self) -> Held:
        """What it trains; an error before it was configured."""
        if self._holder is None:
            raise RuntimeError(f"{self.name} has not been configured")
        return self._holder

    @measured
    def collect(self) -> tuple[int, HeldAdapters]:
        """The live adapters at the round's end, and before them their bytes, which the driver may look at alone."""
        held = self.holder.held()
        return held.nbytes, held

    @measured_with_round
    def restart(self, update: RoundUpdate) -> None:
        """Begin a round with what the aggregation has made of the last one."""
        self.holder.restart(update)

    @measured
    def state(self) -> dict[str, Tensor]:
        """What is trained, and the optimizer's moments."""
        return self.holder.state()

    @measured_with_part
    def resume_state(self, tensors: dict[str, Tensor], update: RoundUpdate) -> None:
        """Resume: follow the residual in ``update`` and take over what is trained, and its moments."""
        self.holder.follow_residual(update.residuals)
        self.holder.load_state(tensors)

    def set_pace(self, seconds: Mapping[str, float]) -> None:
        """From now on spend these seconds in each call of a step, by what it does (METHOD 8): up, turn and down of a
        client; step of a server, or where labels stay at home forward and backward.
        """
        self._pace = dict(seconds)

    def set_lr_scale(self, scale: float) -> None:
        """From now on step with ``scale`` times the job's learning rate."""
        self._lr_scale = scale

    def peak_bytes(self) -> int:
        """Most bytes allocated above the start since the last call, see :class:`PeakMemory`."""
        return self._memory.peak_bytes()

    def parameters_held(self) -> dict[str, int]:
        """Numbers of frozen values held, by module path within the segment (for tests and reports)."""
        segment = self.holder.segment
        named: list[tuple[str, Any]] = [*segment.named_parameters(), *segment.named_buffers()]
        return {name: tensor.numel() for name, tensor in named}
