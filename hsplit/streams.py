"""Standard output and error that cannot end a command: what is shown decides nothing.

A reader that goes away, a full disk, a closed descriptor, a terminal that is stopped, an encoding without a character:
each is met here, below everything that writes, so that nothing above has to think of it. Messages that dependencies
print for nobody are quietened here too.
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
    """Keep back what bitsandbytes says when it is imported on a CPU: of an optional kernel for inference.

    Call it before whatever imports it, as PEFT does. Errors are still said.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


READABLE = "hsplit-readable"
"""Name of the error handler for encoding: what an encoding lacks is written in ASCII, as well as that can be done."""
HELD_UP_S = 5.0
"""How long a run waits for a reader that takes nothing, before it leaves out what it would have written."""

_ASCII = {"–": "-", "—": "-", "Σ": "sum", "→": "->", "…": "...", "✓": "done", "━": "-", "─": "-", "│": "|"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


codecs.register_error(READABLE, _in_ascii)


def encodable(text: str, encoding: str | None) -> str:
    """``text`` with whatever ``encoding`` lacks written in ASCII."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, READABLE).decode(encoding)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a terminal; one that is closed or not there is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


class _Unfailing(io.FileIO):
    """Bytes to a descriptor; once it cannot be written, to nowhere.

    Attributes:
        failure: why it could not be written, if so.
        patience_s: how long a reader that takes nothing is waited for; ``None``: as long as it takes.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None
        self.patience_s: float | None = None
        self._held_up = False

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        if self.patience_s is not None:
            # One that was held up is looked at again, but not waited for.
            self._held_up = not self._takes_some(0.0 if self._held_up else self.patience_s)
            if self._held_up:
                return len(rest)
            # So much is taken at once, or nothing would be said to be taken.
            rest = rest[: select.PIPE_BUF]
        try:
            while (written := super().write(rest)) is None:
                # A descriptor that does not wait by itself.
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
            # Writing to it tells more.
            return True

    def _to_nowhere(self) -> None:
        # In place of the descriptor, for whoever writes past this, and for processes that are started later.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


class Outputs:
    """This process's standard streams, made unfailing; for the command line, which owns them.

    Attributes:
        runs: the command trains, which goes on whatever becomes of its output.
    """

    def __init__(self) -> None:
        self.runs = False
        self._raw: dict[str, _Unfailing] = {}

    def protect(self) -> None:
        """Put unfailing streams in the place of ``sys.stdout`` and ``sys.stderr``, of closed ones too."""
        if os.name != "posix":
            return
        for descriptor in (0, 1, 2):
            # Otherwise a file of the run's could have its number, and be printed into.
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
        """From now on leave out what a reader does not take: a run goes on behind one that has stopped reading."""
        self.runs = True
        for raw in self._raw.values():
            raw.patience_s = HELD_UP_S

    @property
    def reader_is_gone(self) -> bool:
        """Whether nobody reads standard output any more."""
        return self._failure is not None and self._failure.errno == errno.EPIPE

    def loss(self) -> str | None:
        """Why standard output has not all that was written; ``None`` if it has, or its reader wanted no more."""
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        failure = self._failure
        return None if failure is None or self.reader_is_gone else failure.strerror or str(failure)

    @property
    def _failure(self) -> OSError | None:
        raw = self._raw.get("stdout")
        return None if raw is None else raw.failure


outputs = Outputs()
"""Of this process."""


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
