"""Clients with wire formats of their own: what travels, what is counted, and that the random rounding is repeated."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsplit.actors.messages import Activations, WireTensor
from hsplit.config import Job
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.planning.plan import Plan
from hsplit.planning.wire import WIRES, row_bytes, wires_within
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.recording import Recording

CLIENTS, WIDTH = ("c0", "c1", "c2"), 32


def planned(model: Path, splits: tuple[int, ...], wires: tuple[str, ...]) -> Plan:
    plan = fixed_plan(model, Job(), splits, [2] * len(splits), 2)
    return replace(plan, clients=tuple(replace(c, wire=w) for c, w in zip(plan.clients, wires, strict=True)))


def a_run(model: Path, to: Path, plan: Plan, recorder: Recorder, **job: Any) -> Coordinator:
    shares = {name: random_examples(20, seed) for seed, name in enumerate(CLIENTS)}
    settings = {"max_length": 24, "local_steps": 2, "validation": {"max_examples": 3}, **job}
    return coordinator(model, to, plan, shares, recorder, **settings)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wires=st.tuples(*[st.sampled_from(("", *wires_within("fp32")))] * 3),
    splits=st.tuples(*[st.integers(0, 3)] * 3),
    labels=st.sampled_from(["server", "client"]),
    microbatches=st.integers(1, 2),
)
def test_each_message_has_its_clients_format_and_is_counted(
    models: dict[str, Path], wires: tuple[str, ...], splits: tuple[int, ...], labels: str, microbatches: int
) -> None:
    recorder = Recorder()
    job = {"wire": "bf16", "privacy": {"labels": labels}, "pipeline": {"microbatches": microbatches}}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsplit.run.in_process.InProcess", Recording)
        made = a_run(models["llama"], Path(folder), planned(models["llama"], splits, wires), recorder, **job)
        assert made.run()
        executor: Any = made._executor
    expected = {name: wire or "bf16" for name, wire in zip(CLIENTS, wires, strict=True)}
    sent, received, methods = 0, 0, set()
    for passed in executor.passed:
        value = passed.value
        if passed.actor not in CLIENTS or not isinstance(value, (Activations, WireTensor, HeldAdapters, RoundUpdate)):
            continue
        methods.add(passed.method)
        sent += value.nbytes if passed.way == "returned" else 0
        received += value.nbytes if passed.way == "given" else 0
        tensor = value.hidden if isinstance(value, Activations) else value
        if isinstance(tensor, WireTensor):
            assert tensor.wire == expected[passed.actor], (passed.actor, passed.method)
            assert tensor.nbytes == tensor.shape[0] * row_bytes(tensor.wire, WIDTH)
    assert methods >= {"forward", "validation_forward"} and ("tail" in methods) == (labels == "client")
    assert sum(row.bytes_up for row in recorder.rows) == sent
    assert sum(row.bytes_down for row in recorder.rows) == received


def test_seeds_are_of_the_sender_the_step_and_the_part_alone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hsplit.run.in_process.InProcess", Recording)
    job = {"wire": "int4", "privacy": {"labels": "client"}, "pipeline": {"microbatches": 2}}
    found = []
    for number, splits in enumerate([(1, 2, 3), (3, 1, 2)]):
        plan = planned(models["llama"], splits, ("", "", ""))
        made = a_run(models["llama"], tmp_path / str(number), plan, Recorder(), **job)
        assert made.run()
        executor: Any = made._executor
        tensors = [
            (p.actor, p.method, p.way, p.value.hidden if isinstance(p.value, Activations) else p.value)
            for p in executor.passed
            if p.actor in CLIENTS and isinstance(p.value, (Activations, WireTensor))
        ]
        trained = [(*what, tensor.seed) for *what, tensor in tensors if "validation" not in what[1]]
        # Four messages for each of three clients, two steps and two parts; each is rounded by numbers of its own.
        assert len({seed for *_, seed in trained}) == len(trained) == 48
        found.append(set(trained))
    assert found[0] == found[1]


def test_a_run_with_random_rounding_is_repeated_and_resumed_to_the_bit(models: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(models["llama"], (1, 2, 3), ("int4", "int8", ""))
    job = {"wire": "int4", "rounds": 3, "privacy": {"labels": "client"}}
    whole, again, other = Recorder(), Recorder(), Recorder()
    assert a_run(models["llama"], tmp_path / "whole", plan, whole, **job).run()
    assert a_run(models["llama"], tmp_path / "again", plan, again, **job).run()
    assert again.losses == whole.losses
    assert a_run(models["llama"], tmp_path / "other", plan, other, **job, seed=1).run()
    assert other.losses != whole.losses
    first, second = Recorder(), Recorder()
    cut = a_run(models["llama"], tmp_path / "cut", plan, first, **job)
    first.after_step = lambda step: setattr(cut, "stopping", step == 3)
    assert not cut.run()
    checkpoint, _ = latest_checkpoint(cut.context.directory.checkpoints)
    resumed = a_run(models["llama"], tmp_path, plan, second, directory=cut.context.directory, **job)
    assert resumed.run(checkpoint)
    assert [*first.losses, *second.losses] == whole.losses
    assert [row.val_loss for row in (*first.rows, *second.rows)] == [row.val_loss for row in whole.rows]


@pytest.mark.parametrize("wire", WIRES)
def test_a_plan_is_read_with_its_formats_and_no_others(models: dict[str, Path], wire: str) -> None:
    plan = planned(models["llama"], (1, 2, 3), (wire, "", "int8"))
    data = plan.to_json()
    assert Plan.from_json(data) == plan
    data["clients"][0]["wire"] = wire + "x"
    with pytest.raises(ValueError, match="wire"):
        Plan.from_json(data)
