"""Tensors on the wire: what arrives, what it costs, and that the cost model counts the same bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.actors.messages import Activations, WireTensor
from hsplit.config import Job
from hsplit.planning.cost.counted_model import CountedModel
from tests.tiny import tiny_spec

ITEM = {"fp64": 8, "fp32": 4, "bf16": 2}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 600)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**16),
)
def test_int8_errs_by_half_a_scale_of_the_tokens_own(
    shape: tuple[int, int], dtype: torch.dtype, spread: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    # Tokens of very unequal size: each has a scale of its own.
    sizes = 10.0 ** (spread * (torch.rand(shape[0], 1, generator=draw) - 0.5))
    tensor = (torch.randn(shape, generator=draw) * sizes).to(dtype)
    packed = WireTensor.pack(tensor, "int8")
    assert packed.nbytes == packed.data.nbytes == shape[0] * (shape[1] + 4)
    arrived = packed.unpack(torch.float32, "cpu")
    bound = tensor.double().abs().amax(dim=1) / 127 / 2
    assert ((arrived.double() - tensor.double()).abs().amax(dim=1) <= bound * (1 + 1e-5)).all()
    # The largest entry of a token keeps its value, and so the scale its own: packing again changes nothing.
    again = WireTensor.pack(arrived, "int8")
    assert np.array_equal(again.data[4 * shape[0] :], packed.data[4 * shape[0] :])


@pytest.mark.parametrize("wire", ["fp64", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (7,), (3, 4), (2, 3, 4), (3000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_and_bytes(wire: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=draw).to(dtype).requires_grad_()
    packed = WireTensor.pack(tensor, wire)
    size = math.prod(shape)
    rows = size // shape[-1] if shape and size else size
    assert packed.nbytes == (size + 4 * rows if wire == "int8" else size * ITEM[wire])
    for wanted in (torch.float32, torch.bfloat16, torch.float64):
        arrived = packed.unpack(wanted, "cpu")
        assert arrived.dtype == wanted and tuple(arrived.shape) == shape and not arrived.requires_grad
        # Half a step of a code, or the rounding of bf16.
        worst = (arrived.double() - tensor.detach().double()).abs().amax() if size else torch.zeros(1)
        assert float(worst) <= 0.03
        arrived.add_(1)
        assert not size or not torch.equal(packed.unpack(wanted, "cpu"), arrived)


def test_a_transposed_tensor_arrives_as_it_is() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(WireTensor.pack(tensor, "fp32").unpack(torch.float32, "cpu"), tensor)
    arrived = WireTensor.pack(tensor, "int8").unpack(torch.float32, "cpu")
    assert (arrived - tensor).abs().max() <= 11 / 127 / 2 * 1.001


def test_int8_keeps_zeros_and_the_smallest_numbers() -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    tensor = torch.stack(
        [torch.zeros(9), torch.full((9,), 1e-45), torch.full((9,), -2e-43), torch.full((9,), smallest)]
    )
    tensor = torch.cat([tensor, torch.full((1, 9), 1e38)])
    arrived = WireTensor.pack(tensor, "int8").unpack(torch.float32, "cpu")
    assert torch.equal(arrived[0], torch.zeros(9)) and not arrived[0].signbit().any()
    assert arrived.isfinite().all()
    # Below the normal numbers a scale is itself rounded.
    assert (arrived[:3] - tensor[:3]).abs().max() <= 1e-43
    assert torch.allclose(arrived[3:], tensor[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_does_not_hide_what_is_not_finite(bad: float) -> None:
    tensor = torch.ones(3, 5)
    tensor[1, 2] = bad
    arrived = WireTensor.pack(tensor, "int8").unpack(torch.float32, "cpu")
    assert arrived[1].isnan().all()
    assert torch.allclose(arrived[[0, 2]], tensor[[0, 2]])


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("labels", ["server", "client"])
def test_the_cost_model_counts_what_travels(wire: str, labels: str) -> None:
    job = Job.model_validate({"dtype": "fp32", "wire": wire, "max_length": 16, "privacy": {"labels": labels}})
    model = CountedModel(tiny_spec("llama"), job)
    hidden = WireTensor.pack(torch.randn(model.rows, model.width), wire)
    targets = None if labels == "client" else np.zeros(model.rows, dtype=np.int32)
    message = Activations("one", 2, hidden, (16,) * job.batch_size, model.rows, model.rows, targets)
    counted = model.wire_bytes(2)
    assert counted.up == message.nbytes and counted.down == hidden.nbytes
    assert counted.deep == counted.slope == (hidden.nbytes if labels == "client" else 0)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
def test_a_message_weighs_what_its_tensor_does_and_is_not_copied(wire: str) -> None:
    """Within 5 % of the tensor's own bytes, of which pickle copies none."""
    import ray

    tokens, width = 123, 576
    hidden = WireTensor.pack(torch.randn(tokens, width), wire)
    targets = np.arange(tokens, dtype=np.int32)
    message = Activations("phone-0", 3, hidden, (60, 63), 50, 50, targets)
    size = tokens * width * {"fp32": 4, "bf16": 2, "int8": 1}[wire]
    for value in (message, hidden):
        buffers: list[Any] = []
        copied = len(ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append))
        assert copied < 1000
        assert size <= copied + sum(buffer.raw().nbytes for buffer in buffers) <= 1.05 * size
    assert message.nbytes == pytest.approx(size, rel=0.05)
