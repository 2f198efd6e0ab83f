"""What stands in a holder's place while its budget is measured. Ray-free."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch

from hsplit.actors.messages import WIRE_DTYPES, WireTensor
from hsplit.config import Job, Policy
from hsplit.measuring.compute import StepSeconds, StepWork
from hsplit.measuring.free_memory import free_bytes
from hsplit.models.segment import BaseModel
from hsplit.planning.cost.fake_layer import LayerSetting

# Tokens of a message are this wide; what a row of the wire takes beside its entries hardly counts then.
_WIDTH = 1024
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class MeasuringActor:
    """Measures what its process has: memory, compute, and its end of a link.

    Args:
        job, policy: the run's settings.
        base: the base model as the holder would read it.
        device: where the holder would compute.
        at_server: it stands in the server's place.
    """

    def __init__(
        self, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", *, at_server: bool = False
    ) -> None:
        self._job, self._policy, self._base = job, policy, base
        self._device, self._at_server = torch.device(device), at_server
        self._work: StepWork | None = None

    def machine(self) -> tuple[str, str]:
        """The host's name, and an identity of the machine: names may be alike."""
        name = platform.node()
        boot = ""
        with suppress(OSError):
            boot = _BOOT.read_text().strip()
        return name, f"{name} {boot}"

    def free_bytes(self) -> int:
        """See :func:`hsplit.measuring.free_memory.free_bytes`."""
        return free_bytes(self._device)

    def message(self, nbytes: int) -> tuple[int, WireTensor]:
        """A message of about ``nbytes`` at the run's wire dtype, and before it its exact size."""
        token = _WIDTH + 4 if self._job.wire == "int8" else _WIDTH * WIRE_DTYPES[self._job.wire].itemsize
        hidden = torch.ones(max(1, nbytes // token), _WIDTH, dtype=self._base.dtype, device=self._device)
        message = WireTensor.pack(hidden, self._job.wire)
        return message.nbytes, message

    def pass_on(self, message: WireTensor) -> tuple[int, WireTensor]:
        """Take a message as activations are taken, and send it on; as :meth:`message`."""
        again = WireTensor.pack(message.unpack(self._base.dtype, self._device), self._job.wire)
        return again.nbytes, again

    def prepare(self, setting: LayerSetting, clients: int) -> None:
        """Read the layers that are timed, and warm up; see :class:`~hsplit.measuring.compute.StepWork`."""
        self._work = StepWork(
            self._base, self._job, self._policy, setting, self._device, at_server=self._at_server, clients=clients
        )
        self._work.warm_up()

    def step_seconds(self, at_least_s: float) -> StepSeconds:
        """Mean seconds of local steps over ``at_least_s``; call it after :meth:`prepare`."""
        assert self._work is not None, "prepare comes first"
        return self._work.seconds(at_least_s)
