"""Split points: starts of least makespan, then local search (METHOD 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsplit.planning.cost.counted_model import Ints
from hsplit.planning.deadlines import TOTAL, DeadlineScan, Worth
from hsplit.planning.moves import Moves, Prices, server_prices
from hsplit.planning.plan import Plan
from hsplit.planning.problem import Problem, State

# Most deadlines that are scanned for starts: evenly spread ones if there are more distinct client times.
MAX_DEADLINES = 256
# Number of the best starts that are improved.
SEARCHED_STARTS = 8
# Moves whose exact objective is computed before the search takes it that none improves: all in a small instance.
VERIFIED_MOVES = 160
# The same, at a time: best estimates first.
VERIFIED_AT_ONCE = 64
# Best estimates among them that are also tried two at once, and the most (pair, client) entries that this may take.
PAIRED_MOVES = 48
MAX_PAIRED = 100_000
# Most times that all splits are chosen again, for one start.
MAX_ROUNDS = 12
# (client, split) pairs after which no further start is improved, and no further move is looked for within a start.
MAX_PAIRS = 1_500_000
# Prices tried for a byte at a server short of memory, as multiples of the price of the server's seconds per byte.
BYTE_PRICES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 64.0)
# Ratio of the prices that are tried next to a good one.
NEARBY = 1.5
# Price of a second, at least: it would be 0 where no plan that fits is known yet.
SMALL = 1e-9
# Relative improvement up to which it is rounding.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Found:
    """Splits ``(N,)`` and their objective."""

    splits: Ints
    objective: float

    def beaten_by(self, objective: float) -> bool:
        """True if ``objective`` is larger by more than rounding."""
        return objective > self.objective + TOLERANCE * abs(self.objective)


def searched_splits(problem: Problem, current: Plan | None) -> Ints:
    """Choose splits by local search from the best starts: METHOD 5's, and the plan in force.

    Every start is improved in two ways, in turns until neither helps: all splits are chosen again for the best
    deadline (:meth:`Search.rescanned`), and single clients or groups of equal ones are moved (:meth:`Search.moved`).
    The search is limited by work, never by time, so that the same input gives the same plan: after ``MAX_PAIRS`` pairs
    (thousands of different clients) later starts stay as they are.
    """
    search = Search(problem)
    shallowest = np.ones((1, len(problem.clients)), dtype=np.int64)
    starts = np.concatenate([shallowest, search.scan.deepest(MAX_DEADLINES)[:, problem.kind]])
    scores = problem.objective(problem.state(starts))
    chosen = [starts[i] for i in np.argsort(-scores, kind="stable")[:SEARCHED_STARTS]]
    if current is not None:
        # First, so that among equals the plan in force stays.
        chosen = [_in_force(problem, current), *chosen]
    return best_splits(_distinct([search.improved(start) for start in _distinct(chosen)]), problem)


def best_splits(candidates: Sequence[Ints], problem: Problem) -> Ints:
    """Candidate ``(N,)`` with the largest objective, the first among equals."""
    return candidates[int(np.argmax(problem.objective(problem.state(np.stack(candidates)))))]


def _in_force(problem: Problem, current: Plan) -> Ints:
    known = {c.name: c.split for c in current.available}
    splits = np.array([known.get(c.name) or 1 for c in problem.clients], dtype=np.int64)
    return np.clip(splits, 1, problem.deepest)


def _distinct(starts: Sequence[Ints]) -> list[Ints]:
    return list({start.tobytes(): start for start in starts}.values())


class Search:
    """Improves splits, and counts the work.

    Args:
        problem: the planning problem.

    Attributes:
        scan: splits by deadlines.
        pairs: (client, split) pairs gone through so far.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.scan = DeadlineScan(problem)
        self.pairs = 0
        self._done: set[bytes] = set()

    def improved(self, start: Ints) -> Ints:
        """Improve ``start`` ``(N,)`` until nothing helps, or the work is used up."""
        found = Found(start, float(self._problem.objective(self._problem.state(start))[0]))
        while self.pairs < MAX_PAIRS:
            rescanned = self.rescanned(found)
            found = self.moved(rescanned)
            if found is rescanned:
                break
        return found.splits

    def rescanned(self, found: Found) -> Found:
        """Choose all splits again for the best deadline, on all phases together and on each, while it improves.

        The objective is a ratio, so the price of a second follows from the ratio reached so far (Dinkelbach's method);
        at a server short of memory, several prices of a byte are tried. Equal clients stay together.
        """
        levels = range(len(self._problem.rank_set))
        byte_prices: Sequence[float] = BYTE_PRICES
        for _ in range(MAX_ROUNDS):
            if not self._first_time(b"scan", found):
                break
            better, level, price = self._one_rescan(found, levels, byte_prices)
            if better is found:
                break
            found = better
            # Continue from the server's ranks and the price that did best in the first round.
            levels, byte_prices = range(level, level + 1), (price / NEARBY, price, price * NEARBY)
        return found

    def moved(self, found: Found) -> Found:
        """Move one client, or one group of equal clients, at a time while it improves the objective.

        All moves are estimated with the server's ranks held fixed, and the exact objective decides among the best
        estimates: many together, one by one, and with few clients two at once. It ends when none of ``VERIFIED_MOVES``
        improves: at a local optimum if there are no more moves than that, otherwise when the most promising ones do
        not.
        """
        while self._first_time(b"move", found):
            moves = Moves(self._problem, found.splits)
            self.pairs += moves.pairs
            better = _one_sweep(self._problem, moves, found)
            if better is found:
                break
            found = better
            if self.pairs >= MAX_PAIRS:
                break
        return found

    def _first_time(self, what: bytes, found: Found) -> bool:
        """True if ``what`` was not done to these splits before; starts often lead to the same ones."""
        key = what + found.splits.tobytes()
        if key in self._done:
            return False
        self._done.add(key)
        return True

    def _one_rescan(self, found: Found, levels: range, byte_prices: Sequence[float]) -> tuple[Found, int, float]:
        """Try the server's ranks from the largest down, as long as smaller ones gain anything.

        Returns:
            The best splits (``found`` itself if nothing improves), and the level and price of a byte that gave them.
        """
        problem, state, last = self._problem, self._problem.state(found.splits), -np.inf
        best, best_level, best_price = found, levels[-1], 1.0
        for level in reversed(levels):
            discount = problem.discounts(state)[0]
            prices = server_prices(problem, state.counts[0], np.full(len(problem.worth), level), discount)
            proposals, short = self._proposed(found, state, prices, level, byte_prices)
            if not proposals:
                continue
            splits = np.stack([splits for _, splits in proposals])
            scores = problem.objective(problem.state(splits))
            top = int(scores.argmax())
            if best.beaten_by(float(scores[top])):
                best, best_level, best_price = Found(splits[top], float(scores[top])), level, proposals[top][0]
            # One rank for all is a choice of its own at each level.
            if not problem.one_rank and (not short or scores[top] <= last):
                break
            last = float(scores[top])
        return best, best_level, best_price or 1.0

    def _proposed(
        self, found: Found, state: State, prices: Prices, level: int, byte_prices: Sequence[float]
    ) -> tuple[list[tuple[float, Ints]], bool]:
        """Propose splits for the server's ranks at ``level``.

        Returns:
            Prices of a byte and the splits ``(N,)`` for them; and True if the server's memory had a part in these.
        """
        problem, scan = self._problem, self.scan
        discount = problem.discounts(state)[0]
        captured, fixed = problem.joint_gains(prices.captured, discount), float(problem.common_gain(level))
        allowed = problem.fits & (problem.common_levels >= level)
        if not allowed[:, 1].all():
            return [], False
        within = allowed & (problem.times <= state.slowest[0]).all(axis=2)
        per_second, room = problem.price_of_a_second(state), float(problem.server.memory_bytes)
        proposals, short = [], False
        for clock in scan.clocks:
            # A deadline on one phase may make no other phase longer.
            worth = Worth(captured, fixed, per_second, 0.0, room, allowed if clock == TOTAL else within)
            splits, passed_over = scan.splits(clock, worth, prices)
            proposals.append((0.0, splits))
            short |= passed_over
        if short:
            seconds_per_byte = float(np.ptp(prices.seconds[1:])) / max(float(np.ptp(prices.bytes[1:])), 1.0)
            for price in byte_prices:
                per_byte = price * max(per_second, SMALL) * seconds_per_byte
                worth = Worth(captured, fixed, per_second, per_byte, room, allowed)
                proposals.append((price, scan.splits(TOTAL, worth, prices)[0]))
        self.pairs += len(proposals) * problem.fits.size
        return [(price, splits[problem.kind]) for price, splits in proposals], short


