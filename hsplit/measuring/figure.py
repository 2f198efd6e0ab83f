"""One part of a budget as it was measured, with its spread."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hsplit.config.section import LARGEST


@dataclass(frozen=True)
class Figure:
    """A measured figure in the unit of its key in a cluster file.

    Attributes:
        value: what the file gets, four digits of it.
        low, high: of all samples.
        samples: how many there were.
        kind: what ``value`` is of them: the median, or where a budget must hold throughout the least.
    """

    value: float
    low: float
    high: float
    samples: int
    kind: Literal["median", "least"]

    @staticmethod
    def median_of(samples: Sequence[float]) -> Figure:
        """The median of ``samples``, of which there is at least one; none counts as more than a file may have."""
        return Figure._of(statistics.median(samples), samples, "median")

    @staticmethod
    def least_of(samples: Sequence[float]) -> Figure:
        """The least of ``samples``, likewise."""
        return Figure._of(min(samples), samples, "least")

    @staticmethod
    def _of(value: float, samples: Sequence[float], kind: Literal["median", "least"]) -> Figure:
        return Figure(_rounded(value), _rounded(min(samples)), _rounded(max(samples)), len(samples), kind)

    @property
    def spread(self) -> str:
        """In words, as a file's comment has it."""
        return f"{self.kind} of {self.samples}, {self.low:g}-{self.high:g}"


Figures = Mapping[str, Mapping[str, Figure]]
"""By holder, then by key of its budget."""


def _rounded(value: float) -> float:
    return float(f"{min(value, float(LARGEST)):.4g}")
