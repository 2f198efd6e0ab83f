"""Split points with rows, periods, stored forms and wire formats: plans in which holders hardly wait (METHOD 10).

For a deadline on the time between two turns of a client, what a client can bring to a step follows from its own budget
alone; what couples the clients are the sum of their rows and the server's time. So for every deadline each client's
best choice for each number of rows is found by itself, with a price on the server's seconds, and the rows are dealt
out so that their sum is right. The objective is that of the other plans, captured importance per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Pace
from hsplit.planning.cost.counted_model import Floats, Ints, prefix
from hsplit.planning.problem import Problem

Flags = NDArray[np.bool_]

MAX_TIMES_ROWS = 4
"""Most rows of a client, in multiples of ``job.batch_size``."""
EVERY = (1, 2, 3, 4)
"""Periods in local steps that a plan chooses from."""
MAX_GROUPS = 32
# Clients up to which the rows are dealt out exactly, and one group for each is tried.
FEW = 12
# Least common multiple of the periods: rows a step are counted in these parts of an example.
_PARTS = 12
# Deadlines tried at first, as multiples of the least one that may do, and after that around the best.
_DEADLINES = np.geomspace(1.0, 4.0, 12)
_NEARER = (0.9, 0.95, 0.98, 1.02, 1.05)
_HALVINGS = 12
# Parts of the longest exchange that plans are limited to, to find those that are worth it.
_EXCHANGES = (1.0, 0.6, 0.3, 0.1)


@dataclass(frozen=True)
class Choice:
    """What every client does, ``N`` of them.

    Attributes:
        splits, rows, every: of each client, ``(N,)``.
        frozen: it only computes forward, ``(N,)``.
        codes: it stores the base as codes, ``(N,)``.
        groups: number of turns in a local step.
        group, offset: of each client, ``(N,)``.
        seconds: of one local step, on the average (virtual).
        exchange_s: of the round's end, spread over its local steps (virtual).
        captured: METHOD 5's.
    """

    splits: Ints
    rows: Ints
    every: Ints
    frozen: Flags
    codes: Flags
    groups: int
    group: Ints
    offset: Ints
    seconds: float
    exchange_s: float
    captured: float

    @property
    def objective(self) -> float:
        """Captured importance per second."""
        return self.captured / (self.seconds + self.exchange_s)


class PacedProblem:
    """The choices of every kind of client, with their seconds and what they capture.

    Args:
        problem: the planning problem of the same clients; its kinds are those of this one.
        pace: the policy's.
        allowed: splits that each kind may have, ``(K, L + 1)``.
        may_freeze: plans may leave clients' layers untrained.
        unread: bytes of the embedding that each kind does not hold, ``(K,)``.
        wires: format of each kind's messages, ``K`` of them.
        shares: each client's share of the data, ``(N,)``.
    """

    def __init__(
        self,
        problem: Problem,
        pace: Pace,
        allowed: Flags,
        may_freeze: bool,
        unread: Floats,
        wires: Sequence[str],
        shares: Floats,
    ) -> None:
        self.problem, self.pace = problem, pace
        cost, job = problem.cost, problem.cost.model.job
        self._cost, self._job = cost, job
        self.total_rows = job.batch_size * len(problem.clients)
        self.shares = shares
        unit = max(1, job.batch_size // 4)
        rows = [job.batch_size]
        if pace.batch_size == "planned":
            rows = list(range(unit, MAX_TIMES_ROWS * job.batch_size + 1, unit))
        self._rows = np.array(rows, dtype=np.int64)
        whole_steps = pace.periods == "none" or pace.batch_size == "equal"
        pairs = [
            (row, every)
            for every in (EVERY[:1] if whole_steps else EVERY)
            for row in range(len(rows))
            if np.gcd(rows[row] // unit, every) == 1 and (every == 1 or rows[row] <= 2 * job.batch_size)
        ]
        # Pairs of rows and period; the first index is into the numbers of rows.
        self._pair_rows = np.array([row for row, _ in pairs], dtype=np.int64)
        self._pair_every = np.array([every for _, every in pairs], dtype=np.int64)
        self._quota: Ints = self._rows[self._pair_rows] * _PARTS // self._pair_every
        self._forms(allowed, unread)
        self._seconds(wires)
        self._frozen_choices = (False, True) if may_freeze else (False,)
        self._values()

    def _forms(self, allowed: Flags, unread: Floats) -> None:
        """Find the stored form at every number of rows and split, and whether the memory allows one."""
        cost, smallest = self._cost, int(self.problem.rank_set[0])
        held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
        memory = self.problem.memory + unread
        forms = {"dense": ("dense",), "codes": ("codes",), "planned": ("dense", "codes")}[self.pace.stored]
        if not cost.model.quantized:
            forms = ("dense",)
        shape = (len(memory), len(self._rows), cost.model.layers + 1)
        self._fits: Flags = np.zeros(shape, dtype=bool)
        self.codes: Flags = np.zeros(shape, dtype=bool)
        for place, rows in enumerate(self._rows.tolist()):
            for form in forms:
                tables = cost.client_memory(rows, form)  # type: ignore[arg-type]  # one of the two
                needed = tables.constant + smallest * (held @ tables.per_rank)
                fits = (needed <= memory[:, None]) & allowed & ~self._fits[:, place]
                self._fits[:, place] |= fits
                self.codes[:, place] |= fits & (form == "codes")

    def _seconds(self, wires: Sequence[str]) -> None:
        """Count each kind's seconds for one microbatch's fixed part and for one example, by split."""
        model, job, problem = self._cost.model, self._job, self.problem
        kinds = problem.distinct
        flops = np.array([kind.flops for kind in kinds])[:, None]
        latency = np.array([kind.latency_s for kind in kinds])[:, None]
        bandwidth = np.array([kind.bandwidth_bps for kind in kinds])[:, None]
        one = [model.wire_bytes(1, wire, 1) for wire in wires]
        sent = {
            message: 8 * np.array([[getattr(wire, message)] for wire in one]) / bandwidth
            for message in ("up", "deep", "slope", "down")
        }
        forward = prefix(model.forward_flops)[None] / job.batch_size / flops + sent["up"]
        backward = prefix(model.backward_flops)[None] / job.batch_size / flops + sent["down"]
        if model.tail_at_client:
            forward = forward + self._cost.times.tail_flops / job.batch_size / flops + sent["deep"] + sent["slope"]
        turns = 2 * latency if model.tail_at_client else 0.0
        # By whether the client is frozen; a microbatch's part that does not depend on its rows.
        self._row_s = (forward + backward, forward)
        self._message_s = (2 * latency + turns, latency + turns)
        widened = prefix(model.dequantization_flops)[None] / flops
        self._widened_s = (2 * widened, widened)
        splits = np.arange(model.layers + 1)
        ones = np.ones(model.layers + 1, dtype=np.int64)
        self.server_s: Floats = np.sum(self._cost.times.turn_times(problem.server, splits, ones), axis=0)
        self._parts = np.minimum(job.pipeline.microbatches, self._rows)
        self.exchange_s = (problem.exchange(False), problem.exchange(True))

    def _values(self) -> None:
        """What an example of each kind captures at each split, everywhere, by whether the client is frozen."""
        problem = self.problem
        deep = problem.deep_gains
        trained = (
            problem.client_gains
            if not problem.one_rank
            else np.repeat((problem.held @ problem.worth)[None], len(problem.members), axis=0)
        )
        frozen = np.zeros_like(trained)
        self.value = (trained + deep, frozen + deep)

    def own_s(self, kind: Ints, place: Ints, split: Ints, frozen: Flags) -> Floats:
        """Seconds of a client's own work for a batch, waiting left out, elementwise."""
        parts, rows = self._parts[place], self._rows[place]
        codes = self.codes[kind, place, split]
        seconds = [
            rows * self._row_s[f][kind, split]
            + parts * (self._message_s[f][kind, 0] + codes * self._widened_s[f][kind, split])
            for f in (0, 1)
        ]
        return np.where(frozen, seconds[1], seconds[0]) * self._job.grad_accumulation

    # -- the search -------------------------------------------------------------------------------------------------

    def best(self, in_force: Choice | None = None) -> Choice | None:
        """Find the choice with most captured importance per second; ``None``: the rows' sum cannot be dealt out.

        Args:
            in_force: what is done now, which stays unless another choice is better.
        """
        found = in_force
        for limit_s in self._exchange_limits():
            least_s = self._least_s(limit_s)
            tried: set[float] = set()
            deadlines = [least_s * factor for factor in _DEADLINES]
            local: tuple[float, float] | None = None
            for deadline in deadlines + [0.0] * len(_NEARER):
                if deadline == 0.0:
                    if local is None:
                        break
                    deadline = next((local[1] * n for n in _NEARER if local[1] * n not in tried), 0.0)
                tried.add(deadline)
                choice = self._by_deadline(deadline, limit_s)
                if choice is None:
                    continue
                if local is None or choice.objective > local[0]:
                    local = choice.objective, deadline
                if found is None or choice.objective > found.objective * (1 + 1e-9):
                    found = choice
        return found

    def _exchange_limits(self) -> list[float]:
        longest = max(float(np.where(self._fits.any(axis=1), self.exchange_s[0], 0.0).max()), 1e-12)
        return [longest * part for part in _EXCHANGES]

    def _least_s(self, limit_s: float) -> float:
        """Seconds of a step below which no plan comes: of the server at the deepest splits, and of all together."""
        fits = self._fits.any(axis=1)
        deepest = np.where(fits, np.arange(fits.shape[1]), 0).max(axis=1)
        shallow_s = (self._row_s[0] + self.server_s)[:, 1:].min(axis=1)[self.problem.kind]
        together = self.total_rows / float((1 / shallow_s).sum())
        return self._job.grad_accumulation * max(
            together, float(self.server_s[deepest[self.problem.kind]].mean()) * self.total_rows * 0.5
        )

    def _by_deadline(self, deadline: float, limit_s: float) -> Choice | None:
        """Find the best choice in which no client takes longer than ``deadline`` between two turns, a step apart."""
        gains = self._gains(deadline, limit_s)
        price, low, high, found = 0.0, 0.0, None, None
        for _ in range(_HALVINGS):
            dealt = self._dealt(*gains, price)
            if dealt is None:
                return found
            choice = self._completed(*dealt)
            if found is None or choice.objective > found.objective:
                found = choice
            server_s = float((self._quota[dealt[0]] / _PARTS * self.server_s[dealt[1]]).sum())
            within = self.pace.periods == "none" or server_s * self._job.grad_accumulation <= deadline
            if within and high is None and price == 0.0:
                break
            low, high = (low, price) if within else (price, high)
            # Prices are importance per second of the server, of the objective's own size.
            price = (low + high) / 2 if high is not None else max(2 * price, 0.25 * choice.objective)
        return found

    def _gains(self, deadline: float, limit_s: float) -> tuple[Floats, Floats, Flags]:
        """Value and server's seconds of an example by kind, pair, split, and whether it is frozen; and what is feasible.

        Returns:
            Value ``(F, K, 1, L + 1)``, server's seconds ``(L + 1,)``, feasible ``(F, K, P, L + 1)``.
        """
        kinds, layers = self._fits.shape[0], self._fits.shape[2]
        fits = self._fits[:, self._pair_rows]
        rows, parts = self._rows[self._pair_rows], self._parts[self._pair_rows]
        codes = self.codes[:, self._pair_rows]
        feasible = np.zeros((len(self._frozen_choices), kinds, len(rows), layers), dtype=bool)
        turn_s = rows[:, None] * self.server_s / parts[:, None]
        if self.pace.periods == "none":
            wait_s = np.zeros_like(turn_s)
        else:
            wait_s = np.maximum(turn_s, deadline / self._most_groups / parts[:, None])
        for f in range(len(self._frozen_choices)):
            own_s = rows[:, None] * self._row_s[f][:, None, :] + parts[:, None] * (
                self._message_s[f][:, None] + codes * self._widened_s[f][:, None, :]
            )
            total_s = self._job.grad_accumulation * (own_s + (0.0 if f else wait_s))
            feasible[f] = fits & (total_s <= deadline * self._pair_every[:, None])
            feasible[f] &= self.exchange_s[f][:, None, :] <= limit_s * (1 + 1e-9)
        values = np.stack([self.value[f] for f in range(len(self._frozen_choices))])[:, :, None, :]
        return values, self.server_s, feasible

    def _dealt(
        self, values: Floats, server_s: Floats, feasible: Flags, price: float
    ) -> tuple[Ints, Ints, Flags] | None:
        """Choose a pair, a split and whether it is frozen for each client, so that rows have their sum.

        Returns:
            ``(N,)`` each; ``None``: there is none.
        """
        worth = np.where(feasible, values - price * server_s * self.total_rows, -np.inf)
        best = worth.max(axis=(0, 3))
        gain = np.where(np.isfinite(best), best * self._quota, -np.inf)
        kind = self.problem.kind
        floor = np.ceil(self.pace.min_share * self.shares * self.total_rows * _PARTS - 1e-9)
        allowed = self._quota[None] >= (floor if self.pace.batch_size == "planned" else 0 * floor)[:, None]
        of_client = np.where(allowed, gain[kind], -np.inf)
        if not np.isfinite(of_client.max(axis=1)).all():
            return None
        pairs = (self._dealt_exactly if len(kind) <= FEW else self._dealt_by_price)(of_client)
        if pairs is None:
            return None
        flat = worth[:, kind, pairs].transpose(1, 0, 2).reshape(len(kind), -1).argmax(axis=1)
        frozen, splits = np.divmod(flat, worth.shape[3])
        return pairs, splits, frozen.astype(bool)

    def _dealt_exactly(self, gain: Floats) -> Ints | None:
        """Pairs ``(N,)`` with the largest sum of ``gain`` ``(N, P)`` whose rows have their sum."""
        total = self.total_rows * _PARTS
        best = np.full(total + 1, -np.inf)
        best[0] = 0.0
        taken = np.zeros((len(gain), total + 1), dtype=np.int64)
        for client, own in enumerate(gain):
            following = np.full(total + 1, -np.inf)
            for pair in np.flatnonzero(np.isfinite(own)).tolist():
                quota = int(self._quota[pair])
                if quota > total:
                    continue
                reached = best[: total + 1 - quota] + own[pair]
                better = reached > following[quota:]
                following[quota:][better] = reached[better]
                taken[client, quota:][better] = pair
            best = following
        if not np.isfinite(best[total]):
            return None
        pairs, left = np.zeros(len(gain), dtype=np.int64), total
        for client in reversed(range(len(gain))):
            pairs[client] = taken[client, left]
            left -= int(self._quota[pairs[client]])
        return pairs

    def _dealt_by_price(self, gain: Floats) -> Ints | None:
        """As :meth:`_dealt_exactly` for many clients: by a price on rows, then what is left over one by one."""
        total = self.total_rows * _PARTS
        finite = gain[np.isfinite(gain)]
        span = float(np.abs(finite).max()) / float(self._quota.min()) + 1.0
        low, high = -span, span
        for _ in range(40):
            price = (low + high) / 2
            pairs = (gain - price * self._quota).argmax(axis=1)
            low, high = (price, high) if int(self._quota[pairs].sum()) > total else (low, price)
        pairs = (gain - high * self._quota).argmax(axis=1)
        left = total - int(self._quota[pairs].sum())
        clients = np.arange(len(gain))
        while left:
            more = self._quota[None] - self._quota[pairs][:, None]
            loss = np.where((more > 0) & (more <= left), gain[clients, pairs][:, None] - gain, np.inf)
            loss = np.where(np.isfinite(loss), loss - high * -more, np.inf)
            each = loss.min(axis=1)
            order = np.argsort(each, kind="stable")
            before = left
            for client in order[np.isfinite(each[order])].tolist():
                pair = int(loss[client].argmin())
                if more[client, pair] <= left:
                    left -= int(more[client, pair])
                    pairs[client] = pair
                if not left:
                    break
            if left == before:
                return None
        return pairs

    # -- what a choice takes ----------------------------------------------------------------------------------------

    @property
    def _most_groups(self) -> int:
        if self.pace.periods == "none":
            return 1
        most = min(len(self.problem.clients), MAX_GROUPS)
        return most if self.pace.periods == "planned" else min(self.pace.periods, most)

    @cached_property
    def _group_numbers(self) -> list[int]:
        """Numbers of groups to choose from."""
        most = self._most_groups
        if self.pace.periods != "planned":
            return [most]
        return [n for n in range(1, most + 1) if most <= FEW or n in (1, 2, 4, 8, 16, 32) or n == most]

    def _completed(self, pairs: Ints, splits: Ints, frozen: Flags) -> Choice:
        """Assign groups, and find the seconds."""
        kind = self.problem.kind
        place, every = self._pair_rows[pairs], self._pair_every[pairs]
        return self.completed(splits, self._rows[place], every, frozen, self.codes[kind, place, splits])

    def completed(self, splits: Ints, rows: Ints, every: Ints, frozen: Flags, codes: Flags) -> Choice:
        """Make the choice of these splits, rows and periods ``(N,)``: its groups, and what it takes and captures."""
        kind = self.problem.kind
        place = np.searchsorted(self._rows, rows)
        own_s = self.own_s(kind, place, splits, frozen)
        parts = self._parts[place]
        turn_s = rows * self.server_s[splits] * self._job.grad_accumulation
        share = rows / every / self.total_rows
        values = np.where(frozen, self.value[1][kind, splits], self.value[0][kind, splits])
        exchange = np.where(frozen, self.exchange_s[1][kind, splits], self.exchange_s[0][kind, splits])
        widened_s = 2 * self._cost.times.widening_s(self.problem.server, int(splits.min()))
        widened_s *= self._job.grad_accumulation * self._job.pipeline.microbatches
        least = (np.inf, 1, np.zeros(len(kind), dtype=np.int64))
        for groups in self._group_numbers:
            group, turns = _balanced(turn_s / every, groups)
            if self.pace.periods == "none":
                seconds = float((own_s.max() + turn_s.sum()) + widened_s)
            else:
                full = np.bincount(group, weights=turn_s, minlength=groups)[group] + widened_s
                waits = np.where(frozen, 0.0, full / parts)
                seconds = max(float(turns.sum()) + groups * widened_s, float(((own_s + waits) / every).max()))
            if seconds < least[0] * (1 - 1e-3):
                least = (seconds, groups, group)
        seconds, groups, group = least
        return Choice(
            splits,
            rows,
            every,
            frozen,
            codes,
            groups,
            group,
            _offsets(every, turn_s),
            seconds,
            float(exchange.max()),
            float(share @ values),
        )


def _balanced(seconds: Floats, groups: int) -> tuple[Ints, Floats]:
    """Put clients into groups of about equal server time, the longest first; returns group ``(N,)`` and sums ``(G,)``."""
    group, sums = np.zeros(len(seconds), dtype=np.int64), np.zeros(groups)
    for client in np.argsort(-seconds, kind="stable").tolist():
        group[client] = int(sums.argmin())
        sums[group[client]] += seconds[client]
    return group, sums


def _offsets(every: Ints, seconds: Floats) -> Ints:
    """First local step of each client, so that the clients of one period are spread evenly over it, ``(N,)``."""
    offset = np.zeros(len(every), dtype=np.int64)
    for period in np.unique(every[every > 1]).tolist():
        load = np.zeros(period)
        members = np.flatnonzero(every == period)
        for client in members[np.argsort(-seconds[members], kind="stable")].tolist():
            offset[client] = int(load.argmin())
            load[offset[client]] += seconds[client]
    return offset
