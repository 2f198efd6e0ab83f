"""A small process that outlives a run's driver and cleans up after it, however it ended.

A driver that is killed cannot remove anything. So :class:`CleanupProcess` runs this file as a program of its own, with
the standard library alone, and holds a pipe to it. When the pipe ends, the driver is gone: the processes that it
started are ended, and temporary and half-written files are removed.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MARK = "HSPLIT_ROOT"
"""Environment variable of every process that a driver starts for a local Ray: its folder for temporary files."""

# Ray's processes notice within seconds that their driver is gone; those that do not are killed after this.
_PATIENCE_S = 15.0
_LOOK_S = 0.1


class CleanupProcess:
    """Starts the process and makes a folder for temporary files; both end with the ``with`` block, or with the driver.

    Attributes:
        root: the folder, readable by this user alone; its path is short, since a socket's may have about 100 bytes.
    """

    def __init__(self) -> None:
        # Imported here, since this file as a program has the standard library alone.
        from hsplit.cluster.socket_directory import socket_directory

        self.root = Path(tempfile.mkdtemp(prefix="hsplit-", dir=socket_directory()))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.root)],
            stdin=subprocess.PIPE,
            # A Ctrl-C in the terminal is the run's to answer.
            start_new_session=True,
        )

    def remove_at_end(self, *patterns: str | Path) -> None:
        """Also remove files and folders that match ``patterns`` at the end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(pattern) for pattern in patterns]).encode() + b"\n")
        self._process.stdin.flush()

    def __enter__(self) -> CleanupProcess:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def clean_up(root: str, patterns: Sequence[str]) -> None:
    """Remove what matches ``patterns``, end every process marked with ``root``, then remove ``root``."""
    # First: the run may be resumed, and written to, at any moment.
    for path in (path for pattern in patterns for path in glob.glob(pattern, include_hidden=True)):
        _remove(path)
    until = time.monotonic() + _PATIENCE_S
    while pids := _marked(root):
        if time.monotonic() > until:
            for pid in pids:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    _remove(root)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _marked(root: str) -> list[int]:
    """Find the processes with ``root`` in their environment; none where the system has no ``/proc``."""
    mark = f"{MARK}={root}".encode()
    found = []
    for entry in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{entry}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(entry.rpartition("/")[2]))
        except OSError:
            # Ended meanwhile, or another user's.
            continue
    return found


def main(root: str) -> None:
    """Read patterns from stdin, a JSON list a line, until it ends; then clean up."""
    patterns: list[str] = []
    for line in sys.stdin:
        patterns += json.loads(line)
    clean_up(root, patterns)


if __name__ == "__main__":
    main(sys.argv[1])
