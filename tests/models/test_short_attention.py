"""Attention of short sequences by plain products: torch's own results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hsplit.models.packing import short_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    keys=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.integers(1, 9),
    window=st.none() | st.integers(1, 6),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**16),
)
def test_outputs_and_gradients_are_those_of_torch(
    batch: int, keys: int, group: int, length: int, width: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, keys * group, length, width), (batch, keys, length, width), (batch, keys, length, width)]
    given_ = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=draw).to(dtype)
    positions = torch.arange(length)
    distance = positions[:, None] - positions[None, :]
    allowed = None if window is None else ((distance >= 0) & (distance < window))[None, None]
    scale = 0.3
    own = [tensor.clone().requires_grad_() for tensor in given_]
    output = short_attention(*own, allowed, scale)
    output.backward(upstream)
    # The reference in fp64, so that the error is ours alone.
    exact = [tensor.double().requires_grad_() for tensor in given_]
    q, k, v = exact
    expected = scaled_dot_product_attention(
        q,
        k.repeat_interleave(group, dim=1),
        v.repeat_interleave(group, dim=1),
        attn_mask=(distance >= 0) if allowed is None else allowed,
        scale=scale,
    )
    expected.backward(upstream.double())
    for ours, theirs in [(output, expected), *((a.grad, b.grad) for a, b in zip(own, exact, strict=True))]:
        assert ours is not None and theirs is not None and ours.dtype == dtype
        error, size = (ours.detach().double() - theirs.detach()).norm(), float(theirs.detach().norm())
        assert error <= TOLERANCE[dtype] * max(size, 1e-3)


def test_it_is_what_short_sequences_take_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from hsplit.models import packing

    calls = []
    monkeypatch.setattr(packing, "short_attention", lambda *given: calls.append(given) or given[0])
    tensor = torch.zeros(1, 2, 6, 4)
    packed = packing.Packing.of([3, 3])
    packing._packed_attention(None, tensor, tensor, tensor, None, packing=packed, short_attention=True, scaling=0.5)
    ((*_, scale),) = calls
    assert scale == 0.5
