"""``hsplit watch``: follows a run from its directory alone, on any machine that can read it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_type_hints

from hsplit.errors import InputError
from hsplit.observe.displays import Pace, display_for
from hsplit.observe.events import RESERVED, ROUTINE_EVENTS, EventReader, plan_of
from hsplit.observe.observer import Observer
from hsplit.observe.progress_file import StepRecord, read_step_record
from hsplit.observe.run_list import BEGINNINGS, RunSummary, results_lines, run_state, way_on
from hsplit.observe.tables import MetricsRow, PlanRow, Row, TimingRow, read_rows
from hsplit.planning.plan import Plan
from hsplit.run_directory import RunDirectory, read_driver
from hsplit.streams import outputs

POLL_INTERVAL_S = 0.5
_RESOLUTION_S = 0.001
"""Resolution of the times in a log."""
_SILENT_EVENTS = ROUTINE_EVENTS | {"data", "training", "cohort", "budget", "failed"}
"""Kinds of events without a note: ``hsplit launch`` prints none either, or, for a failure, prints it at the end."""
_OPTIONAL = frozenset(column for column, type_ in get_type_hints(MetricsRow).items() if type_ == float | None)


def watch(path: str | Path, *, display: Observer | None = None) -> RunSummary:
    """Follow a run until it ends, as ``launch`` shows it; for a run that has ended, show the outcome.

    Only the run's directory is read, so a machine that shares it can watch too.

    Args:
        path: the run's directory.
        display: display for the run; the terminal by default.

    Returns:
        The run's final state (``complete``, ``stopped``, ``failed`` or ``interrupted``), or its current one if the
        command line's output is no longer read.

    Raises:
        InputError: there is no such run, or no longer, or its configuration cannot be read.
    """
    directory = RunDirectory.open(path)
    state = run_state(directory)
    if state.state == "unreadable":
        raise InputError(state.reason)
    with _Follower(directory, display) as follower:
        while True:
            # First, so that everything that a driver writes before it ends is read afterwards.
            driven = RunDirectory.open(path).is_driven
            follower.update(driven)
            if follower.complete or not driven:
                return follower.end()
            if outputs.reader_is_gone:
                return run_state(directory)
            time.sleep(POLL_INTERVAL_S)


class _Follower:
    """Shows the news of a run's directory on a display.

    Args:
        directory: of the run.
        display: display for the run; the terminal by default.

    Attributes:
        complete: the log has the run's completion.
    """

    def __init__(self, directory: RunDirectory, display: Observer | None) -> None:
        self._directory = directory
        self._clock = _RecordedClock()
        self._pace = Pace(self._clock)
        self._display = display or display_for(sys.stdout, self._pace)
        self._events = EventReader(directory.events)
        self._last_record: StepRecord | None = None
        self._started = False
        self._plan: Plan | None = None
        self._left_out: set[str] = set()
        # Rows by table and round, as read since the last update.
        self._tables: dict[Path, dict[int, list[Any]]] = {}
        self.complete = False

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__(kind, error, trace)

    def update(self, driven: bool) -> None:
        """Show all events since the last call; ``driven``: the run has a driver."""
        record, events = read_step_record(self._directory.progress), self._events.new()
        self._tables.clear()
        if driven and record is not None and read_driver(self._directory.driver) not in (None, record.driver):
            record = None  # of an earlier driver
        if record is not None and (self._last_record is None or record.begun != self._last_record.begun):
            self._start(record.lines)
            with self._clock.set_to(record.begun):
                self._pace.begin()
            self._last_record = replace(record, step=0, time=record.begun)
        elif not self._started and (events or not driven):
            self._start([f"run      {self._directory.path}"])
        for event in events:
            if record is not None and record.time < _seconds(event) + _RESOLUTION_S:
                self._show_step(record)
            self._show_event(event)
        if record is not None:
            self._show_step(record)

    def end(self) -> RunSummary:
        """Show the paths of the results, or how to continue."""
        state = run_state(self._directory)
        changed = 0.0 if state.changed is None else state.changed.timestamp()
        lines = results_lines(self._directory) if state.state == "complete" else _way_on_lines(self._directory, state)
        with self._clock.set_to(max(changed, 0.0 if self._last_record is None else self._last_record.time)):
            self._display.finished(lines)
        return state

    def _start(self, lines: Sequence[str]) -> None:
        self._display.started(self._directory.name, lines)
        self._started = True

    def _show_step(self, record: StepRecord) -> None:
        assert self._last_record is not None
        if record.step == 0 or record.time == self._last_record.time:
            return
        if self._last_record.step == 0:
            # Makes the time left known at once.
            with self._clock.set_to(record.first_time):
                self._pace.step(record.first_step, record.steps)
        with self._clock.set_to(record.time):
            self._display.step(record.round, record.rounds, record.step, record.steps, record.losses, record.states)
        self._last_record = record

    def _show_event(self, event: Mapping[str, Any]) -> None:
        kind, text = event["event"], str(event["text"])
        fields = {name: value for name, value in event.items() if name not in RESERVED}
        if kind == "planned":
            plan = plan_of(event)
            if plan is not None and plan != self._plan:
                # A repeated or resumed round repeats its plan.
                self._plan = plan
                self._display.plan(plan)
        elif kind == "round":
            self._left_out.clear()
            self._show_round(fields)
        elif kind == "left_out":
            # The log has this event for each step.
            client = str(fields.get("client"))
            if client not in self._left_out:
                self._left_out.add(client)
                self._display.note(text, kind, **fields)
        elif kind not in _SILENT_EVENTS:
            self._display.note(text, kind, **fields)
        self.complete = kind == "finished" or (self.complete and kind not in BEGINNINGS)

    def _show_round(self, fields: Mapping[str, Any]) -> None:
        try:
            # The event has more fields than the row.
            columns = [field.name for field in dataclasses.fields(MetricsRow) if field.name in fields]
            row = MetricsRow(**{name: _figure(fields[name], name) for name in columns})
        except (TypeError, ValueError):
            return
        holders = self._rows(self._directory.plan, PlanRow, row.round)
        self._display.round_done(row, holders, self._rows(self._directory.timing, TimingRow, row.round))

    def _rows(self, table: Path, row_type: type[Row], round: int) -> list[Row]:
        """Return a round's rows of a table; none if it cannot be read."""
        if table not in self._tables:
            by_round = self._tables[table] = {}
            with suppress(InputError):
                for row in read_rows(table, row_type):
                    by_round.setdefault(row.round, []).append(row)
        return self._tables[table].get(round, [])


def _way_on_lines(directory: RunDirectory, state: RunSummary) -> list[str]:
    if state.state == "failed":
        return [f"failed: {state.reason}", way_on(directory)]
    if state.state == "stopped":
        return [way_on(directory)]
    return [f"interrupted after round {state.round}: whoever drove it is gone", way_on(directory)]


def _seconds(event: Mapping[str, Any]) -> float:
    """Return the time of ``event``, in seconds since 1970."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (TypeError, ValueError):
        return 0.0


def _figure(value: Any, column: str) -> Any:
    """Return a value of ``metrics.csv`` from the log, which has non-finite numbers as text."""
    known = isinstance(value, int | float) or (value is None and column in _OPTIONAL)
    return value if known else float(value)


class _RecordedClock:
    """Clock of the events being shown: a recorded time, or now.

    Attributes:
        at: the recorded time, ``None`` for now, both in seconds since 1970.
    """

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self) -> float:
        return time.time() if self.at is None else self.at

    @contextmanager
    def set_to(self, at: float) -> Iterator[None]:
        """Show ``at`` within the block."""
        self.at = at
        try:
            yield
        finally:
            self.at = None
