"""Greedy ranks: the fast ways give what walking the increments one by one gives, within the stated bound."""

import itertools

import numpy as np
import pytest

from hsplit.planning.ranks import Ladder, _spend_one_by_one, captured_by, greedy_levels, increments

RANK_SETS = [(1, 2, 4, 8, 16, 32), (1, 2, 3), (1, 4, 5), (2, 3, 9, 10, 30), (4,)]


def drawn(seed: int, weights: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Prices and worths, with ties: three prices, and half of the worths alike."""
    draw = np.random.default_rng(seed)
    unit = draw.choice([300.0, 700.0, 1100.0], weights)
    return unit, np.where(draw.random(weights) < 0.5, 2.0, draw.lognormal(0, 1, weights))


def slacks(unit: np.ndarray, rank_set: np.ndarray, seed: int) -> np.ndarray:
    most = unit.sum() * (rank_set[-1] - rank_set[0])
    return np.floor(np.random.default_rng(seed).uniform(-0.1, 1.1, 60) * most)


@pytest.mark.parametrize("ranks", RANK_SETS)
@pytest.mark.parametrize("seed", range(5))
def test_every_way_of_spending_gives_the_same_ranks(ranks: tuple[int, ...], seed: int) -> None:
    rank_set, (unit, worth) = np.array(ranks), drawn(seed)
    slack = slacks(unit, rank_set, seed)
    rows = (len(slack), len(unit))
    expected = np.zeros(rows, dtype=np.int8)
    if len(rank_set) > 1:
        expected = _spend_one_by_one(
            slack, np.broadcast_to(unit, rows), np.broadcast_to(worth, rows), *increments(rank_set)
        )
    ladder = Ladder(unit, worth, rank_set)
    assert (ladder.levels(slack) == expected).all()
    assert (greedy_levels(slack, np.ones(rows, dtype=bool), unit, worth, rank_set) == expected).all()
    assert ladder.captured(slack) == pytest.approx(captured_by(rank_set)[expected] @ worth)


@pytest.mark.parametrize("ranks", RANK_SETS)
def test_more_slack_never_captures_less(ranks: tuple[int, ...]) -> None:
    rank_set, (unit, worth) = np.array(ranks), drawn(7)
    captured = Ladder(unit, worth, rank_set).captured(np.sort(slacks(unit, rank_set, 7)))
    assert (np.diff(captured) >= -1e-9).all()


@pytest.mark.parametrize("seed", range(40))
def test_greedy_ranks_lose_at_most_the_first_refused_gain(seed: int) -> None:
    rank_set, (unit, worth) = np.array((1, 2, 4, 8)), drawn(seed, weights=4)
    slack = float(np.random.default_rng(seed).uniform(0, 0.6) * unit.sum() * 7)
    steps, gains = increments(rank_set)
    levels = np.array(list(itertools.product(range(len(rank_set)), repeat=len(unit))))
    fits = (rank_set[levels] - 1) @ unit <= slack
    best = (captured_by(rank_set)[levels] @ worth)[fits].max()
    sizes, values = (unit[:, None] * steps).ravel(), (worth[:, None] * gains).ravel()
    order = np.argsort(-values / sizes, kind="stable")
    refused = np.flatnonzero(np.cumsum(sizes[order]) > slack)
    first = float(values[order][refused[0]]) if len(refused) else 0.0
    assert best - first <= Ladder(unit, worth, rank_set).captured(np.array([slack]))[0] + 1e-9 <= best + 2e-9
