"""Law E5 for scores that come out of a training backward, which changes nothing in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsplit.actors.executor import InProcess
from hsplit.config import Policy
from hsplit.data.batches import Batch
from hsplit.lora import importance_probe
from hsplit.observe.events import read_events
from hsplit.planning.importance import ImportanceReport, mean_report, scores
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, coordinator, fixed_plan, planned_run, random_examples, rows_of
from tests.laws.reference import keep_double
from tests.probing import effective_model, job_of, probed_actors, shapes_of, sums_by_autograd, sums_by_client
from tests.run.test_adaptation import a_run, shares
from tests.tiny import LAYERS

TOKENS = 7
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}

laws = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


def trained(executor: InProcess, labels: str, watched: bool = True) -> list[ImportanceReport]:
    """One local step of all clients, in which weights are scored."""
    server, clients = executor.actors["server"], [a for n, a in executor.actors.items() if n != "server"]
    for client in clients:
        client.begin_round(0, 0)
        if watched:
            client.watch(0, TOKENS)
    messages = [client.forward(0, 0)[1] for client in clients]
    if labels == "server":
        _, *gradients = server.train_step(0, 0, *messages)
    else:
        _, *deep = server.forward(0, 0, *messages)
        slopes = [client.tail(0, 0, output)[1] for client, output in zip(clients, deep, strict=True)]
        _, *gradients = server.backward(0, 0, [client.name for client in clients], *slopes)
    server.end_step(0)
    for client, gradient in zip(clients, gradients, strict=True):
        client.backward(0, 0, gradient)
    return [report for actor in executor.actors.values() for report in actor.take_scores()]


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    splits=st.lists(st.integers(0, LAYERS), min_size=1, max_size=4),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "nf4"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
)
@example(family="llama", splits=[0, 2, 4], labels="server", base="nf4", dtype="fp32")
@example(family="gpt2", splits=[3, 0, 1], labels="client", base="nf4", dtype="fp64")
def test_e5_scores_of_a_training_step_do_not_depend_on_the_split_points(
    models: dict[str, Path], family: str, splits: list[int], labels: str, base: str, dtype: str
) -> None:
    model, job = models[family], job_of(base, dtype=dtype, wire=dtype, privacy={"labels": labels})
    found = sums_by_client(trained(probed_actors(model, job, splits), labels))
    expected = sums_by_client(trained(probed_actors(model, job, [0] * len(splits)), labels))
    assert found.keys() == expected.keys() == {f"c{i}" for i in range(len(splits))}
    for client, own in found.items():
        assert own.keys() == {shape.name for shape in shapes_of(model, job)}
        assert own == pytest.approx(expected[client], rel=TOLERANCE[dtype]), client


@pytest.mark.parametrize("splits", [[0, 2, 4], [3, 1]])
@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("watched", [importance_probe.WATCHED_TOKENS, 5])
def test_e5_spectra_of_a_training_step_do_not_depend_on_the_split_points(
    models: dict[str, Path], splits: list[int], labels: str, watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance_probe, "WATCHED_TOKENS", watched)
    model, job = models["llama"], job_of("nf4", dtype="fp64", wire="fp64", privacy={"labels": labels})
    found, expected = (
        scores(trained(probed_actors(model, job, at, metric="spectral"), labels), shapes_of(model, job), "spectral")
        for at in (splits, [0] * len(splits))
    )
    for name, curve in found.items():
        assert isinstance(curve, tuple) and curve[-1] > 0
        assert curve == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("labels", ["server", "client"])
def test_they_are_autograds_for_the_first_examples(
    models: dict[str, Path], labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance_probe, "WATCHED_ROWS", 1)
    model, job = models["llama"], job_of("nf4", dtype="fp64", wire="fp64", privacy={"labels": labels})
    actors = probed_actors(model, job, [2, 1])
    batches = {name: actors.actors[name].data.step_batches(0)[0] for name in ("c0", "c1")}
    reports = trained(actors, labels)
    unsplit, shapes = effective_model(model, job, torch.float64), shapes_of(model, job)
    found, tokens = sums_by_client(reports), {report.client: report.tokens for report in reports}
    for client, batch in batches.items():
        carried = (batch.targets != -100).sum(dim=1).cumsum(0).tolist()
        examples = next(i for i, count in enumerate(carried, 1) if count >= TOKENS)
        assert tokens[client] == carried[examples - 1] >= TOKENS
        first = Batch(batch.ids[:examples], batch.targets[:examples], batch.lengths[:examples])
        assert found[client] == pytest.approx(sums_by_autograd(unsplit, first, shapes), rel=1e-11)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_training_does_not_know_that_it_is_watched(models: dict[str, Path], labels: str) -> None:
    states = []
    for watched in (False, True):
        actors = probed_actors(models["llama"], job_of("nf4", privacy={"labels": labels}, dropout=0.2), [0, 3])
        assert bool(trained(actors, labels, watched)) == watched
        states.append({name: actor.state() for name, actor in actors.actors.items()})
    for name, plain in states[0].items():
        assert all(torch.equal(tensor, states[1][name][key]) for key, tensor in plain.items())


@pytest.mark.parametrize("periods", ["none", 2])
@pytest.mark.parametrize("ahead", [False, True])
def test_clients_that_train_nothing_are_scored_and_stay_as_they_are(
    models: dict[str, Path], tmp_path: Path, periods: str | int, ahead: bool
) -> None:
    """Also where they run ahead of the others: not in the step that scores them."""
    policy, pipeline = Policy.model_validate({"pace": {"periods": periods}}), {"ahead": ahead}
    plan = fixed_plan(models["llama"], job_of("nf4"), [2, 1], [0, 4], 4)
    data = {f"c{i}": random_examples(12, i) for i in range(2)}
    settings: dict[str, Any] = {"rounds": 2, "local_steps": 2, "base": "nf4", "batch_size": 4, "pipeline": pipeline}
    run = coordinator(models["llama"], tmp_path, plan, data, Recorder(), policy, **settings)
    run.start()
    run.begin_round()
    run.local_step(0)
    assert run.state.probe is None
    run.local_step(1)
    assert run.state.probe is not None
    assert run.state.probe.scores.keys() == set(plan.weights) and run.state.probe.tokens > 0
    assert run._executor.actors["c0"].holder.adapters.names == []  # type: ignore[attr-defined]


def test_a_mean_report_gives_the_scores_of_all_of_them(models: dict[str, Path]) -> None:
    model, job = models["llama"], job_of("fp32")
    reports, shapes = trained(probed_actors(model, job, [1, 3]), "server"), shapes_of(model, job)
    names = [shape.name for shape in shapes]
    mean = mean_report(reports, names)
    assert mean is not None
    assert scores([mean], shapes) == pytest.approx(scores(reports, shapes))
    # A client of which a holder has reported nothing does not count.
    alone = mean_report([report for report in reports if report.client == "c0" or len(report.scores) > 10], names)
    assert alone is not None and alone.tokens < mean.tokens
    assert mean_report([ImportanceReport("c0", 3, {})], names) is None


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["llama"]


def test_a_review_takes_them_instead_of_a_probe_also_after_a_resumption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_probe(self: Any) -> Any:
        raise AssertionError("the scores of the last step are there")

    monkeypatch.setattr(Coordinator, "_probe", no_probe)
    run = a_run(model, Policy.model_validate({"replan": {"tau": 0.05}, "importance": {"back_off": False}}))
    whole = planned_run(run, model, RunDirectory.create(tmp_path, "whole"), shares(run), Recorder())
    assert whole.run()
    found = [e for e in read_events(whole.context.directory.events) if e["event"] == "importance"]
    assert [event["round"] for event in found] == list(range(1, run.job.rounds))
    directory, recorder = RunDirectory.create(tmp_path, "cut"), Recorder()
    first = planned_run(run, model, directory, shares(run), recorder)
    # Right after the scores were found.
    recorder.after_step = lambda step: setattr(first, "stopping", step == run.job.local_steps)
    assert not first.run()
    path, _ = latest_checkpoint(directory.checkpoints)
    resumed = planned_run(run, model, directory, shares(run), Recorder())
    assert resumed.run(path)
    for one, other in zip(rows_of(resumed), rows_of(whole), strict=True):
        assert {k: v for k, v in one.items() if not k.endswith("wall_time_s")} == {
            k: v for k, v in other.items() if not k.endswith("wall_time_s")
        }
