"""Tensors on the wire: what arrives, what it costs, and that the cost model counts the same bytes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit.actors.messages import Activations, WireTensor
from hsplit.actors.profiling import PeakMemory
from hsplit.config import Job
from hsplit.config.job import Wire
from hsplit.planning.cost.counted_model import CountedModel
from hsplit.planning.wire import WIRES, packing_bytes, row_bytes, wires_within
from tests.tiny import tiny_spec


def test_row_bytes_of_each_format() -> None:
    assert [row_bytes(wire, 576) for wire in WIRES] == [4608, 2304, 1152, 594, 306]


def test_a_plan_may_choose_the_formats_no_wider_than_the_jobs() -> None:
    assert wires_within("bf16") == ("bf16", "int8", "int4") and wires_within("int4") == ("int4",)
    assert wires_within("fp64") == WIRES == tuple(sorted(get_args(Wire), key=lambda wire: -row_bytes(wire, 576)))


CODES = ["int8", "int4"]
MOST = {"int8": 128, "int4": 8}
"""Largest code by its size."""


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (1,), (7,), (3, 4), (2, 3, 4), (3000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_and_bytes(wire: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=draw).to(dtype).requires_grad_()
    packed = WireTensor.pack(tensor, wire)
    size = math.prod(shape)
    rows, width = (size // shape[-1], shape[-1]) if shape and size else (size, 1)
    assert packed.nbytes == rows * row_bytes(wire, width)
    for wanted in (torch.float32, torch.bfloat16, torch.float64):
        arrived = packed.unpack(wanted, "cpu")
        assert arrived.dtype == wanted and tuple(arrived.shape) == shape and not arrived.requires_grad
        # A few steps of a code, or the rounding of bf16.
        worst = (arrived.double() - tensor.detach().double()).abs().amax() if size else torch.zeros(1)
        assert float(worst) <= {"int4": 1.5, "int8": 0.1}.get(wire, 0.03)
        arrived.add_(1)
        assert not size or not torch.equal(packed.unpack(wanted, "cpu"), arrived)


def test_a_transposed_tensor_arrives_as_it_is() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    assert torch.equal(WireTensor.pack(tensor, "fp32").unpack(torch.float32, "cpu"), tensor)
    for wire in CODES:
        arrived = WireTensor.pack(tensor, wire).unpack(torch.float32, "cpu")
        assert torch.equal(arrived, WireTensor.pack(tensor.contiguous(), wire).unpack(torch.float32, "cpu"))


HADAMARD = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]).double() / 8


def blocks_of(tensor: Tensor) -> Tensor:
    """A row's blocks of 64, the last one filled up with zeros: ``(rows, blocks, 64)``, rotated as codes are."""
    return torch.nn.functional.pad(tensor.double(), (0, -tensor.shape[1] % 64)).unflatten(1, (-1, 64)) @ HADAMARD


def scales_of(tensor: Tensor, wire: str) -> Tensor:
    """Least scale by which a block's rotated entries have codes, with either sign: ``(rows, blocks, 1)``."""
    rotated, most = blocks_of(tensor), MOST[wire]
    above, below = rotated.amax(dim=-1, keepdim=True), -rotated.amin(dim=-1, keepdim=True)
    upright = torch.maximum(above / (most - 1), below / most)
    return torch.minimum(upright, torch.maximum(above / most, below / (most - 1)))


