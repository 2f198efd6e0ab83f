"""Law E5 on real weights: the scores of SmolLM2-135M under the shipped settings, in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsplit.config import Importance, Job
from hsplit.data import restaurants
from hsplit.models.lookup import find_model
from hsplit.run.probe import probe_importance
from tests.probing import probed_actors, sums_by_client

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Largest relative difference of a weight's score. What bf16 rounds depends on which rows share a batch, and each layer
# adds to it; where the model is split decides which rows do.
BOUND = {"fp32": 1e-5, "bf16": 0.1}


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _scores(model: Path, dtype: str, splits: list[int]) -> dict[str, float]:
    job = Job.model_validate({"dtype": dtype, "wire": dtype, "rounds": 1})
    actors = probed_actors(model, job, splits, plain=True, data=restaurants)
    reports = probe_importance(actors, {"server": ["c0", "c1"]}, 1, Importance().tokens, "server").reports
    return {f"{c}:{name}": value for c, own in sums_by_client(reports).items() for name, value in own.items()}


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_e5_on_smollm2(dtype: str) -> None:
    model = find_model(MODEL).directory
    unsplit = _scores(model, dtype, [0, 0])
    for splits in ([7, 15], [30, 4]):
        found = _scores(model, dtype, splits)
        assert found.keys() == unsplit.keys()
        error = max(abs(found[name] / value - 1) for name, value in unsplit.items())
        assert error <= BOUND[dtype], splits
