"""Clients' learning rates make up for the shorter mean of their steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hsplit.config import Importance, Job, Policy
from hsplit.lora.optimizer import learning_rate
from hsplit.run.coordinator import Coordinator
from hsplit.run.state import Status
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples

SETTINGS: dict[str, Any] = {"base": "fp32", "rounds": 2, "local_steps": 2, "lr": 1e-2}


def made(model: Path, to: Path, scaling: str, ranks: tuple[int, ...] = (2, 2, 2), servers: int = 1, **job: Any) -> Any:
    settings = SETTINGS | job
    plan = fixed_plan(model, Job.model_validate(settings), [2, 1, 2], list(ranks), 2, servers)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(3)}
    policy = Policy(init="shared", importance=Importance(metric="equal"), lr_scaling=scaling)
    return coordinator(model, to, plan, shares, Recorder(), policy, **settings)


def rates(run: Coordinator) -> dict[str, float]:
    """The last learning rate of each holder's optimizer."""
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    names = [*run.context.clients, *run.context.servers]
    return {name: actors[name].holder._optimizer.param_groups[0]["lr"] for name in names}


def stepped(run: Coordinator) -> dict[str, float]:
    run.start()
    run.begin_round()
    run.local_step(0)
    usual = learning_rate(0, 4, SETTINGS["lr"], run._job.schedule, run._job.warmup)
    return {name: rate / usual for name, rate in rates(run).items()}


def test_each_of_n_clients_steps_with_the_root_of_n_times_the_rate(models: dict[str, Path], tmp_path: Path) -> None:
    n = math.sqrt(3)
    found = stepped(made(models["llama"], tmp_path, "sqrt"))
    assert found == pytest.approx({"c0": n, "c1": n, "c2": n, "server": 1.0})


def test_who_only_computes_forward_is_not_counted(models: dict[str, Path], tmp_path: Path) -> None:
    found = stepped(made(models["llama"], tmp_path, "sqrt", ranks=(0, 2, 2)))
    assert (found["c1"], found["c2"]) == pytest.approx((math.sqrt(2), math.sqrt(2)))


def test_several_servers_are_averaged_too(models: dict[str, Path], tmp_path: Path) -> None:
    found = stepped(made(models["llama"], tmp_path, "sqrt", servers=2))
    assert {name: rate for name, rate in found.items() if name.startswith("server")} == pytest.approx(
        {"server": math.sqrt(2), "server-1": math.sqrt(2)}
    )


@pytest.mark.parametrize("changed", [{"scaling": "none"}, {"scaling": "sqrt", "optimizer": "sgd"}])
def test_a_mean_of_plain_gradients_needs_none(models: dict[str, Path], tmp_path: Path, changed: dict[str, str]) -> None:
    found = stepped(made(models["llama"], tmp_path, **changed))
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_who_is_lost_is_no_longer_counted(models: dict[str, Path], tmp_path: Path) -> None:
    run = made(models["llama"], tmp_path, "sqrt", rounds=3)
    stepped(run)
    run.local_step(1)
    run.aggregate()
    run.state.round += 1
    run.state.member("c1").status = Status.LOST
    run.begin_round()
    run.local_step(2)
    usual = learning_rate(2, 6, SETTINGS["lr"], run._job.schedule, run._job.warmup)
    assert {c: rates(run)[c] / usual for c in ("c0", "c2")} == pytest.approx({"c0": math.sqrt(2), "c2": math.sqrt(2)})
