"""The bound on a fleet's speed: no mix of splits exceeds it, and one reaches it (METHOD 10)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.planning.bound import speed_bound


@st.composite
def fleets(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Clients' and server's seconds an example by split, deepest splits, and least shares."""
    layers, count = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    seconds = st.floats(0.01, 1.0)
    link = np.array([draw(seconds) for _ in range(count)])
    layer = np.array([draw(seconds) for _ in range(count)])
    client_s = link[:, None] + layer[:, None] * np.arange(layers + 1)
    server_s = draw(seconds) + draw(seconds) * (layers - np.arange(layers + 1.0))
    deepest = np.array([draw(st.integers(1, layers)) for _ in range(count)])
    least = np.array([draw(st.floats(0.0, 1.0)) for _ in range(count)])
    return client_s, server_s, deepest, 0.25 * least / max(least.sum(), 1.0)


def reached(client_s: np.ndarray, server_s: np.ndarray, parts: np.ndarray, least: np.ndarray) -> float:
    """Examples a second of clients that spend ``parts`` of their time at each split, slowed down to what is allowed."""
    speeds = parts / client_s
    total = speeds.sum()
    if total == 0 or (speeds.sum(axis=1) < least * total - 1e-12).any():
        return 0.0
    slowed = max(float((speeds @ server_s).sum()), 1.0)
    return float(total / slowed)


@settings(deadline=None, max_examples=60)
@given(fleet=fleets(), seed=st.integers(0, 2**16))
def test_no_mix_of_splits_is_faster_and_one_is_as_fast(
    fleet: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], seed: int
) -> None:
    client_s, server_s, deepest, least = fleet
    bound = speed_bound(client_s, server_s, deepest, least)
    draw = np.random.default_rng(seed)
    allowed = (np.arange(client_s.shape[1]) >= 1) & (np.arange(client_s.shape[1]) <= deepest[:, None])
    best, parts = 0.0, np.zeros_like(client_s)
    for trial in range(1500):
        # At first anywhere, later around the best found so far.
        tried = allowed * (
            draw.random(client_s.shape) ** 3
            if trial < 300
            else np.clip(parts + draw.normal(0, 0.3 * 0.995 ** (trial - 300), client_s.shape), 0, None)
        )
        tried /= np.maximum(tried.sum(axis=1, keepdims=True), 1.0)
        speed = reached(client_s, server_s, tried, least)
        assert speed <= bound * (1 + 1e-9)
        if speed > best:
            best, parts = speed, tried
    assert best >= 0.9 * bound


def test_one_client_is_known_in_closed_form() -> None:
    """With one layer to give away, client and server are both busy all the time, unless one of them is too slow."""
    server_s = np.array([3.0, 2.0, 1.0])
    every = np.zeros(1)
    # At 2 the client takes 2 s and the server 1: the client binds. At 1 the other way round; mixed, both are busy.
    assert speed_bound(np.array([[0.5, 1.0, 2.0]]), server_s, np.array([2]), every) == pytest.approx(2 / 3)
    assert speed_bound(np.array([[0.5, 1.0, 2.0]]), server_s, np.array([1]), every) == pytest.approx(1 / 2)
    assert speed_bound(np.array([[4.0, 8.0, 9.0]]), server_s, np.array([2]), every) == pytest.approx(1 / 8)


def test_a_client_that_must_bring_its_share_slows_the_fleet_down() -> None:
    client_s, server_s = np.array([[1.0, 1.0], [1.0, 100.0]]), np.array([0.1, 0.1])
    deepest = np.ones(2, dtype=np.int64)
    free = speed_bound(client_s, server_s, deepest, np.zeros(2))
    assert free == pytest.approx(1.01)
    assert speed_bound(client_s, server_s, deepest, np.array([0.125, 0.125])) == pytest.approx(0.01 / 0.125)
