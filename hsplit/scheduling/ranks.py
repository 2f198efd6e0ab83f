"""The ranks of a holder's weights: where the memory that is left captures most importance (METHOD 5)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Levels = NDArray[np.int8]
Flags = NDArray[np.bool_]


def captured_by(rank: Ints | Floats) -> Floats:
    """``g(r) = log2(1 + r)``."""
    return np.log2(1.0 + np.asarray(rank, dtype=np.float64))


def increments(rank_set: Ints) -> tuple[Floats, Floats]:
    """By how much each next rank is larger, and what that gains in ``g``: each ``(Q - 1,)``."""
    return np.diff(rank_set).astype(np.float64), np.diff(captured_by(rank_set))


def never_shrinking(steps: Floats) -> bool:
    """Whether a refused increment rules out the later ones of its weight by size alone.

    So it is with ranks that double; not with 1, 4, 5, where a weight that was refused 4 must not take 5.
    """
    return bool((np.diff(steps) >= 0).all())


def greedy_levels(slack: Floats, held: Flags, unit: Floats, worth: Floats, rank_set: Ints) -> Levels:
    """Spend what is left on the increments with the largest gain per byte, skipping what does not fit.

    Every held weight starts at the smallest rank. Since ``g`` is concave and cost is linear in the rank, a
    weight's increments come in their order by themselves, and more slack never captures less.

    For holders whose weights have the same prices, :class:`~hsplit.scheduling.ladder.Ladder` does the same faster.

    Args:
        slack: bytes left at the smallest ranks, ``(M,)``, one row a holder (or a variant of one).
        held: which weights each row holds, ``(M, W)``.
        unit: bytes a unit of rank, ``(W,)`` or ``(M, W)``.
        worth: importance times share of tokens, ``(W,)`` or ``(M, W)``.
        rank_set: increasing ranks, ``(Q,)``.

    Returns:
        Index into ``rank_set`` by row and weight, ``(M, W)``; 0 where a weight is not held.
    """
    steps, gains = increments(rank_set)
    levels = np.where(held, len(steps), 0).astype(np.int8)
    whole = (held * unit).sum(axis=1) * steps.sum() <= slack
    tight = np.flatnonzero(~whole)
    if len(tight) and len(steps):
        prices, values = np.broadcast_to(unit, held.shape)[tight], np.broadcast_to(worth, held.shape)[tight]
        # What is not held has no price; it never fits either.
        prices = np.where(held[tight], prices, np.inf)
        spend = _spend if never_shrinking(steps) else _spend_one_by_one
        levels[tight] = spend(slack[tight], prices, values, steps, gains)
    return levels


def _best_first(unit: Floats, worth: Floats, steps: Floats, gains: Floats) -> tuple[Ints, Floats]:
    """All increments of each row by falling gain per byte: their flat indices and sizes, each ``(M, W (Q - 1))``."""
    density = (worth / unit)[:, :, None] * (gains / steps)
    order = np.argsort(-density.reshape(len(unit), -1), axis=1, kind="stable")
    sizes = np.take_along_axis((unit[:, :, None] * steps).reshape(len(unit), -1), order, axis=1)
    return order, sizes


def _spend(slack: Floats, unit: Floats, worth: Floats, steps: Floats, gains: Floats) -> Levels:
    """Take runs of increments: all that fit one by one, up to the first that does not fit after those before it.

    The bytes left are then fewer than that one's size, so each run is over smaller increments than the last.
    """
    order, sizes = _best_first(unit, worth, steps, gains)
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


def _spend_one_by_one(slack: Floats, unit: Floats, worth: Floats, steps: Floats, gains: Floats) -> Levels:
    """Walk all increments once, best first, for all rows at the same time, each in its own order.

    Slower, but for any rank set: an increment is taken only after those before it of the same weight.
    """
    rows = np.arange(len(unit))
    order, sizes = _best_first(unit, worth, steps, gains)
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
