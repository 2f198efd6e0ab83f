"""Reports on real runs: split, with the whole model on each client or on one node; stopped, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsplit.config import ClientConfig, Job, Policy, RunConfig, ServerConfig
from hsplit.config.cluster import CENTRAL
from hsplit.observe.events import read_events
from hsplit.report.run_record import load_run
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, planned_run, random_examples
from tests.report.test_report import assert_self_contained, report_of

SPLIT: dict[str, Any] = {"ranks": 4}
FULL = {"placement": "full", "ranks": 4, "aggregation": "hetlora", "init": "shared"}
SINGLE = {"placement": "single", "ranks": 4, "aggregation": "none", "moments": "keep", "init": "shared"}
WEIGHTS = {"placement": "single", "train": "weights", "aggregation": "none", "moments": "keep"}
JOB: dict[str, Any] = {"dtype": "fp32", "wire": "fp32", "rounds": 2, "local_steps": 2, "max_length": 24} | {
    "residual": {"max_rank": "full"}  # nothing is cut of what is aggregated by concat
}
NAMES = ("phone", "laptop")


def a_run(policy: dict[str, Any]) -> RunConfig:
    return RunConfig(
        clients=tuple(ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0) for name in NAMES),
        server=ServerConfig(),
        job=Job.model_validate(JOB),
        policy=Policy.model_validate({"name": "tested", "importance": {"metric": "equal"}, **policy}),
    )


def started(run: RunConfig, model: Path, directory: RunDirectory, recorder: Recorder) -> Coordinator:
    run.save(directory.config)
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    return planned_run(run, model, directory, shares, recorder)


@pytest.mark.parametrize(
    ("policy", "trained_by", "aggregated"),
    [
        (SPLIT, NAMES, "the adapters were summed exactly in every round"),
        (FULL, NAMES, "adapters padded and averaged, which is not noise-free"),
        (SINGLE, (CENTRAL,), "nothing aggregated"),
        (WEIGHTS, (CENTRAL,), "nothing aggregated"),
    ],
)
def test_a_complete_run_of_each_placement(
    models: dict[str, Path], tmp_path: Path, policy: dict[str, Any], trained_by: tuple[str, ...], aggregated: str
) -> None:
    directory = RunDirectory.create(tmp_path / "runs", "made")
    assert started(a_run(policy), models["llama"], directory, Recorder()).run()
    html, page = report_of(tmp_path / "report.html", directory.path)
    assert_self_contained(html, page)
    record = load_run(directory.path)
    assert record.state == "complete"
    assert set(record.client_tokens) == set(trained_by)
    assert sum(record.client_tokens.values()) == record.metrics[-1].tokens
    assert " in 2 rounds, taking " in page.lead and aggregated in page.lead
    data = "with 2 of 2 clients (phone, laptop)" if trained_by == NAMES else "on one node with the data of 2 clients"
    assert data in page.lead
    assert ("\nholds no layer\n" in page.text) == (policy is not SPLIT)
    assert ("\nall weights\n" in page.text) == (policy is WEIGHTS)
    for tokens in record.client_tokens.values():
        assert f"\n{tokens:,}\n" in page.text


def test_a_run_that_was_stopped_inside_a_round_and_resumed(models: dict[str, Path], tmp_path: Path) -> None:
    run, first = a_run(SPLIT), Recorder()
    whole = RunDirectory.create(tmp_path / "runs", "whole")
    started(run, models["llama"], whole, Recorder()).run()

    cut = RunDirectory.create(tmp_path / "runs", "cut")
    interrupted = started(run, models["llama"], cut, first)
    first.after_step = lambda step: setattr(interrupted, "stopping", step == 3)
    assert not interrupted.run()
    _, page = report_of(tmp_path / "stopped.html", cut.path)
    assert " in 1 of 2 rounds (stopped), taking " in page.lead

    checkpoint, _ = latest_checkpoint(cut.checkpoints)
    assert started(run, models["llama"], cut, Recorder()).run(checkpoint)
    html, page = report_of(tmp_path / "resumed.html", cut.path)
    assert_self_contained(html, page)
    assert " in 2 rounds, taking " in page.lead
    assert f"resumed from {checkpoint.name}" in page.text
    assert load_run(cut.path).client_tokens == load_run(whole.path).client_tokens
    rounds = [event for event in read_events(cut.events) if event["event"] == "round"]
    assert [sum(event["client_tokens"].values()) for event in rounds] == [event["tokens"] for event in rounds]
