"""Budgets drawn from distributions: reproducible, independent, and distributed as declared."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.config import Distribution, load_run_config
from hsplit.config.cluster import drawn

EDGE = (
    "{name: edge, count: 20, memory_gb: {uniform: [5, 20]}, tflops: {lognormal: [2, 0.5]},"
    " latency_ms: {choice: [0, 5]}}"
)


def draws(distribution: Distribution, count: int = 4000) -> list[float]:
    return [drawn(distribution, seed, f"c-{i}", "memory_gb") for seed in range(10) for i in range(count // 10)]


def test_the_same_seed_draws_the_same(write: Any) -> None:
    path = write("c.yaml", f"clients: [{EDGE}]\n")
    first, again = load_run_config(path), load_run_config(path)
    other = load_run_config(path, overrides=["seed=1"])
    assert first == again
    assert len({client.memory_gb for client in first.clients}) == 20
    assert all(5 <= client.memory_gb <= 20 for client in first.clients)
    assert {client.latency_ms for client in first.clients} == {0.0, 5.0}
    assert all(a.memory_gb != b.memory_gb for a, b in zip(first.clients, other.clients, strict=True))


def test_a_draw_is_fixed_for_all_time() -> None:
    # resume and published figures rest on these; a change of the draw must be seen
    kinds = [Distribution(uniform=(5, 20)), Distribution(lognormal=(8, 0.5)), Distribution(choice=(1, 2, 4))]
    values = [drawn(kind, 0, "edge-0", "memory_gb") for kind in kinds]
    assert values == pytest.approx([8.080033156487751, 8.707262798308571, 1.0], rel=1e-12)


def test_another_client_changes_no_budget(write: Any) -> None:
    alone = load_run_config(write("c.yaml", f"clients: [{EDGE}]\n"))
    joined = load_run_config(write("d.yaml", f"clients: [{{name: new, memory_gb: {{uniform: [1, 2]}}}}, {EDGE}]\n"))
    assert joined.clients[1:] == alone.clients


def test_fields_are_drawn_apart() -> None:
    same = Distribution(uniform=(1, 2))
    assert drawn(same, 0, "a", "memory_gb") != drawn(same, 0, "a", "tflops")


def test_lognormal_has_the_declared_mean_and_variation() -> None:
    values = draws(Distribution(lognormal=(8.0, 0.5)))
    mean = statistics.fmean(values)
    assert mean == pytest.approx(8.0, rel=0.05)
    assert statistics.stdev(values) / mean == pytest.approx(0.5, rel=0.1)


def test_uniform_and_choice_cover_their_range() -> None:
    values = draws(Distribution(uniform=(5.0, 20.0)))
    assert statistics.fmean(values) == pytest.approx(12.5, rel=0.03)
    assert min(values) < 5.1 and max(values) > 19.9
    chosen = draws(Distribution(choice=(1.0, 2.0, 4.0)))
    counts = {value: chosen.count(value) for value in set(chosen)}
    assert counts == pytest.approx({1.0: 4000 / 3, 2.0: 4000 / 3, 4.0: 4000 / 3}, rel=0.08)


@given(st.floats(1e-300, 1e9), st.floats(0, 100), st.integers(0, 2**32 - 1))
def test_lognormal_draws_can_always_be_used(mean: float, variation: float, seed: int) -> None:
    assert 0 < drawn(Distribution(lognormal=(mean, variation)), seed, "a", "tflops") <= 1e9


def test_a_variation_of_zero_is_the_mean() -> None:
    assert drawn(Distribution(lognormal=(3.0, 0.0)), 0, "a", "tflops") == pytest.approx(3.0)
