"""Free memory of a machine, and what of it is a holder's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

HEADROOM = 0.1
"""Part of the free memory that no budget gets: messages in Ray's object store, and what libraries take unseen."""

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# By version: limit, use, and the key in memory.stat of what is used but given back on demand.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class Location:
    """Where a holder computes.

    Attributes:
        machine: an identity that holders on one machine have in common.
        num_gpus: the share of a GPU that it reserved, 0 for a holder on the host.
    """

    machine: str
    num_gpus: float


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPUs that this process sees, or for a CPU of its host."""
    if device.type == "cuda":
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count()))
    available = int(psutil.virtual_memory().available)
    limited = cgroup_free_bytes()
    return available if limited is None else min(available, limited)


def cgroup_free_bytes(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int | None:
    """What the control groups of this process still let it have; ``None`` where they set no limit.

    Args:
        root: where the system shows control groups.
        own: the file with those of this process.
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
                # In a container the path may be the host's: what there is of it, and the top, is its own.
                if inside.is_relative_to(top):
                    found += _left_in(inside, *names)
    return min(found, default=None)


def _left_in(folder: Path, limit: str, used: str, reclaimable: str) -> list[int]:
    try:
        most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        # No such file, or no limit, which is written as a word.
        return []
    return [max(0, most - now + int(stat.get(reclaimable, 0)))]


def shared_out(free: Mapping[str, int], places: Mapping[str, Location]) -> dict[str, float]:
    """What of the free memory each holder may have, in bytes.

    Holders on the host of one machine have equal parts; one on GPUs has the share of them that it reserved.

    Args:
        free: what each holder finds free where it is, see :func:`free_bytes`.
        places: where that is, by the same names.
    """
    shares = {}
    for name, nbytes in free.items():
        place = places[name]
        beside = sum(other == place for other in places.values())
        part = min(place.num_gpus, 1.0) if place.num_gpus else 1.0 / beside
        shares[name] = (1.0 - HEADROOM) * nbytes * part
    return shares
