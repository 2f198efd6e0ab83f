"""Modes of written files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UMASKS = [0o022, 0o077, 0o002]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    """Set the process's umask within the block."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Modes of all files below ``folder``, by path."""
    return {str(f.relative_to(folder)): stat.S_IMODE(f.stat().st_mode) for f in folder.rglob("*") if f.is_file()}


def assert_new(folder: Path, mask: int, *names: str) -> None:
    """All files below ``folder``, ``names`` among them, have the mode that new ones get under the umask ``mask``."""
    found = modes(folder)
    assert set(names) <= found.keys(), found
    assert set(found.values()) == {0o666 & ~mask}, {name: oct(mode) for name, mode in found.items()}