def unequal(shape: tuple[int, int], spread: int, seed: int) -> Tensor:
    """A random tensor whose entries are of very unequal size, as those of hidden states are."""
    draw = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** (spread * (torch.rand(shape, generator=draw) - 0.5))
    return torch.randn(shape, generator=draw) * sizes


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 600)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    spread=st.integers(0, 12),
    seed=st.integers(0, 2**63 - 1),
    wire=st.sampled_from(CODES),
)
def test_codes_are_one_of_the_two_beside_an_entry(
    shape: tuple[int, int], dtype: torch.dtype, spread: int, seed: int, wire: str
) -> None:
    tensor = unequal(shape, spread, seed % 1000).to(dtype)
    packed = WireTensor.pack(tensor, wire, seed=seed)
    # Without rotating back: what the last block is filled up with does not travel.
    whole = torch.nn.functional.pad(tensor, (0, -shape[1] % 64))
    arrived = WireTensor(packed.data, wire, tuple(whole.shape), seed).unpack(torch.float64, "cpu")
    assert torch.equal(packed.unpack(torch.float64, "cpu"), arrived[:, : shape[1]])
    error = (blocks_of(arrived) - blocks_of(tensor)).abs()
    # A bf16 scale is up to a 64th larger than the least one; fp32 products err by parts of a block's largest entries.
    rounding = 1e-5 * blocks_of(tensor).abs().amax(dim=-1, keepdim=True)
    assert (error <= scales_of(tensor, wire) * (1 + 2**-6) + rounding).all()


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 130),
    spread=st.integers(0, 8),
    seed=st.integers(0, 2**63 - 1),
    wire=st.sampled_from(CODES),
)
def test_codes_are_right_on_the_mean(width: int, spread: int, seed: int, wire: str) -> None:
    count = 4000
    tensor = unequal((1, width), spread, seed % 1000)
    arrived = WireTensor.pack(tensor.expand(count, width), wire, seed=seed).unpack(torch.float64, "cpu")
    bias = blocks_of(arrived.mean(dim=0, keepdim=True) - tensor.double()) @ HADAMARD
    # Hoeffding: the mean of so many errors of range s is beyond this in one of 1e13 cases. Rounding to the nearest is
    # off by up to s / 2 in each rotated entry.
    rounding = 1e-5 * blocks_of(tensor).abs().amax(dim=-1, keepdim=True)
    assert (bias.abs() <= 4 * scales_of(tensor, wire) * (1 + 2**-6) / math.sqrt(count) + rounding).all()


@pytest.mark.parametrize("wire", CODES)
def test_codes_are_right_on_the_mean_over_seeds_too(wire: str) -> None:
    tensor, count = unequal((2, 64), 2, 0), 2000
    mean = torch.stack(
        [WireTensor.pack(tensor, wire, seed=seed).unpack(torch.float64, "cpu") for seed in range(count)]
    ).mean(dim=0)
    bound = 4 * scales_of(tensor, wire) * (1 + 2**-6) / math.sqrt(count)
    assert (blocks_of(mean - tensor.double()).abs() < bound).all()


@settings(max_examples=100, deadline=None)
@given(fraction=st.integers(0, 2**23 - 1), exponent=st.integers(-100, 122), wire=st.sampled_from(CODES))
def test_no_bf16_scale_clips(fraction: int, exponent: int, wire: str) -> None:
    """The largest entry has the largest code at any size: its mean would be too small by what is clipped."""
    rotated = torch.zeros(1, 64, dtype=torch.float64)
    rotated[0, 3] = math.ldexp(1 + fraction * 2.0**-23, exponent)
    tensor = (rotated @ HADAMARD).float()
    arrived = WireTensor.pack(tensor.expand(1000, 64), wire).unpack(torch.float64, "cpu")
    assert float(blocks_of(arrived)[:, 0, 3].max()) >= float(rotated[0, 3]) * (1 - 1e-5)


@pytest.mark.parametrize(("wire", "most"), [("int8", 0.01), ("int4", 0.15)])
def test_codes_spread_a_few_large_entries_and_err_by_little(wire: str, most: float) -> None:
    draw = torch.Generator().manual_seed(0)
    for large in (1, 10, 1000):
        tensor = torch.randn(500, 576, generator=draw)
        tensor[:, ::64] *= large
        arrived = WireTensor.pack(tensor, wire, seed=1).unpack(torch.float32, "cpu")
        assert float((arrived - tensor).norm() / tensor.norm()) < most


@pytest.mark.parametrize("wire", CODES)
def test_codes_keep_zeros_and_err_by_little_at_both_ends_of_the_numbers(wire: str) -> None:
    smallest = torch.finfo(torch.float32).smallest_normal
    sizes = torch.tensor([0.0, 1e-45, smallest, 1e37])[:, None]
    arrived = WireTensor.pack(sizes.expand(4, 100), wire).unpack(torch.float32, "cpu")
    assert torch.equal(arrived[0], torch.zeros(100)) and not arrived[0].signbit().any()
    assert ((arrived - sizes).abs() <= torch.maximum(8 * sizes, torch.tensor(8 * smallest))).all()


