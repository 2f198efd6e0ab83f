"""Error lines of a command, without those that depend on the machine."""

from __future__ import annotations


def error_lines(stderr: str) -> list[str]:
    """Lines of ``stderr`` without those about waiting and about the machine, of which a busy machine prints more."""
    return [line for line in stderr.strip().splitlines() if not line.startswith(("waiting: ", "machine: "))]
