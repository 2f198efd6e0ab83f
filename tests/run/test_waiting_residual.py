"""Residual changes that wait: fewer bytes, a size that is told everywhere, and nothing lost."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.actors.server import AggregationReport, Server
from hsplit.config import ClientConfig, Importance, Job, Pace, Policy, RunConfig, ServerConfig
from hsplit.errors import InputError
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.observe.events import read_events
from hsplit.observe.plan_text import plan_lines
from hsplit.observe.tables import LAG, lag_text, residual_cuts
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.finished_run import finished_run
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples, rows_of
from tests.observe.test_residual_cuts import everything_said
from tests.tiny import tiny_spec


def a_run(
    model: Path, to: Path, wait: float, directory: RunDirectory | None = None, after_step: Any = None, **job: Any
) -> Coordinator:
    # Unequal ranks, so that some directions are frozen beside the residual.
    plan = fixed_plan(model, Job(), [2, 3], [2, 4], 4)
    shares = {f"c{i}": random_examples(12, i) for i in range(2)}
    settings = {"rounds": 4, "local_steps": 2, "lr": 1e-3, **job, "residual": {"max_rank": 8}}
    policy = Policy(importance=Importance(metric="equal"), pace=Pace(residual_wait=wait))
    return coordinator(model, to, plan, shares, Recorder(after_step), policy, directory, **settings)


def lags_of(run: Coordinator) -> dict[int, float]:
    return residual_cuts(read_events(run.context.directory.events), field=LAG)


@pytest.mark.parametrize("base", ["nf4", "fp32"])
def test_what_waits_is_not_sent_and_is_all_there_at_the_end(models: dict[str, Path], tmp_path: Path, base: str) -> None:
    runs = {wait: a_run(models["llama"], tmp_path / str(wait), wait, base=base) for wait in (0.0, 0.9)}
    for run in runs.values():
        assert run.run()
    assert set(lags_of(runs[0.0]).values()) == {0.0}
    *waited, last = lags_of(runs[0.9]).values()
    assert all(0 < lag <= 0.9 for lag in waited) and last == 0
    sent = {wait: [row["bytes_down"] for row in rows_of(run)] for wait, run in runs.items()}
    assert all(less < more for less, more in zip(sent[0.9][1:-1], sent[0.0][1:-1], strict=True))
    # The last validation is of the model that is exported.
    path, _ = latest_checkpoint(runs[0.9].context.directory.checkpoints)
    assert not [key for key in read_checkpoint(path)[1]["server"] if key.startswith("held.")]


@pytest.mark.parametrize("base", ["nf4", "fp32"])
@pytest.mark.parametrize("stop", [4, 5])
def test_a_run_that_is_resumed_while_changes_wait_ends_as_an_uninterrupted_one(
    models: dict[str, Path], tmp_path: Path, base: str, stop: int
) -> None:
    def run(to: str, directory: RunDirectory | None = None, after_step: Any = None) -> Coordinator:
        # A threshold that some rounds pass and others do not.
        return a_run(models["llama"], tmp_path / to, 0.02, directory, after_step, base=base)

    whole = run("whole")
    assert whole.run()
    interrupted = run("cut", None, lambda step: setattr(interrupted, "stopping", step == stop))
    assert not interrupted.run()
    directory = interrupted.context.directory
    path, _ = latest_checkpoint(directory.checkpoints)
    assert any(key.startswith("held.") for key in read_checkpoint(path)[1]["server"])
    resumed = run("cut", directory)
    assert resumed.run(path)
    for one, other in zip(rows_of(resumed), rows_of(whole), strict=True):
        assert {k: v for k, v in one.items() if not k.endswith("wall_time_s")} == {
            k: v for k, v in other.items() if not k.endswith("wall_time_s")
        }
    ends = [read_checkpoint(latest_checkpoint(r.context.directory.checkpoints)[0])[1] for r in (resumed, whole)]
    for holder, tensors in ends[0].items():
        assert tensors.keys() == ends[1][holder].keys()
        assert all(torch.equal(tensor, ends[1][holder][key]) for key, tensor in tensors.items())


def test_nothing_waits_where_the_plan_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    plan = replace(fixed_plan(models["llama"], Job(), [2, 3], [2, 4], 4), waits=False)
    assert "do not wait" in "\n".join(plan_lines(plan))
    policy = Policy(importance=Importance(metric="equal"), pace=Pace(residual_wait=0.9))
    shares = {f"c{i}": random_examples(12, i) for i in range(2)}
    settings = {"rounds": 3, "local_steps": 2, "lr": 1e-3, "base": "fp32"}
    run = coordinator(models["llama"], tmp_path, plan, shares, Recorder(), policy, **settings)
    assert run.run()
    assert set(lags_of(run).values()) == {0.0}


def test_changes_wait_only_beside_a_server_with_memory_for_it() -> None:
    """With the least memory with which they wait a plan has the largest ranks; with less nothing waits."""
    clients = [ClientConfig(name=f"c{i}", kind="c", memory_gb=1.0, tflops=1.0) for i in range(3)]
    job = Job(dtype="fp32", base="nf4", batch_size=2, max_length=32)

    def planned(memory_bytes: float, wait: float) -> Plan:
        server = ServerConfig(memory_gb=memory_bytes / 1e9, tflops=1.0)
        policy = Policy(pace=Pace(residual_wait=wait))
        return Scheduler(RunConfig(server=server, clients=clients, job=job, policy=policy), tiny_spec("llama")).plan()

    low, high = 0.0, 1e9
    assert planned(high, 0.5).waits
    while high - low > 1000:
        middle = (low + high) / 2
        try:
            low, high = (low, middle) if planned(middle, 0.5).waits else (middle, high)
        except InputError:
            low = middle
    tight = planned(low, 0.5)
    assert not tight.waits and tight.server.rank_total > 0
    # Where nothing waits, plans are those of a policy in which nothing may.
    assert replace(tight, waits=True) == planned(low, 0.0)
    ample = planned(high, 0.5)
    assert ample.server.predicted_bytes <= high
    assert set(ample.server.ranks.values()) == {max(job.rank_set)}
    assert ample.exchange_s < tight.exchange_s


@pytest.mark.parametrize("base", ["nf4", "fp32"])
def test_plans_count_the_bytes_that_a_round_sends_while_changes_wait(
    models: dict[str, Path], tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of clients at the largest rank; of one that only computes forward the restart alone."""
    reports: list[AggregationReport] = []
    aggregate = Server.aggregate

    @wraps(aggregate)
    def spied(server: Server, round_: int, *held: HeldAdapters) -> tuple[AggregationReport, *tuple[RoundUpdate, ...]]:
        found = aggregate(server, round_, *held)
        reports.append(found[0])
        return found

    monkeypatch.setattr(Server, "aggregate", spied)
    pace, settings = (
        Pace(residual_wait=0.9),
        {"rounds": 3, "local_steps": 2, "lr": 1e-3, "base": base, "rank_set": [1, 4]},
    )
    job = Job.model_validate({"dtype": "fp32", **settings})
    plan, policy = fixed_plan(models["llama"], job, [2, 3, 2], [4, 4, 0], 4), Policy(pace=pace)
    shares = {f"c{i}": random_examples(12, i) for i in range(3)}
    assert coordinator(models["llama"], tmp_path, plan, shares, Recorder(), policy, **settings).run()

    # A byte a second, over a link without latency.
    link = ClientConfig(name="c", kind="c", memory_gb=1.0, tflops=1.0, bandwidth_mbps=8e-6, latency_ms=0.0)
    times = CostModel(tiny_spec("llama"), job, pace).times
    for report in reports[:-1]:
        for part in plan.clients:
            counted = times.exchange_times([link], forward_only=part.forward_only)[0, part.split] * job.local_steps
            assert report.nbytes_up.get(part.name, 0) + report.nbytes_down[part.name] == pytest.approx(counted), (
                part.name
            )
    # After the last round all that waited is sent.
    assert all(reports[-1].nbytes_down[part.name] > reports[0].nbytes_down[part.name] for part in plan.clients)


def test_what_holders_lacked_is_told_everywhere(models: dict[str, Path], tmp_path: Path) -> None:
    run = finished_run(tmp_path, models["llama"], residual_wait=0.9)
    text = lag_text(residual_cuts(read_events(run.directory.events), field=LAG))
    assert "in 1 of 2 rounds" in text
    for place, said in everything_said(run, tmp_path / "said").items():
        assert text in unescape(said), place
