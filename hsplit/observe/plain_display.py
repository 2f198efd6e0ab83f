"""A run's course as plain lines, for files, pipes, notebooks and continuous integration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from hsplit.config.cluster import is_server
from hsplit.observe.observer import Observer
from hsplit.observe.pace import Pace
from hsplit.observe.plan_text import holder_line, plan_changes, plan_lines
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.observe.wording import bytes_text, duration_text, number_text, printable
from hsplit.scheduling.plan import Plan
from hsplit.streams import encodable
from hsplit.waiting import Waiting


class PlainDisplay(Observer):
    """Prints a line at the start, one a holder that a plan concerns, one every few steps, and one a round.

    Args:
        stream: where to; each line is flushed.
        every_steps: how many steps of a round go by between two lines.
        names_shown: up to how many clients the losses are given by name.
        pace: how far the run is.
    """

    def __init__(
        self,
        stream: TextIO,
        every_steps: int = 5,
        names_shown: int = 8,
        pace: Pace | None = None,
    ) -> None:
        self._stream = stream
        self._every_steps = every_steps
        self._names_shown = names_shown
        self._pace = pace or Pace()
        self._printed_step = 0
        self._plan: Plan | None = None
        self._waiting = Waiting("the actors are reading their data and layers", growing=True)

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        """Print the run's name and what it runs on."""
        self._print(f"run {run_name}")
        for line in lines:
            self._print(f"  {line}")

    def plan(self, plan: Plan) -> None:
        """Print who holds what; of a plan that replaces another, only what it changes."""
        if self._plan is None:
            self._print("plan:")
            lines = [holder_line(holder, plan.layers) for holder in (*plan.clients, plan.server)]
        else:
            self._print("new plan:")
            lines = plan_changes(self._plan, plan) or ["every holder keeps its part"]
        self._plan = plan
        for line in (*lines, *plan_lines(plan)):
            self._print(f"  {line}")
        self._waiting.update("loading the layers of the plan")

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        """Print one line every few steps."""
        self._pace.step(step, steps)
        self._waiting.update(f"round {round}/{rounds}, after step {step}/{steps}")
        # the first one at once: it tells that the run has begun to train; who watches may not see every step
        passed = step // self._every_steps - self._printed_step // self._every_steps
        if self._printed_step and passed == 0:
            return
        self._printed_step = step
        absent = [f"{name}: {states[name]}" for name in states if name not in losses and not is_server(name)]
        parts = [f"round {round}/{rounds} step {step}/{steps}", self._losses(losses), *absent]
        self._print(f"{', '.join(parts)} ({self._pace})")

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """Print the round's figures."""
        trained = "" if row.train_loss is None else f"train loss {number_text(row.train_loss)}, "
        parts = [
            f"round {row.round} done: {trained}validation loss {number_text(row.val_loss)}",
            f"validation perplexity {number_text(row.val_ppl)}",
            f"{row.tokens:,} tokens",
            f"{duration_text(row.wall_time_s)} (virtual {duration_text(row.virtual_time_s)})",
            f"{bytes_text(row.bytes_up)} up, {bytes_text(row.bytes_down)} down",
            f"{row.available_clients} clients",
        ]
        self._print(", ".join(parts))
        self._waiting.update(f"after round {row.round}: checkpoint, plan, next round")

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Print ``text`` as a note."""
        self._print(f"note: {text}")

    def finished(self, lines: Sequence[str]) -> None:
        """Print where the results are."""
        for line in lines:
            self._print(line)

    def __enter__(self) -> Self:
        self._waiting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.__exit__(kind, error, trace)

    def _losses(self, losses: Mapping[str, float]) -> str:
        if not losses:
            return "no losses"
        if len(losses) <= self._names_shown:
            return "loss " + ", ".join(f"{name} {number_text(loss)}" for name, loss in losses.items())
        low, high = min(losses.values()), max(losses.values())
        return f"losses of {len(losses)} clients from {number_text(low)} to {number_text(high)}"

    def _print(self, line: str) -> None:
        print(encodable(printable(line), self._stream.encoding), file=self._stream, flush=True)
        self._waiting.heard()
