"""Split points with rows, periods, stored forms and wire formats: plans in which holders hardly wait (METHOD 10).

For a deadline on the time between two turns of a client, what a client can bring to a step follows from its own budget
alone; what couples the clients are the sum of their rows and the server's time. So for every deadline each client's
best choice for each number of rows is found by itself, with a price on the server's seconds, and the rows are dealt
out so that their sum is right. The objective is that of the other plans, captured importance per second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Pace
from hsplit.planning.cost.counted_model import CountedModel, Floats, Ints, prefix
from hsplit.planning.problem import Problem

Flags = NDArray[np.bool_]
_Dealt = tuple[Ints, Ints, Flags]
"""Pair of rows and period, split, and whether it is frozen, of each client, ``(N,)``."""

MAX_TIMES_ROWS = 4
"""Most rows of a client, in multiples of ``job.batch_size``."""
EVERY = (1, 2, 3, 4)
"""Periods in local steps that a plan chooses from."""
MAX_GROUPS = 32
GAIN = 1e-6
"""Least relative gain in the objective that counts: less is a tie, which the rounding of scores must not decide."""
# Clients up to which the rows are dealt out exactly, and one group for each is tried.
FEW = 12
MAX_SIMULATED = 16
"""Most choices that are simulated: the seconds of all others are estimates."""
# Best choices that are improved client by client, and the changes of a split that are tried.
_CLIMBED = 4
_MOVES = (-4, -2, -1, 1, 2, 4)
# Most times that the longest deadline is doubled where the rows cannot be dealt out within it.
_DOUBLINGS = 12
# Least common multiple of the periods: rows a step are counted in these parts of an example.
_PARTS = 12


@dataclass(frozen=True)
class _Effort:
    """Work of the search, which is limited by the number of clients and never by time.

    Attributes:
        exchanges: number of limits on the exchange at a round's end, from the least to the longest.
        closer: limits tried around the best of these, as multiples.
        deadlines: tried at first, as multiples of the least one that may do.
        nearer: tried around the best of these.
        prices: of the server's seconds, for one deadline.
        kept: best choices within each limit that are simulated: their seconds are estimates.
    """

    exchanges: int
    closer: tuple[float, ...]
    deadlines: tuple[float, ...]
    nearer: tuple[float, ...]
    prices: int
    kept: int


_THOROUGH = _Effort(8, (0.8,), tuple(np.geomspace(1.0, 4.0, 6)), (0.95,), 4, 2)
_LIGHT = _Effort(4, (0.8,), tuple(np.geomspace(1.0, 4.0, 5)), (0.92, 1.08), 4, 1)
_QUICK = _Effort(3, (), (1.0, 1.5, 2.25), (1.2,), 3, 1)
# Where splits are given, the exchange is too, and nothing is gained by a price.
_FIXED = _Effort(1, (), tuple(np.geomspace(1.0, 4.0, 10)), (0.92, 0.97, 1.04), 1, 2)
# Clients up to which the search is light, and beyond which it is quick.
_MANY = 2000


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
        captured: METHOD 5's ``learning``.
        gamma: the objective's exponent.
        lacking: bytes that the server is short of at the smallest ranks; at most 0 where it has room.
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
    gamma: float = 1.0
    lacking: float = 0.0

    @property
    def objective(self) -> float:
        """Captured importance, to the power of ``gamma``, per second; below 0 where the server lacks memory."""
        if self.lacking > 0:
            return -self.lacking
        return float(self.captured**self.gamma) / (self.seconds + self.exchange_s)


def _place(choice: Choice) -> float:
    """Order choices, the best first; equal clients that change places are a tie, whatever the rounding of scores."""
    return -float(f"{choice.objective:.7g}")


class PacedProblem:
    """The choices of every kind of client, with their seconds and what they capture.

    Args:
        problem: the planning problem of the same clients; its kinds are those of this one.
        pace: the policy's.
        allowed: splits that each kind may have, ``(K, L + 1)``.
        may_freeze: plans may leave clients' layers untrained.
        forms: in which a client may store the base, the faster first.
        wires: format of each kind's messages, ``K`` of them.
        shares: each client's share of the data, ``(N,)``.
    """

    def __init__(
        self,
        problem: Problem,
        pace: Pace,
        allowed: Flags,
        may_freeze: bool,
        forms: Sequence[Literal["dense", "codes"]],
        wires: Sequence[str],
        shares: Floats,
    ) -> None:
        self.problem, self.pace = problem, pace
        cost, job = problem.cost, problem.cost.model.job
        self._cost, self._job = cost, job
        self._fixed = bool((allowed.sum(axis=1) <= 1).all())
        self.shares = shares
        unit = max(1, job.batch_size // 4)
        rows = [job.batch_size]
        if pace.batch_size == "planned":
            most = MAX_TIMES_ROWS * job.batch_size // unit
            few = len(problem.clients) <= FEW
            numbers: Sequence[int] = range(1, most + 1) if few else (1, 2, 3, 4, 6, 8, 12, 16)
            rows = [unit * number for number in numbers if number <= most]
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
        self._forms(allowed, forms)
        # Rows by which shares are counted, and those of a step: fewer where memory is short.
        self._usual_rows = job.batch_size * len(problem.clients)
        self.total_rows = min(self._usual_rows, self._most_rows(unit))
        self._seconds(wires)
        self._frozen_choices = (False, True) if may_freeze else (False,)
        self._values()

    def _forms(self, allowed: Flags, forms: Sequence[Literal["dense", "codes"]]) -> None:
        """Find the stored form at every number of rows and split, the first that the memory allows, if it does."""
        cost, smallest = self._cost, int(self.problem.rank_set[0])
        held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
        memory = self.problem.memory
        shape = (len(memory), len(self._rows), cost.model.layers + 1)
        self._fits: Flags = np.zeros(shape, dtype=bool)
        self.codes: Flags = np.zeros(shape, dtype=bool)
        # In each form, by whether it is codes.
        self._fits_in: Flags = np.zeros((2, *shape), dtype=bool)
        for place, rows in enumerate(self._rows.tolist()):
            for form in forms:
                tables = cost.client_memory(rows, form)
                needed = tables.constant + smallest * (held @ tables.per_rank)
                self._fits_in[int(form == "codes"), :, place] = (needed <= memory[:, None]) & allowed
                fits = self._fits_in[int(form == "codes"), :, place] & ~self._fits[:, place]
                self._fits[:, place] |= fits
                self.codes[:, place] |= fits & (form == "codes")

    def _most_rows(self, unit: int) -> int:
        """Most rows of a step that the clients' memory allows, each one's floor included: a multiple of ``unit``."""
        fits = self._fits.any(axis=2)
        most = np.where(fits, self._rows, 0).max(axis=1)[self.problem.kind]
        rows = float(most.sum())
        floors = self.pace.min_share * self.shares
        if self.pace.batch_size == "planned" and floors.any():
            rows = min(rows, float((most[floors > 0] / floors[floors > 0]).min()))
        return max(unit, int(rows + 1e-9) // unit * unit)

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
        self._trained = trained
        # Before it is known who holds what, as if all clients trained their layers, each its own.
        apart = float(np.square(self.shares / max(self.shares.sum(), 1e-300)).sum())
        discount = apart**problem.constants.kappa if apart else 1.0
        self.value = (discount * trained + deep, np.zeros_like(trained) + deep)

    def learned(self, splits: Ints, share: Floats, frozen: Flags) -> float:
        """Compute METHOD 5's ``learning`` of a choice: what is captured, with the discount of what is learned apart.

        Args:
            splits, frozen: of each client, ``(N,)``.
            share: of the usual rows of a step, ``(N,)``.
        """
        problem, kind = self.problem, self.problem.kind
        if problem.constants.kappa == 0.0:
            return float(share @ self._of_choice(self.value, splits, frozen))
        discount = problem.discounts_of(splits, share, frozen)
        front = problem.of_front(discount[None])[0]
        layers = self._cost.model.layers
        passing = np.bincount(splits, weights=share, minlength=layers + 1).cumsum()[:layers]
        own = share * ~frozen * self._trained[kind, splits]
        return float(own @ front[splits] + (-np.diff(problem.deep_gains) * discount) @ passing)

    def own_s(self, kind: Ints, place: Ints, split: Ints, frozen: Flags, codes: Flags) -> Floats:
        """Seconds of a client's own work for a batch, waiting left out, elementwise."""
        parts, rows = self._parts[place], self._rows[place]
        seconds = [
            rows * self._row_s[f][kind, split]
            + parts * (self._message_s[f][kind, 0] + codes * self._widened_s[f][kind, split])
            for f in (0, 1)
        ]
        return np.where(frozen, seconds[1], seconds[0]) * self._job.grad_accumulation

    # -- the search -------------------------------------------------------------------------------------------------

    @property
    def _effort(self) -> _Effort:
        count = len(self.problem.clients)
        if self._fixed:
            return _FIXED
        return _THOROUGH if count <= FEW else _LIGHT if count <= _MANY else _QUICK

    def best(self, in_force: Choice | None = None) -> list[Choice]:
        """Find the choices with most captured importance per second, the best first; none where the rows' sum cannot
        be dealt out.

        Args:
            in_force: what is done now, which is among them.
        """
        chosen = [] if in_force is None else [in_force]
        limits = self._exchange_limits()
        for limit_s in limits:
            chosen += self._within(limit_s)
        if chosen:
            top = max(chosen, key=lambda choice: choice.objective)
            for factor in self._effort.closer:
                chosen += self._within(top.exchange_s * factor)
        chosen.sort(key=_place)
        if len(self.problem.clients) <= FEW and not self._fixed:
            chosen = [*map(self._climbed, chosen[:_CLIMBED]), *chosen]
            chosen.sort(key=_place)
        return chosen[:MAX_SIMULATED]

    def _within(self, limit_s: float) -> list[Choice]:
        """Find the best choices in which nobody's exchange takes longer than ``limit_s`` a step."""
        effort, found = self._effort, dict[bytes, tuple[float, _Dealt]]()
        if np.isinf(self._least_s):
            return []
        best: tuple[float, float] = (-np.inf, self._least_s)
        for factor in effort.deadlines:
            best = max(best, self._try(self._least_s * factor, limit_s, found))
        deadline = self._least_s * effort.deadlines[-1]
        for _ in range(_DOUBLINGS):
            if found:
                break
            deadline *= 2
            best = max(best, self._try(deadline, limit_s, found))
        for factor in effort.nearer:
            self._try(best[1] * factor, limit_s, found)
        ranked = sorted(found.values(), key=lambda one: -one[0])[: effort.kept]
        return [self._completed(*dealt) for _, dealt in ranked]

    def _climbed(self, choice: Choice) -> Choice:
        """Change one client, or the rows of two, as long as it improves the choice."""
        while True:
            least = choice.objective + GAIN * abs(choice.objective)
            promising = [other for other in self._neighbours(choice) if other.objective > least]
            promising.sort(key=_place)
            # The server's memory takes the longest to count, so the best are counted first.
            better = next((own for own in map(self._counted, promising) if own.objective > least), None)
            if better is None:
                return choice
            choice = better

    def _counted(self, choice: Choice) -> Choice:
        """``choice`` with the groups that the server has memory for."""
        parts = choice.splits, choice.rows, choice.every, choice.frozen, choice.codes
        return choice if self._server_has_room else self.completed(*parts)

    @cached_property
    def _together(self) -> list[list[int]]:
        """All clients, and those of one speed: one of several alone that is deeper changes little for the others.

        Memory may differ within a speed, if only by the rows of the embedding that each client reads.
        """
        by_speed: dict[tuple[float, float, float], list[int]] = defaultdict(list)
        for place, client in enumerate(self.problem.clients):
            by_speed[client.flops, client.bandwidth_bps, client.latency_s].append(place)
        together = [list(range(len(self.problem.clients))), *by_speed.values()]
        return [clients for n, clients in enumerate(together) if len(clients) > 1 and clients not in together[:n]]

    def _neighbours(self, choice: Choice) -> Iterator[Choice]:
        count = len(choice.splits)
        for client in range(count):
            for move in _MOVES:
                yield from self._changed(choice, {client: move}, {})
            if len(self._frozen_choices) > 1:
                yield from self._changed(choice, {}, {}, client)
        for clients in self._together:
            for move in _MOVES:
                yield from self._changed(choice, dict.fromkeys(clients, move), {})
        for giver, taker in permutations(range(count), 2):
            # What one client brings less over its period, the other brings more.
            least = int(np.lcm(choice.every[giver], choice.every[taker]))
            less, more = least // int(choice.every[taker]), least // int(choice.every[giver])
            rows = {giver: -int(choice.every[giver]) * less * more // least, taker: 0}
            rows[taker] = -rows[giver] * int(choice.every[taker]) // int(choice.every[giver])
            for first, second in product((0, 1, 2), (0, -1, -2)):
                yield from self._changed(choice, {giver: first, taker: second}, rows)

    def _changed(
        self, choice: Choice, deeper: Mapping[int, int], more_rows: Mapping[int, int], thawed: int | None = None
    ) -> Iterator[Choice]:
        """``choice`` with some splits, rows, or one client frozen or not; nothing where that is no choice."""
        splits, rows, frozen = choice.splits.copy(), choice.rows.copy(), choice.frozen.copy()
        for client, by in deeper.items():
            splits[client] += by
        for client, by in more_rows.items():
            rows[client] += by
        if thawed is not None:
            frozen[thawed] = not frozen[thawed]
        if splits.min() < 0 or splits.max() > self._cost.model.layers or rows.min() < 1:
            return
        changed = self.again(splits, rows, choice.every, frozen, counted=False)
        if changed is not None:
            yield changed

    def _try(self, deadline: float, limit_s: float, found: dict[bytes, tuple[float, _Dealt]]) -> tuple[float, float]:
        """Add what does best within ``deadline`` to ``found``; returns its estimated objective, and the deadline."""
        top = -np.inf
        for objective, dealt in self._by_deadline(deadline, limit_s):
            found.setdefault(b"".join(part.tobytes() for part in dealt), (objective, dealt))
            top = max(top, objective)
        return top, deadline

    def _exchange_limits(self) -> list[float]:
        """From the least exchange that some client has whatever the plan to the longest that a plan may have."""
        fits = self._fits.any(axis=1)
        own = self.exchange_s[1] if len(self._frozen_choices) > 1 else self.exchange_s[0]
        least = float(np.where(fits, own, np.inf).min(axis=1).max())
        if np.isinf(least):
            # Some client has no split that may be chosen.
            return []
        longest = float(np.where(fits, self.exchange_s[0], 0.0).max())
        if self._effort.exchanges == 1:
            return [longest]
        limits: list[float] = np.geomspace(least, max(longest, least * 1.001), self._effort.exchanges).tolist()
        return limits

    @cached_property
    def _least_s(self) -> float:
        """Seconds of a step below which no plan comes: of all together, of the server, and of each client's floor."""
        fits = self._fits.any(axis=1)
        deepest = np.where(fits, np.arange(fits.shape[1]), 0).max(axis=1)
        shallow_s = (self._row_s[0] + self.server_s)[:, 1:].min(axis=1)[self.problem.kind]
        together = self.total_rows / float((1 / shallow_s).sum())
        serving = float(self.server_s[deepest[self.problem.kind]].mean()) * self.total_rows * 0.5
        # Of each client the least that some rows above its floor take, over its period.
        quickest = (self._own_s / self._pair_every[:, None]).min(axis=(0, 3))
        enough = self._quota >= self._least_quota[:, None]
        floors = np.where(enough, quickest[self.problem.kind], np.inf).min(axis=1)
        return self._job.grad_accumulation * max(together, serving, float(floors.max()))

    def _by_deadline(self, deadline: float, limit_s: float) -> list[tuple[float, _Dealt]]:
        """Deal out rows within ``deadline`` at several prices of the server's seconds.

        Returns:
            What was dealt, with its objective, estimated as if the server's turns fitted together without a gap.
        """
        gains, accumulated = self._gains(deadline, limit_s), self._job.grad_accumulation
        price, low, high, found = 0.0, 0.0, None, list[tuple[float, _Dealt]]()
        for _ in range(self._effort.prices):
            dealt = self._dealt(*gains, price)
            if dealt is None:
                break
            pairs, splits, frozen = dealt
            share = self._quota[pairs] / (_PARTS * self._usual_rows)
            server_s = float(share @ self.server_s[splits]) * self._usual_rows * accumulated
            within = self.pace.periods == "none" or server_s <= deadline
            seconds = deadline + server_s if self.pace.periods == "none" else max(deadline, server_s)
            captured = self.learned(splits, share, frozen)
            exchange_s = float(self._of_choice(self.exchange_s, splits, frozen).max())
            found.append((captured**self.problem.constants.gamma / (seconds + exchange_s), dealt))
            if within and high is None and price == 0.0:
                break
            low, high = (low, price) if within else (price, high)
            # Prices are importance per second of the server, of the size of what is captured in a second.
            price = (low + high) / 2 if high is not None else max(2 * price, 0.25 * captured / (seconds + exchange_s))
        return found

    @cached_property
    def _own_s(self) -> Floats:
        """Seconds of a client's own work for one batch, ``(F, K, P, L + 1)``; infinite where memory is short."""
        place = self._pair_rows
        rows, parts = self._rows[place], self._parts[place]
        codes = self.codes[:, place]
        own = []
        for f in range(len(self._frozen_choices)):
            messages = self._message_s[f][:, None] + codes * self._widened_s[f][:, None, :]
            seconds = rows[:, None] * self._row_s[f][:, None, :] + parts[:, None] * messages
            own.append(np.where(self._fits[:, place], seconds, np.inf))
        return np.stack(own)

    def _of_choice(self, table: tuple[Floats, Floats], splits: Ints, frozen: Flags) -> Floats:
        """Values of two tables ``(K, L + 1)`` for trained and frozen clients, ``(N,)``."""
        kind = self.problem.kind
        values: Floats = np.where(frozen, table[1][kind, splits], table[0][kind, splits])
        return values

    def _gains(self, deadline: float, limit_s: float) -> tuple[Floats, Floats, Flags]:
        """Find what an example brings and costs, and what is feasible within a deadline.

        Returns:
            Value ``(F, K, 1, L + 1)``, server's seconds ``(L + 1,)``, feasible ``(F, K, P, L + 1)``.
        """
        rows, parts = self._rows[self._pair_rows], self._parts[self._pair_rows]
        turn_s = rows[:, None] * self.server_s / parts[:, None]
        wait_s = turn_s
        if self.pace.periods == "none":
            wait_s = np.zeros_like(turn_s)
        elif self._most_groups > 1:
            # The turn is shared with the rest of the group.
            wait_s = np.maximum(turn_s, deadline / self._most_groups / parts[:, None])
        # A client that needs no gradient does not wait.
        left_s = (deadline * self._pair_every[:, None] - np.stack([wait_s, 0 * wait_s])) / self._job.grad_accumulation
        feasible = self._own_s <= left_s[: len(self._frozen_choices), None]
        for f in range(len(self._frozen_choices)):
            feasible[f] &= (self.exchange_s[f] <= limit_s * (1 + 1e-9))[:, None, :]
        values = np.stack([self.value[f] for f in range(len(self._frozen_choices))])[:, :, None, :]
        return values, self.server_s, feasible

    def _dealt(self, values: Floats, server_s: Floats, feasible: Flags, price: float) -> _Dealt | None:
        """Choose a pair, a split and whether it is frozen for each client, so that rows have their sum.

        Returns:
            ``(N,)`` each; ``None``: there is none.
        """
        worth = np.where(feasible, values - price * server_s * self._usual_rows, -np.inf)
        best = worth.max(axis=(0, 3))
        gain = np.where(np.isfinite(best), best * self._quota, -np.inf)
        kind = self.problem.kind
        allowed = self._quota[None] >= self._least_quota[:, None]
        of_client = np.where(allowed, gain[kind], -np.inf)
        if not np.isfinite(of_client.max(axis=1)).all():
            return None
        pairs = (self._dealt_exactly if len(kind) <= FEW else self._dealt_by_price)(of_client)
        if pairs is None:
            return None
        flat = worth[:, kind, pairs].transpose(1, 0, 2).reshape(len(kind), -1).argmax(axis=1)
        frozen, splits = np.divmod(flat, worth.shape[3])
        return pairs, splits, frozen.astype(bool)

    @cached_property
    def _least_quota(self) -> Floats:
        """Least rows a step of each client, in parts of an example, ``(N,)``."""
        if self.pace.batch_size == "equal":
            return np.zeros(len(self.shares))
        least: Floats = np.ceil(self.pace.min_share * self.shares * self.total_rows * _PARTS - 1e-9)
        return least

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

    def again(
        self,
        splits: Ints,
        rows: Ints,
        every: Ints,
        frozen: Flags,
        codes: Flags | None = None,
        counted: bool = True,
    ) -> Choice | None:
        """The choice of these splits, rows and periods ``(N,)``; ``None`` if it is none of this problem's.

        Args:
            splits, rows, every, frozen: of each client, ``(N,)``.
            codes: who stores codes, where that fits; by default those for whom a dense base does not.
            counted: the server's memory counts.
        """
        kind = self.problem.kind
        place = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        known = (self._rows[place] == rows).all() and set(every.tolist()) <= set(self._pair_every.tolist())
        if not known or not self._fits[kind, place, splits].all() or (frozen.any() and len(self._frozen_choices) == 1):
            return None
        quota = rows * _PARTS // every
        if int(quota.sum()) != self.total_rows * _PARTS or (quota < self._least_quota).any():
            return None
        usual = self.codes[kind, place, splits]
        if codes is not None:
            usual = np.where(self._fits_in[codes.astype(np.int64), kind, place, splits], codes, usual)
        return self.completed(splits, rows, every, frozen, usual, counted)

    def variants(self, choice: Choice) -> Iterator[Choice]:
        """Change the split or the stored form of one client, or of several together.

        What a choice captures is an estimate, of clients with the usual rows and in the form that takes least memory:
        these are changes to try once it is known.
        """
        nothing = np.zeros(len(choice.splits), dtype=bool)
        for clients in [*self._together, *([client] for client in range(len(nothing)))]:
            turned = nothing.copy()
            turned[clients] = True
            for move, codes in ((0, choice.codes ^ turned), *((move, choice.codes) for move in (1, -1, 2, -2))):
                splits = choice.splits + move * turned
                if splits.min() < 0 or splits.max() > self._cost.model.layers:
                    continue
                changed = self.again(splits, choice.rows, choice.every, choice.frozen, codes)
                if changed is not None and (move or (changed.codes != choice.codes).any()):
                    yield changed

    def completed(
        self, splits: Ints, rows: Ints, every: Ints, frozen: Flags, codes: Flags, counted: bool = True
    ) -> Choice:
        """Make the choice of these splits, rows and periods ``(N,)``: its groups, and what it takes and captures.

        Args:
            splits, rows, every, frozen, codes: of each client, ``(N,)``.
            counted: the server's memory counts, which takes a while.
        """
        kind = self.problem.kind
        place = np.searchsorted(self._rows, rows)
        own_s = self.own_s(kind, place, splits, frozen, codes)
        parts = self._parts[place]
        turn_s = rows * self.server_s[splits] * self._job.grad_accumulation
        share = rows / every / self._usual_rows
        exchange = self._of_choice(self.exchange_s, splits, frozen)
        widened_s = 2 * self._cost.times.widening_s(self.problem.server, int(splits.min()))
        widened_s *= self._job.grad_accumulation * self._job.pipeline.microbatches
        grouped = list[tuple[float, int, Ints]]()
        least = 0
        for groups in self._group_numbers:
            group, turns = _balanced(turn_s / every, groups)
            if self.pace.periods == "none":
                seconds = float((own_s.max() + turn_s.sum()) + widened_s)
            else:
                full = np.bincount(group, weights=turn_s, minlength=groups)[group] + widened_s
                waits = np.where(frozen, 0.0, full / parts)
                seconds = max(float(turns.sum()) + groups * widened_s, float(((own_s + waits) / every).max()))
            grouped.append((seconds, groups, group))
            # More groups have to gain something.
            if seconds < grouped[least][0] * (1 - 1e-3):
                least = len(grouped) - 1
        first = grouped.pop(least)
        (seconds, groups, group), lacking = first, 0.0
        if counted and not self._server_has_room:
            ordered = [first, *sorted(grouped, key=lambda one: one[0])]
            (seconds, groups, group), lacking = self._with_room(ordered, splits, rows)
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
            self.learned(splits, share, frozen),
            self.problem.constants.gamma,
            lacking,
        )

    # -- the server's memory ----------------------------------------------------------------------------------------

    def _with_room(
        self, grouped: Sequence[tuple[float, int, Ints]], splits: Ints, rows: Ints
    ) -> tuple[tuple[float, int, Ints], float]:
        """Find the first grouping that the server has room for, or that lacks least: smaller turns hold fewer rows."""
        least, best = np.inf, grouped[0]
        for one in grouped:
            lacking = self.server_lacks(splits, rows, one[2])
            if lacking < least:
                least, best = lacking, one
            if lacking <= 0:
                break
        return best, least

    @cached_property
    def _server_has_room(self) -> bool:
        """True if the server has room for any choice at the smallest ranks; else each choice is checked."""
        cost, count = self._cost, len(self.problem.clients)
        fits = self._fits.any(axis=(0, 1))
        deepest = int(np.flatnonzero(fits).max(initial=0))
        shallow, deep = (cost.model.clients_at([split] * count)[None] for split in (int(fits.argmax()), deepest))
        # Shallow clients leave it most layers and rows; deep ones send it most adapters, which come on top at most.
        most = cost.server.constant(shallow, shallow * int(self._rows.max())) + cost.server.constant(deep)
        most += self.problem.rank_set[0] * cost.server.per_rank(shallow, shallow * int(self._rows.max())).sum(axis=1)
        return float(most[0]) <= self.problem.server.memory_bytes

    def server_lacks(self, splits: Ints, rows: Ints, group: Ints) -> float:
        """Bytes that the server lacks for its part with every weight at the smallest rank; below 0 those left."""
        turns = turns_of(self._cost.model, splits, rows, group)
        counts = np.repeat(self._cost.model.clients_at(splits)[None], len(turns), axis=0)
        needed = self._cost.server.constant(counts, turns)
        needed = needed + self.problem.rank_set[0] * self._cost.server.per_rank(counts, turns).sum(axis=1)
        return float(needed.max()) - self.problem.server.memory_bytes


