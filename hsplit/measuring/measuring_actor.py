"""The actor that measures a holder's budget on its node. Ray-free."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

from hsplit.actors.messages import WireTensor
from hsplit.config import Job, Policy
from hsplit.measuring.compute import StepSeconds, StepWork
from hsplit.measuring.free_memory import free_bytes
from hsplit.models.segment import BaseModel
from hsplit.planning.cost.fake_layer import LayerSetting
from hsplit.planning.wire import row_bytes

# Width of a message's tokens: large, so that a row's bytes beside its entries hardly count.
_WIDTH = 1024
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class MeasuringActor:
    """Measures the memory and compute of its process, and its end of a link.

    Args:
        job, policy: the run's settings.
        base: the base model as the holder would read it.
        device: where the holder would compute.
        at_server: the holder is a server.
    """

    def __init__(
        self, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", *, at_server: bool = False
    ) -> None:
        self._job, self._policy, self._base = job, policy, base
        self._device, self._at_server = torch.device(device), at_server
        self._work: StepWork | None = None

    def machine(self) -> tuple[str, str]:
        """Return the host's name, and a unique identity of the machine."""
        name = platform.node()
        boot = ""
        with suppress(OSError):
            boot = _BOOT.read_text().strip()
        return name, f"{name} {boot}"

    def free_bytes(self) -> int:
        """See :func:`hsplit.measuring.free_memory.free_bytes`."""
        return free_bytes(self._device)

    def message(self, nbytes: int) -> tuple[int, WireTensor]:
        """Make a message of about ``nbytes`` in the run's wire format; returns its exact size, then the message."""
        rows = max(1, nbytes // row_bytes(self._job.wire, _WIDTH))
        hidden = torch.ones(rows, _WIDTH, dtype=self._base.dtype, device=self._device)
        message = WireTensor.pack(hidden, self._job.wire)
        return message.nbytes, message

    def pass_on(self, message: WireTensor) -> tuple[int, WireTensor]:
        """Unpack a message as activations are, and pack it again; returns as :meth:`message`."""
        again = WireTensor.pack(message.unpack(self._base.dtype, self._device), self._job.wire)
        return again.nbytes, again

    def prepare(self, setting: LayerSetting, clients: int) -> None:
        """Read the timed layers, and warm up; see :class:`~hsplit.measuring.compute.StepWork`."""
        self._work = StepWork(
            self._base, self._job, self._policy, setting, self._device, at_server=self._at_server, clients=clients
        )
        self._work.warm_up()

    def step_seconds(self, at_least_s: float) -> StepSeconds:
        """Measure the mean seconds of local steps over ``at_least_s``; call it after :meth:`prepare`."""
        assert self._work is not None, "prepare comes first"
        return self._work.seconds(at_least_s)
