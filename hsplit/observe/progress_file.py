"""Progress of a run within its round, in a file that ``hsplit watch`` shows between the ends of rounds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType

from hsplit.config.reading import read_json
from hsplit.config.section import EXACT
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.events import MaybeInfinite, finite
from hsplit.observe.observer import Observer
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.run_directory import Driver

WRITTEN_EVERY_S = 1.0


@dataclass(frozen=True)
class StepRecord:
    """Content of ``progress.json``: the last local step of a run's newest driver.

    Times are in seconds since 1970 by the driver's clock.

    Attributes:
        driver: the process that wrote it.
        begun: start of that process.
        lines: as passed to :meth:`~hsplit.observe.observer.Observer.started`.
        round, rounds, step, steps, losses, states: as last passed to :meth:`~hsplit.observe.observer.Observer.step`,
            with the losses and states of every holder so far; 0 and empty before any step.
        first_step, first_time: the first reported step, and the time of its report.
        time: time of the report of ``step``.
    """

    driver: Driver
    begun: float
    lines: tuple[str, ...] = ()
    round: int = 0
    rounds: int = 0
    step: int = 0
    steps: int = 0
    losses: Mapping[str, MaybeInfinite] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    first_step: int = 0
    first_time: float = 0.0
    time: float = 0.0
    __pydantic_config__ = EXACT


def read_step_record(path: Path) -> StepRecord | None:
    """Read the record in the file ``path``; ``None`` without a readable one."""
    try:
        return read_json(path, StepRecord)
    except InputError:
        return None


class ProgressFile(Observer):
    """Keeps ``progress.json`` up to date.

    The file is written at most once in ``WRITTEN_EVERY_S``, and at the end of a round and of the run.

    Args:
        path: the file.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._record = StepRecord(Driver.here(), clock())
        self._written = 0.0

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._record = replace(self._record, lines=tuple(lines))
        self._write()

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        now, last = self._clock(), self._record
        first = (last.first_step, last.first_time) if last.first_step else (step, now)
        self._record = StepRecord(
            last.driver,
            last.begun,
            last.lines,
            *(round, rounds, step, steps),
            {**last.losses, **losses},
            {**last.states, **states},
            *first,
            now,
        )
        if now >= self._written + WRITTEN_EVERY_S:
            self._write()

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        self._written = self._clock()
        # Not durable: training need not wait for the disk, since no run resumes from this file.
        write_text_atomically(self._path, json.dumps(finite(asdict(self._record))) + "\n", durable=False)
