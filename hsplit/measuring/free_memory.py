"""Free memory of a machine, and each holder's share of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

HEADROOM = 0.1
"""Part of the free memory kept out of budgets, for messages in Ray's object store and untracked allocations."""

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# By version: limit, use, and the key in memory.stat of memory that is used but reclaimable.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


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
    available = int(psutil.virtual_memory().available)
    limited = cgroup_free_bytes()
    return available if limited is None else min(available, limited)


def cgroup_free_bytes(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int | None:
    """Return the memory that this process's control groups leave it; ``None`` where they set no limit.

    Args:
        root: directory of the control groups.
        own: file that lists those of this process.
    """
    found: list[int] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            names, top = (_VERSION_1, root / "memory") if controllers else (_VERSION_2, root)
            folder = top / path.lstrip("/")
            for inside in (folder, *folder.parents):
                # In a container the path may be the host's; the folders of it that exist are the container's.
                if inside.is_relative_to(top):
                    found += _left_in(inside, *names)
    return min(found, default=None)


def _left_in(folder: Path, limit: str, used: str, reclaimable: str) -> list[int]:
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        # No such file, or no limit, which is written as "max".
        return []
    return [max(0, most - now + int(stat.get(reclaimable, 0)))]


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
