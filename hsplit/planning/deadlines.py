"""The best split of every client by a deadline, for all deadlines at once (METHOD 5).

The deeper a split, the longer a client's phases take. So (client, split) pairs in the order of their time have each
client's splits in increasing order, and a client's choice changes from one deadline to the next only at a pair that is
better than all of its client's before. Sums and maxima over the choices are then running ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.moves import Prices
from hsplit.planning.problem import PHASES, Problem

# Beside the phases in Problem.times: all of them together.
TOTAL = PHASES


@dataclass(frozen=True)
class Worth:
    """Value of each split to the search.

    Attributes:
        captured: importance that a client's tokens bring at each split, at itself and at the server, ``(K, L + 1)``.
        fixed: captured importance that no choice of splits changes.
        per_second: captured importance that a second of makespan must bring.
        per_byte: captured importance that a byte at the server must bring.
        room: bytes at the server; choices that need more are passed over while others fit.
        allowed: splits to choose from, ``(K, L + 1)``, split 1 always among them.
    """

    captured: Floats
    fixed: float
    per_second: float
    per_byte: float
    room: float
    allowed: NDArray[np.bool_]


class DeadlineScan:
    """Chooses splits by deadlines on one phase, or on all together.

    Args:
        problem: the clients, with the times and gains of their splits.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._phases = [phase for phase in range(PHASES) if problem.times[:, 1:, phase].any()]
        self._orders: dict[int, tuple[Ints, Ints]] = {}

    @property
    def clocks(self) -> list[int]:
        """Phases that a deadline can be on: those that take time, as indices into ``Problem.times``, and ``TOTAL``."""
        return [*self._phases, TOTAL]

    def splits(self, clock: int, worth: Worth, prices: Prices) -> tuple[Ints, bool]:
        """Choose each kind's split of most worth that ends by the best deadline on ``clock``.

        Returns:
            The splits, ``(K,)``; and True if the best deadline was passed over for want of bytes at the server.
        """
        problem = self._problem
        order, place = self._order(clock)
        clients, width = len(problem.clients), worth.allowed.shape[1] - 1
        captured_each = worth.captured[:, 1:] / clients
        value = captured_each - worth.per_second * prices.seconds[1:] - worth.per_byte * prices.bytes[1:]
        value[~worth.allowed[:, 1:]] = -np.inf
        # A pair counts where it is better than all shallower ones of its kind.
        counts = np.empty(value.shape, dtype=bool)
        counts[:, 1:] = value[:, 1:] > np.maximum.accumulate(value, axis=1)[:, :-1]
        # Every kind begins at split 1, whatever its time.
        counts[:, 0] = False
        events = order[counts.reshape(-1)[order]]
        if not len(events):
            return np.ones(len(value), dtype=np.int64), False
        chosen = np.maximum.accumulate(np.where(counts, np.arange(width), 0), axis=1)
        kinds, now = np.divmod(events, width)
        before = chosen[kinds, now - 1]
        members = problem.members[kinds]
        more = members * (captured_each[kinds, now] - captured_each[kinds, before])
        captured = problem.members @ captured_each[:, 0] + worth.fixed + np.cumsum(more)
        seconds = np.cumsum(members * (prices.seconds[1:][now] - prices.seconds[1:][before]))
        for phase in self._phases:
            running = np.maximum.accumulate(problem.times[kinds, now + 1, phase])
            seconds += np.maximum(running, problem.times[:, 1, phase].max())
        # Prices are differences: seconds so far are relative to the server's phase with all clients at split 1.
        seconds += self._server_seconds()
        more_bytes = np.cumsum(members * (prices.bytes[1:][now] - prices.bytes[1:][before]))
        lacking = prices.fixed_bytes + clients * prices.bytes[1] + more_bytes - worth.room
        ratio = problem.per_second(captured, seconds)
        best_of_all = last = int(ratio.argmax())
        if lacking[last] > 0:
            fitting = lacking <= 0
            last = int(np.where(fitting, ratio, -np.inf).argmax()) if fitting.any() else int(lacking.argmin())
        within = counts & (place <= place.reshape(-1)[events[last]])
        splits: Ints = np.where(within, np.arange(1, width + 1), 1).max(axis=1)
        return splits, last != best_of_all

    def deepest(self, deadlines: int) -> Ints:
        """METHOD 5's ``k_i(D)``: the deepest split of each kind that fits and ends by ``D``, at least 1.

        Args:
            deadlines: most distinct client times that are tried as ``D``; evenly spread ones if there are more.

        Returns:
            The distinct results, ``(M, K)``, by rising deadline.
        """
        totals = self._problem.times.sum(axis=2)
        times = np.unique(totals[self._problem.fits])
        if len(times) > deadlines:
            times = times[np.linspace(0, len(times) - 1, deadlines).round().astype(np.int64)]
        # Times grow with the split, so a kind's deepest split is the number of its pairs that end in time.
        kinds, splits = np.nonzero(self._problem.fits[:, 2:])
        since = np.searchsorted(times, totals[kinds, splits + 2])
        deeper = np.bincount(since * len(totals) + kinds, minlength=(len(times) + 1) * len(totals))
        rows = 1 + np.cumsum(deeper.reshape(len(times) + 1, -1)[:-1], axis=0)
        changed = np.ones(len(rows), dtype=bool)
        changed[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        return rows[changed]

    def _server_seconds(self) -> float:
        problem = self._problem
        counts = np.zeros((1, problem.cost.model.layers + 1), dtype=np.int64)
        counts[0, 1] = len(problem.clients)
        return float(problem.cost.times.server_times(problem.server, counts)[0])

    def _order(self, clock: int) -> tuple[Ints, Ints]:
        """All (kind, split) pairs by their time, as flat indices, and each pair's place in that order."""
        if clock not in self._orders:
            times = self._problem.times[:, 1:]
            keys = times.sum(axis=2) if clock == TOTAL else times[:, :, clock]
            # Stable: pairs of one kind stay in the order of their splits where times are equal.
            order: Ints = np.argsort(keys.reshape(-1), kind="stable")
            place = np.empty(len(order), dtype=np.int64)
            place[order] = np.arange(len(order))
            self._orders[clock] = order, place.reshape(keys.shape)
        return self._orders[clock]
