"""Greedy ranks of a holder's weights: where the memory that is left captures most importance (METHOD 5).

The ranks of many holders are found together where the same weights cost all of them the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.importance import Score

Levels = NDArray[np.int8]
Flags = NDArray[np.bool_]


def captured_by(rank: Ints | Floats, rho: float = 1.0) -> Floats:
    """``g(r) = log2(1 + r) ** rho``; ``rho`` as in ``policy.objective``."""
    captured: Floats = np.log2(1.0 + np.asarray(rank, dtype=np.float64)) ** rho
    return captured


def gain_table(importance: Mapping[str, Score], names: Sequence[str], rank_set: Ints, rho: float = 1.0) -> Floats:
    """Compute what each weight captures at each rank, ``(W, Q)``.

    Only proportions matter: the table is scaled so that all weights at the largest rank capture ``g`` of it, whatever
    the scores' unit.

    Args:
        importance: ``H_w`` by weight name: a number, which ``g`` multiplies, or a curve of the weight's own in its
            place, whose shape ``rho`` flattens as it does ``g``'s.
        names: of the weights, ``W`` of them.
        rank_set: increasing ranks, ``(Q,)``.
        rho: exponent of ``g``.
    """
    shared, table = captured_by(rank_set, rho), np.zeros((len(names), len(rank_set)))
    logarithm = float(captured_by(rank_set[-1]))
    for row, name in enumerate(names):
        score = importance[name]
        if isinstance(score, Sequence):
            # What a rank beyond the curve's end adds is not known.
            curve = np.concatenate([[0.0], score])[np.minimum(rank_set, len(score))]
            table[row] = curve[-1] / logarithm * shared[-1] * (curve / (curve[-1] or 1.0)) ** rho
        else:
            table[row] = score * shared
    table *= shared[-1] / table[:, -1].sum()
    return table


def steps_of(rank_set: Ints) -> Floats:
    """Compute the steps from each rank to the next, ``(Q - 1,)``."""
    return np.diff(rank_set).astype(np.float64)


def at_levels(values: Floats, levels: Levels | Ints) -> Floats:
    """Look up what weights capture at ``levels`` ``(..., W)`` in ``values`` ``(W, Q)``, ``(..., W)``."""
    captured: Floats = values[np.arange(len(values)), levels]
    return captured


def never_shrinking(steps: Floats) -> bool:
    """True if a refused increment rules out the later ones of its weight by size alone.

    It does with ranks that double; not with 1, 4, 5, where a weight that was refused 4 must not take 5.
    """
    return bool((np.diff(steps) >= 0).all())


def greedy_levels(slack: Floats, held: Flags, unit: Floats, values: Floats, rank_set: Ints) -> Levels:
    """Spend the bytes left on the increments with the largest gain per byte, skipping those that do not fit.

    Every held weight starts at the smallest rank. Since what a weight captures is concave in its rank and cost is
    linear, a weight's increments come in their order by themselves, and more slack never captures less.

    For holders whose weights have the same prices, :class:`Ladder` does the same faster.

    Args:
        slack: bytes left at the smallest ranks, ``(M,)``, one row a holder (or a variant of one).
        held: weights that each row holds, ``(M, W)``.
        unit: bytes a unit of rank, ``(W,)`` or ``(M, W)``.
        values: captured at each rank, ``(W, Q)`` or ``(M, W, Q)``.
        rank_set: increasing ranks, ``(Q,)``.

    Returns:
        Index into ``rank_set`` by row and weight, ``(M, W)``; 0 where a weight is not held.
    """
    steps = steps_of(rank_set)
    levels = np.where(held, len(steps), 0).astype(np.int8)
    whole = (held * unit).sum(axis=1) * steps.sum() <= slack
    tight = np.flatnonzero(~whole)
    if len(tight) and len(steps):
        prices = np.broadcast_to(unit, held.shape)[tight]
        gains = np.broadcast_to(np.diff(values, axis=-1), (*held.shape, len(steps)))[tight]
        # A weight that is not held costs nothing, and must never be taken.
        prices = np.where(held[tight], prices, np.inf)
        spend = _spend if never_shrinking(steps) else _spend_one_by_one
        levels[tight] = spend(slack[tight], prices, gains, steps)
    return levels


def _best_first(unit: Floats, gains: Floats, steps: Floats) -> tuple[Ints, Floats]:
    """Order all increments of each row by falling gain per byte: flat indices and sizes, each ``(M, W (Q - 1))``."""
    density = gains / (unit[:, :, None] * steps)
    order = np.argsort(-density.reshape(len(unit), -1), axis=1, kind="stable")
    sizes = np.take_along_axis((unit[:, :, None] * steps).reshape(len(unit), -1), order, axis=1)
    return order, sizes


def _spend(slack: Floats, unit: Floats, gains: Floats, steps: Floats) -> Levels:
    """Take runs of increments: all that fit one by one, up to the first that does not fit after those before it.

    The bytes left are then fewer than its size, so each run is over smaller increments than the last.
    """
    order, sizes = _best_first(unit, gains, steps)
    taken = np.zeros(sizes.shape, dtype=bool)
    left, position = slack.astype(np.float64), np.arange(sizes.shape[1])
    smallest = sizes.min(axis=1)
    begin = np.zeros(len(sizes), dtype=np.int64)
    rows = np.flatnonzero(left >= smallest)
    while len(rows):
        fits = (sizes[rows] <= left[rows, None]) & (position >= begin[rows, None])
        spent = np.cumsum(np.where(fits, sizes[rows], 0.0), axis=1)
        run = fits & (spent <= left[rows, None])
        taken[rows] |= run
        refused = fits & ~run
        begin[rows] = np.where(refused.any(axis=1), refused.argmax(axis=1) + 1, len(position))
        left[rows] -= np.where(run, spent, 0.0).max(axis=1)
        rows = rows[(begin[rows] < len(position)) & (left[rows] >= smallest[rows])]
    flat = np.zeros(taken.shape, dtype=np.int8)
    np.put_along_axis(flat, order, taken.astype(np.int8), axis=1)
    levels: Levels = flat.reshape(*unit.shape, len(steps)).sum(axis=2, dtype=np.int8)
    return levels


def _spend_one_by_one(slack: Floats, unit: Floats, gains: Floats, steps: Floats) -> Levels:
    """Walk all increments once, best first, for all rows at the same time, each in its own order.

    Slower, but for any rank set: an increment is taken only after those before it of the same weight.
    """
    rows = np.arange(len(unit))
    order, sizes = _best_first(unit, gains, steps)
    weights, step_of = np.divmod(order.T, len(steps))
    levels = np.zeros(unit.shape, dtype=np.int8)
    left = slack.astype(np.float64)
    smallest = sizes.min(axis=1)
    for weight, step, size in zip(weights, step_of, sizes.T, strict=True):
        taken = (size <= left) & (levels[rows, weight] == step)
        levels[rows, weight] += taken
        left -= np.where(taken, size, 0.0)
        if (left < smallest).all():
            break
    return levels


@dataclass(frozen=True)
class _Run:
    """Increments of at most one size that some rows take one after the other.

    Attributes:
        rows: the rows that take any, ``(R,)``.
        begin, end: range that each takes, as indices among the increments that are small enough, ``(R,)``.
        small: increments that are small enough, ``(n,)``.
        before: number of those that precede each increment, ``(n + 1,)``.
        gain: running sum of their gains, ``(count + 1,)``.
    """

    rows: Ints
    begin: Ints
    end: Ints
    small: Flags
    before: Ints
    gain: Floats


class Ladder:
    """All increments of some weights, by falling gain per byte: the order in which every holder takes them.

    The increments that a holder can afford from the start of the order are one search among cumulative sizes. Where an
    increment is refused, the bytes left are fewer than its size, so only smaller ones count from there on: at most one
    more search for each distinct size, for all holders together.

    Args:
        unit: bytes a unit of rank, ``(W,)``.
        values: captured at each rank, ``(W, Q)``.
        rank_set: increasing ranks, ``(Q,)``.
    """

    def __init__(self, unit: Floats, values: Floats, rank_set: Ints) -> None:
        self._unit, self._values, self._rank_set = unit, values, rank_set
        self._steps, gains = steps_of(rank_set), np.diff(values, axis=1)
        # In the order of greedy_levels, ties included.
        density = gains / (unit[:, None] * self._steps)
        self._order: Ints = np.argsort(-density.reshape(-1), kind="stable")
        self._sizes: Floats = (unit[:, None] * self._steps).reshape(-1)[self._order]
        self._gains: Floats = gains.reshape(-1)[self._order]

    def captured(self, slack: Floats) -> Floats:
        """Importance captured, ``(M,)``, by holders with ``slack`` bytes left at the smallest ranks, ``(M,)``."""
        if not self._fast:
            return at_levels(self._values, self.levels(slack)).sum(axis=1)
        total = np.full(len(slack), self._values[:, 0].sum())
        for run in self._runs(slack):
            total[run.rows] += run.gain[run.end] - run.gain[run.begin]
        return total

    def levels(self, slack: Floats) -> Levels:
        """Index into the rank set by holder and weight, ``(M, W)``: the same as by :func:`greedy_levels`."""
        if not self._fast:
            held = np.ones((len(slack), len(self._unit)), dtype=bool)
            return greedy_levels(slack, held, self._unit, self._values, self._rank_set)
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
        """Increments up to each distinct size, largest first, and sums over them."""
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
            # Continue behind the increment that was refused, or at the end.
            seen[rows] = np.append(members, len(self._order) - 1)[end] + 1
            yield _Run(rows, begin, end, small, before, gain)
