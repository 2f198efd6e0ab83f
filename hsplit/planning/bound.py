"""The speed that a fleet's budgets allow with everything overlapped (METHOD 10): a linear program, solved directly.

A client that spends all its time takes ``r`` examples a second by splitting each at the deepest layers that it has the
time for, so that the server's work for them is a convex, piecewise linear function of ``r``. The fleet's speed is where
the sum of these, filled up from the cheapest piece on, takes all of the server's time.
"""

from __future__ import annotations

import numpy as np

from hsplit.planning.cost.counted_model import Floats, Ints

# Halvings of the range in which the speed lies.
_HALVINGS = 60


def speed_bound(client_s: Floats, server_s: Floats, deepest: Ints, least_share: Floats) -> float:
    """Most examples a second that a fleet can take.

    Args:
        client_s: seconds of each client for one example at each split, compute and links one after another,
            ``(N, L + 1)``.
        server_s: seconds of the server for one example at each split, ``(L + 1,)``.
        deepest: the deepest split that each client has the memory for, at least 1, ``(N,)``.
        least_share: each client's least share of the examples, ``(N,)``; they sum to at most 1.
    """
    pieces = _Pieces(client_s, server_s, deepest)
    low, high = 0.0, float(pieces.end.sum())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if pieces.server_time(middle, least_share * middle) <= 1 else (low, middle)
    return low


class _Pieces:
    """All clients' linear pieces, sorted by the server's seconds for one more example a second."""

    def __init__(self, client_s: Floats, server_s: Floats, deepest: Ints) -> None:
        owner, start, end, slope = [], [], [], []
        last: list[float] = []
        for client, most in enumerate(deepest.tolist()):
            speeds, costs = _hull(client_s[client, 1 : most + 1], server_s[1 : most + 1])
            owner += [client] * len(speeds)
            start += [0.0, *speeds[:-1]]
            end += speeds
            work = [0.0, *(speed * cost for speed, cost in zip(speeds, costs, strict=True))]
            slope += [
                (after - before) / (until - since)
                for before, after, since, until in zip(work, work[1:], [0.0, *speeds], speeds, strict=False)
            ]
            last.append(speeds[-1])
        order = np.argsort(slope, kind="stable")
        self._owner, self._slope = np.array(owner)[order], np.array(slope)[order]
        self._start, self._end = np.array(start)[order], np.array(end)[order]
        self.end: Floats = np.array(last)

    def server_time(self, speed: float, least: Floats) -> float:
        """Seconds a second that the server works if the fleet takes ``speed`` examples, each client its ``least``."""
        if (least > self.end).any() or speed > self.end.sum():
            return np.inf
        floor = least[self._owner]
        owed = np.clip(floor - self._start, 0.0, self._end - self._start)
        more = self._end - self._start - owed
        left = speed - float(least.sum())
        taken = np.clip(left - np.concatenate([[0.0], np.cumsum(more)[:-1]]), 0.0, more)
        return float((owed + taken) @ self._slope)


def _hull(client_s: Floats, server_s: Floats) -> tuple[list[float], list[float]]:
    """Lower convex hull of the points (client's seconds, server's seconds), the slowest client first.

    Returns:
        Examples a second, increasing, and the server's seconds for one example at each.
    """
    hull: list[tuple[float, float]] = []
    for point in sorted(zip(client_s.tolist(), server_s.tolist(), strict=True)):
        # Slower for the client, and no cheaper for the server.
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return [1 / seconds for seconds, _ in reversed(hull)], [cost for _, cost in reversed(hull)]


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """True if ``middle`` is on or above the line from ``first`` to ``last``."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])
