"""A working copy beside the codes of a quantized base: the values of codes and residual, and memory that allows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit.models.adapted_linear import FORMED_AT_ONCE, AdaptedLinear
from hsplit.models.factors import LowRank
from hsplit.models.weights import DenseWeight, Int8Weight, NF4Weight
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import HolderPlan
from tests.planning.test_planner import JOB, cost, tiny_spec

# Rounding of a sum of two matrices, and of a product with it.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}
D_IN, ROWS, RANK = 64, 5, 3


def _factors(d_out: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(d_out, rank).to(dtype), 0.02 * torch.randn(rank, D_IN).to(dtype))


def _passes(linear: AdaptedLinear, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    given = x.clone().requires_grad_()
    output = linear(given)
    output.backward(slope)
    assert given.grad is not None
    return output.detach(), given.grad


@settings(deadline=None, max_examples=30)
@given(
    base=st.sampled_from([NF4Weight, Int8Weight]),
    dtype=st.sampled_from(list(TOLERANCE)),
    d_out=st.sampled_from([24, FORMED_AT_ONCE, FORMED_AT_ONCE + 40]),
    changes=st.lists(st.sampled_from(["append", "replace", "matrix", "nothing"]), max_size=3),
    seed=st.integers(0, 100),
)
def test_a_working_copy_follows_every_change_of_the_residual(
    base: type[NF4Weight] | type[Int8Weight], dtype: torch.dtype, d_out: int, changes: list[str], seed: int
) -> None:
    torch.manual_seed(seed)
    values = torch.randn(d_out, D_IN)
    beside, copied = (
        AdaptedLinear("w", base(values.half() if base is Int8Weight else values), None, None, dtype) for _ in range(2)
    )
    copied.keep_working_copy(True)
    A, B = torch.randn(RANK, D_IN), torch.randn(d_out, RANK)
    x, slope = torch.randn(ROWS, D_IN).to(dtype), torch.randn(ROWS, d_out).to(dtype)
    held = 0
    for change in ["nothing", *changes]:
        new, matrix = _factors(d_out, RANK, dtype), 0.02 * torch.randn(d_out, D_IN)
        for linear in (beside, copied):
            if change == "append":
                linear.append_residual(held, new)
            elif change == "replace":
                linear.append_residual(0, new)
            elif change == "matrix":
                linear.set_residual_matrix(matrix)
        held = {"append": held + RANK, "replace": RANK, "matrix": 0, "nothing": held}[change]
        for linear in (beside, copied):
            linear.set_adapter(A, B, 0.5)
        for one, other in zip(_passes(copied, x, slope), _passes(beside, x, slope), strict=True):
            error = torch.linalg.vector_norm((one - other).double()) / torch.linalg.vector_norm(other.double())
            assert error <= TOLERANCE[dtype]


def test_without_a_residual_it_has_the_bits_of_the_codes_and_can_be_dropped() -> None:
    linear = AdaptedLinear("w", NF4Weight(torch.randn(300, D_IN)), None, None, torch.bfloat16)
    x = torch.randn(ROWS, D_IN).bfloat16()
    codes = linear(x)
    linear.keep_working_copy(True)
    assert torch.equal(linear(x), codes)
    linear.keep_working_copy(False)
    assert not linear.has_working_copy
    assert torch.equal(linear(x), codes)


def test_a_merged_base_has_none() -> None:
    values = torch.randn(8, D_IN)
    linear = AdaptedLinear("w", DenseWeight(values), None, lambda: values.clone(), torch.float32)
    with pytest.raises(ValueError, match="w: a merged base is its own working copy"):
        linear.keep_working_copy(True)


def test_a_server_keeps_one_where_its_declared_memory_has_room() -> None:
    quantized = cost()
    part = HolderPlan("server", "server", True, 1, declared_bytes=10**12, predicted_bytes=1000)
    roomy = quantized.with_working_copy(part)
    needed = 1000 + quantized.working_copy_bytes(1)
    assert (roomy.working_copy, roomy.predicted_bytes) == (True, needed)
    assert quantized.with_working_copy(replace(part, declared_bytes=needed)) == replace(roomy, declared_bytes=needed)
    short = replace(part, declared_bytes=needed - 1)
    assert quantized.with_working_copy(short) == short


def test_none_is_kept_where_16_bits_would_lose_the_residual() -> None:
    job = JOB.model_copy(update={"base": "nf4", "dtype": "bf16"})
    part = HolderPlan("server", "server", True, 1, declared_bytes=10**12, predicted_bytes=1000)
    assert CostModel(tiny_spec("llama"), job).with_working_copy(part) == part
