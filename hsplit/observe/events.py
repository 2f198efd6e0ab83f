"""The event log of a run: one JSON object a line, each line complete or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import BeforeValidator

from hsplit.planning.plan import Plan

ROUTINE_EVENTS = frozenset(
    {"shares", "started", "planned", "importance", "unprobed", "step", "validated", "round", "checkpoint", "finished"}
)
"""Kinds of events in the normal course of a run; a report lists all others, such as ``replanned`` and ``budget``."""

RESERVED = ("time", "event", "text")
"""Fields of every event; the rest are its own."""
_BLOCK_BYTES = 1 << 16


class EventLog:
    """Appends to ``events.jsonl``: ``{"time": ISO 8601 in UTC, "event": kind, "text": ..., ...fields}``.

    Each line is one write, so a kill can only cut the last one; opening the file again removes such a half line.

    Args:
        path: the file; created if missing.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("ab+", buffering=0)  # noqa: SIM115  # open as long as the log is
        _drop_half_line(self._file.fileno())

    def write(self, kind: str, text: str, /, **fields: Any) -> None:
        """Append one event.

        Args:
            kind: one word, such as ``failure`` (see ``ROUTINE_EVENTS``).
            text: a sentence for the user.
            fields: figures and names; values unknown to JSON are written as text, infinite and undefined numbers too.

        Raises:
            ValueError: a field is named ``time``, ``event`` or ``text``, or the log is closed.
            OSError: the line cannot be written.
        """
        for name in RESERVED:
            if name in fields:
                raise ValueError(f"an event's field cannot be named {name!r}")
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        event = {"time": now, "event": kind, "text": text, **finite(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False, default=str) + "\n"
        # bytes of a path that are not UTF-8 arrive as lone surrogates; JSON has an escape for them
        rest = memoryview(line.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file; no event can be written afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class EventReader:
    """Reads a growing log, each complete line once; a line that is being written is left for the next call.

    Args:
        path: the file, which may not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the events since the last call, oldest first; invalid lines are left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return _events(whole)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read the events in ``path``, oldest first; none if there is no such file.

    Lines not written by :meth:`EventLog.write` are left out, and so is an incomplete last line.
    """
    return EventReader(path).new()


def plan_of(event: Mapping[str, Any]) -> Plan | None:
    """Return the plan in a ``planned`` event, ``None`` without a complete one."""
    try:
        plan: Any = event.get("plan")
        return Plan.from_json(plan)
    except ValueError:
        return None


def finite(value: Any) -> Any:
    """Return ``value`` with NaN and infinities as text, since strict JSON cannot express them."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


MaybeInfinite = Annotated[float, BeforeValidator(_number)]
"""A number as :func:`finite` writes it."""


def _events(lines: bytes) -> list[dict[str, Any]]:
    events = []
    for line in lines.split(b"\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and all(isinstance(event.get(key), str) for key in RESERVED) and _is_time(event):
            events.append(event)
    return events


def _is_time(event: Mapping[str, Any]) -> bool:
    try:
        return datetime.fromisoformat(event["time"]).tzinfo is not None
    except ValueError:
        return False


def _drop_half_line(descriptor: int) -> None:
    """Truncate the file after its last newline."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    keep = 0
    start = end
    while start > 0 and keep == 0:
        size = min(_BLOCK_BYTES, start)
        start -= size
        os.lseek(descriptor, start, os.SEEK_SET)
        found = os.read(descriptor, size).rfind(b"\n")
        keep = start + found + 1 if found >= 0 else 0
    if keep < end:
        os.ftruncate(descriptor, keep)
