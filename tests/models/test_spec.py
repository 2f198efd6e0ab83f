"""A model is read once in a process, and its meta model is built once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.api import plan
from hsplit.config import ClientConfig, Job, RunConfig, ServerConfig
from hsplit.models import spec as module
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.planning.cost.model import CostModel
from hsplit.run_directory import RunDirectory
from tests.conftest import FAMILIES
from tests.in_process import Recorder, planned_run, random_examples

pytestmark = pytest.mark.usefixtures("own_cache")

SPLIT = 2


class Counts:
    """Calls of what reads a configuration and of what builds a meta model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = self.built = 0
        read, build = ModelSpec.read, module.build_skeleton

        def counted_read(directory: Path) -> ModelSpec:
            self.reads += 1
            return read(directory)

        def counted_build(config: Any, attention: str | None) -> torch.nn.Module:
            self.built += 1
            return build(config, attention)

        monkeypatch.setattr(ModelSpec, "read", staticmethod(counted_read))
        monkeypatch.setattr(module, "build_skeleton", counted_build)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def test_a_plan_reads_the_model_once(counts: Counts, models: dict[str, Path]) -> None:
    plan("hetero", None, [f"model={models['llama']}", "max_length=16", "base=fp32", "dtype=fp32"])
    assert (counts.reads, counts.built) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_and_segments_share_one_meta_model(counts: Counts, models: dict[str, Path], family: str) -> None:
    spec = ModelSpec.read(models[family])
    spec.check_weights()
    CostModel(spec, Job(dtype="fp32", max_length=16))
    base = BaseModel(spec, "fp32", torch.float32)
    front, again = (load_segment(base, SegmentSpec(0, SPLIT, embedding=True)) for _ in range(2))
    assert front.linears.keys() == again.linears.keys() == {s.name for s in spec.linears if s.layer < SPLIT}
    assert (counts.reads, counts.built) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_share_no_module_and_leave_the_meta_model_as_it_is(models: dict[str, Path], family: str) -> None:
    spec = ModelSpec.read(models[family])
    base, part = BaseModel(spec, "fp32", torch.float32), SegmentSpec(0, spec.layers, embedding=True, tail=True)
    one, other = load_segment(base, part), load_segment(base, part)
    modules = [set(map(id, model.modules())) for model in (spec.skeleton, one, other)]
    assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    assert all(parameter.is_meta for parameter in spec.skeleton.parameters())
    # The configuration is not copied with each of them.
    assert {id(m.config) for m in one.layers.modules() if hasattr(m, "config")} <= {id(spec.skeleton.config)}


def test_a_run_in_one_process_builds_one_meta_model(counts: Counts, models: dict[str, Path], tmp_path: Path) -> None:
    job = Job(dtype="fp32", base="fp32", wire="fp32", rounds=1, local_steps=1, batch_size=2, max_length=16)
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0) for name in ("a", "b"))
    run = RunConfig(clients=clients, server=ServerConfig(memory_gb=1.0, tflops=1.0), job=job)
    shares = {client.name: random_examples(6, seed) for seed, client in enumerate(clients)}
    assert planned_run(run, models["llama"], RunDirectory.create(tmp_path, None), shares, Recorder()).run()
    assert (counts.reads, counts.built) == (1, 1)
