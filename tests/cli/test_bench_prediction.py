"""Parts of ``hsplit bench prediction``, and a small run of it on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, prediction
from benchmarks.prediction import MEAN_RANK, PROBE, Cell, allocation_of, cells, correlated, correlation, predicted
from hsplit.models.spec import LinearShape

SHAPES = [LinearShape(f"layers.{n}.{kind}_proj", n, 8, d) for n in range(6) for kind, d in (("q", 8), ("up", 24))]


def test_allocations_differ_and_take_the_same_bytes() -> None:
    unit = {shape.name: shape.d_in + shape.d_out for shape in SHAPES}
    drawn = [allocation_of(number, SHAPES) for number in range(10)]
    assert len({tuple(ranks.values()) for ranks in drawn}) == 10 and drawn[3] == allocation_of(3, SHAPES)
    whole = MEAN_RANK * sum(unit.values())
    for ranks in drawn:
        assert 0.8 * whole < sum(rank * unit[name] for name, rank in ranks.items()) <= whole
        assert max(ranks.values()) >= 4 * min(ranks.values())


def test_correlation_is_of_places() -> None:
    assert correlation([1.0, 2.0, 30.0], [1.0, 4.0, 5.0]) == pytest.approx(1.0)
    assert correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)


def test_a_metric_that_knows_the_outcome_correlates() -> None:
    """Falls that are the learning by curves of each weight's own: the spectral metric finds them, numbers do not."""
    draw = np.random.default_rng(0)
    curves = {s.name: list(np.sqrt(np.cumsum(draw.uniform(0.3, 1.0) ** np.arange(32)))) for s in SHAPES}
    scale = {name: float(draw.lognormal(0, 2)) for name in curves}
    spectra = {name: [scale[name] * value for value in own] for name, own in curves.items()}
    numbers = {name: float(draw.lognormal(0, 1)) for name in curves}
    shapes = [{"name": s.name, "layer": s.layer, "d_out": s.d_out, "d_in": s.d_in} for s in SHAPES]
    found = []
    for seed in (0, 1):
        of_run = {"data": "d", "seed": seed}
        probe = {**of_run, "allocation": PROBE, "spectral": spectra, "rngwp": numbers, "weights": shapes}
        found.append(probe)
        for number in range(24):
            ranks = allocation_of(number, SHAPES)
            fall = predicted("spectral", probe, ranks)
            found.append({**of_run, "allocation": number, "ranks": ranks, "fall": fall})
    columns, rows = correlated(found)
    of = dict(zip(columns, rows[0], strict=True))
    assert of["spectral"] == "+1.00" and float(of["rngwp"]) < 0.9 and of["runs"] == "24"
    assert rows[0][-1] == "+1.00" and rows[-1][0] == "mean"


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "ROUNDS", 1)
    monkeypatch.setattr(prediction, "STEPS", 2)
    monkeypatch.setattr(prediction, "ALLOCATIONS", 3)
    monkeypatch.setattr(prediction, "SEEDS", (0,))
    model = common.tiny_model(tmp_path / "model", 64, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    data = common.texts(tmp_path / "texts.csv", 80, 64, 8)
    assert cells(["texts"])[0] == Cell("texts", 0, PROBE)
    to = tmp_path / "results"
    prediction.main(["--data", str(data), "--model", str(model), "--to", str(to)])
    made = sorted(path.stem for path in (to / "cells").iterdir())
    assert made == [f"texts-s0-{one}" for one in ("a0", "a1", "a2", "probe")]
    table = (to / "prediction.md").read_text()
    assert "spectral" in table and "| texts |" in table
