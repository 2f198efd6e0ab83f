"""A small complete run on disk, made in this process, for tests of evaluation and export."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.config import ClientConfig, Importance, Job, Pace, Policy, RunConfig
from hsplit.models.lookup import find_model
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint, save_checkpoint
from hsplit.run.inputs import read_inputs
from hsplit.run.state import RunState
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, coordinator, fixed_plan
from tests.tiny import WORDS

PROMPTS, REFERENCES = 20, 3


@dataclass(frozen=True)
class FinishedRun:
    """A run's directory, and its inputs."""

    directory: RunDirectory
    config: RunConfig
    data: Path
    model: Path

    @property
    def path(self) -> Path:
        return self.directory.path

    def checkpoint(self) -> tuple[RunState, dict[str, dict[str, Tensor]]]:
        return read_checkpoint(latest_checkpoint(self.directory.checkpoints)[0])

    def replace_checkpoint(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Put other tensors into the newest checkpoint."""
        state, _ = self.checkpoint()
        name = latest_checkpoint(self.directory.checkpoints)[0].name
        save_checkpoint(self.directory.checkpoints, name, state, tensors, keep=2)


def write_data(path: Path, prompts: int = PROMPTS, references: int = REFERENCES, seed: int = 0) -> Path:
    """``mr,ref`` rows of the tiny tokenizer's words, several references a prompt."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(draw.randint(low, high)))

    rows = []
    for _ in range(prompts):
        prompt = words(2, 6)
        rows += [f"{prompt},{words(3, 9)}" for _ in range(references)]
    path.write_text("mr,ref\n" + "\n".join(rows) + "\n")
    return path


def finished_run(
    folder: Path,
    model: Path,
    splits: tuple[int, int] = (1, 3),
    ranks: tuple[int, int] = (2, 4),
    residual_wait: float = 0.0,
    **job: Any,
) -> FinishedRun:
    """Two rounds over two clients, of four layers one and three with them; large steps so that much is learned."""
    source = write_data(folder / "data.csv")
    settings = {
        "dtype": "fp32",
        "wire": "fp32",
        "rounds": 2,
        "local_steps": 3,
        "lr": 1e-2,
        "validation": {"share": 0.2},
        "data": {"source": str(source), "test": 0.2},
        **job,
    }
    wanted = Job.model_validate({"model": str(model), **settings})
    policy = Policy(
        importance=Importance(metric="equal"), description="for tests", pace=Pace(residual_wait=residual_wait)
    )
    plan = fixed_plan(model, wanted, splits, ranks, 4)
    clients = tuple(ClientConfig(name=c.name, kind=c.name, memory_gb=1.0, tflops=1.0) for c in plan.clients)
    config = RunConfig(clients=clients, job=wanted, policy=policy)
    inputs = read_inputs(config, find_model(str(model)))
    directory = RunDirectory.create(folder / "runs", "tiny")
    known = {"policy": policy, "directory": directory, "data_sha256": inputs.data_sha256}
    made = coordinator(model, folder, plan, inputs.shares, Recorder(), **known, **settings)
    assert made.run()
    config.save(directory.config)
    return FinishedRun(directory, config, source, model)


def logits_of(model: Any, seed: int = 0) -> Tensor:
    """Logits over random ids, the same for every model."""
    ids = torch.randint(2, WORDS, (3, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids).logits.double()
