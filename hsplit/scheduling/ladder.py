"""Greedy ranks of many holders at once, where the same weights cost all of them the same (METHOD 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hsplit.scheduling.ranks import Flags, Floats, Ints, Levels, captured_by, greedy_levels, increments, never_shrinking


@dataclass(frozen=True)
class _Run:
    """Increments of at most one size that some rows take one after the other.

    Attributes:
        rows: whose, ``(R,)``.
        begin, end: which of the run's increments each takes, as indices among those that are small enough, ``(R,)``.
        small: which increments are small enough, ``(n,)``.
        before: how many of those precede each increment, ``(n + 1,)``.
        gain: sums of what they gain, ``(count + 1,)``.
    """

    rows: Ints
    begin: Ints
    end: Ints
    small: Flags
    before: Ints
    gain: Floats


class Ladder:
    """All increments of some weights, by falling gain per byte: the order in which every holder takes them.

    What a holder can afford from the start of the order is one search among cumulative sizes. Where an increment
    is refused, the bytes left are fewer than its size, so that only smaller ones count from there on: one more
    search for each distinct size at most, for all holders together.

    Args:
        unit: bytes a unit of rank, ``(W,)``.
        worth: importance of the weights, ``(W,)``.
        rank_set: increasing ranks, ``(Q,)``.
    """

    def __init__(self, unit: Floats, worth: Floats, rank_set: Ints) -> None:
        self._unit, self._worth, self._rank_set = unit, worth, rank_set
        self._steps, gains = increments(rank_set)
        # In the order of ranks.greedy_levels, ties included.
        density = (worth / unit)[:, None] * (gains / self._steps)
        self._order: Ints = np.argsort(-density.reshape(-1), kind="stable")
        self._sizes: Floats = (unit[:, None] * self._steps).reshape(-1)[self._order]
        self._gains: Floats = (worth[:, None] * gains).reshape(-1)[self._order]

    def captured(self, slack: Floats) -> Floats:
        """Importance captured, ``(M,)``, by holders with ``slack`` bytes left at the smallest ranks, ``(M,)``."""
        if not self._fast:
            return captured_by(self._rank_set)[self.levels(slack)] @ self._worth
        total = np.full(len(slack), captured_by(self._rank_set[:1])[0] * self._worth.sum())
        for run in self._runs(slack):
            total[run.rows] += run.gain[run.end] - run.gain[run.begin]
        return total

    def levels(self, slack: Floats) -> Levels:
        """Index into the rank set by holder and weight, ``(M, W)``: what ``greedy_levels`` gives."""
        if not self._fast:
            held = np.ones((len(slack), len(self._unit)), dtype=bool)
            return greedy_levels(slack, held, self._unit, self._worth, self._rank_set)
        taken = np.zeros((len(slack), len(self._order)), dtype=bool)
        for run in self._runs(slack):
            some = run.end > run.begin
            rows, begin, end = run.rows[some], run.begin[some, None], run.end[some, None]
            taken[rows] |= run.small & (run.before[:-1] >= begin) & (run.before[:-1] < end)
        flat = np.empty_like(taken)
        flat[:, self._order] = taken
        levels: Levels = flat.reshape(len(slack), len(self._unit), len(self._steps)).sum(axis=2, dtype=np.int8)
        return levels

    @cached_property
    def _fast(self) -> bool:
        return never_shrinking(self._steps)

    @cached_property
    def _classes(self) -> list[tuple[float, Ints, Flags, Ints, Floats, Floats]]:
        """For each distinct size, largest first: the increments that are no larger, and sums over them."""
        classes = []
        for size in np.unique(self._sizes)[::-1]:
            small = self._sizes <= size
            members = np.flatnonzero(small)
            before = np.concatenate([[0], np.cumsum(small)])
            bytes_ = np.concatenate([[0.0], np.cumsum(self._sizes[members])])
            gain = np.concatenate([[0.0], np.cumsum(self._gains[members])])
            classes.append((float(size), members, small, before, bytes_, gain))
        return classes

    def _runs(self, slack: Floats) -> Iterator[_Run]:
        left, seen = slack.astype(np.float64), np.zeros(len(slack), dtype=np.int64)
        for size, members, small, before, sums, gain in self._classes:
            rows = np.flatnonzero((left >= size) & (seen < len(self._order)))
            if not len(rows):
                continue
            begin = before[seen[rows]]
            end = np.searchsorted(sums, sums[begin] + left[rows], side="right") - 1
            left[rows] -= sums[end] - sums[begin]
            # On from behind the one that was refused, or from the end.
            seen[rows] = np.append(members, len(self._order) - 1)[end] + 1
            yield _Run(rows, begin, end, small, before, gain)
