"""The ranks of a holder's weights: where the memory that is left captures most importance (METHOD 5)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Levels = NDArray[np.int8]


def captured_by(rank: Ints | Floats) -> Floats:
    """``g(r) = log2(1 + r)``."""
    return np.log2(1.0 + np.asarray(rank, dtype=np.float64))


def greedy_levels(slack: Floats, held: NDArray[np.bool_], unit: Floats, worth: Floats, rank_set: Ints) -> Levels:
    """Spend what is left on the increments with the largest gain per byte, skipping what does not fit.

    Every held weight starts at the smallest rank. Since ``g`` is concave and cost is linear in the rank, a
    weight's increments come in their order by themselves, and more slack never captures less.

    Args:
        slack: bytes left at the smallest ranks, ``(M,)``, one row a holder (or a variant of one).
        held: which weights each row holds, ``(M, W)``.
        unit: bytes a unit of rank, ``(W,)`` or ``(M, W)``.
        worth: importance times share of tokens, ``(W,)`` or ``(M, W)``.
        rank_set: increasing ranks, ``(Q,)``.

    Returns:
        Index into ``rank_set`` by row and weight, ``(M, W)``; 0 where a weight is not held.
    """
    steps, gains = np.diff(rank_set).astype(np.float64), np.diff(captured_by(rank_set))
    levels = np.where(held, len(steps), 0).astype(np.int8)
    whole = (held * unit).sum(axis=1) * steps.sum() <= slack
    tight = np.flatnonzero(~whole)
    if len(tight) and len(steps):
        prices, values = np.broadcast_to(unit, held.shape)[tight], np.broadcast_to(worth, held.shape)[tight]
        levels[tight] = _spend(slack[tight], held[tight], prices, values, steps, gains)
    return levels


def _spend(slack: Floats, held: NDArray[np.bool_], unit: Floats, worth: Floats, steps: Floats, gains: Floats) -> Levels:
    """Walk all increments once, best first, for all rows at the same time, each in its own order."""
    rows = np.arange(len(held))
    # What is not held has no price; it never fits either.
    unit = np.where(held, unit, np.inf)
    density = (worth / unit)[:, :, None] * (gains / steps)
    order = np.argsort(-density.reshape(len(rows), -1), axis=1, kind="stable")
    weights, increments = np.divmod(order.T, len(steps))
    sizes = unit[rows, weights] * steps[increments]
    levels = np.zeros(held.shape, dtype=np.int8)
    left = slack.astype(np.float64)
    smallest = sizes.min(axis=0)
    for weight, increment, size in zip(weights, increments, sizes, strict=True):
        taken = (size <= left) & (levels[rows, weight] == increment)
        levels[rows, weight] += taken
        left -= np.where(taken, size, 0.0)
        if (left < smallest).all():
            break
    return levels
