"""A run that nobody watches: for experiments and tests, which look at what they need alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from hsplit.observe.metrics import MetricsRow, PlanRow
from hsplit.observe.timing import TimingRow
from hsplit.scheduling.plan import Plan


class SilentDisplay:
    """Shows nothing of a run; whoever looks at more than the rounds' rows overrides what tells of it.

    Attributes:
        rows: what each round has added to ``metrics.csv``.
    """

    def __init__(self) -> None:
        self.rows: list[MetricsRow] = []

    def started(self, run_name: str, lines: Sequence[str]) -> None: ...

    def plan(self, plan: Plan) -> None: ...

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None: ...

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """Keep the round's row."""
        self.rows.append(row)

    def note(self, text: str, event: str = "", /, **fields: Any) -> None: ...

    def finished(self, lines: Sequence[str]) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
