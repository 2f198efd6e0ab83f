"""What a user sees while a run goes on: a live table in a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from hsplit.observe.live_display import LiveDisplay
from hsplit.observe.metrics import MetricsRow, PlanRow
from hsplit.observe.pace import Pace
from hsplit.observe.plain_display import PlainDisplay
from hsplit.observe.plan_table import plan_table
from hsplit.observe.silent_display import SilentDisplay
from hsplit.observe.timing import TimingRow
from hsplit.scheduling.plan import Plan
from hsplit.streams import is_terminal

__all__ = ["Display", "LiveDisplay", "PlainDisplay", "display_for", "plan_table"]


class Display(Protocol):
    """Is told of a run's course, in the order of its methods.

    A context manager, so that the terminal is left tidy however the run ends.
    """

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        """The run has a directory and a name; ``lines`` say what it runs on."""

    def plan(self, plan: Plan) -> None:
        """The first plan, or one that replaces it."""

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        """Step ``step`` of the run's ``steps`` is done, in round ``round`` of ``rounds``; all count from 1.

        Args:
            losses: mean loss of each client that took part.
            states: what each holder does, in a word; a holder left out keeps its state.
        """

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """A round ended, its validation done; round 0 is before any training.

        Args:
            row, holders, timing: what the round adds to ``metrics.csv``, ``plan.csv`` and ``timing.csv``.
        """

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Something that the user should know of now.

        Args:
            text: a sentence.
            event, fields: as the log has it, if it does (:class:`~hsplit.observe.events.EventLog`).
        """

    def finished(self, lines: Sequence[str]) -> None:
        """The run is complete; ``lines`` say where its results are."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display_for(stream: TextIO | None, pace: Pace | None = None) -> Display:
    """The live table if ``stream`` is a terminal that can show it, plain lines otherwise; nothing without a stream.

    Args:
        stream: where to.
        pace: how far the run is; by default counted from now on.
    """
    if stream is None or stream.closed:
        return SilentDisplay()
    if is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown") and _shows(stream, "–Σ→━"):
        return LiveDisplay(stream, pace=pace)
    return PlainDisplay(stream, pace=pace)


def _shows(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
