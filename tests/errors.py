"""The error lines that a command wrote, apart from what a slow machine adds to them."""

from __future__ import annotations


def error_lines(stderr: str) -> list[str]:
    """Return the lines of ``stderr``, without those that say what is waited for: a slow machine has more of these."""
    return [line for line in stderr.strip().splitlines() if not line.startswith("waiting: ")]
