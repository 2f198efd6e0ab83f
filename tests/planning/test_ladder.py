"""Greedy ranks: the fast ways give what walking the increments one by one gives, within the stated bound."""

import itertools

import numpy as np
import pytest

from hsplit.planning.ranks import Ladder, _spend_one_by_one, at_levels, captured_by, gain_table, greedy_levels, steps_of

RANK_SETS = [(1, 2, 4, 8, 16, 32), (1, 2, 3), (1, 4, 5), (2, 3, 9, 10, 30), (4,)]


def drawn(seed: int, rank_set: np.ndarray, weights: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Prices and what is captured, with ties: three prices, half of the worths alike; every third seed has curves."""
    draw = np.random.default_rng(seed)
    unit = draw.choice([300.0, 700.0, 1100.0], weights)
    worth = np.where(draw.random(weights) < 0.5, 2.0, draw.lognormal(0, 1, weights))
    curve = captured_by(rank_set)[None]
    if seed % 3 == 0:
        # Singular values that fall at rates of their own; some end before the largest rank.
        spectra = draw.uniform(0.5, 1.0, (weights, 1)) ** np.arange(rank_set[-1]) * (draw.random((weights, 1)) < 0.8)
        curve = np.sqrt(np.cumsum(spectra**2, axis=1))[:, rank_set - 1]
    return unit, worth[:, None] * curve


def slacks(unit: np.ndarray, rank_set: np.ndarray, seed: int) -> np.ndarray:
    most = unit.sum() * (rank_set[-1] - rank_set[0])
    return np.floor(np.random.default_rng(seed).uniform(-0.1, 1.1, 60) * most)


@pytest.mark.parametrize("ranks", RANK_SETS)
@pytest.mark.parametrize("seed", range(5))
def test_every_way_of_spending_gives_the_same_ranks(ranks: tuple[int, ...], seed: int) -> None:
    rank_set = np.array(ranks)
    unit, values = drawn(seed, rank_set)
    slack = slacks(unit, rank_set, seed)
    rows = (len(slack), len(unit))
    expected = np.zeros(rows, dtype=np.int8)
    if len(rank_set) > 1:
        gains = np.broadcast_to(np.diff(values, axis=1), (*rows, len(rank_set) - 1))
        expected = _spend_one_by_one(slack, np.broadcast_to(unit, rows), gains, steps_of(rank_set))
    ladder = Ladder(unit, values, rank_set)
    assert (ladder.levels(slack) == expected).all()
    assert (greedy_levels(slack, np.ones(rows, dtype=bool), unit, values, rank_set) == expected).all()
    assert ladder.captured(slack) == pytest.approx(at_levels(values, expected).sum(axis=1))


@pytest.mark.parametrize("ranks", RANK_SETS)
def test_more_slack_never_captures_less(ranks: tuple[int, ...]) -> None:
    rank_set = np.array(ranks)
    for seed in (7, 9):
        unit, values = drawn(seed, rank_set)
        captured = Ladder(unit, values, rank_set).captured(np.sort(slacks(unit, rank_set, seed)))
        assert (np.diff(captured) >= -1e-9).all()


@pytest.mark.parametrize("seed", range(40))
def test_greedy_ranks_lose_at_most_the_first_refused_gain(seed: int) -> None:
    rank_set = np.array((1, 2, 4, 8))
    unit, values = drawn(seed, rank_set, weights=4)
    slack = float(np.random.default_rng(seed).uniform(0, 0.6) * unit.sum() * 7)
    levels = np.array(list(itertools.product(range(len(rank_set)), repeat=len(unit))))
    fits = (rank_set[levels] - 1) @ unit <= slack
    best = at_levels(values, levels).sum(axis=1)[fits].max()
    sizes, gains = (unit[:, None] * steps_of(rank_set)).ravel(), np.diff(values, axis=1).ravel()
    order = np.argsort(-gains / sizes, kind="stable")
    refused = np.flatnonzero(np.cumsum(sizes[order]) > slack)
    first = float(gains[order][refused[0]]) if len(refused) else 0.0
    assert best - first <= Ladder(unit, values, rank_set).captured(np.array([slack]))[0] + 1e-9 <= best + 2e-9


@pytest.mark.parametrize("rho", [1.0, 0.2])
def test_curves_that_are_logarithms_capture_what_numbers_do(rho: float) -> None:
    rank_set, scores = np.array([1, 2, 4, 8, 32]), {"a": 2.0, "b": 0.5, "none": 0.0}
    curves = {name: tuple(score * np.log2(2.0 + np.arange(32))) for name, score in scores.items()}
    tables = [gain_table(given, list(scores), rank_set, rho) for given in (scores, curves)]
    assert np.allclose(tables[0], tables[1], rtol=1e-12)
    assert np.allclose(tables[0].sum(axis=0), np.log2(1 + rank_set) ** rho)
