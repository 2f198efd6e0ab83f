"""Observers of a run: one base class with a no-op method for each kind of event, and a fan-out to several observers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.planning.plan import Plan


class Observer:
    """Receives a run's events in the order of the methods below; each does nothing unless a subclass overrides it.

    A context manager, so that a terminal or a file is left tidy however the run ends.
    """

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        """The run has a directory and a name; ``lines`` describe its machines."""

    def plan(self, plan: Plan) -> None:
        """The first plan is in force, or one that replaces it."""

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        """Step ``step`` of the run's ``steps`` is done, in round ``round`` of ``rounds``; all count from 1.

        Args:
            losses: mean loss of each client that took part.
            states: a word for the activity of each holder; a holder left out keeps its state.
        """

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """A round ended, its validation done; round 0 is before any training.

        Args:
            row, holders, timing: the rows that the round adds to ``metrics.csv``, ``plan.csv`` and ``timing.csv``.
        """

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Something happened that the user should know now.

        Args:
            text: a sentence.
            event, fields: as written to ``events.jsonl``, if at all (:class:`~hsplit.observe.events.EventLog`).
        """

    def finished(self, lines: Sequence[str]) -> None:
        """The run is complete; ``lines`` name the places of its results."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class SilentDisplay(Observer):
    """Display that shows nothing, for experiments and tests.

    Attributes:
        rows: the rows of ``metrics.csv`` so far.
    """

    def __init__(self) -> None:
        self.rows: list[MetricsRow] = []

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        self.rows.append(row)


class Observers(Observer):
    """Fan-out of a run's events to a display and to further observers.

    An observer that raises is removed, the display too; the display notes the removal of any other. A failing observer
    never ends a run.

    Args:
        display: shows the run to the user.
        others: further observers, called in this order.
    """

    def __init__(self, display: Observer, *others: Observer) -> None:
        self._display = display
        self._others = list(others)

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._each(lambda observer: observer.started(run_name, lines))

    def plan(self, plan: Plan) -> None:
        self._each(lambda observer: observer.plan(plan))

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        self._each(lambda observer: observer.step(round, rounds, step, steps, losses, states))

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        self._each(lambda observer: observer.round_done(row, holders, timing))

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._each(lambda observer: observer.note(text, event, **fields))

    def finished(self, lines: Sequence[str]) -> None:
        self._each(lambda observer: observer.finished(lines))

    def __enter__(self) -> Self:
        self._each(lambda observer: observer.__enter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for observer in reversed(self._others):
            with suppress(Exception):
                observer.__exit__(kind, error, trace)
        with suppress(Exception):
            self._display.__exit__(kind, error, trace)

    def _each(self, call: Callable[[Observer], Any]) -> None:
        try:
            call(self._display)
        except Exception as error:
            with suppress(Exception):
                self._display.__exit__(type(error), error, error.__traceback__)
            self._display = SilentDisplay()
            with suppress(Exception):
                failed = "what shows the run has failed, and the run goes on without"
                print(f"note: {failed}: {type(error).__name__}: {error}", file=sys.stderr)
        for observer in list(self._others):
            try:
                call(observer)
            except Exception as error:
                self._others.remove(observer)
                with suppress(Exception):
                    observer.__exit__(type(error), error, error.__traceback__)
                self._display.note(f"{type(observer).__name__} has failed and is left out from here on: {error}")
