"""Progress lines of a command that waits, and of the stages of long work on a model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hsplit.streams import encodable, is_terminal

EVERY_S = 8.0
"""Seconds without output before a line is printed; below ten, polling and a busy machine included."""
_POLL_S = 0.25
Item = TypeVar("Item")


class Waiting:
    """Context that prints what a command waits for, every ``every_s`` seconds.

    Of nested contexts only the innermost prints.

    Attributes:
        detail: printed behind the cause, such as how far it is.

    Args:
        what: cause of the wait, for the line.
        every_s: seconds between two lines, and before the first.
        growing: double the time after each line, until :meth:`heard`.
        stream: to print to; by default the present stderr, even if it is redirected later.
    """

    _nested: list[Waiting] = []  # noqa: RUF012 - of the process, which has one stderr

    def __init__(
        self, what: str, every_s: float = EVERY_S, *, growing: bool = False, stream: TextIO | None = None
    ) -> None:
        self._what, self._every_s, self._growing = what, every_s, growing
        self.detail = ""
        self._stream = stream or sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, name="waiting", daemon=True)
        self._begun = self._printed = time.monotonic()
        self._gap_s = every_s

    @classmethod
    def innermost(cls) -> Waiting | None:
        """The one of nested contexts that prints."""
        return cls._nested[-1] if cls._nested else None

    def update(self, what: str) -> None:
        """Print ``what`` from now on."""
        if what != self._what:
            self._what, self._begun = what, time.monotonic()

    def heard(self) -> None:
        """Start the time to the next line again, since other output was shown."""
        self._printed, self._gap_s = time.monotonic(), self._every_s

    def end(self) -> None:
        """Print no more lines."""
        self._ended.set()
        if self in self._nested:
            self._nested.remove(self)

    def __enter__(self) -> Self:
        self._begun = self._printed = time.monotonic()
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

    def _print_lines(self) -> None:
        while not self._ended.wait(min(_POLL_S, self._every_s)):
            now = time.monotonic()
            if now - self._printed < self._gap_s or self._nested[-1:] != [self]:
                continue
            self._printed = now
            if self._growing:
                self._gap_s *= 2
            # A closed stderr is no error.
            with suppress(OSError, ValueError, AttributeError):
                text = f"waiting: {self._what}{self.detail} ({now - self._begun:.0f} s)"
                print(encodable(text, self._stream.encoding), file=self._stream, flush=True)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show ``what`` with a spinner in a terminal, and as :class:`Waiting` elsewhere.

    Yields:
        A function that changes the text.
    """
    if is_terminal(sys.stderr):
        from rich.console import Console

        with Console(stderr=True).status(what) as spinner:
            yield spinner.update
    else:
        with Waiting(what) as waiting:
            yield waiting.update


SHOWN_FROM = 5_000
"""Items whose progress is shown: fewer take a moment."""


def track(items: Sequence[Item], what: str, each: int = 1, total: int | None = None) -> Iterator[Item]:
    """Yield ``items``, and show how far they are: as a bar in a terminal, elsewhere in the line of :class:`Waiting`.

    Args:
        items: to go through.
        what: is done with them, for the line.
        each: things that an item stands for.
        total: number of things; by default of items.
    """
    count = len(items) if total is None else total
    outer = Waiting.innermost()
    if count < SHOWN_FROM:
        yield from items
    elif is_terminal(sys.stderr):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=count)
            for item in items:
                yield item
                bar.advance(task, each)
                if outer is not None:
                    outer.heard()
    else:
        for number, item in enumerate(items):
            if outer is not None:
                outer.detail = f": {what}, {min(number * each, count):,} of {count:,}"
            yield item
        if outer is not None:
            outer.detail = ""


Stage = Callable[[str], AbstractContextManager[None]]


@contextmanager
def stages(progress: bool) -> Iterator[Stage]:
    """Yield ``stage``, used as ``with stage("converting"): ...``; each shows a line with its elapsed time.

    Lines go to stderr, since stdout is for a command's result. Without ``progress``, only stages that take long are
    shown; without a terminal, only the finished lines appear.
    """
    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    # The present stderr: a stage may redirect sys.stderr to silence a library.
    stderr = sys.stderr
    console = Console(file=stderr)
    with Progress(*columns, console=console, disable=not progress) as bar:

        @contextmanager
        def stage(description: str) -> Iterator[None]:
            task = bar.add_task(description, total=None)
            if progress:
                yield
            else:
                with Waiting(description, stream=stderr):
                    yield
            # Only a stage without an error is ticked off.
            bar.update(task, total=1, completed=1)

        yield stage
