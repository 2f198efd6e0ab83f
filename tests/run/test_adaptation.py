"""Runs whose plans change: by scheduled and requested budgets, importance, clients that join or leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hsplit.actors.executor import ActorFailure
from hsplit.api import change_budget
from hsplit.config import ClientConfig, Job, Policy, RunConfig, ScheduledChange, ServerConfig
from hsplit.errors import InputError
from hsplit.models.spec import ModelSpec
from hsplit.observe.events import read_events
from hsplit.planning.cost.model import CostModel
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.inbox import post_budget, take_requests
from hsplit.run.state import RunState
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, planned_run, random_examples
from tests.tiny import LAYERS

JOB = Job(dtype="fp32", wire="fp32", base="nf4", rounds=4, local_steps=2, batch_size=2, max_length=16, clip=None)


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["llama"]


def bytes_for(model: Path, split: int, rank: int, job: Job = JOB) -> float:
    cost = CostModel(ModelSpec.read(model), job)
    return float(cost.client_bytes(split, {w.name: rank for w in cost.model.weights if w.layer < split}))


def a_run(model: Path, policy: Policy | None = None, **schedule: tuple[ScheduledChange, ...]) -> RunConfig:
    """Three clients with room for one, two and all layers; fast ones, so that deep splits pay."""
    sizes = {"small": bytes_for(model, 1, 8), "middle": bytes_for(model, 2, 16), "large": bytes_for(model, LAYERS, 32)}
    clients = tuple(
        ClientConfig(name=n, kind=n, memory_gb=size * 1.001 / 1e9, tflops=1.0, schedule=schedule.get(n, ()))
        for n, size in sizes.items()
    )
    return RunConfig(
        clients=clients,
        server=ServerConfig(memory_gb=1.0, tflops=0.001),
        job=JOB,
        policy=policy or Policy(),
    )


def shares(run: RunConfig) -> dict[str, Any]:
    return {c.name: random_examples(12, seed) for seed, c in enumerate(run.clients)}


def plans_by_round(directory: RunDirectory) -> dict[int, dict[str, Any]]:
    """Plans by the round at whose end they were made."""
    return {e["round"]: e["plan"] for e in read_events(directory.events) if e["event"] == "planned"}


def part(plan: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in plan["clients"] if c["name"] == name)


def test_a_budget_that_shrinks_shrinks_the_plan_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    less = ScheduledChange(round=3, memory_gb=bytes_for(model, 1, 1) * 1.001 / 1e9)
    run = a_run(model, large=(less,))
    directory, recorder = RunDirectory.create(tmp_path, "run"), Recorder()
    assert planned_run(run, model, directory, shares(run), recorder).run()
    plans = plans_by_round(directory)
    first, last = plans[0], plans[2]
    assert part(first, "large")["split"] > part(last, "large")["split"] == 1
    assert part(last, "large")["predicted_bytes"] <= run.clients[2].changed(less.values()).memory_bytes
    assert any("planned anew after round 2: the budget of large is now memory_gb" in note for note in recorder.notes)
    assert [row.round for row in recorder.rows] == [0, 1, 2, 3, 4]
    assert recorder.rows[-1].val_loss < recorder.rows[0].val_loss


def test_a_client_that_no_longer_fits_leaves_and_comes_back(model: Path, tmp_path: Path) -> None:
    whole = bytes_for(model, 2, 16) * 1.001 / 1e9
    away = (ScheduledChange(round=2, memory_gb=1e-6), ScheduledChange(round=4, memory_gb=whole))
    run = a_run(model, middle=away)
    recorder = Recorder()
    directory = RunDirectory.create(tmp_path, "run")
    assert planned_run(run, model, directory, shares(run), recorder).run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 2, 2, 3]
    assert any(note.startswith("middle is unavailable: it lacks") for note in recorder.notes)


def test_importance_is_probed_and_blended_and_decides_the_plan(model: Path, tmp_path: Path) -> None:
    run = a_run(model, Policy.model_validate({"importance": {"back_off": False}}))
    directory = RunDirectory.create(tmp_path, "run")
    planned_run(run, model, directory, shares(run), Recorder()).run()
    scores = [e for e in read_events(directory.events) if e["event"] == "importance"]
    assert [e["round"] for e in scores] == [1, 2, 3]
    weights = {w.name for w in CostModel(ModelSpec.read(model), JOB).model.weights}
    assert all(e["scores"].keys() == weights for e in scores)
    plans = plans_by_round(directory)
    assert "equal importance" in plans[0]["importance"]
    assert plans[1]["importance"] == "probes until round 1"


@pytest.mark.parametrize(("back_off", "probed"), [(True, [1, 3, 7]), (False, [1, 2, 3, 4, 5, 6, 7])])
def test_the_next_probe_waits_twice_as_long_where_importance_has_settled(
    model: Path, tmp_path: Path, back_off: bool, probed: list[int]
) -> None:
    settled = {"importance": {"back_off": back_off}, "replan": {"tau": 2.0}}
    run = a_run(model, Policy.model_validate(settled))
    run = run.model_copy(update={"job": run.job.model_copy(update={"rounds": 8})})
    directory = RunDirectory.create(tmp_path, "run")
    recorder = Recorder()
    first = planned_run(run, model, directory, shares(run), recorder)
    first.run()
    assert [e["round"] for e in read_events(directory.events) if e["event"] == "importance"] == probed
    # A run that is resumed from a checkpoint probes in the same rounds.
    resumed = RunState.from_json(json.dumps(first.state.to_json()), "here").planning
    assert [round_ for round_ in range(8, 20) if resumed.probe_due(round_)][:1] == ([15] if back_off else [8])


@pytest.mark.parametrize(
    ("rank_set", "probed", "unprobed"), [([4], [], [1, 2, 3, 4, 5, 6, 7]), ([1, 2, 4, 8, 16], [1, 2], [])]
)
def test_importance_that_can_move_nobody_is_not_probed(
    model: Path, tmp_path: Path, rank_set: list[int], probed: list[int], unprobed: list[int]
) -> None:
    run = a_run(model, Policy.model_validate({"replan": {"tau": 0.0}, "freeze": "never", "split": 1}))
    job = run.job.model_copy(update={"rounds": 8, "rank_set": rank_set})
    run = run.model_copy(update={"job": job})
    directory, recorder = RunDirectory.create(tmp_path, "run"), Recorder()
    assert planned_run(run, model, directory, shares(run), recorder).run()
    events = read_events(directory.events)
    found = [e["round"] for e in events if e["event"] == "importance"]
    # With one rank to choose from there is nothing to decide; with many, ranks follow importance.
    assert found[:2] == probed
    assert [e["round"] for e in events if e["event"] == "unprobed"] == unprobed
    assert {e["round"] for e in events if e["event"] == "replanned"} == set(found)


def test_without_a_reason_the_plan_stays(model: Path, tmp_path: Path) -> None:
    run = a_run(model, Policy.model_validate({"importance": {"metric": "equal"}}))
    directory = RunDirectory.create(tmp_path, "run")
    planned_run(run, model, directory, shares(run), Recorder()).run()
    assert list(plans_by_round(directory)) == [0]


def test_a_plan_that_still_fits_stays_for_min_rounds(model: Path, tmp_path: Path) -> None:
    run = a_run(model, Policy.model_validate({"replan": {"min_rounds": 3, "tau": 0.0}}))
    directory = RunDirectory.create(tmp_path, "run")
    planned_run(run, model, directory, shares(run), Recorder()).run()
    assert list(plans_by_round(directory)) == [0, 3]


def test_a_plan_that_no_longer_fits_does_not_wait(model: Path, tmp_path: Path) -> None:
    less = ScheduledChange(round=2, memory_gb=bytes_for(model, 1, 1) * 1.001 / 1e9)
    run = a_run(
        model, Policy.model_validate({"replan": {"min_rounds": 3}, "importance": {"metric": "equal"}}), large=(less,)
    )
    directory = RunDirectory.create(tmp_path, "run")
    planned_run(run, model, directory, shares(run), Recorder()).run()
    assert list(plans_by_round(directory)) == [0, 1]


def test_when_nobody_fits_the_run_fails_and_names_the_round(model: Path, tmp_path: Path) -> None:
    none = (ScheduledChange(round=3, memory_gb=1e-6),)
    run = a_run(model, small=none, middle=none, large=none)
    directory = saved(run, tmp_path)
    failing = planned_run(run, model, directory, shares(run), Recorder())
    with pytest.raises(ActorFailure, match="scheduler failed in review: clients: none has the memory") as failure:
        failing.run()
    assert failing.state.round == 2
    last, _ = latest_checkpoint(directory.checkpoints)
    assert last.name == "round-0002"
    # The advised command works: the run continues.
    assert f"hsplit budget {directory.path} NAME memory_gb=GB" in str(failure.value)
    change_budget(directory.path, "large", [f"memory_gb={run.clients[2].memory_gb}"])
    assert planned_run(run, model, directory, shares(run), Recorder()).run(last)


def test_a_measured_overrun_shrinks_that_clients_plan(model: Path, tmp_path: Path) -> None:
    run = a_run(model, Policy.model_validate({"importance": {"metric": "equal"}}))
    recorder = Recorder()
    directory = RunDirectory.create(tmp_path, "run")
    running = planned_run(run, model, directory, shares(run), recorder)
    actors = running._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    took = iter([0, 2 * run.clients[2].memory_bytes, *[0] * 9])
    actors["large"].peak_bytes = lambda: next(took)
    running.run()
    plans = plans_by_round(directory)
    assert list(plans) == [0, 1]
    assert part(plans[1], "large")["predicted_bytes"] <= 0.51 * run.clients[2].memory_bytes
    assert any("more than it declared" in note for note in recorder.notes)


# -- the inbox ----------------------------------------------------------------------------------------------------


def saved(run: RunConfig, tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.create(tmp_path, "run")
    run.save(directory.config)
    return directory


def test_a_request_is_taken_at_the_next_rounds_end(model: Path, tmp_path: Path) -> None:
    run = a_run(model, Policy.model_validate({"importance": {"metric": "equal"}}))
    directory, recorder = saved(run, tmp_path), Recorder()
    less = bytes_for(model, 1, 1) * 1.001 / 1e9

    def ask(step: int) -> None:
        if step == 3:
            change_budget(directory.path, "large", [f"memory_gb={less}"])

    recorder.after_step = ask
    planned_run(run, model, directory, shares(run), recorder).run()
    plans = plans_by_round(directory)
    assert list(plans) == [0, 2]
    assert part(plans[2], "large")["split"] == 1
    asked = [e for e in read_events(directory.events) if e["event"] == "budget"]
    assert [(e["round"], e["holder"]) for e in asked] == [(2, "large")]


def test_a_resumed_run_takes_the_same_requests_at_the_same_round(model: Path, tmp_path: Path) -> None:
    run = a_run(model)
    less = {"memory_gb": bytes_for(model, 1, 1) * 1.001 / 1e9}
    rows = []
    for name, stop in (("whole", False), ("broken", True)):
        run_dir = tmp_path / name
        run_dir.mkdir()
        directory, recorder = saved(run, run_dir), Recorder()
        going = planned_run(run, model, directory, shares(run), recorder)

        def watch(step: int, going: Any = going, directory: RunDirectory = directory, stop: bool = stop) -> None:
            if step == 1:
                post_budget(directory, "large", less)
            if stop and step == 5:
                raise KeyboardInterrupt

        recorder.after_step = watch
        if stop:
            # As a kill would, in round 3, after the request was taken at the end of round 1: back to an earlier one.
            with pytest.raises(KeyboardInterrupt):
                going.run()
            first = directory.checkpoints / "round-0001"
            again = Recorder()
            assert planned_run(run, model, directory, shares(run), again).run(first)
            rows.append(recorder.rows[:2] + again.rows)
        else:
            assert going.run()
            rows.append(recorder.rows)
        assert part(plans_by_round(directory)[1], "large")["split"] == 1
    whole, broken = rows
    assert [row.val_loss for row in broken] == [row.val_loss for row in whole]
    assert [row.virtual_time_s for row in broken] == [row.virtual_time_s for row in whole]
    assert [row.bytes_up for row in broken] == [row.bytes_up for row in whole]


def test_wrong_requests_are_refused_with_what_is_right(model: Path, tmp_path: Path) -> None:
    directory = saved(a_run(model), tmp_path)
    for holder, values, text in (
        ("nobody", ["memory_gb=1"], "has no holder 'nobody'; it has: small, middle, large, server"),
        ("small", ["memory_gb=-1"], "the budget of small: memory_gb: must be"),
        ("small", ["memory=1"], "the budget of small: memory: unknown key"),
        ("small", ["memory_gb"], "memory_gb: must be FIELD=VALUE"),
        ("server", ["latency_ms=1"], "latency_ms: it has only memory_gb, tflops"),
    ):
        with pytest.raises(InputError) as refused:
            change_budget(directory.path, holder, values)
        assert text in str(refused.value)
    assert list(directory.inbox.iterdir()) == []


def test_a_broken_request_is_named_and_left_out(model: Path, tmp_path: Path) -> None:
    directory = saved(a_run(model), tmp_path)
    (directory.inbox / "1.json").write_text("{")
    (directory.inbox / "2.json").write_text(json.dumps({"request": "party"}))
    post_budget(directory, "small", {"tflops": 2})
    requests, refused = take_requests(directory.inbox, 1)
    assert [(r.holder, r.values) for r in requests] == [("small", {"tflops": 2.0})]
    assert [text.partition(" is no request")[0] for text in refused] == ["inbox: 1.json", "inbox: 2.json"]
    assert take_requests(directory.inbox, 1)[0] == requests
    assert take_requests(directory.inbox, 2) == ([], [])
