"""Who drives a run, told in a file: machines that share a run's directory may not see each other's locks on it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hsplit.config.files import read_json
from hsplit.config.section import EXACT
from hsplit.errors import InputError
from hsplit.files import write_text_atomically

_TOUCHED_S = 5.0
_SILENT_S = 30.0
"""A driver that has not touched its file for so long is gone; much more than ``_TOUCHED_S``, for clocks that differ."""


@dataclass(frozen=True)
class Driver:
    """A process that drives a run, or has.

    Attributes:
        host: the name of its machine.
        pid: its process id there.
    """

    host: str
    pid: int
    __pydantic_config__ = EXACT

    @classmethod
    def here(cls) -> Driver:
        """This process."""
        return cls(socket.gethostname(), os.getpid())


@contextmanager
def announced(path: Path) -> Iterator[None]:
    """Have the file ``path`` say who drives the run, and be touched now and then, until the end of the block."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCHED_S):
            with suppress(OSError):
                os.utime(path)

    # Who cannot write it drives all the same: it matters to those who watch from elsewhere only.
    with suppress(OSError):
        write_text_atomically(path, json.dumps(asdict(Driver.here())), durable=False)
    thread = threading.Thread(target=touch, name="announces the driver", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            path.unlink()


def read_driver(path: Path) -> Driver | None:
    """Who announced itself in ``path`` last and did not end well since; ``None`` if nobody did."""
    try:
        return read_json(path, Driver)
    except InputError:
        return None


def drives_elsewhere(path: Path) -> bool:
    """Whether a process of another machine keeps touching the file ``path``."""
    driver = read_driver(path)
    if driver is None or driver.host == socket.gethostname():
        return False
    with suppress(OSError):
        return time.time() - path.stat().st_mtime < _SILENT_S
    return False