def turns_of(model: CountedModel, splits: Ints, rows: Ints, group: Ints) -> Ints:
    """Count the examples that join a turn of a server at each split, one row a group, ``(G, L + 1)``.

    Args:
        model: the counts.
        splits, rows, group: of each client, ``(N,)``.
    """
    width = model.layers + 1
    if model.tail_at_client:
        # Every turn's graph is kept until the tails' gradients are there.
        group = np.zeros_like(group)
    joined = np.bincount(group * width + splits, weights=rows, minlength=(int(group.max()) + 1) * width)
    per_server = -(-joined // model.servers) if model.servers > 1 else joined
    return per_server.astype(np.int64).reshape(-1, width)


def _balanced(seconds: Floats, groups: int) -> tuple[Ints, Floats]:
    """Put clients into groups of about equal server time; returns each one's group ``(N,)`` and the sums ``(G,)``."""
    group, sums = np.zeros(len(seconds), dtype=np.int64), np.zeros(groups)
    order = np.argsort(-seconds, kind="stable")
    if len(seconds) <= FEW * FEW:
        for client in order.tolist():
            group[client] = int(sums.argmin())
            sums[group[client]] += seconds[client]
        return group, sums
    # Back and forth over the groups.
    place = np.arange(len(seconds)) % (2 * groups)
    group[order] = np.minimum(place, 2 * groups - 1 - place)
    np.add.at(sums, group, seconds)
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
