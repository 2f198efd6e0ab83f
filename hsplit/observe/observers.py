"""Several observers of one run, told of its course in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from hsplit.observe.metrics import MetricsRow, PlanRow
from hsplit.observe.silent_display import SilentDisplay
from hsplit.observe.terminal import Display
from hsplit.observe.timing import TimingRow
from hsplit.scheduling.plan import Plan


class Observers:
    """Tells a display, then others, as a :class:`~hsplit.observe.terminal.Display` is told.

    One that fails, the display too, is left out from then on, and the display says so of the others: a run does not end
    because it cannot be watched.

    Args:
        display: what the user watches.
        others: whoever else is told, in this order.
    """

    def __init__(self, display: Display, *others: Display) -> None:
        self._display = display
        self._others = list(others)

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._tell(lambda observer: observer.started(run_name, lines))

    def plan(self, plan: Plan) -> None:
        self._tell(lambda observer: observer.plan(plan))

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        self._tell(lambda observer: observer.step(round, rounds, step, steps, losses, states))

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        self._tell(lambda observer: observer.round_done(row, holders, timing))

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._tell(lambda observer: observer.note(text, event, **fields))

    def finished(self, lines: Sequence[str]) -> None:
        self._tell(lambda observer: observer.finished(lines))

    def __enter__(self) -> Self:
        self._tell(lambda observer: observer.__enter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for observer in reversed(self._others):
            with suppress(Exception):
                observer.__exit__(kind, error, trace)
        with suppress(Exception):
            self._display.__exit__(kind, error, trace)

    def _tell(self, what: Callable[[Display], Any]) -> None:
        try:
            what(self._display)
        except Exception as error:
            with suppress(Exception):
                self._display.__exit__(type(error), error, error.__traceback__)
            self._display = SilentDisplay()
            with suppress(Exception):
                failed = "what shows the run has failed, and the run goes on without"
                print(f"note: {failed}: {type(error).__name__}: {error}", file=sys.stderr)
        for observer in list(self._others):
            try:
                what(observer)
            except Exception as error:
                self._others.remove(observer)
                with suppress(Exception):
                    observer.__exit__(type(error), error, error.__traceback__)
                self._display.note(f"{type(observer).__name__} has failed and is left out from here on: {error}")
