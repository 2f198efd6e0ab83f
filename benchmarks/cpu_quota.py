"""A share of one core for a process, by the kernel (Linux control groups): budgets that are physical.

A part of: hsplit bench clock
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hsplit.errors import InputError

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 20_000
# Ahead of whatever else the machine does, so that a share of a core is had and not only allowed.
_WEIGHT = 100


class CpuQuotas:
    """Gives processes shares of a core; outside of :meth:`applied` they have none.

    Args:
        root: where control groups are mounted.

    Raises:
        InputError: no controller of CPU time can be written there.
    """

    def __init__(self, root: Path = ROOT) -> None:
        if os.access(root / "cpu", os.W_OK) and (root / "cpu" / "cpu.cfs_quota_us").exists():
            self._parent, self._first = root / "cpu", True
        elif os.access(root, os.W_OK) and "cpu" in _words(root / "cgroup.subtree_control"):
            self._parent, self._first = root, False
        else:
            raise InputError(f"bench clock: no control group of CPU time can be made below {root} (it takes root)")

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Put this process, and whatever it starts, ahead of whatever else the machine does; no limit is set."""
        group = self._parent / f"hsplit-{os.getpid()}"
        try:
            self._make(group, None)
            (group / "cgroup.procs").write_text(str(os.getpid()))
            yield
        finally:
            self._remove(group)

    @contextmanager
    def applied(self, shares: Mapping[int, float]) -> Iterator[None]:
        """Keep every process to its share.

        Args:
            shares: of one core, by process id.

        Raises:
            OSError: a process is gone.
        """
        groups = []
        try:
            for pid, share in shares.items():
                groups.append(self._parent / f"hsplit-{os.getpid()}-{pid}")
                self._make(groups[-1], share)
                (groups[-1] / "cgroup.procs").write_text(str(pid))
            yield
        finally:
            for group in groups:
                self._remove(group)

    def _make(self, group: Path, share: float | None) -> None:
        group.mkdir(exist_ok=True)
        quota = None if share is None else round(share * PERIOD_US)
        if self._first:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))
            (group / "cpu.shares").write_text(str(1024 * _WEIGHT))
        else:
            (group / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD_US}")
            (group / "cpu.weight").write_text(str(100 * _WEIGHT))

    def _remove(self, group: Path) -> None:
        """A group can go when its processes are back above it."""
        if not group.exists():
            return
        for pid in _words(group / "cgroup.procs"):
            with suppress(ProcessLookupError):
                (self._parent / "cgroup.procs").write_text(pid)
        group.rmdir()


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []
