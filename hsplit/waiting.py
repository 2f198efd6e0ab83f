"""Lines that say what a command waits for, and the stages of long work on a model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hsplit.streams import encodable, is_terminal

EVERY_S = 8.0
"""Seconds without a word before one is said; with the time that a look and a busy machine take, below ten."""
_LOOK_S = 0.25


class Waiting:
    """Says what is waited for, in every ``every_s`` seconds of its ``with`` block; nothing in a shorter one.

    Of several that are nested only the innermost speaks.

    Args:
        what: is waited for.
        every_s: seconds between two lines.
        growing: each time twice as long as before, until :meth:`heard`.
        stream: where to; stderr as it is now by default, whatever takes its place meanwhile.
    """

    _nested: list[Waiting] = []  # noqa: RUF012 - of the process, which has one stderr

    def __init__(
        self, what: str, every_s: float = EVERY_S, *, growing: bool = False, stream: TextIO | None = None
    ) -> None:
        self._what, self._every_s, self._growing = what, every_s, growing
        self._stream = stream or sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="says what is waited for", daemon=True)
        self._begun = self._spoken = time.monotonic()
        self._gap_s = every_s

    def update(self, what: str) -> None:
        """Wait for ``what`` from now on."""
        if what != self._what:
            self._what, self._begun = what, time.monotonic()

    def heard(self) -> None:
        """Something else was shown: nothing need be said for a while."""
        self._spoken, self._gap_s = time.monotonic(), self._every_s

    def end(self) -> None:
        """Say nothing more."""
        self._ended.set()
        if self in self._nested:
            self._nested.remove(self)

    def __enter__(self) -> Self:
        self._begun = self._spoken = time.monotonic()
        self._nested.append(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        self._thread.join()
        for outer in self._nested[-1:]:
            outer.heard()

    def _speak(self) -> None:
        while not self._ended.wait(min(_LOOK_S, self._every_s)):
            now = time.monotonic()
            if now - self._spoken < self._gap_s or self._nested[-1:] != [self]:
                continue
            self._spoken = now
            if self._growing:
                self._gap_s *= 2
            # Whoever closed stderr does not want to know.
            with suppress(OSError, ValueError, AttributeError):
                text = f"waiting: {self._what} ({now - self._begun:.0f} s)"
                print(encodable(text, self._stream.encoding), file=self._stream, flush=True)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show what is under way, as a line that turns in a terminal and as :class:`Waiting` elsewhere.

    Yields:
        What changes the text.
    """
    if is_terminal(sys.stderr):
        from rich.console import Console

        with Console(stderr=True).status(what) as shown:
            yield shown.update
    else:
        with Waiting(what) as waiting:
            yield waiting.update


Stage = Callable[[str], AbstractContextManager[None]]


@contextmanager
def stages(progress: bool) -> Iterator[Stage]:
    """Yield ``stage``, used as ``with stage("converting"): ...``; each shows a line with its elapsed time.

    Written to stderr, because stdout belongs to what a command was asked for. When ``progress`` is False, only a
    stage that takes long is told of; where stderr is no terminal only the finished lines appear.
    """
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    # Bound to today's stderr on purpose: a stage may redirect sys.stderr to hush a library without hushing
    # this.
    said = sys.stderr
    console = Console(file=said)
    with Progress(*columns, console=console, disable=not progress) as bar:

        @contextmanager
        def stage(description: str) -> Iterator[None]:
            task = bar.add_task(description, total=None)
            if progress:
                yield
            else:
                with Waiting(description, stream=said):
                    yield
            # Only a stage that ended well is ticked off; one that raised keeps its spinner's last frame.
            bar.update(task, total=1, completed=1)

        yield stage
