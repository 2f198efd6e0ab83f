"""Turns, periods and overlap where clients fail, are late, return, and where a run stops in the middle of a period."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.config import Importance, Job, Pace, Policy
from hsplit.observe.events import read_events
from hsplit.planning.plan import Plan
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run.split_step import SplitTraining
from hsplit.run.step import Deadlines
from hsplit.run_directory import RunDirectory
from tests.faulty import Fault, FaultyInProcess
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples, reached_by, rows_of
from tests.laws.test_periods import state_of

SETTINGS: dict[str, Any] = {"base": "fp32", "rounds": 3, "local_steps": 6, "lr": 1e-2, "batch_size": 2}
MORE: dict[str, Any] = {"pipeline": {"microbatches": 2}, "grad_accumulation": 2, "dropout": 0.1, "optimizer": "adamw"}

# Of each client: split, rank, rows, group, period in local steps and offset. The last one trains nothing.
Turns = tuple[int, int, int, int, int, int]
CLIENTS: list[Turns] = [(2, 2, 2, 0, 1, 0), (1, 2, 1, 1, 2, 1), (3, 2, 3, 2, 1, 0), (2, 0, 2, 1, 2, 0)]
# Two clients whose turns are never in the same step.
ALTERNATING: list[Turns] = [(2, 2, 2, 0, 2, 0), (1, 2, 2, 0, 2, 1)]


def plan_of(model: Path, clients: Sequence[Turns], servers: int = 1, **job: Any) -> Plan:
    settings = Job.model_validate(job)
    plan = fixed_plan(model, settings, [c[0] for c in clients], [c[1] for c in clients], 2, servers)
    parts = tuple(
        replace(part, rows=rows, group=group, every=every, offset=offset)
        for part, (_, _, rows, group, every, offset) in zip(plan.clients, clients, strict=True)
    )
    return replace(plan, clients=parts, groups=3)


class Watching(Recorder):
    """A display that also looks for what a round's end should have left nothing of."""

    run: Coordinator | None = None

    def round_done(self, row: Any, holders: Any, timing: Any) -> None:
        super().round_done(row, holders, timing)
        assert self.run is not None
        training = self.run.context.training
        assert isinstance(training, SplitTraining)
        left = {name: getattr(training, name) for name in ("_fronts", "_before", "_early", "_ends", "_stepping")}
        assert not any(left.values()), left
        assert not any(training._unread.values())
        for name in self.run.context.clients:
            actor = self.run._executor.actors[name]  # type: ignore[attr-defined]  # in-process by construction
            assert not actor._sent and not actor._behind and not actor.data._begun, name
            assert not actor.holder.adapters.flat.grad.any(), name


def made(
    model: Path,
    to: Path,
    *faults: Fault,
    clients: Sequence[Turns] = CLIENTS,
    servers: int = 1,
    periods: str = "planned",
    ahead: bool = False,
    before: Any = None,
    later: dict[int, Plan] | None = None,
    directory: RunDirectory | None = None,
    after_step: Any = None,
    **job: Any,
) -> Coordinator:
    """A run by the turns of ``clients`` that is hit by ``faults``, ready to run."""
    settings = SETTINGS | job
    policy = Policy(name="hsplitlora", importance=Importance(metric="equal"), pace=Pace(periods=periods, ahead=ahead))
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(len(clients))}
    to.mkdir(exist_ok=True)
    recorder, plan = Watching(after_step), plan_of(model, clients, servers, **settings)
    inside = coordinator(model, to, plan, shares, recorder, policy, directory, later, **settings)
    run = reached_by(FaultyInProcess(inside._executor, faults, before), inside)  # type: ignore[arg-type]
    recorder.run = run
    return run


def trained(*arguments: Any, **settings: Any) -> Coordinator:
    run = made(*arguments, **settings)
    assert run.run()
    return run


def events_of(run: Coordinator, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.context.directory.events) if event["event"] in kinds]


def metrics(run: Coordinator) -> list[dict[str, Any]]:
    """Rows of metrics.csv without wall times."""
    return [{key: value for key, value in row.items() if "wall" not in key} for row in rows_of(run)]


