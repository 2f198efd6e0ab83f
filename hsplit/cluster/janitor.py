"""A small process that outlives a run's driver and tidies up after it, however it ended.

A driver that is killed cannot remove anything. So :class:`Janitor` starts this file as a program of its own, with the
standard library alone, and holds a pipe to it. When the pipe ends, the driver is gone: what it has started is ended,
and what is temporary or half-written is removed.
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
"""In the environment of every process that a driver starts for a local Ray: the folder of what is temporary."""

# Ray's processes notice within seconds that their driver is gone; then they are made to end.
_PATIENCE_S = 15.0
_LOOK_S = 0.1


class Janitor:
    """Starts the process and makes the folder of what is temporary; both end with the ``with`` block, or the driver.

    Attributes:
        root: the folder; short, since a socket's path may have about a hundred bytes. Nobody else may enter.
    """

    def __init__(self) -> None:
        # Here, since this file is a program too, with the standard library alone.
        from hsplit.cluster.socket_directory import socket_directory

        self.root = Path(tempfile.mkdtemp(prefix="hsplit-", dir=socket_directory()))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.root)],
            stdin=subprocess.PIPE,
            # A Ctrl-C in the terminal is the run's to answer.
            start_new_session=True,
        )

    def removes(self, *patterns: str | Path) -> None:
        """Have files and folders that match ``patterns`` removed at the end as well."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(pattern) for pattern in patterns]).encode() + b"\n")
        self._process.stdin.flush()

    def __enter__(self) -> Janitor:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def tidy(root: str, patterns: Sequence[str]) -> None:
    """Remove what matches ``patterns``, end every process that has ``root`` as its mark, then remove ``root``."""
    # First of all: whoever goes on with the run may be writing soon.
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
    """Processes that were started with ``root`` in their environment; none where the system has no ``/proc``."""
    mark = f"{MARK}={root}".encode()
    found = []
    for entry in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{entry}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(entry.rpartition("/")[2]))
        except OSError:
            # Gone meanwhile, or somebody else's.
            continue
    return found


def main(root: str) -> None:
    """Take patterns from stdin, a JSON list a line, until it ends; then tidy up."""
    patterns: list[str] = []
    for line in sys.stdin:
        patterns += json.loads(line)
    tidy(root, patterns)


if __name__ == "__main__":
    main(sys.argv[1])
