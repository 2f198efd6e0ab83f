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


def steps(run: Coordinator) -> dict[str, dict[int, float]]:
    """The longest last step of each holder's layers, in units of the job's rate at that step."""
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    holders = {name: actors[name].holder for name in [*run.context.clients, *run.context.servers]}
    step, total = run.state.step, run._job.rounds * run._job.local_steps
    before = {name: holder.adapters.flat.detach().clone() for name, holder in holders.items()}
    run.local_step(step)
    usual = learning_rate(step, total, SETTINGS["lr"], run._job.schedule, run._job.warmup)
    found: dict[str, dict[int, float]] = {}
    for name, holder in holders.items():
        moved, adapters = holder.adapters.flat.detach() - before[name], holder.adapters
        for weight in adapters.names:
            layer = adapters.layer(weight)
            longest = max(float(moved[at : at + math.prod(shape)].abs().max()) for at, shape in adapters.spans(weight))
            found.setdefault(name, {})[layer] = max(found.get(name, {}).get(layer, 0.0), longest / usual)
    return found


def stepped(run: Coordinator) -> dict[str, dict[int, float]]:
    """The first step of each holder's layers: that of AdamW is as long as the rate."""
    run.start()
    run.begin_round()
    return steps(run)


def roots(*holders: int) -> Any:
    """Of the numbers of holders of some layers, which begin at the first or end at the last."""
    return [pytest.approx(math.sqrt(count), rel=1e-3) for count in holders]


def by_layer(found: dict[str, dict[int, float]]) -> dict[str, list[float]]:
    return {name: [own[layer] for layer in sorted(own)] for name, own in found.items()}


def test_a_layers_rate_grows_with_the_root_of_its_holders(models: dict[str, Path], tmp_path: Path) -> None:
    """Layer 0 is on three clients, layer 1 on two and for the third on the server, which has the others alone."""
    found = by_layer(stepped(made(models["llama"], tmp_path, "sqrt")))
    layers = len(found["server"]) + 1
    assert found == {"c0": roots(3, 3), "c1": roots(3), "c2": roots(3, 3), "server": roots(3, *[1] * (layers - 2))}


def test_who_only_computes_forward_is_not_counted(models: dict[str, Path], tmp_path: Path) -> None:
    found = by_layer(stepped(made(models["llama"], tmp_path, "sqrt", ranks=(0, 2, 2))))
    assert (found["c1"], found["c2"]) == (roots(2), roots(2, 2))
    assert found["server"][:2] == roots(2, 1)


def test_several_servers_are_averaged_too(models: dict[str, Path], tmp_path: Path) -> None:
    found = by_layer(stepped(made(models["llama"], tmp_path, "sqrt", servers=2)))
    # Layer 1 is left to a server by one client alone, which one of them serves.
    assert found["c0"] == roots(3, 3)
    assert found["server"][:2] == roots(3, 2)
    assert found["server-1"][:2] == [0.0, *roots(2)]


@pytest.mark.parametrize("changed", [{"scaling": "none"}, {"scaling": "sqrt", "optimizer": "sgd"}])
def test_a_mean_of_plain_gradients_needs_none(models: dict[str, Path], tmp_path: Path, changed: dict[str, str]) -> None:
    run = made(models["llama"], tmp_path, **changed)
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    found = by_layer(stepped(run))
    holders = {name: actors[name].holder for name in found}
    assert not any(actors[name]._lr_scales for name in found)
    usual = learning_rate(0, 4, SETTINGS["lr"], run._job.schedule, run._job.warmup)
    assert {holder._optimizer.param_groups[0]["lr"] for holder in holders.values()} == {usual}
    if "optimizer" not in changed:
        assert all(own == roots(*[1] * len(own)) for own in found.values())


def test_who_is_lost_is_no_longer_counted(models: dict[str, Path], tmp_path: Path) -> None:
    run = made(models["llama"], tmp_path, "sqrt", rounds=3)
    actors = run._executor.actors  # type: ignore[attr-defined]
    stepped(run)
    run.local_step(1)
    run.aggregate()
    run.state.round += 1
    run.state.member("c1").status = Status.LOST
    run.begin_round()
    # Layer 0 on two clients, layer 1 too, which nobody leaves to the server any more.
    assert actors["c0"]._lr_scales == {0: math.sqrt(2), 1: math.sqrt(2), 2: 1.0, 3: 1.0}
