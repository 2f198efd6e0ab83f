"""Declared, predicted and measured memory of each holder over the rounds, and which measured peaks were too high."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hsplit.observe.metrics import PlanRow


@dataclass(frozen=True)
class HolderMemory:
    """A holder's memory over the rounds.

    Attributes:
        last: its row of the last round in the table.
        worst: its row of the round in which the measured peak was the largest part of what was declared for that
            round; of the predictions, where nothing was measured.
        over_predicted, over_declared: the rounds whose measured peak exceeded the prediction, the declared budget.
    """

    last: PlanRow
    worst: PlanRow
    over_predicted: tuple[int, ...]
    over_declared: tuple[int, ...]

    @property
    def name(self) -> str:
        """Whose memory it is."""
        return self.last.name

    @property
    def mark(self) -> str:
        """What the measured peaks exceeded, in words; empty where they kept to both."""
        if self.over_declared:
            return "over declared"
        return "over predicted" if self.over_predicted else ""


def memory_record(rows: Iterable[PlanRow]) -> list[HolderMemory]:
    """The record of every holder in the last round of ``rows`` (all of ``plan.csv``), clients first.

    A client that takes no part in a round has nothing predicted or measured in it, and keeps to its budget.
    """
    by_name: dict[str, list[PlanRow]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    last_round = max((row.round for own in by_name.values() for row in own), default=0)
    records = [_record(own) for own in by_name.values() if own[-1].round == last_round]
    return sorted(records, key=lambda record: record.last.kind != "client")


def _record(rows: list[PlanRow]) -> HolderMemory:
    measured = [row for row in rows if row.measured_bytes is not None]

    def part(row: PlanRow) -> float:
        size = row.predicted_bytes if row.measured_bytes is None else row.measured_bytes
        return size / max(row.declared_bytes, 1)

    return HolderMemory(
        last=rows[-1],
        # of equals the later one, so that a run without change shows its last round
        worst=max(reversed(measured or rows), key=part),
        over_predicted=tuple(row.round for row in measured if (row.measured_bytes or 0) > row.predicted_bytes),
        over_declared=tuple(row.round for row in measured if (row.measured_bytes or 0) > row.declared_bytes),
    )