def assert_same(one: Coordinator, other: Coordinator) -> None:
    """The same numbers to the last bit."""
    assert metrics(one) == metrics(other)
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("job", [{}, MORE, MORE | {"privacy": {"labels": "client"}}, {"clients_per_round": 2}])
def test_without_faults_only_waiting_differs(models: dict[str, Path], tmp_path: Path, job: dict[str, Any]) -> None:
    overlapped = trained(models["llama"], tmp_path / "overlapped", **job)
    assert_same(overlapped, trained(models["llama"], tmp_path / "waiting", periods="none", **job))
    assert rows_of(overlapped)[-1]["val_loss"] < rows_of(overlapped)[0]["val_loss"]


@pytest.mark.parametrize(
    ("client", "method", "nth", "kinds"),
    [
        # The second round: its begin, its middle, and its end, where no front follows a backward.
        ("c0", "forward", 7, "died hang"),
        ("c0", "forward", 9, "died hang memory refused"),
        ("c0", "backward", 9, "died hang memory"),
        ("c0", "backward", 12, "died hang memory"),
        # Every other step, and nobody else is in its group.
        ("c1", "forward", 5, "memory hang"),
        ("c1", "backward", 5, "died hang refused"),
        # The last one in a step.
        ("c2", "forward", 10, "died hang"),
        ("c2", "backward", 11, "memory hang"),
        # A step ahead.
        ("c3", "forward", 5, "died hang"),
        ("c3", "backward", 5, "memory hang"),
    ],
)
def test_a_client_that_fails_is_back_and_nothing_of_it_is_left(
    models: dict[str, Path], tmp_path: Path, client: str, method: str, nth: int, kinds: str
) -> None:
    for kind in kinds.split():
        fault = Fault(client, method, nth, kind)
        run = trained(models["llama"], tmp_path / kind, fault)
        assert run._executor.happened == [fault]  # type: ignore[attr-defined]
        events = events_of(run, "lost", "left_out", "repeated", "set_aside")
        assert {event["client"] for event in events} <= {client}
        # Too early for a deadline, a late client is waited for.
        assert [event["event"] for event in events] == ["lost"] or (kind == "hang" and not events_of(run, "lost"))
        assert [row["available_clients"] for row in rows_of(run)][-1] == len(CLIENTS)


@pytest.mark.parametrize(
    "settings",
    [MORE, MORE | {"privacy": {"labels": "client"}}, {"servers": 2}, {"clients_per_round": 2}, MORE | {"ahead": True}],
)
@pytest.mark.parametrize(
    "fault", [Fault("c0", "backward", 15), Fault("c1", "forward", 9, "hang"), Fault("c2", "forward", 16, "memory")]
)
def test_faults_with_microbatches_accumulation_servers_and_drawn_clients(
    models: dict[str, Path], tmp_path: Path, settings: dict[str, Any], fault: Fault
) -> None:
    run = trained(models["llama"], tmp_path / "run", replace(fault), **settings)
    assert all(event["client"] == fault.actor for event in events_of(run, "lost", "left_out"))
    assert not events_of(run, "repeated", "set_aside")
    assert [row["available_clients"] for row in rows_of(run)][-1] == len(CLIENTS)


def test_a_tail_that_is_late_is_left_out_though_nobody_else_is_in_its_turn(
    models: dict[str, Path], tmp_path: Path
) -> None:
    fault = Fault("c0", "tail", 8, "hang")
    run = trained(models["llama"], tmp_path / "run", fault, privacy={"labels": "client"})
    assert [(event["client"], event["step"]) for event in events_of(run, "left_out")] == [("c0", 8)]


@pytest.mark.parametrize(("client", "step", "group"), [("c0", 9, 0), ("c1", 10, 1), ("c2", 9, 2)])
def test_a_late_client_misses_its_turn_and_has_the_next(
    models: dict[str, Path], tmp_path: Path, client: str, step: int, group: int
) -> None:
    """Whatever the turn of its group, of which it is all: the first, another, the last."""
    nth = {"c0": 9, "c1": 5, "c2": 9}[client]
    run = trained(models["llama"], tmp_path / "run", Fault(client, "forward", nth, "hang"))
    assert [(event["client"], event["step"]) for event in events_of(run, "left_out")] == [(client, step)]
    calls = run._executor.calls  # type: ignore[attr-defined]
    assert calls[client, "skip"] == 1 and calls[client, "backward"] == calls[client, "forward"] - 1
    turns = sum(run.context.plan.client(client).takes_part_in(step) for step in range(18))
    assert calls[client, "forward"] == turns


