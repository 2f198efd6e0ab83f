"""Latency and bandwidth of a link, from the times of messages of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hsplit.config.section import LARGEST

# Ray carries messages of up to 100 kB within its calls; activations are larger, and so is the smallest of these.
SIZES = (128 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Bytes of the messages with which a link is measured."""
# No larger size is measured after a message that took longer, but two are at least.
_LONG_S = 1.0

Transfer = Callable[[int], tuple[int, float]]
"""Sends messages of about so many bytes; returns their exact size, and the seconds of one of them one way."""


@dataclass(frozen=True)
class Link:
    """Figures of a link.

    Attributes:
        bandwidth_bps: bits per second.
        latency_s: seconds of a message beside its transmission, one way.
    """

    bandwidth_bps: float
    latency_s: float


def measure_link(transfer: Transfer, sizes: Sequence[int] = SIZES) -> Link:
    """Fit the straight line ``latency + 8 nbytes / bandwidth`` to the times of messages.

    Every size has the same weight, by its relative error: the small ones determine the latency, the large ones the
    bandwidth.

    Args:
        transfer: sends messages.
        sizes: at least two, increasing; after the second, none follows one that took more than a second.
    """
    nbytes, seconds = [], []
    for size in sizes:
        exact, took = transfer(size)
        nbytes.append(exact)
        seconds.append(took)
        if took > _LONG_S and len(seconds) > 1:
            break
    slope, constant = np.polyfit(nbytes, seconds, 1, w=1.0 / np.maximum(seconds, 1e-9))
    # On a busy machine the largest message may seem to take no longer than the smallest.
    bandwidth = 8.0 / slope if slope > 0 else float(LARGEST) * 1e6
    return Link(float(bandwidth), max(0.0, float(constant)))
