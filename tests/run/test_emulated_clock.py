"""``clock: emulated``: each holder takes at least the time that its budget declares (METHOD 8)."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from hsplit.config import ClientConfig, Job, Policy, RunConfig
from hsplit.config.cluster import ServerConfig
from hsplit.observe.tables import TimingRow, read_rows
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, planned_run, random_examples

STEPS = 2


def _run(model: Path, to: Path, recorder: Recorder, policy: str = "hsplitlora", **changes: Any) -> Coordinator:
    settings = {"base": "fp32", "dtype": "fp32", "rounds": 1, "local_steps": STEPS, "max_length": 16, **changes}
    clients = tuple(
        ClientConfig(name=f"c{i}", kind="c", memory_gb=1.0, tflops=1e-3 * (i + 1), bandwidth_mbps=20, latency_ms=1)
        for i in range(2)
    )
    placement = "full" if policy == "fedlora" else "split"
    rules: dict[str, Any] = {"placement": placement} | ({"split": 2} if placement == "split" else {})
    if placement == "full":
        rules |= {"ranks": "uniform", "aggregation": "fedavg", "init": "shared"}
    run = RunConfig(
        clients=clients,
        server=ServerConfig(memory_gb=1.0, tflops=1e-3),
        job=Job.model_validate({"model": str(model), "clock": "emulated", **settings}),
        policy=Policy.model_validate({"name": policy, "importance": {"metric": "equal"}, **rules}),
    )
    shares = {client.name: random_examples(8, i) for i, client in enumerate(clients)}
    return planned_run(run, model, RunDirectory.create(to, None), shares, recorder)


def _timed_calls(run: Coordinator) -> dict[tuple[str, str], list[float]]:
    """Wall seconds of every call from now on, by actor and method."""
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    perform = run._executor.perform  # type: ignore[attr-defined]  # in-process by construction

    def timed(actor: str, method: str, *arguments: Any) -> Any:
        begun = time.perf_counter()
        value = perform(actor, method, *arguments)
        took[actor, method].append(time.perf_counter() - begun)
        return value

    run._executor.perform = timed  # type: ignore[attr-defined]
    return took


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_holder_takes_its_declared_time(
    models: dict[str, Path], tmp_path: Path, labels: str, microbatches: int
) -> None:
    recorder = Recorder()
    changes: dict[str, Any] = {"privacy": {"labels": labels}, "pipeline": {"microbatches": microbatches}}
    run = _run(models["llama"], tmp_path, recorder, **changes)
    took = _timed_calls(run)
    run.run()
    declared = run.context.clock.call_s(run.context.plan)
    client, server = {"forward": "up", "backward": "down"}, {"train_step": "step"}
    if labels == "client":
        client, server = {**client, "tail": "turn"}, {"forward": "forward", "backward": "backward"}
    for name, methods in (("c0", client), ("c1", client), ("server", server)):
        for method, what in methods.items():
            seconds = took[name, method]
            assert len(seconds) == STEPS * microbatches
            # No holder is early. One that computes longer than declared is named in a note.
            expected = sum(s for call, s in declared[name].items() if call.split()[0] == what)
            assert min(seconds) >= expected > 0
    # All of a round is paced: steps, aggregation, validation.
    (start, last) = recorder.rows
    assert last.wall_time_s - start.wall_time_s >= 0.95 * (last.virtual_time_s - start.virtual_time_s)


def test_speedup_divides_the_time_and_who_cannot_keep_up_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder()
    run = _run(models["llama"], tmp_path, recorder, clock_speedup=1e9)
    run.run()
    (note,) = [text for text in recorder.notes if "emulated" in text]
    assert "c0, c1, server computed longer than declared" in note and "job.clock_speedup" in note
    assert recorder.rows[-1].virtual_time_s > 0


def test_whole_models_are_paced_too(models: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder()
    run = _run(models["llama"], tmp_path, recorder, policy="fedlora")
    took = _timed_calls(run)
    run.run()
    declared = run.context.clock.call_s(run.context.plan)
    for name in ("c0", "c1"):
        assert len(took[name, "train_step"]) == STEPS
        assert min(took[name, "train_step"]) >= declared[name]["up"] > 0


def test_a_holders_phases_sum_to_the_steps(models: dict[str, Path], tmp_path: Path) -> None:
    run = _run(models["llama"], tmp_path, Recorder(), clock="real")
    run.run()
    rows = read_rows(run.context.directory.timing, TimingRow)
    sums = {name: sum(row.seconds for row in rows if row.name == name) for name in ("c0", "c1", "server")}
    assert sums["c0"] == pytest.approx(sums["server"]) == pytest.approx(sums["c1"])
    assert {row.phase for row in rows if row.name == "server"} >= {"unpack", "forward", "tail", "backward", "optimizer"}
    assert {row.phase for row in rows if row.name == "c0"} >= {"data", "forward", "pack", "backward", "optimizer"}
    assert not any(row.phase == "paced" for row in rows)
