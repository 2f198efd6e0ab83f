"""Free memory: what each holder gets of it."""

from __future__ import annotations

import pytest

from hsplit.measuring.free_memory import HEADROOM, Location, shared_out


def test_a_host_is_shared_equally_and_a_gpu_by_what_is_reserved() -> None:
    places = {
        "a": Location("one", 0.0),
        "b": Location("one", 0.0),
        "c": Location("two", 0.0),
        "d": Location("one", 0.25),
        "e": Location("one", 0.25),
        "server": Location("one", 2.0),
    }
    shares = shared_out(dict.fromkeys(places, 1000), places)
    parts = {name: share / 1000 / (1 - HEADROOM) for name, share in shares.items()}
    assert parts == pytest.approx({"a": 0.5, "b": 0.5, "c": 1.0, "d": 0.25, "e": 0.25, "server": 1.0})
