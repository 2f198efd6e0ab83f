"""Clipping by adapted weight: the same for every split, holder and rank."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.lora.adapters import AdapterSet
from hsplit.lora.optimizer import clip_each, clip_limits
from hsplit.models.spec import LinearShape

SHAPES = [LinearShape(f"layers.{layer}.{n}", layer, 4 + 3 * n, 9 - 2 * n) for layer in range(3) for n in range(2)]
NAMES = [shape.name for shape in SHAPES]


def _adapters(ranks: dict[str, int], gradients: dict[str, torch.Tensor]) -> AdapterSet:
    adapters = AdapterSet(SHAPES, ranks, 8.0, torch.float64)
    for name, gradient in adapters.gradients().items():
        gradient.copy_(gradients[name])
    return adapters


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.fixed_dictionaries({name: st.sampled_from([1, 2, 4]) for name in NAMES}),
    split=st.integers(0, 3),
    clip=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**16),
)
def test_a_split_model_is_clipped_as_the_whole_is(ranks: dict[str, int], split: int, clip: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    gradients = {
        s.name: 10.0 ** torch.randint(-2, 2, (), generator=draw)
        * torch.randn(ranks[s.name] * (s.d_out + s.d_in), generator=draw, dtype=torch.float64)
        for s in SHAPES
    }
    limits = clip_limits(SHAPES, clip)
    # The whole model's gradient has a norm of at most clip.
    assert math.fsum(limit**2 for limit in limits.values()) == pytest.approx(clip**2)
    whole = _adapters(ranks, gradients)
    clip_each(whole.gradients(), limits)
    for first, last in ((0, split), (split, 3)):
        held = {s.name: ranks[s.name] for s in SHAPES if first <= s.layer < last}
        part = _adapters(held, gradients)
        clip_each(part.gradients(), limits)
        for name, gradient in part.gradients().items():
            assert torch.equal(gradient, whole.gradients()[name])
            was, shape = gradients[name], next(s for s in SHAPES if s.name == name)
            allowed = clip * math.sqrt((shape.d_out + shape.d_in) / sum(s.d_out + s.d_in for s in SHAPES))
            if was.norm() <= allowed - 1e-6:
                assert torch.equal(gradient, was)
            else:
                assert gradient.norm() <= allowed
                torch.testing.assert_close(gradient, was * (allowed / (was.norm() + 1e-6)).clamp(max=1.0))


def test_a_holder_of_nothing_has_nothing_to_clip() -> None:
    clip_each(AdapterSet(SHAPES, {}, 8.0, torch.float32).gradients(), clip_limits(SHAPES, 1.0))
