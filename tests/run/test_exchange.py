"""Adapters that are rounded for the exchange at a round's end (``pace.exchange``)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.config import Importance, Job, Pace, Policy
from hsplit.lora.holder import HeldAdapters, Holder
from hsplit.lora.learned import learned
from hsplit.models.factors import LowRank
from hsplit.run.coordinator import Coordinator
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples

ALPHA = 10.0
"""Scales that bf16 does not hold."""


def a_run(model: Path, to: Path, recorder: Recorder, rounds: int, dtype: str = "bf16", **policy: Any) -> Coordinator:
    """Three clients of unequal ranks, run to the end."""
    importance = Importance(metric="equal")
    plan = fixed_plan(model, Job(), [1, 2, 2], [2, 4, 3], 4)
    shares = {f"c{i}": random_examples(12, i) for i in range(3)}
    job: dict[str, Any] = {
        "base": "fp32",
        "dtype": dtype,
        "alpha": ALPHA,
        "rounds": rounds,
        "local_steps": 2,
        "residual": {"max_rank": "full"},
    }
    policy = {"init": "shared", **policy}
    run = coordinator(model, to, plan, shares, recorder, Policy(importance=importance, **policy), **job)
    assert run.run()
    return run


@pytest.mark.parametrize("reinit", ["mean", "svd", "random"])
def test_what_holders_handed_in_is_summed_exactly(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reinit: str
) -> None:
    handed_in: list[HeldAdapters] = []
    held, own = Holder.held, []

    def watched(self: Holder) -> HeldAdapters:
        handed_in.append(held(self))
        own.append({name: self.adapters.live(name) for name in self.adapters.names})
        return handed_in[-1]

    monkeypatch.setattr(Holder, "held", watched)
    run = a_run(models["llama"], tmp_path, Recorder(), 1, reinit=reinit, pace=Pace(exchange="compute"))
    assert len(handed_in) == 4
    for one, kept in zip(handed_in, own, strict=True):
        for name, term in one.terms.items():
            assert term.A.dtype == term.B.dtype == torch.bfloat16
            # The holder itself has nothing else, but for the rounding of its scale.
            assert torch.equal(kept[name].A, term.A.float())
            torch.testing.assert_close(kept[name].B, term.B.float(), rtol=1e-6, atol=0)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    sums = learned(actors["server"].state())
    assert sums
    for name, total in sums.items():
        holders = [(one.terms[name], one.tokens[one.layers[name]]) for one in handed_in if name in one.terms]
        tokens = sum(count for _, count in holders)
        expected = sum(count / tokens * term.to(torch.float64).dense() for term, count in holders)
        assert isinstance(expected, torch.Tensor)
        assert (total.dense().double() - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("reinit", ["mean", "svd"])
def test_after_every_restart_all_holders_have_the_adapter_that_is_stored(
    models: dict[str, Path], tmp_path: Path, reinit: str
) -> None:
    """Whatever their ranks and scales: what a holder's adapter is not, the residual has (law E4)."""
    run = a_run(models["llama"], tmp_path, Recorder(), 3, reinit=reinit, pace=Pace(exchange="compute"))
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    stored = actors["server"].aggregator._common
    for name in ("c0", "c1", "c2", "server"):
        adapters = actors[name].holder.adapters
        assert adapters.names
        for weight in adapters.names:
            rank = min(adapters.ranks[weight], stored[weight].rank)
            live, restart = adapters.live(weight, rank), stored[weight].up_to_rank(rank)
            assert torch.equal(live.A, restart.A)
            torch.testing.assert_close(live.B, restart.B, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reinit", ["mean", "svd"])
def test_in_fp32_nothing_is_rounded(models: dict[str, Path], tmp_path: Path, reinit: str) -> None:
    """By default E1 holds in fp32, and a run is the same number by number."""
    whole, narrow = Recorder(), Recorder()
    a_run(models["llama"], tmp_path / "whole", whole, 2, "fp32", reinit=reinit)
    a_run(models["llama"], tmp_path / "narrow", narrow, 2, "fp32", reinit=reinit, pace=Pace(exchange="compute"))
    assert narrow.losses == whole.losses
    assert [row.val_loss for row in narrow.rows] == [row.val_loss for row in whole.rows]


def test_only_the_exchange_is_rounded_and_it_is_shorter(models: dict[str, Path], tmp_path: Path) -> None:
    whole, narrow = Recorder(), Recorder()
    a_run(models["llama"], tmp_path / "whole", whole, 3)
    a_run(models["llama"], tmp_path / "narrow", narrow, 3, pace=Pace(exchange="compute"))
    assert narrow.losses[:2] == whole.losses[:2] and narrow.losses[2:] != whole.losses[2:]
    assert narrow.rows[1].bytes_up < whole.rows[1].bytes_up and narrow.rows[1].bytes_down < whole.rows[1].bytes_down
    assert narrow.rows[-1].val_loss == pytest.approx(whole.rows[-1].val_loss, rel=1e-3)


def test_factors_in_bf16_travel_with_every_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    term = LowRank(torch.randn(8, 2, generator=draw), torch.randn(2, 6, generator=draw)).to(torch.bfloat16)
    came: LowRank = pickle.loads(pickle.dumps(term))
    assert came.A.dtype == torch.bfloat16 and torch.equal(came.A, term.A) and torch.equal(came.B, term.B)
