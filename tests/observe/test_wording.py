from __future__ import annotations

import pytest

from hsplit.observe.plan_text import ranks_by_kind, ranks_by_layer, ranks_range
from hsplit.observe.wording import bytes_text, duration_text, number_text, of_budget


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (99, "99 B"), (160e6, "0.16 GB"), (99e6, "99.0 MB"), (8e9, "8.00 GB"), (2_500, "2.50 kB")],
)
def test_bytes(size: float, text: str) -> None:
    assert bytes_text(size) == text


def test_budget_is_in_one_unit() -> None:
    assert of_budget(150e6, 160e6) == "0.15 / 0.16 GB"
    assert of_budget(9e6, 8e9) == "0.01 / 8.00 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1.5, "1.500 s"),
        (42, "42 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (349200, "4 d 01 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_numbers() -> None:
    assert [number_text(x) for x in (0.0, 0.00123, 4.8123, 21.75, 123.45, 12345.6, float("inf"))] == [
        *("0.000", "0.0012", "4.812", "21.75", "123.5", "12,346", "inf")
    ]


def test_ranks() -> None:
    mixed = {"model.layers.0.self_attn.q_proj": 1, "model.layers.1.self_attn.q_proj": 8, "h.0.mlp.up_proj": 4}
    assert ranks_range(mixed) == "1–8 (Σ 13)"
    assert ranks_by_kind(mixed) == "q:1–8 up:4"
    assert ranks_by_kind(dict.fromkeys(mixed, 8)) == "all 8"
    assert (ranks_range({}), ranks_by_kind({})) == ("–", "–")
    assert (ranks_range({"a.0.b": 0}), ranks_by_kind({"a.0.b": 0})) == ("frozen", "frozen")
    assert ranks_by_layer(mixed, 3, 8) == "▅█"
    assert ranks_by_layer({"a.1.b": 1, "a.3.b": 32, "a.4.b": 0}, 6, 32) == " ▂ █·"
    gpt2 = {"transformer.h.0.attn.c_proj": 2, "transformer.h.0.mlp.c_proj": 4, "transformer.h.0.mlp.c_fc": 4}
    assert ranks_by_kind(gpt2) == "attn.c:2 mlp.c:4 c_fc:4"
