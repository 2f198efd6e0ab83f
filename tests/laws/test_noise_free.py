"""Law E3: the residual takes up exactly what the holders learned (METHOD section 6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsplit.lora.aggregation import Contribution, Restart, average_factors, noise_free, rounded
from hsplit.lora.residual import Residual
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.factors import LowRank
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import base_values

laws = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _dense64(*terms: LowRank | None) -> torch.Tensor:
    return sum((t.to(torch.float64).dense() for t in terms if t is not None), torch.zeros(1, dtype=torch.float64))


@laws
@given(
    shape=st.tuples(st.integers(8, 48), st.integers(8, 48)),
    ranks=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5),
    tokens=st.lists(st.integers(0, 500), min_size=5, max_size=5),
    reinit=st.sampled_from(["random", "svd", "mean"]),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    max_rank=st.sampled_from([None, 128]),
    sent=st.sampled_from([None, torch.bfloat16]),
)
def test_e3_residual_and_restart_hold_the_exact_sum(
    shape: tuple[int, int],
    ranks: list[int],
    tokens: list[int],
    reinit: str,
    rounds: int,
    seed: int,
    max_rank: int | None,
    sent: torch.dtype | None,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    counts = tokens[: len(ranks)]
    total = sum(counts)
    if total == 0:
        counts, total = [1] * len(ranks), len(ranks)
    residual = Residual(*shape, max_rank)
    # What each round's exact sum should have made of the model, kept in fp64 beside the product's own numbers.
    common: LowRank | None = None
    for _ in range(rounds):
        before = _dense64(residual.factors) if residual.matrix is None else residual.matrix.double()
        contributions, expected = [], torch.zeros(shape, dtype=torch.float64)
        for rank, count in zip(ranks, counts, strict=True):
            start_B = torch.zeros(shape[0], rank)
            start_A = torch.randn(rank, shape[1], generator=draw)
            if common is not None:
                start_B[:, : common.rank], start_A[: common.rank] = common.B, common.A
            B = start_B + 1e-3 * torch.randn(shape[0], rank, generator=draw)
            A = start_A + 1e-3 * torch.randn(rank, shape[1], generator=draw)
            if sent is not None:
                # As a holder rounds what it has learned before it hands it in.
                B, A = B.to(sent).float(), A.to(sent).float()
            share = count / total
            # METHOD's Delta: what the holder learned, without what it started the round with.
            expected += share * (B.double() @ A.double() - start_B.double() @ start_A.double())
            if count:
                contributions.append(Contribution(LowRank(B, A), share))
        started = _dense64(common)
        outcome = noise_free(contributions, Restart(reinit, tuple(ranks)))
        if sent is not None:
            outcome = rounded(outcome, sent, keeps_residual=True)
        if sent is not None and outcome.common is not None:
            assert torch.equal(outcome.common.to(sent).B.float(), outcome.common.B)
            assert torch.equal(outcome.common.to(sent).A.float(), outcome.common.A)
        cut = 0.0 if outcome.residual is None else residual.add(outcome.residual)
        common = outcome.common
        after = _dense64(residual.factors) if residual.matrix is None else residual.matrix.double()
        change = after + _dense64(common) - before - started
        allowed = 1e-5 * expected.norm() + cut * 1.001 * (after.norm() / max(1e-12, (1 - cut**2)) ** 0.5)
        assert (change - expected).norm() <= allowed


def test_averaging_the_factors_is_not_noise_free() -> None:
    """The law can fail: FedAvg of A and of B, on the same holders, is far from the exact sum."""
    draw = torch.Generator().manual_seed(0)
    terms = [LowRank(torch.randn(16, 4, generator=draw), torch.randn(4, 16, generator=draw)) for _ in range(3)]
    contributions = [Contribution(term, 1 / 3) for term in terms]
    exact = _dense64(*terms) / 3
    averaged = average_factors(contributions, Restart("random", (4, 4, 4)))
    assert averaged.common is not None
    assert (_dense64(averaged.common) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_effective_weight_is_base_plus_residual_to_the_base_dtypes_rounding(
    models: dict[str, Path], base: str, family: str
) -> None:
    model = BaseModel(ModelSpec.read(models[family]), base, torch.float32)
    segment = load_segment(model, SegmentSpec(0, 2), quantized=True)
    draw = torch.Generator().manual_seed(0)
    for name, linear in segment.linears.items():
        d_out, d_in = linear.weight.shape
        factors = LowRank(1e-2 * torch.randn(d_out, 3, generator=draw), 1e-2 * torch.randn(3, d_in, generator=draw))
        pristine = linear.weight.dense(torch.float64).clone()
        for _ in range(3):
            # Formed again each time: three times must give the same as once.
            linear.append_residual(0, factors)
        expected = pristine + factors.to(torch.float64).dense()
        assert (_effective(linear, d_in) - expected).norm() <= 1e-6 * expected.norm(), name
        # An append after what is there adds to it.
        if not linear.merges:
            linear.append_residual(3, factors)
            doubled = pristine + 2 * factors.to(torch.float64).dense()
            assert (_effective(linear, d_in) - doubled).norm() <= 1e-6 * doubled.norm(), name


def test_bf16_working_weight_is_rounded_once(models: dict[str, Path]) -> None:
    segment = load_segment(BaseModel(ModelSpec.read(models["llama"]), "bf16", torch.bfloat16), SegmentSpec(0, 1))
    linear = next(iter(segment.linears.values()))
    d_out, d_in = linear.weight.shape
    pristine = linear.weight.dense(torch.float32).clone()
    delta = LowRank(torch.full((d_out, 1), 1e-4), torch.ones(1, d_in))
    small = LowRank(torch.zeros(d_out, 0), torch.zeros(0, d_in))
    for count in range(1, 40):
        small = LowRank(torch.cat([small.B, delta.B], dim=1), torch.cat([small.A, delta.A]))
        linear.append_residual(0, small)
        exact = pristine + small.dense()
        assert (linear.weight.dense(torch.float32) - exact).abs().max() <= 2**-8 * exact.abs().max(), count


def test_base_values_do_not_depend_on_how_they_are_stored(models: dict[str, Path]) -> None:
    for base in ("int8", "nf4"):
        model = BaseModel(ModelSpec.read(models["llama"]), base, torch.float32)
        stored = load_segment(model, SegmentSpec(0, 1), quantized=True).linears
        dense = load_segment(model, SegmentSpec(0, 1), quantized=False).linears
        for name, linear in stored.items():
            assert torch.equal(linear.weight.dense(torch.float32), dense[name].weight.dense(torch.float32))
            again = base_values(linear.weight.dense(torch.float32), base, torch.float32)
            assert torch.allclose(again, linear.weight.dense(torch.float32), rtol=1e-2, atol=1e-3)


def _effective(linear: AdaptedLinear, d_in: int) -> torch.Tensor:
    with torch.no_grad():
        out = linear(torch.eye(d_in))
    bias = 0 if linear.bias is None else linear.bias
    weight: torch.Tensor = (out - bias).T.double()
    return weight
