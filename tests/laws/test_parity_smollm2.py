"""Law E2 on real weights: SmolLM2-135M split between client and server against PEFT on the unsplit model.

Gradients are clipped as the default has it: the reference clips each adapted weight by its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hsplit.config import Job, Policy
from hsplit.data import restaurants
from hsplit.models.lookup import find_model
from hsplit.models.spec import ModelSpec
from tests.in_process import Recorder, coordinator, fixed_plan
from tests.laws.reference import clip_each_weight, mean_loss, peft_model

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def _assert_parity(tmp_path: Path, split: int, labels: str, base: str, steps: int) -> None:
    model = find_model(MODEL).directory
    clip, names = Job().clip, [shape.name for shape in ModelSpec.read(model).linears]
    settings = {"base": base, "local_steps": steps, "lr": 1e-3, "clip": clip, "privacy": {"labels": labels}}
    # Validation is no part of the law; two examples keep it short.
    settings |= {"validation": {"max_examples": 2}, "batch_size": 4}
    plan = fixed_plan(model, Job.model_validate(settings), [split], [8], 8)
    recorder = Recorder()
    shares = {"c0": restaurants(60, seed=1)}
    run = coordinator(model, tmp_path, plan, shares, recorder, Policy(init="shared"), **settings)
    run.run()
    client = run._executor.actors["c0"]  # type: ignore[attr-defined]  # in-process by construction

    reference = peft_model(model, base, torch.float32, 8, 16.0, "0|shared|{name}|1")
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    clipped = 0
    for step in range(steps):
        loss = mean_loss(reference, list(client.data.step_batches(step).values()))
        optimizer.zero_grad()
        loss.backward()
        clipped += clip_each_weight(reference, names, clip)
        optimizer.step()
        assert recorder.losses[step]["c0"] == pytest.approx(float(loss.detach()), rel=1e-5), step
    assert clipped


def test_e2_on_smollm2(tmp_path: Path) -> None:
    _assert_parity(tmp_path, split=4, labels="server", base="nf4", steps=4)


@pytest.mark.real
@pytest.mark.parametrize(
    ("split", "labels", "base"), [(0, "server", "fp32"), (7, "client", "nf4"), (30, "server", "int8")]
)
def test_e2_on_smollm2_over_twenty_steps(tmp_path: Path, split: int, labels: str, base: str) -> None:
    _assert_parity(tmp_path, split, labels, base, steps=20)
