"""Microbatches do not change the result, and clients have work while the server computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsplit.config import Job, Policy
from hsplit.planning.cost.step_time import pipelined_s
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples


def _one_step(model: Path, to: Path, labels: str, microbatches: int) -> tuple[dict[str, Any], Any]:
    """Parameters of every holder after one SGD step at rate 1: the start less the gradients."""
    settings: dict[str, Any] = {
        "base": "fp32",
        "batch_size": 4,
        "local_steps": 1,
        "optimizer": "sgd",
        "lr": 1.0,
        "privacy": {"labels": labels},
        "pipeline": {"microbatches": microbatches},
    }
    plan = fixed_plan(model, Job.model_validate(settings), [1, 3], [3, 3], 3)
    shares = {f"c{i}": random_examples(12, i) for i in range(2)}
    recorder = Recorder()
    run = coordinator(model, to / str(microbatches), plan, shares, recorder, Policy(init="shared"), **settings)
    run.start()
    run.local_step(0)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    return {name: actors[name].state()["parameters"] for name in ("c0", "c1", "server")}, recorder.losses


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("microbatches", [3, 4])
def test_gradients_equal_those_of_whole_batches(
    models: dict[str, Path], tmp_path: Path, family: str, labels: str, microbatches: int
) -> None:
    whole, losses = _one_step(models[family], tmp_path, labels, 1)
    cut, losses_cut = _one_step(models[family], tmp_path, labels, microbatches)
    for name, parameters in whole.items():
        assert (cut[name] - parameters).norm() / parameters.norm() < 1e-6
        assert cut[name].ne(0).any()
    for one, other in zip(losses, losses_cut, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_every_part_is_asked_for_before_the_server_has_done_the_first(
    models: dict[str, Path], tmp_path: Path, labels: str
) -> None:
    settings: dict[str, Any] = {
        "base": "fp32",
        "local_steps": 1,
        "privacy": {"labels": labels},
        "pipeline": {"microbatches": 2},
    }
    plan = fixed_plan(models["llama"], Job.model_validate(settings), [2], [2], 2)
    run = coordinator(models["llama"], tmp_path, plan, {"c0": random_examples(8, 0)}, Recorder(), **settings)
    run.start()
    asked = []
    executor = run._executor
    perform = executor.perform  # type: ignore[attr-defined]  # in-process by construction

    def watched(actor: str, method: str, *arguments: Any) -> Any:
        asked.append((actor, method, arguments[1] if len(arguments) > 1 else None))
        return perform(actor, method, *arguments)

    executor.perform = watched  # type: ignore[attr-defined]
    run.local_step(0)
    # An actor works through its own calls in this order.
    client = [(method, part) for actor, method, part in asked if actor == "c0"]
    server = [(method, part) for actor, method, part in asked if actor == "server"]
    tails = [("tail", 0), ("tail", 1)] if labels == "client" else []
    assert client == [("forward", 0), ("forward", 1), *tails, ("backward", 0), ("backward", 1)]
    if labels == "server":
        assert server == [("train_step", 0), ("train_step", 1), ("end_step", None)]
    else:
        assert server == [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("end_step", None)]


def test_one_part_takes_the_phases_one_after_another() -> None:
    clients = np.array([[1.0, 0.0, 3.0], [2.0, 0.0, 0.5]])
    assert pipelined_s(clients, 1.0, 2.0, 1, turns=False) == 2 + 3 + 3
    clients[:, 1] = [0.25, 0.5]
    assert pipelined_s(clients, 1.0, 2.0, 1, turns=True) == 2 + 1 + 0.5 + 2 + 3


@pytest.mark.parametrize(("server_s", "expected"), [(8.0, 8 + 4 / 4), (4.0, 4 + 4 / 4), (2.0, 4.0)])
def test_the_slower_side_waits_for_one_part_at_most(server_s: float, expected: float) -> None:
    clients = np.array([[1.5, 0.0, 2.5]])
    assert pipelined_s(clients, server_s / 3, server_s * 2 / 3, 4, turns=False) == pytest.approx(expected)


def test_parts_never_take_longer_and_never_less_than_the_slower_side() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        clients = draw.uniform(0, 1, (3, 3))
        forward_s, backward_s = draw.uniform(0, 2, 2)
        for turns in (False, True):
            if not turns:
                clients[:, 1] = 0
            whole = pipelined_s(clients, forward_s, backward_s, 1, turns=turns)
            cut = pipelined_s(clients, forward_s, backward_s, 4, turns=turns)
            assert max(clients.sum(axis=1).max(), forward_s + backward_s) <= cut + 1e-12
            assert cut <= whole + 1e-12
