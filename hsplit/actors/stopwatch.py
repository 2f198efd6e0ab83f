"""Where the time of one call to an actor goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds of the wall by phase, from when it is made.

    A phase ends when its work is done: on CUDA, which works behind the caller's back, that is waited for.

    Args:
        device: where the work is done.

    Attributes:
        seconds: by phase, see :data:`hsplit.observe.tables.PHASES`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards phase ``name``."""
        begun = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._add(name, time.perf_counter() - begun)

    def pace(self, seconds: float | None) -> None:
        """Sleep until ``seconds`` have passed since the start (``clock: emulated``, METHOD 8); ``None``: do not.

        Whoever is more than 5 % late has no phase ``paced``.
        """
        if seconds is None:
            return
        left = seconds - (time.perf_counter() - self._begun)
        if left < -0.05 * seconds and seconds > 0:
            return
        time.sleep(max(left, 0.0))
        self._add("paced", max(left, 0.0))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
