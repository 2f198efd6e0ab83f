"""A link of known bandwidth and latency is recovered from the times of its messages."""

from __future__ import annotations

import pytest

from hsplit.measuring.link import SIZES, measure_link


@pytest.mark.parametrize("bandwidth_bps", [5e7, 1e9, 2e10])
@pytest.mark.parametrize("latency_s", [1e-4, 0.04])
def test_bandwidth_and_latency_are_recovered(bandwidth_bps: float, latency_s: float) -> None:
    def transfer(size: int) -> tuple[int, float]:
        # Whole rows only, as activations have them.
        nbytes = size // 2052 * 2052
        return nbytes, latency_s + 8 * nbytes / bandwidth_bps

    link = measure_link(transfer)
    assert link.bandwidth_bps == pytest.approx(bandwidth_bps, rel=1e-6)
    assert link.latency_s == pytest.approx(latency_s, rel=1e-6)


def test_a_slow_link_is_spared_large_messages() -> None:
    sent = []

    def transfer(size: int) -> tuple[int, float]:
        sent.append(size)
        return size, 0.5 + 8 * size / 1e6

    link = measure_link(transfer)
    assert sent == list(SIZES[:2])
    assert link.bandwidth_bps == pytest.approx(1e6) and link.latency_s == pytest.approx(0.5)


def test_neither_figure_is_ever_negative() -> None:
    assert measure_link(lambda size: (size, 0.01)).bandwidth_bps > 1e12
    falling = measure_link(lambda size: (size, 0.01 if size < 1e6 else 0.005))
    assert falling.bandwidth_bps > 0 and falling.latency_s >= 0
    # Small messages that take less than their part of a large one leave no latency.
    assert measure_link(lambda size: (size, 1e-15 * size**2)).latency_s == 0


def test_a_large_message_that_was_held_up_leaves_the_latency_alone() -> None:
    def transfer(size: int) -> tuple[int, float]:
        return size, (0.002 + 8 * size / 1e10) * (1.3 if size == SIZES[-1] else 1.0)

    link = measure_link(transfer)
    assert link.latency_s == pytest.approx(0.002, rel=0.1)
    assert link.bandwidth_bps == pytest.approx(1e10, rel=0.3)
