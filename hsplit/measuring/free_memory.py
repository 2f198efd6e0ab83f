"""Free memory of a machine, and each holder's share of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hsplit.machine import free_host_bytes

HEADROOM = 0.1
"""Part of the free memory kept out of budgets, for messages in Ray's object store and untracked allocations."""


@dataclass(frozen=True)
class Location:
    """Machine and device of a holder.

    Attributes:
        machine: its identity, the same for all holders on it.
        num_gpus: the share of a GPU that it reserved, 0 for a holder on the host.
    """

    machine: str
    num_gpus: float


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the GPUs that this process sees, or for a CPU of its host."""
    if device.type == "cuda":
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    return free_host_bytes()


def shared_out(free: Mapping[str, int], locations: Mapping[str, Location]) -> dict[str, float]:
    """Compute each holder's share of the free memory, in bytes.

    Holders on the host of one machine have equal parts; one on GPUs has the share of them that it reserved.

    Args:
        free: free memory as each holder measures it, see :func:`free_bytes`.
        locations: of the holders, by the same names.
    """
    shares = {}
    for name, nbytes in free.items():
        location = locations[name]
        sharing = sum(other == location for other in locations.values())
        part = min(location.num_gpus, 1.0) if location.num_gpus else 1.0 / sharing
        shares[name] = (1.0 - HEADROOM) * nbytes * part
    return shares
