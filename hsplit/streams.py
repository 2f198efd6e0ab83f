"""Standard output and error whose failures cannot end a command.

A reader that closes the pipe, a full disk, a closed descriptor, a stopped terminal, an encoding without a character:
each is handled here, so that no code above has to. Useless messages of dependencies are silenced here too.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO


def quieten_bitsandbytes() -> None:
    """Silence bitsandbytes' warning on a CPU about an optional inference kernel; errors are still shown.

    Call this before bitsandbytes is imported, as PEFT does.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


READABLE = "hsplit-readable"
"""Name of the encoding error handler that replaces characters by similar ASCII."""
HELD_UP_S = 5.0
"""Seconds that a run waits for a blocked reader before it drops output."""

_ASCII = {"–": "-", "—": "-", "Σ": "sum", "→": "->", "…": "...", "✓": "done", "━": "-", "─": "-", "│": "|"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(READABLE, _in_ascii)


def encodable(text: str, encoding: str | None) -> str:
    """``text`` with the characters that ``encoding`` lacks replaced by ASCII."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, READABLE).decode(encoding)


def is_terminal(stream: TextIO | None) -> bool:
    """True if ``stream`` is an open terminal."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


class _Unfailing(io.FileIO):
    """Raw output to a descriptor that discards all bytes once writing has failed.

    Attributes:
        failure: error of the first failed write; ``None``: there was none.
        patience_s: seconds to wait for a blocked reader before output is dropped; ``None``: forever.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None
        self.patience_s: float | None = None
        self._held_up = False

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        if self.patience_s is not None:
            # A reader that was blocked before is checked again, but not waited for.
            self._held_up = not self._takes_some(0.0 if self._held_up else self.patience_s)
            if self._held_up:
                return len(rest)
            # Selected as writable, a pipe takes this many bytes at once.
            rest = rest[: select.PIPE_BUF]
        try:
            while (written := super().write(rest)) is None:
                # A non-blocking descriptor.
                self._takes_some(None)
        except OSError as error:
            self.failure = error
            self._to_nowhere()
            return len(rest)
        return written

    def _takes_some(self, timeout_s: float | None) -> bool:
        try:
            return bool(select.select([], [self.fileno()], [], timeout_s)[1])
        except (OSError, ValueError):
            # Writing raises the actual error.
            return True

    def _to_nowhere(self) -> None:
        # Replaces the descriptor, also for code that writes to it directly and for later subprocesses.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class Outputs:
    """Unfailing standard streams of this process, for the command line.

    Attributes:
        runs: true if the command trains, which continues without its output.
    """

    def __init__(self) -> None:
        self.runs = False
        self._raw: dict[str, _Unfailing] = {}

    def protect(self) -> None:
        """Replace ``sys.stdout`` and ``sys.stderr``, closed ones too, by unfailing streams."""
        if os.name != "posix":
            return
        for descriptor in (0, 1, 2):
            # Otherwise a file of the run could get its number, and be printed into.
            _open_if_closed(descriptor)
        if sys.stdin is None:
            sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - it is open until the end
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            before: io.TextIOWrapper | None = getattr(sys, name)
            raw = self._raw[name] = _Unfailing(descriptor)
            by_line = descriptor == 2 or raw.isatty()
            encoding = before.encoding if before is not None else "utf-8"
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, READABLE, line_buffering=by_line)
            stream.mode = "w"  # type: ignore[misc]
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)

    def never_wait(self) -> None:
        """Drop output from now on that a blocked reader does not take, so that a run continues."""
        self.runs = True
        for raw in self._raw.values():
            raw.patience_s = HELD_UP_S

    @property
    def reader_is_gone(self) -> bool:
        """True if the reader has closed standard output."""
        return self._failure is not None and self._failure.errno == errno.EPIPE

    def loss(self) -> str | None:
        """Error that standard output was cut short by; ``None`` if it is whole, or the reader closed it."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        failure = self._failure
        return None if failure is None or self.reader_is_gone else failure.strerror or str(failure)

    @property
    def _failure(self) -> OSError | None:
        raw = self._raw.get("stdout")
        return None if raw is None else raw.failure


outputs = Outputs()
"""Standard streams of this process."""


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
