"""Parts of ``hsplit bench ranks``, and small runs of it on a tiny model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common, ranks
from benchmarks.ranks import USUAL, WAYS, Cell, WithMomentum, average_moments, momentum, run_cell, threshold, ways
from hsplit.config import Job, Policy
from hsplit.lora.aggregation import Aggregator
from hsplit.lora.holder import HeldAdapters
from hsplit.lora.optimizer import FIRST, moment_views
from hsplit.models.factors import LowRank
from hsplit.models.spec import LinearShape

SHAPE = LinearShape("w", 0, 60, 50)
HELD = (2, 4, 8)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    for name, value in {"ROUNDS": 3, "STEPS": 2, "CAP": 64, "POLICY": ranks.POLICY.replace("30", "3")}.items():
        monkeypatch.setattr(ranks, name, value)
    model = common.tiny_model(tmp_path / "model", 64, hidden_size=128, intermediate_size=128, num_hidden_layers=3)
    data = common.texts(tmp_path / "texts.csv", 120, 64, 8)
    return argparse.Namespace(data=str(data), model=str(model))


def test_ways_that_no_policy_has_train_at_unequal_ranks(options: argparse.Namespace) -> None:
    own = [
        name for name, way in WAYS.items() if "benchmarks" in "".join(way.policy) or way.aggregator is not Aggregator
    ]
    assert len(own) == 6
    found = [run_cell(Cell(way, "iid", 0), options) for way in (USUAL, *own, "moments averaged")]
    for one in found:
        assert math.isfinite(one["ppl"]) and one["worst_ppl"] >= one["ppl"] > 1
        assert len(one["losses"]) == len(ranks.RANKS)
    assert len({one["ppl"] for one in found}) == len(found)
    assert found[0]["cut"] == 0
    assert [row[:2] for row in ways(found)[1]] == [["iid", way] for way in WAYS if way in {o["way"] for o in found}]


def drawn(seed: int) -> list[HeldAdapters]:
    torch.manual_seed(seed)
    terms = [LowRank(torch.randn(60, rank) / 10, torch.randn(rank, 50) / 4) for rank in HELD]
    return [HeldAdapters(f"c{i}", {"w": term}, {0: 10.0}, {"w": 0}) for i, term in enumerate(terms)]


def aggregator(kind: type[Aggregator]) -> Aggregator:
    job = Job.model_validate({"residual": {"max_rank": "full"}})
    return kind([SHAPE], job, Policy(reinit="random"), torch.float32, merges=False)


def learned(of: Aggregator) -> torch.Tensor:
    residual = of.residuals["w"]
    return residual.matrix if residual.matrix is not None else residual.factors.B @ residual.factors.A


def test_momentum_adds_what_the_formula_says() -> None:
    plain, moving = aggregator(Aggregator), aggregator(momentum(0.5))
    assert isinstance(moving, WithMomentum)
    velocity, expected, before = torch.zeros(60, 50), torch.zeros(60, 50), torch.zeros(60, 50)
    for round_ in range(3):
        for one in (plain, moving):
            one.aggregate(drawn(round_))
        delta = learned(plain) - before
        before = learned(plain).clone()
        velocity = 0.5 * velocity + delta
        expected = expected + delta + 0.5 * velocity
        assert torch.allclose(learned(moving), expected, atol=1e-5)


def test_a_threshold_keeps_the_least_directions_with_enough_energy() -> None:
    plain, cutting = aggregator(Aggregator), aggregator(threshold(0.9))
    plain.aggregate(drawn(0))
    cut = cutting.aggregate(drawn(0))
    values = torch.linalg.svdvals(learned(plain))
    energy = values.square().cumsum(0) / values.square().sum()
    kept = int((energy < 0.9).sum()) + 1
    assert cutting.residuals["w"].rank == kept < sum(HELD)
    assert cut == pytest.approx(float((1 - energy[kept - 1]).sqrt()), rel=1e-4)
    update: Any = cutting.update_for(2, {"w": 2}).residuals["w"]
    assert update.start_rank == 0 and update.factors.rank == kept


def test_moments_are_the_mean_of_those_who_have_a_direction(options: argparse.Namespace, tmp_path: Path) -> None:
    run = ranks.configured(tmp_path, Cell("moments averaged", "iid", 0), options)
    source, inputs = common.read(run)
    with common.in_process(
        run, source.directory, inputs, ranks.SilentDisplay(), scheduler=ranks.UnequalRanks(run, source.spec)
    ) as (coordinator, _):
        coordinator.start()
        coordinator.begin_round()
        coordinator.local_step(0)
        holders = [coordinator._executor.actors[name].holder for name in coordinator.context.clients]  # type: ignore[attr-defined]
        name = holders[0].adapters.names[0]

        def first(holder: Any, direction: int) -> torch.Tensor:
            view = moment_views(holder._optimizer)
            assert view is not None
            return view(FIRST, holder.adapters.spans(name)[1])[:, direction].clone()

        before = {d: [first(holder, d) for holder in holders if d < holder.adapters.ranks[name]] for d in (0, 3, 31)}
        average_moments(holders)
        for direction, own in before.items():
            assert len(own) == {0: 5, 3: 4, 31: 1}[direction]
            for holder in holders[-len(own) :]:
                assert torch.allclose(first(holder, direction), torch.stack(own).mean(dim=0), atol=1e-7)
