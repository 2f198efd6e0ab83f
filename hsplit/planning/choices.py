"""What clients may do in a step: splits, rows, periods, stored forms; and what that captures and takes (METHOD 10).

Seconds and captured importance are estimates, good enough to tell which choices are worth being made and simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Pace
from hsplit.planning.cost.counted_model import CountedModel, Floats, Ints, prefix
from hsplit.planning.problem import Problem
from hsplit.planning.ranks import Ladder, captured_by

Flags = NDArray[np.bool_]

MAX_TIMES_ROWS = 4
"""Most rows of a client, in multiples of ``job.batch_size``."""
EVERY = (1, 2, 3, 4)
"""Periods in local steps that a plan chooses from."""
MAX_GROUPS = 32
FEW = 12
"""Clients up to which rows are dealt out exactly, one group for each is tried, and choices are changed one by one."""
PARTS = int(np.lcm.reduce(EVERY))
"""Least common multiple of the periods: rows a step are counted in these parts of an example."""
# Amounts of memory for which the importance that a server captures is computed; between them it is interpolated.
_SLACKS = 24
# Most choices whose server's memory is counted, unless said otherwise.
_COUNTED = 128


@dataclass(frozen=True)
class Choices:
    """What every client does in each of ``M`` choices.

    Attributes:
        splits, rows, every: of each client, ``(M, N)``.
        frozen: it only computes forward, ``(M, N)``.
        codes: it stores the base as codes, ``(M, N)``.
    """

    splits: Ints
    rows: Ints
    every: Ints
    frozen: Flags
    codes: Flags

    def __len__(self) -> int:
        return len(self.splits)

    def __getitem__(self, rows: Ints | Flags | slice) -> Choices:
        return Choices(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def of(several: Iterable[Choices]) -> Choices:
        """Join some choices."""
        parts = list(several)
        return Choices(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Choices)))


@dataclass(frozen=True)
class Choice:
    """What every client does, with the turns that they take, ``N`` of them.

    Attributes:
        splits, rows, every, frozen, codes: as in :class:`Choices`, ``(N,)``.
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
    def decided(self) -> bytes:
        """What is decided, without groups and the figures that follow."""
        return b"".join(getattr(self, field.name).tobytes() for field in fields(Choices))

    @property
    def alone(self) -> Choices:
        """The choice as the only one of several."""
        return Choices(*(getattr(self, field.name)[None] for field in fields(Choices)))

    @property
    def objective(self) -> float:
        """Captured importance, to the power of ``gamma``, per second; below 0 where the server lacks memory."""
        if self.lacking > 0:
            return -self.lacking
        return float(self.captured**self.gamma) / (self.seconds + self.exchange_s)