@pytest.mark.parametrize("wire", CODES)
def test_the_random_numbers_follow_from_the_seed_alone(wire: str) -> None:
    tensor, before = unequal((70, 600), 4, 0), torch.random.get_rng_state()
    packed = WireTensor.pack(tensor, wire, seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert np.array_equal(WireTensor.pack(tensor, wire, seed=7).data, packed.data)
    others = [packed.answer(tensor, "down", "store"), packed.answer(tensor, "deep", "store")]
    others.append(WireTensor.pack(tensor, wire, seed=8))
    for first, second in pairwise([packed, *others, packed]):
        assert first.wire == second.wire == wire
        # Scales are the same, codes are not.
        assert 0.1 < (first.data != second.data).mean() < 0.9
    assert np.array_equal(packed.answer(tensor, "down", "store").data, others[0].data)


@pytest.mark.parametrize("wire", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_codes_do_not_hide_what_is_not_finite(wire: str, bad: float) -> None:
    tensor = torch.ones(3, 5)
    tensor[1, 2] = bad
    arrived = WireTensor.pack(tensor, wire).unpack(torch.float32, "cpu")
    assert arrived[1].isnan().all()
    assert torch.allclose(arrived[[0, 2]], tensor[[0, 2]], atol=0.4 if wire == "int4" else 0.03)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("labels", ["server", "client"])
def test_the_cost_model_counts_what_travels(wire: str, labels: str) -> None:
    job = Job.model_validate({"dtype": "fp32", "wire": "fp64", "max_length": 16, "privacy": {"labels": labels}})
    # A plan's format counts, or without one the job's.
    model = CountedModel(tiny_spec("llama"), job)
    own = CountedModel(tiny_spec("llama"), job.model_copy(update={"wire": wire}))
    hidden = WireTensor.pack(torch.randn(model.rows, model.width), wire)
    targets = None if labels == "client" else np.zeros(model.rows, dtype=np.int32)
    message = Activations("one", 2, hidden, (16,) * job.batch_size, model.rows, model.rows, targets)
    counted = model.wire_bytes(2, wire)
    assert own.wire_bytes(2) == counted
    assert counted.up == message.nbytes and counted.down == hidden.nbytes
    assert counted.deep == counted.slope == (hidden.nbytes if labels == "client" else 0)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "int4"])
def test_a_message_weighs_what_its_tensor_does_and_is_not_copied(wire: str) -> None:
    """Within 5 % of the tensor's own bytes, of which pickle copies none."""
    import ray

    tokens, width = 123, 576
    hidden = WireTensor.pack(torch.randn(tokens, width), wire)
    targets = np.arange(tokens, dtype=np.int32)
    message = Activations("phone-0", 3, hidden, (60, 63), 50, 50, targets)
    size = tokens * width * {"fp32": 4, "bf16": 2, "int8": 66 / 64, "int4": 34 / 64}[wire]
    for value in (message, hidden):
        buffers: list[Any] = []
        copied = len(ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append))
        assert copied < 1000
        assert size <= copied + sum(buffer.raw().nbytes for buffer in buffers) <= 1.05 * size
    assert message.nbytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_packing_takes_what_is_counted_beside_the_message_and_unpacking_no_more(wire: str) -> None:
    memory, tensor = PeakMemory(torch.device("cpu")), torch.randn(4000, 576)
    with memory.window():
        packed = WireTensor.pack(tensor, wire)
    beside = packing_bytes(wire, tensor.numel())
    assert packed.nbytes + 0.9 * beside <= memory.peak_bytes() <= packed.nbytes + beside
    with memory.window():
        arrived = packed.unpack(torch.float32, "cpu")
    # The message as it was packed is still there, beside a copy and the values.
    known = 2 * packed.nbytes + arrived.nbytes
    assert known <= memory.peak_bytes() <= known + beside
