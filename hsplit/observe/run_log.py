"""What is told to logging libraries: figures by name, over local steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from hsplit.observe.metrics import MetricsRow, PlanRow
from hsplit.observe.plan_changes import holder_line
from hsplit.observe.timing import TimingRow
from hsplit.observe.wording import plan_lines
from hsplit.scheduling.plan import Plan

MOST_HOLDERS = 100
"""Holders that have figures of their own; where there are more, only the run's figures are logged."""


class RunLog(ABC):
    """Is told of a run as a :class:`~hsplit.observe.terminal.Display` is, and logs its figures.

    Steps are local steps over the whole run. A round that is repeated has steps again that were logged before.

    Args:
        step: the last step that the run has done so far; 0 before any.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._opened = False

    @abstractmethod
    def _open(self, run_name: str) -> None:
        """Begin a log, or go on with the run's own."""

    @abstractmethod
    def _say(self, what: str, lines: Sequence[str]) -> None:
        """Log a text."""

    @abstractmethod
    def _log(self, figures: Mapping[str, float]) -> None:
        """Log figures of the step ``self._step``."""

    @abstractmethod
    def _close(self, failed: bool) -> None:
        """Have everything on the disk, or on its way."""

    @abstractmethod
    def _go_back(self) -> None:
        """The step ``self._step`` and those after it come again."""

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._open(run_name)
        self._opened = True
        self._say("run", [run_name, *lines])

    def plan(self, plan: Plan) -> None:
        holders = [*plan.clients[:MOST_HOLDERS], plan.server]
        self._say("plan", [*(holder_line(holder, plan.layers) for holder in holders), *plan_lines(plan)])

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        back, self._step = step <= self._step, step
        if back:
            self._go_back()
        if len(losses) <= MOST_HOLDERS:
            self._log({f"loss/{name}": loss for name, loss in losses.items()})

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        back, self._step = row.step < self._step, row.step
        if back:
            self._go_back()
        self._log(round_figures(row, holders))

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._say("notes", [text])

    def finished(self, lines: Sequence[str]) -> None:
        self._say("run", lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened:
            self._close(error is not None)


def round_figures(row: MetricsRow, holders: Sequence[PlanRow]) -> dict[str, float]:
    """A round's figures by the names that they are logged under."""
    figures: dict[str, float] = {
        "validation/loss": row.val_loss,
        "validation/perplexity": row.val_ppl,
        "progress/round": row.round,
        "progress/tokens": row.tokens,
        "progress/wall_time_s": row.wall_time_s,
        "progress/virtual_time_s": row.virtual_time_s,
        "bytes/up": row.bytes_up,
        "bytes/down": row.bytes_down,
        "plan/captured_importance": row.captured_importance,
        "plan/available_clients": row.available_clients,
    }
    if row.train_loss is not None:
        figures["train/loss"] = row.train_loss
    if len(holders) > MOST_HOLDERS:
        return figures
    for holder in holders:
        own = {
            "split": holder.split,
            "rank_total": holder.rank_total,
            "memory_predicted_bytes": holder.predicted_bytes,
            "memory_measured_bytes": holder.measured_bytes,
            "step_time_predicted_s": holder.predicted_time_s,
            "step_time_measured_s": holder.measured_time_s,
        }
        figures |= {f"{name}/{holder.name}": value for name, value in own.items() if value is not None}
    return figures
