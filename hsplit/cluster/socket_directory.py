"""A temporary directory whose path is short enough for sockets: the system's own, or another one."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence

from hsplit.errors import InputError

# The shortest limit is that of macOS: 104 bytes with the terminating one.
_LONGEST_SOCKET_PATH = 103
# In a directory of hsplit's own, such as hsplit-a1b2c3d4, Ray makes the longest of its sockets' paths.
_LONGEST_BELOW = len("/hsplit-a1b2c3d4/session_2026-11-22_09-54-12_123456_4194304/sockets/dash_MetricsHead")
LONGEST = _LONGEST_SOCKET_PATH - _LONGEST_BELOW
"""Most bytes of the directory's path."""
OTHERS = ("/tmp", "/var/tmp", "/dev/shm")
# The path becomes part of commands that Ray runs.
_PLAIN = re.compile(rb"[\w./+-]+", re.ASCII)


def socket_directory(others: Sequence[str] = OTHERS) -> str:
    """Find a directory for temporary files: ``TMPDIR`` if its path is short and plain, else the first usable other.

    Args:
        others: directories to try instead.

    Raises:
        InputError: none of them can be written.
    """
    try:
        first = tempfile.gettempdir()
    except OSError as error:
        raise InputError(f"TMPDIR: {error.strerror}: give a directory that can be written") from error
    for directory in (first, *others):
        path = os.fsencode(directory)
        if len(path) <= LONGEST and _PLAIN.fullmatch(path) and os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise InputError(
        f"TMPDIR: {first} has {len(os.fsencode(first))} bytes, sockets need at most {LONGEST} of letters, digits and"
        f" ./+-_, and of {', '.join(others)} none can be written: give a shorter one"
    )