@dataclass(frozen=True)
class _Grouped:
    """Choices with one number of groups; figures as in :class:`Choice`, ``M`` of them."""

    groups: int
    group: Ints
    seconds: Floats


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

    Attributes:
        unit: examples by which numbers of rows differ at least.
        numbers: rows that a batch of a client may have, increasing, ``(R,)``.
        pair_rows, pair_every: pairs of rows, as indices into ``numbers``, and a period, ``(P,)``.
        quota: rows a step of each pair, in parts of an example, ``(P,)``.
        fits: splits that the memory of each kind allows with each number of rows, ``(K, R, L + 1)``.
        codes: its stored form there is codes, since no faster one fits, ``(K, R, L + 1)``.
        total_rows: examples of a step; fewer than those of equal clients where memory is short.
        server_s: the server's seconds for an example by its client's split, ``(L + 1,)``.
        exchange_s: of the round's end a step, of clients that train and of those that do not, each ``(K, L + 1)``.
        row_s, message_s: seconds of a client for an example, and for a microbatch whatever its rows, by whether it is
            frozen, each ``(K, L + 1)`` and ``(K, 1)``.
        frozen_choices: whether a client may be frozen.
        fixed: there is one split for each client.
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
        self.problem, self.pace, self.shares = problem, pace, shares
        self._cost, self.job = problem.cost, problem.cost.model.job
        self.fixed = bool((allowed.sum(axis=1) <= 1).all())
        self.unit = unit = max(1, self.job.batch_size // 4)
        rows = [self.job.batch_size]
        if pace.batch_size == "planned":
            most = MAX_TIMES_ROWS * self.job.batch_size // unit
            numbers: Sequence[int] = range(1, most + 1) if self.few else (1, 2, 3, 4, 6, 8, 12, 16)
            rows = [unit * number for number in numbers if number <= most]
        self.numbers: Ints = np.array(rows, dtype=np.int64)
        whole_steps = pace.periods == "none" or pace.batch_size == "equal"
        pairs = [
            (row, every)
            for every in (EVERY[:1] if whole_steps else EVERY)
            for row in range(len(rows))
            if np.gcd(rows[row] // unit, every) == 1 and (every == 1 or rows[row] <= 2 * self.job.batch_size)
        ]
        self.pair_rows: Ints = np.array([row for row, _ in pairs], dtype=np.int64)
        self.pair_every: Ints = np.array([every for _, every in pairs], dtype=np.int64)
        self._is_pair: Flags = np.zeros((len(rows), EVERY[-1] + 2), dtype=bool)
        self._is_pair[self.pair_rows, self.pair_every] = True
        self.quota: Ints = self.numbers[self.pair_rows] * PARTS // self.pair_every
        self._forms(allowed, forms)
        self.total_rows = min(self.job.batch_size * len(problem.clients), self._most_rows(unit))
        self._seconds(wires)
        self.frozen_choices = (False, True) if may_freeze else (False,)

    @property
    def few(self) -> bool:
        """True if choices are found and changed client by client."""
        return len(self.problem.clients) <= FEW

    def _forms(self, allowed: Flags, forms: Sequence[Literal["dense", "codes"]]) -> None:
        """Find the stored form at every number of rows and split, the first that the memory allows, if it does."""
        cost, smallest = self._cost, int(self.problem.rank_set[0])
        held = self.problem.held
        memory = self.problem.memory
        shape = (len(memory), len(self.numbers), cost.model.layers + 1)
        self.fits: Flags = np.zeros(shape, dtype=bool)
        self.codes: Flags = np.zeros(shape, dtype=bool)
        # In each form, by whether it is codes.
        self._fits_in: Flags = np.zeros((2, *shape), dtype=bool)
        for place, rows in enumerate(self.numbers.tolist()):
            for form in forms:
                tables = cost.client_memory(rows, form)
                needed = tables.constant + smallest * (held @ tables.per_rank)
                self._fits_in[int(form == "codes"), :, place] = (needed <= memory[:, None]) & allowed
                fits = self._fits_in[int(form == "codes"), :, place] & ~self.fits[:, place]
                self.fits[:, place] |= fits
                self.codes[:, place] |= fits & (form == "codes")

    def _most_rows(self, unit: int) -> int:
        """Most rows of a step that the clients' memory allows, each one's floor included: a multiple of ``unit``."""
        fits = self.fits.any(axis=2)
        most = np.where(fits, self.numbers, 0).max(axis=1)[self.problem.kind]
        rows = float(most.sum())
        floors = self.pace.min_share * self.shares
        if self.pace.batch_size == "planned" and floors.any():
            rows = min(rows, float((most[floors > 0] / floors[floors > 0]).min()))
        return max(unit, int(rows + 1e-9) // unit * unit)

    @cached_property
    def least_quota(self) -> Floats:
        """Least rows a step of each client, in parts of an example, ``(N,)``."""
        if self.pace.batch_size == "equal":
            return np.zeros(len(self.shares))
        least: Floats = np.ceil(self.pace.min_share * self.shares * self.total_rows * PARTS - 1e-9)
        return least

    def _seconds(self, wires: Sequence[str]) -> None:
        """Count each kind's seconds for one microbatch's fixed part and for one example, by split."""
        model, job, problem = self._cost.model, self.job, self.problem
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
        self.row_s = (forward + backward, forward)
        self.message_s = (2 * latency + turns, latency + turns)
        widened = prefix(model.dequantization_flops)[None] / flops
        self.widened_s = (2 * widened, widened)
        splits = np.arange(model.layers + 1)
        ones = np.ones(model.layers + 1, dtype=np.int64)
        self.server_s: Floats = np.sum(self._cost.times.turn_times(problem.server, splits, ones), axis=0)
        each = [self._cost.times.widening_s(problem.server, split) for split in splits.tolist()]
        self._turn_s: Floats = 2 * job.grad_accumulation * job.pipeline.microbatches * np.array(each)
        self.parts: Ints = np.minimum(job.pipeline.microbatches, self.numbers)
        self.exchange_s = (problem.exchange(False), problem.exchange(True))

    def own_s(self, kind: Ints, place: Ints, split: Ints, frozen: Flags, codes: Flags) -> Floats:
        """Seconds of a client's own work for a batch, waiting left out, elementwise."""
        parts, rows = self.parts[place], self.numbers[place]
        seconds = [
            rows * self.row_s[f][kind, split]
            + parts * (self.message_s[f][kind, 0] + codes * self.widened_s[f][kind, split])
            for f in (0, 1)
        ]
        return np.where(frozen, seconds[1], seconds[0]) * self.job.grad_accumulation

    # -- what is captured -------------------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> Floats:
        """Importance that each kind captures at each split with ``job.batch_size`` rows, ``(K, L + 1)``."""
        problem = self.problem
        if problem.one_rank:
            return np.repeat((problem.held @ problem.worth)[None], len(problem.members), axis=0)
        return problem.client_gains

    @cached_property
    def _by_layer(self) -> Floats:
        """Importance of each layer at the largest ranks, ``(L,)``."""
        problem, layers = self.problem, self._cost.model.layers
        values = problem.worth if problem.one_rank else problem.values[:, -1]
        return np.bincount(self._cost.model.weight_layer, weights=values, minlength=layers).astype(np.float64)

    @cached_property
    def value(self) -> tuple[Floats, Floats]:
        """What an example of each kind captures at each split, at all holders, by whether the client is frozen.

        As if the server had the ranks that it has room for with all clients at the shallowest split, in most turns.
        """
        fits, count = self.fits.any(axis=1), len(self.problem.clients)
        first = np.full((1, count), int(fits.any(axis=0).argmax()), dtype=np.int64)
        rows = np.full((1, count), self.job.batch_size, dtype=np.int64)
        turns = np.arange(count)[None] % self.group_numbers[-1]
        part = np.ones(1)
        if not self.problem.one_rank:
            part = self._server_parts(first, rows, [(turns, self.group_numbers[-1])])[0][:, 0]
        deep = float(part[0]) * np.append(np.cumsum(self._by_layer[::-1])[::-1], 0.0)
        # Before it is known who holds what, as if all clients trained their layers, each its own.
        apart = float(np.square(self.shares / max(self.shares.sum(), 1e-300)).sum())
        discount = apart**self.problem.constants.kappa if apart else 1.0
        return discount * self.trained + deep, np.zeros_like(self.trained) + deep

    def _own_gains(self, choices: Choices) -> Floats:
        """Importance that clients capture of their own tokens in their layers, before any discount, ``(M, N)``."""
        kind = self.problem.kind
        if not self.few or self.problem.one_rank:
            return np.where(choices.frozen, 0.0, self.trained[kind, choices.splits])
        return np.where(choices.frozen, 0.0, self._looked_up(choices))

    def _looked_up(self, choices: Choices) -> Floats:
        """Look up :meth:`_gains_at` for every client, ``(M, N)``."""
        place, codes, known = np.searchsorted(self.numbers, choices.rows), choices.codes.astype(np.int64), self._gains
        unknown = np.isnan(known[place, codes, choices.splits, 0])
        if unknown.any():
            keys = (part[unknown].tolist() for part in (place, codes, choices.splits))
            for at, stored, split in {*zip(*keys, strict=True)}:
                known[at, stored, split] = self._gains_at(split, at, bool(stored))
        gains: Floats = known[place, codes, choices.splits, self.problem.kind]
        return gains

    def _gains_at(self, split: int, place: int, codes: bool) -> Floats:
        """Importance that each kind captures at ``split``, with some rows and in a stored form, ``(K,)``.

        With one rank for all: ``g`` of the largest rank that the kind fits.
        """
        problem = self.problem
        tables = self._cost.client_memory(int(self.numbers[place]), "codes" if codes else "dense")
        held = problem.held[split]
        prices = held * tables.per_rank
        slack = problem.memory - tables.constant[split] - problem.rank_set[0] * prices.sum()
        gains = np.zeros(len(slack))
        fits = slack >= 0
        if problem.one_rank:
            gains = self._common_gain(prices.sum() + np.zeros(len(slack)), slack)
        elif fits.any():
            gains[fits] = problem.captured_by_clients(held, prices, slack[fits])
        return gains

    def _common_gain(self, prices: Floats, slack: Floats) -> Floats:
        """Return ``g`` of the largest rank that all weights of a holder have room for, ``(M,)``.

        Args:
            prices: bytes of one more unit of rank of all its weights, ``(M,)``.
            slack: bytes left at the smallest rank, ``(M,)``.
        """
        more = self.problem.rank_set - self.problem.rank_set[0]
        level = (np.multiply.outer(prices, more) <= slack[:, None]).sum(axis=1) - 1
        gain: Floats = captured_by(self.problem.rank_set, self.problem.constants.rho)[np.maximum(level, 0)]
        return gain

    @cached_property
    def _gains(self) -> Floats:
        """Results of :meth:`_gains_at`, NaN where they are not known yet, ``(R, 2, L + 1, K)``."""
        return np.full((len(self.numbers), 2, self._cost.model.layers + 1, len(self.problem.members)), np.nan)

    def _learned(self, choices: Choices, gains: Floats, part: Floats) -> Floats:
        """Compute METHOD 5's ``learning``.

        Args:
            choices: ``M`` of them.
            gains: what clients capture of their own tokens, ``(M, N)``.
            part: of what the largest ranks capture at the server, ``(M, G)``.

        Returns:
            Of each choice and part, ``(M, G)``.
        """
        share = choices.rows / choices.every / self.total_rows
        layers = self._cost.model.layers
        passing = self._cost.model.summed_at(choices.splits, share).cumsum(axis=1)[:, :layers]
        if self.problem.constants.kappa == 0.0:
            learned: Floats = (share * gains).sum(axis=1)[:, None] + part * (passing @ self._by_layer)[:, None]
            return learned
        discount = self.problem.discounts_of(choices.splits, share, choices.frozen)
        front = np.take_along_axis(self.problem.of_front(discount), choices.splits, axis=1)
        by_server = part * ((passing * discount) @ self._by_layer)[:, None]
        learned = (share * gains * front).sum(axis=1)[:, None] + by_server
        return learned

    # -- what a choice takes ----------------------------------------------------------------------------------------

    @property
    def most_groups(self) -> int:
        """Most turns of the server in a local step."""
        if self.pace.periods == "none":
            return 1
        most = min(len(self.problem.clients), MAX_GROUPS)
        return most if self.pace.periods == "planned" else min(self.pace.periods, most)

    @cached_property
    def group_numbers(self) -> list[int]:
        """Numbers of turns to choose from."""
        most = self.most_groups
        if self.pace.periods != "planned":
            return [most]
        return [n for n in range(1, most + 1) if most <= FEW or n in (1, 2, 4, 8, 16, 32) or n == most]

    def of_pairs(self, pairs: Ints, splits: Ints, frozen: Flags) -> Choices:
        """Make choices of pairs of rows and period, splits and who is frozen, ``(M, N)``, in the usual stored form."""
        place = self.pair_rows[pairs]
        codes = self.codes[self.problem.kind, place, splits]
        return Choices(splits, self.numbers[place], self.pair_every[pairs], frozen, codes)

    def legal(self, choices: Choices) -> Choices:
        """Return those of some choices that are any of this problem's; who stores codes as given, where that fits."""
        kind, every = self.problem.kind, choices.every
        place = np.minimum(np.searchsorted(self.numbers, choices.rows), len(self.numbers) - 1)
        splits = np.clip(choices.splits, 0, self._cost.model.layers)
        quota = choices.rows * PARTS // every
        legal = (
            (self.numbers[place] == choices.rows).all(axis=1)
            & (splits == choices.splits).all(axis=1)
            & self._is_pair[place, np.minimum(every, EVERY[-1] + 1)].all(axis=1)
            & self.fits[kind, place, splits].all(axis=1)
            & (quota.sum(axis=1) == self.total_rows * PARTS)
            & (quota >= self.least_quota).all(axis=1)
        )
        if len(self.frozen_choices) == 1:
            legal &= ~choices.frozen.any(axis=1)
        form = choices.codes.astype(np.int64)
        codes = np.where(self._fits_in[form, kind, place, splits], choices.codes, self.codes[kind, place, splits])
        return Choices(splits, choices.rows, every, choices.frozen, codes)[legal]

    def ranked(self, choices: Choices, above: float = -np.inf, most: int = _COUNTED) -> list[Choice]:
        """Estimate the objective of some choices; returns those above a bound, the best first, in the best groups.

        Args:
            choices: legal ones.
            above: objective that the others exceed.
            most: choices whose server's memory is counted: those that would be best if the server had all it needs.
        """
        if not len(choices):
            return []
        kind, place = self.problem.kind, np.searchsorted(self.numbers, choices.rows)
        forward_s = self.own_s(kind, place, choices.splits, np.ones_like(choices.frozen), choices.codes)
        own_s = self.own_s(kind, place, choices.splits, choices.frozen, choices.codes)
        served_s = choices.rows * self.server_s[choices.splits] * self.job.grad_accumulation
        offset = _offsets(choices.every, served_s)
        exchange = [table[kind, choices.splits] for table in self.exchange_s]
        exchange_s = np.where(choices.frozen, exchange[1], exchange[0]).max(axis=1)
        gains, gamma = self._own_gains(choices), self.problem.constants.gamma
        grouped = [self._grouped(choices, n, own_s, forward_s, served_s, offset) for n in self.group_numbers]
        ones = np.ones((len(choices), 1))
        # One rank for all is that of the holder with least room.
        common = self._looked_up(choices).min(axis=1) if self.problem.one_rank else ones[:, 0]
        at_most = self._learned(choices, gains, ones)[:, 0] * common
        seconds = np.stack([one.seconds for one in grouped], axis=1)
        promised = self.problem.per_second(at_most[:, None], seconds + exchange_s[:, None])
        order = np.argsort(-promised.max(axis=1), kind="stable")
        order = order[promised.max(axis=1)[order] > above][:most]
        near, found = choices[order], list[Choice]()
        if not len(order):
            return []
        learned, lacking = np.repeat(at_most[order, None], len(grouped), axis=1), np.zeros((len(order), len(grouped)))
        if not self._server_has_all:
            turns = [(one.group[order], one.groups) for one in grouped]
            parts, lacking = self._server_parts(near.splits, near.rows, turns)
            if self.problem.one_rank:
                learned *= np.minimum(parts / common[order, None], 1.0)
            else:
                learned = self._learned(near, gains[order], parts)
        scores = self.problem.per_second(learned, (seconds + exchange_s[:, None])[order])
        scores = np.where(lacking > 0, -lacking, scores)
        for row, place_of in enumerate(order.tolist()):
            best = 0
            for n in range(1, len(grouped)):
                # More groups have to gain something.
                if scores[row, n] > scores[row, best] + 1e-3 * abs(scores[row, best]):
                    best = n
            if scores[row, best] > above:
                found.append(
                    Choice(
                        choices.splits[place_of],
                        choices.rows[place_of],
                        choices.every[place_of],
                        choices.frozen[place_of],
                        choices.codes[place_of],
                        grouped[best].groups,
                        grouped[best].group[place_of],
                        offset[place_of],
                        float(seconds[place_of, best]),
                        float(exchange_s[place_of]),
                        float(learned[row, best]),
                        gamma,
                        float(lacking[row, best]),
                    )
                )
        return sorted(found, key=place_of_choice)

    def _grouped(
        self, choices: Choices, groups: int, own_s: Floats, forward_s: Floats, served_s: Floats, offset: Ints
    ) -> _Grouped:
        """Put the clients of each choice into ``groups``, and estimate the seconds of a step."""
        group = _balanced(served_s / choices.every, groups)
        turn_s = self._turn_s[choices.splits.min(axis=1)]
        if self.pace.periods == "none":
            # All wait for all, twice.
            together = forward_s.max(axis=1) + served_s.sum(axis=1) + (own_s - forward_s).max(axis=1)
            return _Grouped(groups, group, together + turn_s)
        met = _met(choices.every, offset, group, served_s, groups) + turn_s[:, None, None]
        place = np.searchsorted(self.numbers, choices.rows)
        turns = np.take_along_axis(met.max(axis=1), group, axis=1)
        own = own_s + np.where(choices.frozen, 0.0, turns / self.parts[place])
        always = np.where(choices.every == 1, own, 0.0).max(axis=1)
        serving = np.maximum(met.sum(axis=2), always[:, None]).mean(axis=1)
        # A client that needs no gradient begins one step ahead and no earlier, however many it sits out.
        waited = np.where(choices.frozen & (choices.every > 1), turns + (choices.every - 2) * serving[:, None], 0.0)
        return _Grouped(groups, group, np.maximum(serving, ((own + waited) / choices.every).max(axis=1)))

    # -- the server's memory ----------------------------------------------------------------------------------------

    @cached_property
    def _server_has_all(self) -> bool:
        """True if the server has room for any choice at the largest ranks."""
        cost, count = self._cost, len(self.problem.clients)
        fits = self.fits.any(axis=(0, 1))
        deepest = int(np.flatnonzero(fits).max(initial=0))
        shallow, deep = (cost.model.clients_at([split] * count)[None] for split in (int(fits.argmax()), deepest))
        # Shallow clients leave it most layers and rows; deep ones send it most adapters, which come on top at most.
        most = cost.server.constant(shallow, shallow * int(self.numbers.max())) + cost.server.constant(deep)
        prices = cost.server.per_rank(shallow, shallow * int(self.numbers.max())).sum(axis=1)
        return float((most + self.problem.rank_set[-1] * prices)[0]) <= self.problem.server.memory_bytes

    def _server_parts(self, splits: Ints, rows: Ints, grouped: Sequence[tuple[Ints, int]]) -> tuple[Floats, Floats]:
        """Find what the server captures with the ranks that it has room for.

        Args:
            splits, rows: of each client, ``(M, N)``.
            grouped: ways to group each choice's clients, ``G`` of them: each one's turn, ``(M, N)``, and their number.

        Returns:
            Parts of what it would capture with the largest ranks (with one rank for all: ``g`` of the largest that it
            fits), and the bytes that it lacks at the smallest ones (at most 0: none), each ``(M, G)``.
        """
        model, server, many, width = self._cost.model, self._cost.server, len(splits), self._cost.model.layers + 1
        turns = [turns_of(model, splits, rows, *one) for one in grouped]
        each = [one.shape[1] for one in turns]
        counts = model.clients_at(splits)
        several = np.concatenate([np.repeat(counts, number, axis=0) for number in each])
        flat = np.concatenate([one.reshape(-1, width) for one in turns])
        prices = server.per_common_rank(several, flat)
        needed = server.constant(several, flat) + self.problem.rank_set[0] * prices
        # The turn that takes most, of each choice and way.
        begin = many * np.concatenate([[0], np.cumsum(each)[:-1]])
        worst = np.zeros((many, len(grouped)), dtype=np.int64)
        for n, (start, number) in enumerate(zip(begin.tolist(), each, strict=True)):
            of_turns = needed[start : start + many * number].reshape(many, number)
            worst[:, n] = start + np.arange(many) * number + of_turns.argmax(axis=1)
        lacking: Floats = needed[worst] - self.problem.server.memory_bytes
        if self.problem.one_rank:
            return self._common_gain(prices[worst].ravel(), -lacking.ravel()).reshape(lacking.shape), lacking
        first = splits.min(axis=1)
        joined, held = flat[worst].cumsum(axis=2)[:, :, :-1], np.arange(width - 1) >= first[:, None]
        examples = np.einsum("mgl,ml->mg", joined, held) / np.maximum(held.sum(axis=1), 1)[:, None]
        of_turn, first = np.rint(examples).astype(np.int64), np.broadcast_to(first[:, None], lacking.shape)
        part = np.ones(lacking.shape)
        for split, rows_of_turn in {*zip(first.ravel().tolist(), of_turn.ravel().tolist(), strict=True)}:
            same = (first == split) & (of_turn == rows_of_turn)
            slack, captured = self._server_curve(split, rows_of_turn)
            part[same] = np.interp(-lacking[same], slack, captured)
        return part, lacking

    def _server_curve(self, first: int, examples: int) -> tuple[Floats, Floats]:
        """Find the part of the importance that ranks capture at the server by its memory, at points between the ends.

        Args:
            first: its first layer.
            examples: of its largest turn.

        Returns:
            Bytes beyond those at the smallest ranks, increasing, and the parts, each ``(S,)``.
        """
        key = first, examples
        if key not in self._known_curves:
            problem, model = self.problem, self._cost.model
            held = model.weight_layer >= first
            alike = model.clients_at([first] * len(problem.clients))[None]
            turn = np.zeros((1, model.layers + 1), dtype=np.int64)
            turn[0, first] = examples
            prices = self._cost.server.per_rank(alike, turn)[0][held]
            if not held.any():
                self._known_curves[key] = np.zeros(1), np.ones(1)
            else:
                whole = float(prices.sum() * (problem.rank_set[-1] - problem.rank_set[0]))
                slack = whole * np.linspace(0.0, 1.0, _SLACKS) ** 2
                values = problem.values[held]
                captured = Ladder(prices, values, problem.rank_set).captured(slack)
                self._known_curves[key] = slack, captured / max(float(values[:, -1].sum()), 1e-300)
        return self._known_curves[key]

    @cached_property
    def _known_curves(self) -> dict[tuple[int, int], tuple[Floats, Floats]]:
        return {}


def place_of_choice(choice: Choice) -> float:
    """Order choices, the best first; equal clients that change places are a tie, whatever the rounding of scores."""
    return -float(f"{choice.objective:.7g}")


def turns_of(model: CountedModel, splits: Ints, rows: Ints, group: Ints, groups: int) -> Ints:
    """Count the examples that join each turn of a server at each split, ``(M, G, L + 1)``.

    Args:
        model: the counts.
        splits, rows, group: of each client, ``(M, N)``.
        groups: number of turns.
    """
    width, many = model.layers + 1, len(splits)
    if model.tail_at_client:
        # Every turn's graph is kept until the tails' gradients are there.
        group, groups = np.zeros_like(group), 1
    place = (np.arange(many)[:, None] * groups + group) * width + splits
    joined = np.bincount(place.ravel(), weights=rows.ravel(), minlength=many * groups * width)
    per_server = -(-joined // model.servers) if model.servers > 1 else joined
    turns: Ints = per_server.astype(np.int64).reshape(many, groups, width)
    return turns


def _balanced(seconds: Floats, groups: int) -> Ints:
    """Put the clients of each row into groups of about equal server time, ``(M, N)``."""
    group = np.zeros(seconds.shape, dtype=np.int64)
    order, rows = np.argsort(-seconds, axis=1, kind="stable"), np.arange(len(seconds))
    count = seconds.shape[1]
    if count <= FEW * FEW:
        sums = np.zeros((len(seconds), groups))
        for client in order.T:
            least = sums.argmin(axis=1)
            group[rows, client] = least
            sums[rows, least] += seconds[rows, client]
        return group
    # Back and forth over the groups.
    place = np.arange(count) % (2 * groups)
    np.put_along_axis(group, order, np.broadcast_to(np.minimum(place, 2 * groups - 1 - place), order.shape), axis=1)
    return group


def _met(every: Ints, offset: Ints, group: Ints, seconds: Floats, groups: int) -> Floats:
    """Seconds of each group's turn in every step until all periods begin again, ``(M, T, G)``."""
    steps, many = int(np.lcm.reduce(np.unique(every))), len(every)
    place = (np.arange(many)[:, None] * groups + group).ravel()
    met: Floats = np.zeros((many, steps, groups))
    for step in range(steps):
        here = np.where(step % every == offset, seconds, 0.0)
        met[:, step] = np.bincount(place, weights=here.ravel(), minlength=many * groups).reshape(many, groups)
    return met


def _offsets(every: Ints, seconds: Floats) -> Ints:
    """First local step of each client, so that the clients of one period are spread evenly over it, ``(M, N)``."""
    offset = np.zeros(every.shape, dtype=np.int64)
    if every.max() == 1:
        return offset
    rows = np.arange(len(every))
    loads = {period: np.zeros((len(every), period)) for period in np.unique(every[every > 1]).tolist()}
    for client in np.argsort(-seconds, axis=1, kind="stable").T:
        for period, load in loads.items():
            here = rows[every[rows, client] == period]
            if len(here):
                least = load[here].argmin(axis=1)
                offset[here, client[here]] = least
                load[here, least] += seconds[here, client[here]]
    return offset
