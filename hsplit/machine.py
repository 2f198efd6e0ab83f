"""The state of this machine: memory, cores, shared memory and open files, and what a run would lack of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# By version: limit, use, and the key in memory.stat of memory that is used but reclaimable.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")

_SHARED_MEMORY = "/dev/shm"
# Ray's object store takes so much of the free memory, and goes to a disk where /dev/shm has neither that nor the most.
_STORE_SHARE, _MOST_STORE_BYTES = 0.3, 10e9
# Files and connections of the raylet, which has the most, and so many more for each actor (measured with 2 to 30).
_FILES_OF_RAY, _FILES_PER_ACTOR = 100, 5
# Share of a machine's memory in use at which Ray's memory monitor ends actors.
_THRESHOLD, _USUAL_THRESHOLD = "RAY_memory_usage_threshold", "0.95"
# Actors wait most of the time; beyond so many for each core they wait for one another.
_ACTORS_PER_CORE = 16


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """A run would start, and be slower or in danger."""
    BAD = "bad"
    """A run would not start."""


@dataclass(frozen=True)
class Finding:
    """One line about a machine.

    Attributes:
        what: the part of it, such as ``memory``.
        level: whether something is wrong.
        text: its state, and the remedy.
    """

    what: str
    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


@dataclass(frozen=True)
class Machine:
    """What a machine has left.

    Attributes:
        free_bytes: memory that is available, within the control groups' limits.
        reserve_bytes: part of it that has to stay free: Ray's memory monitor ends actors where less is left.
        cores: that this process may use.
        load: processes that wanted a core, the mean of the last minute.
        shared_bytes: free in ``/dev/shm``; ``None``: there is none.
        open_files: most files that a process may have open; ``None``: no limit.
    """

    free_bytes: int
    reserve_bytes: int
    cores: int
    load: float
    shared_bytes: int | None
    open_files: int | None

    @classmethod
    def here(cls) -> Machine:
        """Look at the machine of this process."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(
            free_host_bytes(), _reserve_bytes(), cores, psutil.getloadavg()[0], _shared_bytes(), _most_open_files()
        )

    def findings(self, declared_bytes: Mapping[str, int]) -> list[Finding]:
        """Compare what there is with what a run needs.

        Args:
            declared_bytes: memory of the holders on this machine's CPUs, by name; empty: no run in particular.
        """
        found = [self._memory(declared_bytes), self._cores(len(declared_bytes)), self._files(len(declared_bytes))]
        return found if self.shared_bytes is None else [*found, self._shared(self.shared_bytes)]

    def _memory(self, declared_bytes: Mapping[str, int]) -> Finding:
        free, declared = f"{self.free_bytes / 1e9:.1f} GB free", sum(declared_bytes.values())
        if not declared_bytes:
            return Finding("memory", Level.OK, free)
        text = f"{free}, {declared / 1e9:.1f} GB declared for {_names(list(declared_bytes))}"
        if declared + self.reserve_bytes <= self.free_bytes:
            return Finding("memory", Level.OK, text)
        text += (
            f": Ray ends actors where less than {self.reserve_bytes / 1e9:.1f} GB are left; free some, or declare less"
        )
        text += " (memory_gb)"
        return Finding("memory", Level.NOTE, text)

    def _cores(self, actors: int) -> Finding:
        text = f"{self.cores}, of which {self.load:.1f} were in use in the last minute"
        if actors:
            text += f", for {actors} actors"
        if self.load >= self.cores:
            return Finding("cores", Level.NOTE, f"{text}: other work slows a run down")
        if actors > _ACTORS_PER_CORE * self.cores:
            return Finding("cores", Level.NOTE, f"{text}: they wait for one another; more machines help (--address)")
        return Finding("cores", Level.OK, text)

    def _files(self, actors: int) -> Finding:
        needed = _FILES_OF_RAY + _FILES_PER_ACTOR * actors
        if self.open_files is None:
            return Finding("open files", Level.OK, "no limit")
        text = f"{self.open_files:,} at most in a process"
        if self.open_files >= needed:
            return Finding("open files", Level.OK, text)
        return Finding("open files", Level.BAD, f"{text}, Ray needs about {needed:,}: raise it (ulimit -Hn {8 * 1024})")

    def _shared(self, shared_bytes: int) -> Finding:
        text = f"{shared_bytes / 1e9:.1f} GB free in {_SHARED_MEMORY}"
        wanted = min(_STORE_SHARE * self.free_bytes, _MOST_STORE_BYTES)
        # Ray leaves a twentieth.
        if 0.95 * shared_bytes >= wanted:
            return Finding("shared memory", Level.OK, text)
        return Finding(
            "shared memory",
            Level.NOTE,
            f"{text}, Ray's object store takes {wanted / 1e9:.1f} GB and so goes to a disk, which is slower: make it"
            f" larger (in Docker --shm-size={math.ceil(wanted / 0.95 / (1 << 30))}gb)",
        )


def _names(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:most])} and {more} others"


def _shared_bytes() -> int | None:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bsize * found.f_bavail


def _most_open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    # Ray raises the soft limit as far as the hard one allows.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def _reserve_bytes() -> int:
    with suppress(ValueError):
        return round((1 - float(os.environ.get(_THRESHOLD, _USUAL_THRESHOLD))) * psutil.virtual_memory().total)
    return 0


def free_host_bytes() -> int:
    """Return the memory that is available to this process on its host."""
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