def test_clients_late_in_turns_of_their_own_are_waited_for_together(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their deadlines have one begin, however long the first was waited for."""
    begins: dict[int, list[float]] = {}
    until = Deadlines.until

    def recorded(self: Deadlines, client: str, calls: Any, since: float) -> float | None:
        if "forward" in calls:
            begins.setdefault(run.state.step, []).append(since)
        return until(self, client, calls, since)

    monkeypatch.setattr(Deadlines, "until", recorded)
    run = made(models["llama"], tmp_path / "run", Fault("c0", "forward", 9, "hang"))
    assert run.run()
    assert [(event["client"], event["step"]) for event in events_of(run, "left_out")] == [("c0", 9)]
    assert all(len(own) >= 2 and len(set(own)) == 1 for own in begins.values()) and len(begins) == 18


def test_a_client_that_alone_has_a_turn_is_not_waited_for_by_those_with_another(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = trained(models["llama"], tmp_path / "run", Fault("c0", "forward", 6, "hang"), clients=ALTERNATING)
    assert [(event["client"], event["step"]) for event in events_of(run, "left_out")] == [("c0", 11)]
    assert run._executor.calls["server", "train_step"] == 17  # type: ignore[attr-defined]


def test_if_nobody_answers_everybody_is_waited_for(models: dict[str, Path], tmp_path: Path) -> None:
    """The cause is then not the clients themselves; in the round's first step no other call is under way."""
    faults = [Fault(name, "forward", 7, "hang") for name in ("c0", "c2")]
    clients = [CLIENTS[0], (1, 2, 1, 1, 2, 1), CLIENTS[2]]
    run = trained(models["llama"], tmp_path / "run", *faults, clients=clients)
    assert run._executor.happened == faults  # type: ignore[attr-defined]
    assert not events_of(run, "left_out", "lost")


def test_nan_of_a_client_that_alone_has_a_turn_is_its_own_failure(models: dict[str, Path], tmp_path: Path) -> None:
    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("c1", "forward"):
            run_calls.append(actor)
            if len(run_calls) == 5:
                with torch.no_grad():
                    client.holder.adapters.flat.fill_(float("nan"))

    run_calls: list[str] = []
    run = trained(models["llama"], tmp_path / "run", clients=ALTERNATING, before=poison)
    (lost,) = events_of(run, "lost")
    assert (lost["client"], lost["kind"]) == ("c1", "refused")
    assert not events_of(run, "repeated")


def test_a_failure_read_in_a_step_in_which_nobody_has_a_turn_repeats_nothing(
    models: dict[str, Path], tmp_path: Path
) -> None:
    clients = [(2, 2, 2, 0, 2, 0), (1, 2, 2, 1, 2, 0)]
    run = trained(models["llama"], tmp_path / "run", Fault("c1", "backward", 3, "memory"), clients=clients)
    assert [event["client"] for event in events_of(run, "lost", "repeated")] == ["c1"]


def test_a_backward_that_failed_fails_its_client_though_the_next_front_is_late(
    models: dict[str, Path], tmp_path: Path
) -> None:
    faults = [Fault("c0", "backward", 8, "memory"), Fault("c0", "forward", 9, "hang")]
    run = trained(models["llama"], tmp_path / "run", *faults)
    assert [(event["event"], event["client"]) for event in events_of(run, "left_out", "lost")] == [
        ("left_out", "c0"),
        ("lost", "c0"),
    ]
    assert run.state.member("c0").shortages == 1


def test_rounds_without_a_turn_change_nothing_for_a_client(models: dict[str, Path], tmp_path: Path) -> None:
    clients = [CLIENTS[0], (2, 2, 2, 1, 9, 8)]
    run = made(models["llama"], tmp_path / "run", clients=clients)
    assert run.run()
    # Of local steps 0 to 17 it has 8 and 17.
    assert run._executor.calls["c1", "forward"] == 2  # type: ignore[attr-defined]
    assert rows_of(run)[-1]["val_loss"] < rows_of(run)[0]["val_loss"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("c0", "backward", 9),
        Fault("c1", "forward", 5, "memory"),
        Fault("c3", "backward", 5),
        Fault("server", "train_step", 20),
        Fault("server", "end_step", 9),
    ],
)
def test_a_repeated_round_changes_no_number(models: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    job = {"faults": {"recovery": "repeat"}}
    run = trained(models["llama"], tmp_path / "hit", replace(fault), **job)
    assert len(events_of(run, "repeated")) == 1 and not events_of(run, "lost")
    assert_same(run, trained(models["llama"], tmp_path / "whole", **job))


def test_a_plan_with_other_turns_is_followed(models: dict[str, Path], tmp_path: Path) -> None:
    """Layers and ranks stay: rows, groups and periods change."""
    other: list[Turns] = [(2, 2, 1, 2, 2, 1), (1, 2, 3, 0, 1, 0), (3, 2, 1, 1, 3, 2), (2, 0, 2, 0, 1, 0)]

    def run(name: str, periods: str, *faults: Fault) -> Coordinator:
        later = {1: plan_of(models["llama"], other, **SETTINGS)}
        return trained(models["llama"], tmp_path / name, *faults, periods=periods, later=later)

    overlapped = run("overlapped", "planned")
    for part in overlapped.context.plan.clients:
        actor = overlapped._executor.actors[part.name]  # type: ignore[attr-defined]
        assert actor._part.given == part.given
    # Per client: turns and rows of a round by the first plan, and of two by the other.
    assert overlapped.state.examples == {"c0": 18, "c1": 39, "c2": 22, "c3": 30}
    assert_same(overlapped, run("waiting", "none"))
    # Lost in the round before, it returns to the plan in force.
    hit = run("hit", "planned", Fault("c1", "backward", 2), Fault("c2", "collect", 1))
    assert [event["client"] for event in events_of(hit, "lost")] == ["c1", "c2"]
    for part in hit.context.plan.clients:
        assert hit._executor.actors[part.name]._part.given == part.given  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("stop", "job"),
    [
        (2, {}),
        (9, MORE),
        (7, MORE | {"privacy": {"labels": "client"}}),
        (3, {"ahead": True}),
        (9, MORE | {"ahead": True}),
    ],
)
def test_a_run_stopped_in_the_middle_of_a_period_goes_on_as_if_it_had_not(
    models: dict[str, Path], tmp_path: Path, stop: int, job: dict[str, Any]
) -> None:
    whole = trained(models["llama"], tmp_path / "whole", **job)
    directory = RunDirectory.create(tmp_path, "stopped")
    cut = made(models["llama"], tmp_path, directory=directory, after_step=lambda step: halt(cut, step == stop), **job)
    assert not cut.run()
    for name in cut.context.clients:
        actor = cut._executor.actors[name]  # type: ignore[attr-defined]
        assert not actor._sent and not actor.data._begun
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    resumed = made(models["llama"], tmp_path, directory=directory, **job)
    assert resumed.run(checkpoint)
    assert_same(resumed, whole)


def halt(run: Coordinator, stop: bool) -> None:
    run.stopping = stop


def test_a_backward_that_failed_is_found_when_the_run_stops(models: dict[str, Path], tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "stopped")
    fault = Fault("c0", "backward", 7, "memory")
    cut = made(models["llama"], tmp_path, fault, directory=directory, after_step=lambda step: halt(cut, step == 7))
    assert not cut.run()
    assert [event["client"] for event in events_of(cut, "lost")] == ["c0"]
    resumed = made(models["llama"], tmp_path, directory=directory)
    assert resumed.run(latest_checkpoint(directory.checkpoints)[0])
    assert [row["available_clients"] for row in rows_of(resumed)][-1] == len(CLIENTS)