def _best_of(problem: Problem, found: Found, candidates: Sequence[Ints]) -> Found:
    scores = problem.objective(problem.state(np.stack(candidates)))
    top = int(scores.argmax())
    return Found(candidates[top], float(scores[top])) if found.beaten_by(float(scores[top])) else found


def _one_sweep(problem: Problem, moves: Moves, found: Found) -> Found:
    """Make the best moves together, or else the best single move of the first that improve, or a pair of moves."""
    estimate = moves.estimate
    best = estimate.argmax(axis=1)
    value = estimate[np.arange(len(best)), best]
    promising = np.flatnonzero(value > found.objective)
    promising = promising[np.argsort(-value[promising], kind="stable")]
    if len(promising) > 1:
        sizes = np.unique(np.minimum(2 ** np.arange(1, 2 + len(promising).bit_length()), len(promising)))
        joint = [moves.together(promising[:size], best[promising[:size]]) for size in sizes]
        found_jointly = _best_of(problem, found, joint)
        if found_jointly is not found:
            return found_jointly
    rows, targets = np.nonzero(np.isfinite(estimate))
    if len(rows) > VERIFIED_MOVES:
        flat = estimate[rows, targets]
        most = np.argpartition(-flat, VERIFIED_MOVES)[:VERIFIED_MOVES]
        rows, targets = rows[most], targets[most]
    order = np.argsort(-estimate[rows, targets], kind="stable")
    for begin in range(0, len(order), VERIFIED_AT_ONCE):
        part = order[begin : begin + VERIFIED_AT_ONCE]
        scores = problem.objective(moves.states(rows[part], targets[part]))
        top = int(scores.argmax())
        if found.beaten_by(float(scores[top])):
            row, target = rows[part[top] : part[top] + 1], targets[part[top] : part[top] + 1]
            return _best_of(problem, found, [moves.together(row, target)])
    return _two_at_once(problem, moves, found, rows[order], targets[order])


def _two_at_once(problem: Problem, moves: Moves, found: Found, rows: Ints, targets: Ints) -> Found:
    """Make the best pair of the first moves: two clients that the step waits for gain nothing one by one."""
    first, second = np.triu_indices(min(len(rows), PAIRED_MOVES), 1)
    different = moves.group[rows[first]] != moves.group[rows[second]]
    pairs = np.stack([first[different], second[different]], axis=1)
    if not len(pairs) or len(pairs) * len(found.splits) > MAX_PAIRED:
        return found
    return _best_of(problem, found, [moves.together(rows[pair], targets[pair]) for pair in pairs])
