"""Split points with rows, periods, stored forms and wire formats: plans in which holders hardly wait (METHOD 10).

For a deadline on the time between two turns of a client, what a client can bring to a step follows from its own budget
alone; what couples the clients are the sum of their rows and the server's time. So for every deadline each client's
best choice for each number of rows is found by itself, with a price on the server's seconds, and the rows are dealt
out so that their sum is right. In small fleets the best of these, and trivial plans, are then changed client by client.
The objective is that of the other plans.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import permutations, product
from typing import Any

import numpy as np

from hsplit.planning.choices import FEW, PARTS, Choice, Choices, Flags, PacedProblem, place_of_choice
from hsplit.planning.cost.counted_model import Floats, Ints

_Dealt = tuple[Ints, Ints, Flags]
"""Pair of rows and period, split, and whether it is frozen, of each client, ``(N,)``."""

GAIN = 1e-6
"""Least relative gain in the objective that counts: less is a tie, which the rounding of scores must not decide."""
MAX_ALIKE = 40
"""Most splits that are tried for all clients alike."""
MAX_SIMULATED = 16
"""Most choices that are simulated: the seconds of all others are estimates."""
# Best choices that are improved client by client, and the changes of a split that are tried.
_CLIMBED = 8
_MOVES = (-4, -2, -1, 1, 2, 4)
# Changes of the splits of a client that gives rows and of the one that takes them.
_SPLITS_MOVED = np.array([(0, 1), *product((0, 1, 2), (0, -1, -2))])
# Most times that the longest deadline is doubled where the rows cannot be dealt out within it.
_DOUBLINGS = 12
# Most changes whose server's memory is counted at a time.
_TRIED = 48


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
# Where next to nothing is exchanged: many deadlines, and what comes of them is changed further.
_WAITING = _Effort(1, (), tuple(np.geomspace(1.0, 4.0, 16)), (0.92, 0.97, 1.04), 1, 6)
# Clients up to which the search is light, and beyond which it is quick.
_MANY = 2000


def distinct(choices: Sequence[Choice]) -> list[Choice]:
    """Sort choices, the best first, each once; equal ones in their order."""
    known = dict[bytes, Choice]()
    for choice in choices:
        known.setdefault(choice.decided, choice)
    return sorted(known.values(), key=place_of_choice)


class PaceSearch:
    """Finds good choices of a problem.

    Args:
        problem: the clients' choices.
    """

    def __init__(self, problem: PacedProblem) -> None:
        self._paced = problem
        self._count = len(problem.problem.clients)
        self._kind = problem.problem.kind

    @property
    def _effort(self) -> _Effort:
        if self._paced.fixed:
            return _FIXED
        return _THOROUGH if self._count <= FEW else _LIGHT if self._count <= _MANY else _QUICK

    def best(self, in_force: Choice | None = None, near: bool = False, climb: bool = True) -> list[Choice]:
        """Find the choices with the largest objective, the best first; none where the rows' sum cannot be dealt out.

        Args:
            in_force: what is done now, which is among them.
            near: with few clients only change what is in force, which is quick.
            climb: with few clients change the best ones.
        """
        chosen = [] if in_force is None else [in_force]
        if chosen and near and self._paced.few:
            return distinct([*chosen, *map(self.climbed, chosen)])
        for limit_s in self._exchange_limits():
            chosen += self._within(limit_s)
        if chosen:
            top = max(chosen, key=lambda choice: choice.objective)
            for factor in self._effort.closer:
                chosen += self._within(top.exchange_s * factor)
        chosen = distinct(chosen)
        alike = self.alike()
        if self._paced.few and not self._paced.fixed:
            # Where next to nothing is exchanged, splits are the shallowest, few train, and rows alone decide.
            shallow = [
                choice for limit_s in self._exchange_limits()[:1] for choice in self._within(limit_s, waiting=True)
            ]
            alike += distinct(shallow)
        if self._paced.few and climb:
            trained = list[Choice]()
            if len(self._paced.frozen_choices) > 1:
                # The best choice in which all train may be far from the others, as one in which none does.
                limits = self._exchange_limits(True)
                within = distinct([choice for limit_s in limits for choice in self._within(limit_s, True)])
                trained = [self.climbed(choice, True) for choice in within[:_CLIMBED]]
            chosen += map(self.climbed, distinct([*chosen[:_CLIMBED], *distinct(trained)[:1], *alike]))
            chosen += trained
            for top in distinct(chosen)[:1]:
                chosen += map(self.climbed, self._redealt(top))
        first = distinct([*chosen, *alike])[:MAX_SIMULATED]
        # Estimates are no reason to leave it.
        left_out = in_force is not None and all(choice.decided != in_force.decided for choice in first)
        return [*first, in_force] if in_force is not None and left_out else first

    def alike(self) -> list[Choice]:
        """Find the best choices in which all clients do the same, one where they train and one where none does.

        A search that starts at these misses no trivial plan. Where a server lacks memory for all of them, others are
        added, with fewest rows of shallow clients: what it lacks least for.
        """
        problem, found = self._paced, list[Choice]()
        for of_server in (False, True):
            rows = self._level_rows(of_server)
            fits = problem.fits[self._kind, np.searchsorted(problem.numbers, rows)]
            deepest = np.where(fits, np.arange(fits.shape[1]), 0).max(axis=1)
            splits = np.unique(np.minimum(np.arange(1, int(deepest.max()) + 1)[:, None], deepest), axis=0)
            if len(splits) > MAX_ALIKE:
                splits = splits[np.unique(np.geomspace(1, len(splits), MAX_ALIKE).astype(np.int64)) - 1]
            ones = np.ones_like(splits)
            for frozen in problem.frozen_choices:
                alike = Choices(splits, rows * ones, ones, ones * int(frozen) > 0, ones < 0)
                found += problem.ranked(problem.legal(alike))[:1]
            if any(choice.lacking <= 0 for choice in found):
                break
        return found

    def _level_rows(self, of_server: bool) -> Ints:
        """Deal out the rows of a step one after another, each to the client with the smallest turn, ``(N,)``.

        So the largest turn is as small as can be: in rows, or in what the server keeps, rows times the layers that are
        left to it. A client without memory for as many rows as the others brings what it can.
        """
        numbers, fits = self._paced.numbers, self._paced.fits
        deepest = np.where(fits, np.arange(fits.shape[2]), -1).max(axis=2)
        turn = numbers * ((fits.shape[2] - deepest) if of_server else np.ones_like(deepest))
        # A client that fits nothing brings least too: then no choice is legal.
        turn = np.where(deepest < 0, np.inf, turn)
        place = np.zeros(self._count, dtype=np.int64)
        left = self._paced.total_rows - int(numbers[0]) * self._count
        following = (
            [(float(turn[kind, 1]), i) for i, kind in enumerate(self._kind.tolist())] if len(numbers) > 1 else []
        )
        heapq.heapify(following)
        while left > 0 and following and following[0][0] < np.inf:
            _, client = heapq.heappop(following)
            place[client] += 1
            left -= int(numbers[place[client]] - numbers[place[client] - 1])
            if place[client] + 1 < len(numbers):
                heapq.heappush(following, (float(turn[self._kind[client], place[client] + 1]), client))
        dealt: Ints = numbers[place]
        return dealt

    def _within(self, limit_s: float, everybody: bool = False, waiting: bool = False) -> list[Choice]:
        """Find the best choices in which nobody's exchange takes longer than ``limit_s`` a step.

        Args:
            limit_s: seconds.
            everybody: all train.
            waiting: begin at deadlines that are met by forward passes alone.
        """
        exchange_s = np.stack(self._paced.exchange_s[: len(self._paced.frozen_choices)])
        allowed: Flags = exchange_s <= limit_s * (1 + 1e-9)
        allowed[1:] &= not everybody
        return self._passed(allowed, _WAITING if waiting else self._effort, self._least_s(waiting))

    def _redealt(self, choice: Choice) -> list[Choice]:
        """Deal out all rows anew where every client has a split of its kind's, and trains or not, as in ``choice``.

        Changing one client after another ends where only three of them together would gain anything.
        """
        allowed = np.zeros((len(self._paced.frozen_choices), *self._paced.fits[:, 0].shape), dtype=bool)
        allowed[choice.frozen.astype(np.int64), self._kind, choice.splits] = True
        return self._passed(allowed, replace(_WAITING, prices=_THOROUGH.prices), self._least_s(True))

    def _passed(self, allowed: Flags, effort: _Effort, least_s: float) -> list[Choice]:
        """Find the best choices within several deadlines.

        Args:
            allowed: splits that each kind may have, by whether the client is frozen, ``(F, K, L + 1)``.
            effort: for the search.
            least_s: the shortest deadline.
        """
        found = dict[bytes, tuple[float, _Dealt]]()
        if np.isinf(least_s):
            return []
        best: tuple[float, float] = (-np.inf, least_s)
        for factor in effort.deadlines:
            best = max(best, self._try(least_s * factor, allowed, effort.prices, found))
        deadline = least_s * effort.deadlines[-1]
        for _ in range(_DOUBLINGS):
            if found:
                break
            deadline *= 2
            best = max(best, self._try(deadline, allowed, effort.prices, found))
        for factor in effort.nearer:
            self._try(best[1] * factor, allowed, effort.prices, found)
        ranked = sorted(found.values(), key=lambda one: -one[0])[: effort.kept]
        if not ranked:
            return []
        pairs, splits, frozen = (np.stack(parts) for parts in zip(*(dealt for _, dealt in ranked), strict=True))
        return self._paced.ranked(self._paced.of_pairs(pairs, splits, frozen))

    def climbed(self, choice: Choice, everybody: bool = False) -> Choice:
        """Change one client, or the rows of two, as long as it improves the choice; ``everybody``: all train."""
        while True:
            least = choice.objective + GAIN * abs(choice.objective)
            near = self.neighbours(choice)
            near = near[~np.asarray(near.frozen.any(axis=1))] if everybody else near
            # What would be best with all the memory of the world says nothing about who lacks least.
            better = self._paced.ranked(near, least, most=_TRIED if choice.lacking <= 0 else len(near))
            if not better:
                return choice
            choice = better[0]

    @cached_property
    def _together(self) -> list[list[int]]:
        """All clients, and those of one speed: one of several alone that is deeper changes little for the others.

        Memory may differ within a speed, if only by the rows of the embedding that each client reads.
        """
        by_speed: dict[tuple[float, float, float], list[int]] = defaultdict(list)
        for place, client in enumerate(self._paced.problem.clients):
            by_speed[client.flops, client.bandwidth_bps, client.latency_s].append(place)
        together = [list(range(len(self._paced.problem.clients))), *by_speed.values()]
        return [clients for n, clients in enumerate(together) if len(clients) > 1 and clients not in together[:n]]

    def neighbours(self, choice: Choice) -> Choices:
        """Change one thing of a choice: splits, rows and periods, stored forms or who trains."""
        base, several = choice.alone, list[Choices]()
        clients = np.eye(self._count, dtype=np.int64)
        groups = np.stack([*clients, *(clients[own].sum(axis=0) for own in self._together)])

        def changed(**parts: Any) -> None:
            same = np.zeros(max(len(part) for part in parts.values()), dtype=np.int64)
            several.append(replace(base[same], **parts))

        for move in _MOVES:
            changed(splits=base.splits + move * groups)
            # What one client takes off the server may be room for layers of the others.
            changed(splits=base.splits + move * clients - int(np.sign(move)) * (1 - clients))
        if len(self._paced.frozen_choices) > 1:
            # Several together all train, or none.
            changed(frozen=base.frozen ^ (clients > 0))
            changed(frozen=base.frozen | (groups > 0))
            changed(frozen=base.frozen & (groups == 0))
        changed(codes=base.codes ^ (groups > 0))
        changed(**self._rows_moved(choice))
        near = self._paced.legal(Choices.of(several))
        other = [(getattr(near, f.name) != getattr(base, f.name)).any(axis=1) for f in fields(Choices)]
        return near[np.any(other, axis=0)]

    def _rows_moved(self, choice: Choice) -> dict[str, Ints]:
        """Let one client bring at most a unit of rows a step less, another one as many more, with splits to match.

        Returns:
            Splits, rows and periods, ``(M, N)`` each.
        """
        paced, moved = self._paced, list[tuple[int, int, int, int]]()
        quota = choice.rows * PARTS // choice.every
        for giver, taker in permutations(range(self._count), 2):
            less = quota[giver] - paced.quota
            for pair in np.flatnonzero((less > 0) & (less <= PARTS * paced.unit)).tolist():
                for other in self._pairs_of.get(int(quota[taker] + less[pair]), ()):
                    moved.append((giver, taker, pair, other))
        columns: Ints = np.array(moved, dtype=np.int64).reshape(-1, 4)
        givers, takers, first, second = columns.T
        each = np.arange(len(moved))
        rows, every = (np.repeat(own[None], len(moved), axis=0) for own in (choice.rows, choice.every))
        for client, pairs in ((givers, first), (takers, second)):
            rows[each, client], every[each, client] = paced.numbers[paced.pair_rows[pairs]], paced.pair_every[pairs]
        # With another period the giver's split stays.
        tried = (every == choice.every).all(axis=1)[:, None] | (_SPLITS_MOVED[:, 0] == 0)
        which, move = np.nonzero(tried)
        splits: Ints = np.repeat(choice.splits[None], len(which), axis=0)
        for column, client in enumerate((givers, takers)):
            splits[np.arange(len(which)), client[which]] += _SPLITS_MOVED[move, column]
        return {"splits": splits, "rows": rows[which], "every": every[which]}

    @cached_property
    def _pairs_of(self) -> dict[int, list[int]]:
        """Pairs of rows and period by the rows a step that they bring, in parts of an example."""
        found = defaultdict(list)
        for pair, quota in enumerate(self._paced.quota.tolist()):
            found[quota].append(pair)
        return found

    def _try(
        self, deadline: float, allowed: Flags, prices: int, found: dict[bytes, tuple[float, _Dealt]]
    ) -> tuple[float, float]:
        """Add what does best within ``deadline`` to ``found``; returns its estimated objective, and the deadline."""
        top = -np.inf
        for objective, dealt in self._by_deadline(deadline, allowed, prices):
            found.setdefault(b"".join(part.tobytes() for part in dealt), (objective, dealt))
            top = max(top, objective)
        return top, deadline

    def _exchange_limits(self, everybody: bool = False) -> list[float]:
        """From the least exchange that some client has whatever the plan to the longest that a plan may have."""
        fits = self._paced.fits.any(axis=1)
        own = self._paced.exchange_s[int(len(self._paced.frozen_choices) > 1 and not everybody)]
        least = float(np.where(fits, own, np.inf).min(axis=1).max())
        if np.isinf(least):
            # Some client has no split that may be chosen.
            return []
        longest = float(np.where(fits, self._paced.exchange_s[0], 0.0).max())
        if self._effort.exchanges == 1:
            return [longest]
        limits: list[float] = np.geomspace(least, max(longest, least * 1.001), self._effort.exchanges).tolist()
        return limits

    def _least_s(self, waiting: bool) -> float:
        """Seconds of a step below which no plan comes: of all together, of the server, and of each client's floor.

        Args:
            waiting: clients may compute forward alone.
        """
        row_s = self._paced.row_s[int(waiting and len(self._paced.frozen_choices) > 1)]
        fits = self._paced.fits.any(axis=1)
        deepest = np.where(fits, np.arange(fits.shape[1]), 0).max(axis=1)
        shallow_s = (row_s + self._paced.server_s)[:, 1:].min(axis=1)[self._kind]
        together = self._paced.total_rows / float((1 / shallow_s).sum())
        serving = float(self._paced.server_s[deepest[self._kind]].mean()) * self._paced.total_rows * 0.5
        # Of each client the least that some rows above its floor take, over its period.
        quickest = (self._own_s / self._paced.pair_every[:, None]).min(axis=(0, 3))
        enough = self._paced.quota >= self._paced.least_quota[:, None]
        floors = np.where(enough, quickest[self._kind], np.inf).min(axis=1)
        return self._paced.job.grad_accumulation * max(together, serving, float(floors.max()))

    def _by_deadline(self, deadline: float, allowed: Flags, prices: int) -> list[tuple[float, _Dealt]]:
        """Deal out rows within ``deadline`` at several prices of the server's seconds.

        Returns:
            What was dealt, with its objective, estimated as if the server's turns fitted together without a gap.
        """
        gains, accumulated = self._gains(deadline, allowed), self._paced.job.grad_accumulation
        price, low, high, found = 0.0, 0.0, None, list[tuple[float, _Dealt]]()
        for _ in range(prices):
            dealt = self._dealt(*gains, price)
            if dealt is None:
                break
            pairs, splits, frozen = dealt
            share = self._paced.quota[pairs] / (PARTS * self._paced.total_rows)
            server_s = float(share @ self._paced.server_s[splits]) * self._paced.total_rows * accumulated
            within = self._paced.pace.periods == "none" or server_s <= deadline
            seconds = deadline + server_s if self._paced.pace.periods == "none" else max(deadline, server_s)
            captured = float(share @ self._of_clients(self._paced.value, splits, frozen))
            exchange_s = float(self._of_clients(self._paced.exchange_s, splits, frozen).max())
            found.append((captured**self._paced.problem.constants.gamma / (seconds + exchange_s), dealt))
            if within and high is None and price == 0.0:
                break
            low, high = (low, price) if within else (price, high)
            # Prices are importance per second of the server, of the size of what is captured in a second.
            price = (low + high) / 2 if high is not None else max(2 * price, 0.25 * captured / (seconds + exchange_s))
        return found

    @cached_property
    def _own_s(self) -> Floats:
        """Seconds of a client's own work for one batch, ``(F, K, P, L + 1)``; infinite where memory is short."""
        place = self._paced.pair_rows
        rows, parts = self._paced.numbers[place], self._paced.parts[place]
        codes = self._paced.codes[:, place]
        own = []
        for f in range(len(self._paced.frozen_choices)):
            messages = self._paced.message_s[f][:, None] + codes * self._paced.widened_s[f][:, None, :]
            seconds = rows[:, None] * self._paced.row_s[f][:, None, :] + parts[:, None] * messages
            own.append(np.where(self._paced.fits[:, place], seconds, np.inf))
        return np.stack(own)

    def _of_clients(self, table: tuple[Floats, Floats], splits: Ints, frozen: Flags) -> Floats:
        """Values of two tables ``(K, L + 1)`` for trained and frozen clients, ``(N,)``."""
        values: Floats = np.where(frozen, table[1][self._kind, splits], table[0][self._kind, splits])
        return values

    def _gains(self, deadline: float, allowed: Flags) -> tuple[Floats, Floats, Flags]:
        """Find what an example brings and costs, and what is feasible within a deadline.

        Returns:
            Value ``(F, K, 1, L + 1)``, server's seconds ``(L + 1,)``, feasible ``(F, K, P, L + 1)``.
        """
        rows, parts = self._paced.numbers[self._paced.pair_rows], self._paced.parts[self._paced.pair_rows]
        turn_s = rows[:, None] * self._paced.server_s / parts[:, None]
        wait_s = turn_s
        if self._paced.pace.periods == "none":
            wait_s = np.zeros_like(turn_s)
        elif self._paced.most_groups > 1:
            # The turn is shared with the rest of the group.
            wait_s = np.maximum(turn_s, deadline / self._paced.most_groups / parts[:, None])
        # A client that needs no gradient does not wait.
        left_s = deadline * self._paced.pair_every[:, None] - np.stack([wait_s, 0 * wait_s])
        left_s /= self._paced.job.grad_accumulation
        feasible = self._own_s <= left_s[: len(self._paced.frozen_choices), None]
        feasible &= allowed[:, :, None, :]
        values = np.stack([self._paced.value[f] for f in range(len(self._paced.frozen_choices))])[:, :, None, :]
        return values, self._paced.server_s, feasible

    def _dealt(self, values: Floats, server_s: Floats, feasible: Flags, price: float) -> _Dealt | None:
        """Choose a pair, a split and whether it is frozen for each client, so that rows have their sum.

        Returns:
            ``(N,)`` each; ``None``: there is none.
        """
        worth = np.where(feasible, values - price * server_s * self._paced.total_rows, -np.inf)
        best = worth.max(axis=(0, 3))
        gain = np.where(np.isfinite(best), best * self._paced.quota, -np.inf)
        kind = self._kind
        allowed = self._paced.quota[None] >= self._paced.least_quota[:, None]
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
        total = self._paced.total_rows * PARTS
        best = np.full(total + 1, -np.inf)
        best[0] = 0.0
        taken = np.zeros((len(gain), total + 1), dtype=np.int64)
        for client, own in enumerate(gain):
            following = np.full(total + 1, -np.inf)
            for pair in np.flatnonzero(np.isfinite(own)).tolist():
                quota = int(self._paced.quota[pair])
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
            left -= int(self._paced.quota[pairs[client]])
        return pairs

    def _dealt_by_price(self, gain: Floats) -> Ints | None:
        """As :meth:`_dealt_exactly` for many clients: by a price on rows, then what is left over one by one."""
        total = self._paced.total_rows * PARTS
        finite = gain[np.isfinite(gain)]
        span = float(np.abs(finite).max()) / float(self._paced.quota.min()) + 1.0
        low, high = -span, span
        for _ in range(40):
            price = (low + high) / 2
            pairs = (gain - price * self._paced.quota).argmax(axis=1)
            low, high = (price, high) if int(self._paced.quota[pairs].sum()) > total else (low, price)
        pairs = (gain - high * self._paced.quota).argmax(axis=1)
        left = total - int(self._paced.quota[pairs].sum())
        clients = np.arange(len(gain))
        while left:
            more = self._paced.quota[None] - self._paced.quota[pairs][:, None]
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
