"""Sums of low-rank matrices and their singular values, against the dense matrices."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit.lora.low_rank import LowRankSum, empty, leading_and_rest, spectral
from hsplit.models.factors import LowRank

EXACT = torch.float64


@st.composite
def sums(draw: st.DrawFn) -> LowRankSum:
    """Sums of unequal terms: more directions than the matrix has, repeated factors, and unequal sizes included."""
    d_out, d_in = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    ranks = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    terms: list[LowRank] = []
    for rank in ranks:
        size = 10.0 ** draw(st.integers(-3, 3))
        B = size * torch.randn(d_out, rank, generator=generator)
        A = torch.randn(rank, d_in, generator=generator)
        if terms and draw(st.booleans()):
            # As holders that begin with the same A: a rank-deficient stack.
            shared = min(rank, terms[0].rank)
            A[:shared] = terms[0].A[:shared]
        terms.append(LowRank(B, A))
    weights = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.5]), min_size=len(ranks), max_size=len(ranks)))
    return LowRankSum(tuple(terms), tuple(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_factors_travel_as_they_are_and_belong_to_the_receiver(dtype: torch.dtype) -> None:
    buffer = torch.randn(40).to(dtype)
    # Views of a longer buffer, one of them transposed, as live adapters are.
    sent = LowRank(buffer[:12].view(3, 4).T, buffer[12:24].view(3, 4).requires_grad_().detach())
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    read_only = [bytes(part.raw()) for part in buffers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        came: LowRank = pickle.loads(data, buffers=read_only)
    assert torch.equal(came.B, sent.B) and torch.equal(came.A, sent.A)
    assert came.B.dtype == came.A.dtype == dtype
    came.B.zero_()
    assert torch.equal(sent.B, buffer[:12].view(3, 4).T)


def _dense(total: LowRankSum) -> Tensor:
    return sum(
        (w * (t.B.double() @ t.A.double()) for t, w in zip(total.terms, total.weights, strict=True)),
        torch.zeros(1, dtype=EXACT),
    )


def _size(total: LowRankSum) -> float:
    """Scale of rounding errors: the terms before anything cancels."""
    return sum(
        abs(w) * float(t.B.double().norm() * t.A.double().norm())
        for t, w in zip(total.terms, total.weights, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(sums())
def test_singular_values_and_directions_are_those_of_the_dense_sum(total: LowRankSum) -> None:
    dense, size = _dense(total), _size(total)
    parts = spectral(total)
    count = min(len(parts.S), min(dense.shape))
    assert torch.allclose(parts.S[:count], torch.linalg.svdvals(dense)[:count], rtol=0, atol=1e-13 * size)
    whole = parts.part(0, len(parts.S), EXACT)
    assert (whole.dense() - dense).norm() <= 1e-13 * size
    assert parts.rank <= min(total.width, *dense.shape)
    for cut in (0, 1, parts.rank):
        kept = parts.part(0, cut, EXACT)
        assert abs(float((dense - kept.dense()).norm()) - parts.norm_beyond(cut)) <= 1e-13 * size
    assert (parts.U * parts.S @ parts.V - dense).norm() <= 1e-13 * size
    resolved = int((1e-6 * size < parts.S).sum())
    for vectors in (parts.U[:, :resolved].T, parts.V[:resolved]):
        assert torch.allclose(vectors @ vectors.T, torch.eye(resolved, dtype=EXACT), rtol=0, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(total=sums(), rank=st.integers(1, 16))
def test_leading_part_and_rest_are_the_sum(total: LowRankSum, rank: int) -> None:
    dense, size = _dense(total), _size(total)
    leading, rest = leading_and_rest(total, rank, torch.float32)
    assert leading.rank == min(rank, spectral(total).rank)
    split = leading.to(EXACT).dense()
    if rest is not None:
        # By reference the rest takes up even what rounding the leading part to fp32 has left.
        assert (split + _dense(rest) - dense).norm() <= 1e-13 * size
        as_factors = rest.compressed(torch.float32)
        assert as_factors.rank == rest.rank <= total.width
        split = split + as_factors.to(EXACT).dense()
    assert (split - dense).norm() <= 1e-6 * size


@settings(max_examples=40, deadline=None)
@given(sums())
def test_a_sum_can_be_concatenated_or_formed_row_by_row(total: LowRankSum) -> None:
    dense, size = _dense(total), _size(total)
    assert (total.concatenated(EXACT).dense() - dense).norm() <= 1e-14 * size
    middle = dense.shape[0] // 2
    rows = torch.cat([total.dense_rows(0, middle), total.dense_rows(middle, dense.shape[0])])
    assert (rows - dense).norm() <= 1e-14 * size


def test_what_is_zero_or_empty_stays_so() -> None:
    for zero in (
        empty(8, 9),
        LowRank(torch.zeros(8, 2), torch.ones(2, 9)),
        LowRank(torch.zeros(3, 7), torch.ones(7, 3)),
    ):
        parts = spectral(zero)
        assert parts.rank == 0 and parts.norm_beyond(0) == 0.0
        part = parts.part(0, len(parts.S), torch.float32)
        assert torch.equal(part.dense(), torch.zeros(zero.B.shape[0], zero.A.shape[1]))


def test_directions_that_cancel_do_not_count() -> None:
    draw = torch.Generator().manual_seed(0)
    term = LowRank(torch.randn(30, 4, generator=draw), torch.randn(4, 20, generator=draw))
    other = LowRank(torch.randn(30, 2, generator=draw), torch.randn(2, 20, generator=draw))
    assert spectral(LowRankSum((term, other, term), (0.5, 1.0, -0.5))).rank == other.rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_terms_are_left_as_they_are(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    term = LowRank(torch.randn(30, 4, generator=draw, dtype=dtype), torch.randn(4, 20, generator=draw, dtype=dtype))
    copy = LowRank(term.B.clone(), term.A.clone())
    spectral(LowRankSum((term, term), (0.5, 2.0))).part(0, 3, dtype)
    assert torch.equal(term.B, copy.B) and torch.equal(term.A, copy.A)
