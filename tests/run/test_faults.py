"""The coordinator's handling of actors that fail, in this process; for Ray see tests/cluster/test_drill.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hsplit.actors.executor import ActorFailure
from hsplit.actors.messages import Activations, WireTensor
from hsplit.config import Importance, Job, Policy
from hsplit.observe.events import read_events
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run.state import Status
from hsplit.run.step import SLACK_S, Deadlines
from hsplit.run_directory import RunDirectory
from tests.faulty import Fault, FaultyInProcess
from tests.in_process import Recorder, coordinator, fixed_plan, holders_of, random_examples, reached_by, rows_of

CLIENTS = 3
SETTINGS: dict[str, Any] = {"base": "fp32", "rounds": 3, "local_steps": 3, "lr": 1e-2, "batch_size": 2}
FULL_FINE_TUNING = yaml.safe_load((Path(__file__).parents[2] / "policies" / "ft.yaml").read_text()) | {"name": "ft"}
SPLIT_PHASES = ("forward", "backward", "collect", "restart", "validation_forward", "state")


def run_with(
    model: Path,
    to: Path,
    *faults: Fault,
    before: Any = None,
    recorder: Recorder | None = None,
    servers: int = 1,
    **job: Any,
) -> Coordinator:
    """A run of three clients that is hit by ``faults``; the first two hold the first two layers, the third three."""
    to.mkdir(exist_ok=True)
    settings = SETTINGS | job
    plan = fixed_plan(model, Job.model_validate({**settings, "dtype": "fp32"}), [2, 2, 3], [2, 2, 2], 2, servers)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(CLIENTS)}
    made = coordinator(model, to, plan, shares, recorder or Recorder(), **settings)
    faulty = FaultyInProcess(made._executor, faults, before)  # type: ignore[arg-type]
    made = reached_by(faulty, made)
    made.run()
    return made


def events_of(run: Coordinator, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.context.directory.events) if event["event"] in kinds]


def metrics(run: Coordinator) -> list[dict[str, Any]]:
    """Rows of metrics.csv without wall times."""
    return [{k: v for k, v in row.items() if not k.endswith("wall_time_s")} for row in rows_of(run)]


@pytest.fixture(scope="module")
def undisturbed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return metrics(run_with(models["llama"], tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize("kind", ["died", "after"])
@pytest.mark.parametrize("phase", SPLIT_PHASES)
def test_a_client_that_dies_in_any_phase_is_back_for_the_next_round(
    models: dict[str, Path], tmp_path: Path, undisturbed: list[dict[str, Any]], phase: str, kind: str
) -> None:
    # In the second round, after each phase has happened once.
    nth = {"forward": 5, "backward": 5, "collect": 2, "restart": 3, "validation_forward": 3, "state": 3}[phase]
    fault = Fault("c1", phase, nth, kind)
    run = run_with(models["llama"], tmp_path, fault)
    assert run._executor.happened == [fault]  # type: ignore[attr-defined]
    lost, returned = events_of(run, "lost", "returned")
    assert (lost["client"], returned["client"]) == ("c1", "c1") and lost["round"] == 2
    assert not events_of(run, "repeated", "set_aside")
    found = metrics(run)
    assert [row["available_clients"] for row in found] == [3] * 4
    assert found[:2] == undisturbed[:2], "nothing changes before the fault"
    # Rounds that a client misses a part of have fewer tokens, and learn nearly the same.
    assert found[-1]["val_ppl"] == pytest.approx(undisturbed[-1]["val_ppl"], rel=0.05)
    assert found[-1]["val_ppl"] < undisturbed[0]["val_ppl"]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_the_others_train_on_without_the_lost_one(models: dict[str, Path], tmp_path: Path, labels: str) -> None:
    """A round with a lost client equals the round of the others alone, with their own weights."""
    settings = {"rounds": 1, "privacy": {"labels": labels}}
    method = "tail" if labels == "client" else "forward"
    run = run_with(models["llama"], tmp_path / "lost", Fault("c2", method, 1), **settings)
    trained = rows_of(run)[1]
    others = fixed_plan(models["llama"], Job.model_validate(SETTINGS), [2, 2], [2, 2], 2)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(2)}
    (tmp_path / "others").mkdir()
    alone = coordinator(models["llama"], tmp_path / "others", others, shares, Recorder(), **SETTINGS | settings)
    alone.run()
    expected = rows_of(alone)[1]
    assert trained["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert trained["tokens"] == expected["tokens"]
    ours, theirs = run._executor.actors["server"], alone._executor.actors["server"]  # type: ignore[attr-defined]
    for name, residual in theirs.aggregator.residuals.items():
        mine = ours.aggregator.residuals[name]
        torch.testing.assert_close(mine.factors.dense(), residual.factors.dense(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("actor", "method", "nth"),
    [
        ("server", "train_step", 5),
        ("server", "aggregate", 2),
        ("server", "evaluate", 4),
        ("server", "state", 1),
        ("server", "state", 3),
        ("scheduler", "review", 1),
        ("scheduler", "review", 2),
        ("server", "configure", 1),
        ("c0", "configure", 1),
        ("scheduler", "first", 1),
    ],
)
def test_server_and_scheduler_may_die_and_no_number_changes(
    models: dict[str, Path], tmp_path: Path, undisturbed: list[dict[str, Any]], actor: str, method: str, nth: int
) -> None:
    run = run_with(models["llama"], tmp_path, Fault(actor, method, nth))
    assert metrics(run) == undisturbed
    (repeated,) = events_of(run, "repeated")
    assert repeated["actor"] == actor and "is repeated from" in repeated["text"]


@pytest.fixture(scope="module")
def undisturbed_servers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return metrics(run_with(models["llama"], tmp_path_factory.mktemp("servers"), servers=2))


@pytest.mark.parametrize(
    ("actor", "method", "nth"),
    [
        ("server-1", "configure", 1),
        ("server-1", "train_step", 5),
        ("server-1", "collect", 2),
        ("server-1", "restart", 3),
        ("server-1", "evaluate", 3),
        ("server-1", "state", 3),
        ("server", "aggregate", 2),
    ],
)
def test_any_of_several_servers_may_die_and_no_number_changes(
    models: dict[str, Path],
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    undisturbed_servers: list[dict[str, Any]],
    actor: str,
    method: str,
    nth: int,
) -> None:
    assert undisturbed_servers != undisturbed, "two servers train apart"
    run = run_with(models["llama"], tmp_path, Fault(actor, method, nth), servers=2)
    assert metrics(run) == undisturbed_servers
    (repeated,) = events_of(run, "repeated")
    assert repeated["actor"] == actor


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_client_of_the_second_server_may_die(models: dict[str, Path], tmp_path: Path, labels: str) -> None:
    # Dealt out by split: c0 and c2 are the first server's, c1 is all that the second has.
    run = run_with(models["llama"], tmp_path, Fault("c1", "backward", 5), servers=2, privacy={"labels": labels})
    lost, returned = events_of(run, "lost", "returned")
    assert (lost["client"], returned["client"]) == ("c1", "c1")
    assert [row["available_clients"] for row in metrics(run)] == [3] * 4


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_server_that_loses_its_last_client_in_mid_step_takes_the_step(
    models: dict[str, Path], tmp_path: Path, labels: str, accumulation: int
) -> None:
    """Else its gradients would count in a later step and a later round."""
    parts = {"grad_accumulation": 2} if accumulation == 2 else {"pipeline": {"microbatches": 2}}
    settings: dict[str, Any] = {"rounds": 1, "local_steps": 1, "privacy": {"labels": labels}, **parts}
    stepped = []

    def watch(actor: str, method: str, instance: Any) -> None:
        if actor == "server-1" and method == "collect":
            stepped.append((dict(instance._step_tokens), float(instance.adapters.flat.grad.abs().sum())))
            stepped.append(instance.holder.tokens.by_layer())

    run = run_with(models["llama"], tmp_path, Fault("c1", "forward", 2), before=watch, servers=2, **settings)
    assert [event["client"] for event in events_of(run, "lost")] == ["c1"]
    (left, gradient), trained = stepped
    assert (left, gradient) == ({}, 0.0)
    if labels == "server" or accumulation == 2:
        assert sum(trained.values()) > 0, "it has trained on the part that came"


def test_the_only_client_of_a_round_may_be_lost_in_mid_step(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {"rounds": 2, "pipeline": {"microbatches": 2}, "clients_per_round": 1, "seed": 3}
    kept: list[dict[int, int]] = []

    def watch(actor: str, method: str, instance: Any) -> None:
        if actor == "server" and method == "aggregate":
            kept.append(dict(instance._step_tokens))

    drawn = run_with(models["llama"], tmp_path / "undisturbed", **settings)
    (first, *_) = [event["clients"][0] for event in events_of(drawn, "cohort")]
    run = run_with(models["llama"], tmp_path / "lost", Fault(first, "forward", 2), before=watch, **settings)
    assert [event["client"] for event in events_of(run, "lost")] == [first]
    assert kept == [{}, {}]
    assert [row["available_clients"] for row in metrics(run)] == [3, 3, 3]


@pytest.mark.parametrize("phase", SPLIT_PHASES)
def test_with_recovery_by_repeating_a_dead_client_changes_no_number(
    models: dict[str, Path], tmp_path: Path, undisturbed: list[dict[str, Any]], phase: str
) -> None:
    nth = 2 if phase == "collect" else 3
    run = run_with(models["llama"], tmp_path, Fault("c1", phase, nth), faults={"recovery": "repeat"})
    assert metrics(run) == undisturbed
    assert len(events_of(run, "repeated")) == 1 and not events_of(run, "lost")


def test_a_client_that_fails_too_often_is_set_aside_and_named(models: dict[str, Path], tmp_path: Path) -> None:
    fault = Fault("c1", "forward", 1, times=3)
    run = run_with(models["llama"], tmp_path, fault, rounds=4, faults={"max_failures": 2})
    lost = events_of(run, "lost")
    assert [event["failures"] for event in lost] == [1, 2, 3]
    ends = [event["text"].partition("; the others go on")[2] for event in lost]
    assert ends[1] == ", and it is begun anew (failure 2; more than 2 set a client aside)"
    assert ends[2] == " (failure 3; more than 2 set a client aside)"
    (aside,) = events_of(run, "set_aside")
    assert "c1 has failed 3 times and is set aside" in aside["text"]
    assert [row["available_clients"] for row in rows_of(run)] == [3, 3, 3, 2, 2]
    assert run.state.with_status(Status.ASIDE) == ["c1"]


def test_a_round_that_fails_again_and_again_ends_the_run(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ActorFailure, match="server failed in train_step: the test says so") as failure:
        run_with(models["llama"], tmp_path, Fault("server", "train_step", 4, "error", times=10))
    assert failure.value.actor == "server"
    (run,) = tmp_path.iterdir()
    assert len([event for event in read_events(run / "events.jsonl") if event["event"] == "repeated"]) == 3
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["round-0000", "round-0001"]


@pytest.mark.parametrize("labels", ["server", "client"])
def test_what_cannot_be_right_is_refused_by_name(models: dict[str, Path], tmp_path: Path, labels: str) -> None:
    """A client with NaN in its adapters harms neither the others' steps nor the aggregation."""

    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("c1", "forward") and run_calls["n"] == 4:
            with torch.no_grad():
                client.holder.adapters.flat.fill_(float("nan"))
        run_calls["n"] += (actor, method) == ("c1", "forward")

    run_calls = {"n": 0}
    run = run_with(models["llama"], tmp_path, before=poison, privacy={"labels": labels})
    (lost,) = events_of(run, "lost")
    assert (lost["client"], lost["kind"], lost["round"]) == ("c1", "refused", 2)
    assert "values that are no numbers (NaN or infinite)" in lost["text"]
    assert all(row["val_loss"] < 10 for row in rows_of(run))
    assert rows_of(run)[-1]["available_clients"] == 3


def test_adapters_that_are_no_numbers_are_not_aggregated(models: dict[str, Path], tmp_path: Path) -> None:
    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("c0", "collect") and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                client.holder.adapters.flat[-1] = float("inf")

    poisoned: list[bool] = []
    run = run_with(models["llama"], tmp_path, before=poison)
    (lost,) = events_of(run, "lost")
    assert (lost["client"], lost["kind"]) == ("c0", "refused") and "it handed in an adapter of" in lost["text"]
    assert rows_of(run)[-1]["val_loss"] < rows_of(run)[0]["val_loss"]


def test_a_wrong_shape_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    def cut(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("c2", "forward"):
            client._message = lambda *given, **named: _without_a_row(type(client)._message(client, *given, **named))

    run = run_with(models["llama"], tmp_path, before=cut, rounds=1, faults={"max_failures": 1})
    assert [event["kind"] for event in events_of(run, "lost")] == ["refused"]
    assert "it sent activations of shape" in events_of(run, "lost")[0]["text"]


def _without_a_row(message: Activations) -> Activations:
    hidden = message.hidden.unpack(torch.float32, "cpu")[1:]
    return Activations(**{**vars(message), "hidden": WireTensor.pack(hidden, "fp32")})


@pytest.mark.parametrize(
    ("method", "labels"), [("forward", "server"), ("backward", "server"), ("tail", "client"), ("backward", "client")]
)
def test_a_straggler_is_left_out_of_the_step_not_of_the_round(
    models: dict[str, Path], tmp_path: Path, method: str, labels: str
) -> None:
    fault = Fault("c1", method, 5, "hang")
    run = run_with(models["llama"], tmp_path, fault, privacy={"labels": labels})
    assert run._executor.happened == [fault]  # type: ignore[attr-defined]
    assert [(event["client"], event["step"]) for event in events_of(run, "left_out")] == [("c1", 5)]
    assert not events_of(run, "lost", "repeated")
    assert [row["available_clients"] for row in rows_of(run)] == [3] * 4
    assert rows_of(run)[-1]["val_loss"] < rows_of(run)[0]["val_loss"]


def test_if_everybody_is_late_nobody_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    faults = [Fault(f"c{i}", "forward", 5, "hang") for i in range(CLIENTS)]
    run = run_with(models["llama"], tmp_path, *faults)
    assert run._executor.happened == faults  # type: ignore[attr-defined]
    assert not events_of(run, "left_out", "lost")


def test_a_client_that_never_answers_is_lost_after_a_while(models: dict[str, Path], tmp_path: Path) -> None:
    run = run_with(models["llama"], tmp_path, Fault("c1", "collect", 2, "hang"))
    (lost,) = events_of(run, "lost")
    assert (lost["client"], lost["kind"]) == ("c1", "late")


def test_a_client_that_is_late_at_the_start_holds_nobody_up_beyond_the_patience(
    models: dict[str, Path], tmp_path: Path
) -> None:
    fault = Fault("c1", "load_data", 1, "hang")
    run = run_with(models["llama"], tmp_path / "late", fault)
    assert run._executor.happened == [fault]  # type: ignore[attr-defined]
    (lost,) = events_of(run, "lost")
    assert (lost["client"], lost["kind"], lost["round"]) == ("c1", "late", 0) and "the others begin" in lost["text"]
    assert run._executor.calls["c1", "load_data"] == 1, "it goes on reading"  # type: ignore[attr-defined]
    assert [(event["client"], event["round"]) for event in events_of(run, "returned")] == [("c1", 2)]
    assert not events_of(run, "repeated")
    # Its texts are not trained on before it is there.
    _, first, *later = [row["tokens"] for row in rows_of(run)]
    assert 0 < first < min(after - before for before, after in pairwise([first, *later]))
    # Where a failed round is to change no number, the start is repeated with all.
    repeated = run_with(
        models["llama"], tmp_path / "repeated", Fault("c1", "load_data", 1, "hang"), faults={"recovery": "repeat"}
    )
    assert [event["actor"] for event in events_of(repeated, "repeated")] == ["c1"] and not events_of(repeated, "lost")
    everybody = [Fault(f"c{i}", "load_data", 1, "hang") for i in range(CLIENTS)]
    again = run_with(models["llama"], tmp_path / "everybody", *everybody)
    assert len(events_of(again, "repeated")) == 1 and not events_of(again, "lost")


def test_deadlines_follow_the_measured_median() -> None:
    deadlines = Deadlines(4.0)
    for seconds in (0.5, 9.0, 0.5):
        assert deadlines.until("c0", {"forward": 1}, 7.0) is None, "not before there is something to go by"
        deadlines.record("c0", "forward", seconds)
    assert deadlines.until("c0", {"forward": 2}, 7.0) == 7.0 + SLACK_S + 4.0 * 2 * 0.5
    assert deadlines.until("c1", {"forward": 1}, 7.0) is None
    never = Deadlines(None)
    for _ in range(5):
        never.record("c0", "forward", 1.0)
    assert never.until("c0", {"forward": 1}, 7.0) is None


@pytest.mark.parametrize(
    ("fault", "recovery", "smaller_from"),
    [
        (Fault("c1", "forward", 2, "memory"), "go_on", 2),
        (Fault("c1", "forward", 2, "memory"), "repeat", 1),
        # The very first validation is before any checkpoint, so the run starts again.
        (Fault("c1", "validation_forward", 1, "memory"), "go_on", 0),
        (Fault("c1", "validation_forward", 2, "memory"), "go_on", 2),
        (Fault("c1", "configure", 1, "memory"), "go_on", 0),
    ],
)
def test_out_of_memory_gives_a_smaller_plan(
    models: dict[str, Path], tmp_path: Path, fault: Fault, recovery: str, smaller_from: int
) -> None:
    """The run's own scheduler: less for a holder that ran out of memory, from the next plan on."""
    from hsplit.config import ClientConfig, RunConfig
    from tests.in_process import planned_run

    job = Job.model_validate({**SETTINGS, "dtype": "fp32", "max_length": 32, "rank_set": [1, 2, 4]})
    job = Job.model_validate({**job.model_dump(), "faults": {"recovery": recovery}})
    clients = tuple(ClientConfig(name=f"c{i}", kind=f"c{i}", memory_gb=0.0014, tflops=0.01) for i in range(2))
    run_config = RunConfig(clients=clients, job=job)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(2)}
    made = planned_run(run_config, models["llama"], RunDirectory.create(tmp_path, "short"), shares, Recorder())
    faulty = FaultyInProcess(made._executor, [replace(fault)])  # type: ignore[arg-type]
    made = reached_by(faulty, made)
    made.run()
    assert faulty.happened
    plans = {name: [row for row in holders_of(made) if row["name"] == name] for name in ("c0", "c1")}
    for row, other in zip(plans["c1"], plans["c0"], strict=True):
        # Both have declared the same.
        if row["round"] >= smaller_from:
            assert row["predicted_bytes"] * 1.25 <= 1_400_000 + 1
        else:
            assert row["predicted_bytes"] == other["predicted_bytes"]
    assert made.state.member("c1").failures == 1 and rows_of(made)[-1]["available_clients"] == 2


def short_run(
    model: Path, to: Path, fault: Fault, server: tuple[float, float], client_gb: float = 0.0014, max_failures: int = 3
) -> Coordinator:
    """A run of two clients, by its own plans, in which ``fault`` is to happen; ``server``: its memory and TFLOP/s."""
    from hsplit.config import ClientConfig, RunConfig, ServerConfig
    from tests.in_process import planned_run

    settings = {**SETTINGS, "dtype": "fp32", "max_length": 32, "rank_set": [1, 2, 4]}
    job = Job.model_validate({**settings, "faults": {"max_failures": max_failures}})
    clients = tuple(ClientConfig(name=f"c{i}", kind=f"c{i}", memory_gb=client_gb, tflops=0.01) for i in range(2))
    config = RunConfig(server=ServerConfig(memory_gb=server[0], tflops=server[1]), clients=clients, job=job)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(2)}
    made = planned_run(config, model, RunDirectory.create(to, "short"), shares, Recorder())
    return reached_by(FaultyInProcess(made._executor, [fault]), made)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "method", "nth", "smaller_from"),
    [
        ("server", "train_step", 5, 2),
        ("server", "evaluate", 2, 1),
        ("server", "configure", 1, 0),
        ("c1", "forward", 5, 3),
    ],
)
def test_who_is_short_of_much_less_than_it_declared_holds_less_than_before(
    models: dict[str, Path], tmp_path: Path, name: str, method: str, nth: int, smaller_from: int
) -> None:
    """A budget of a thousand times the plan's memory says nothing about the machine."""
    # A fast server has most layers; a slow one leaves them to clients that have room.
    server, client_gb = ((4.0, 20.0), 0.0014) if name == "server" else ((4.0, 0.001), 0.004)
    run = short_run(models["llama"], tmp_path, Fault(name, method, nth, "memory"), server, client_gb)
    assert run.run()
    held = [row["predicted_bytes"] for row in holders_of(run) if row["name"] == name]
    (planned, *_) = events_of(run, "planned")
    first = planned["plan"]["server"] if name == "server" else planned["plan"]["clients"][1]
    for round_, held_bytes in enumerate(held):
        if round_ >= smaller_from:
            assert held_bytes < first["predicted_bytes"]
        else:
            assert held_bytes == first["predicted_bytes"]
    assert any(
        f"{name} ran out of memory" in reason for event in events_of(run, "replanned") for reason in event["reasons"]
    )
    assert run.state.member(name).shortages == 1 and rows_of(run)[-1]["available_clients"] == 2


def test_a_server_that_could_hold_no_less_is_tried_again_and_the_run_says_what_is_lacking(
    models: dict[str, Path], tmp_path: Path
) -> None:
    fault = Fault("server", "train_step", 4, "memory", times=9)
    run = short_run(models["llama"], tmp_path, fault, (4.0, 20.0), max_failures=8)
    with pytest.raises(ActorFailure) as failure:
        run.run()
    assert [event["kind"] for event in events_of(run, "repeated")] == ["memory"] * 8
    last = events_of(run, "planned")[-1]["plan"]["server"]["predicted_bytes"]
    assert failure.value.reason == (
        f"the test says so; its part of the plan takes {last / 1e6:.1f} MB, and its node lacks them; free memory there,"
        " or give it less to do"
    )
    reasons = [reason for event in events_of(run, "replanned") for reason in event["reasons"]]
    assert any("there is no plan with so little (server: memory_gb: " in reason for reason in reasons)


def test_a_client_that_could_hold_no_less_keeps_its_part(models: dict[str, Path], tmp_path: Path) -> None:
    run = short_run(models["llama"], tmp_path, Fault("c1", "forward", 2, "memory", times=3), (1.0, 20.0))
    assert run.run()
    assert [row["available_clients"] for row in rows_of(run)] == [2] * 4
    assert not events_of(run, "unavailable", "set_aside") and run.state.member("c1").shortages == 3


def test_when_nobody_is_left_the_last_ones_reason_is_given(models: dict[str, Path], tmp_path: Path) -> None:
    faults = [Fault(f"c{i}", "validation_forward", 2, "error", times=20) for i in range(CLIENTS)]
    reason = r"no client is left to train with \(c\d failed last: the test says so\)"
    with pytest.raises(ActorFailure, match=reason):
        run_with(models["llama"], tmp_path, *faults, faults={"max_failures": 1})


def test_a_lost_clients_rank_counts_for_what_all_restart_with(models: dict[str, Path], tmp_path: Path) -> None:
    """With unequal ranks the common restart must also fit the missing client (law E4)."""
    settings = {**SETTINGS, "rounds": 2, "dtype": "fp32"}
    plan = fixed_plan(models["llama"], Job.model_validate(settings), [2, 2, 3], [4, 1, 4], 4)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(CLIENTS)}
    policy = Policy(name="hsplitlora", init="shared", importance=Importance(metric="equal"), reinit="svd")
    made = coordinator(models["llama"], tmp_path, plan, shares, Recorder(), policy, **settings)
    faulty = FaultyInProcess(made._executor, [Fault("c1", "forward", 2)])  # type: ignore[arg-type]
    made = reached_by(faulty, made)
    made.start()
    for step in range(3):
        made.local_step(step)
    made.aggregate()
    assert events_of(made, "returned")
    # All holders compute with the same weights.
    weights: dict[str, list[torch.Tensor]] = {}
    for name in ("c0", "c1"):
        for weight, linear in faulty.actors[name].holder.segment.linears.items():
            with torch.no_grad():
                weights.setdefault(weight, []).append(linear(torch.eye(linear.weight.values.shape[1])))
    for weight, (one, other) in weights.items():
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=weight)


@pytest.mark.parametrize("phase", ["backward", "forward"])
def test_if_nobody_is_left_the_round_is_repeated(
    models: dict[str, Path], tmp_path: Path, undisturbed: list[dict[str, Any]], phase: str
) -> None:
    run = run_with(models["llama"], tmp_path, *[Fault(f"c{i}", phase, 4) for i in range(CLIENTS)])
    assert metrics(run) == undisturbed
    assert len(events_of(run, "repeated")) == 1 and {event["client"] for event in events_of(run, "lost")} <= {
        "c0",
        "c1",
        "c2",
    }


def test_a_client_lost_when_the_run_is_stopped_is_back_after_the_resume(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def stop(step: int) -> None:
        run.stopping = step == 5

    settings = {**SETTINGS, "dtype": "fp32"}
    plan = fixed_plan(models["llama"], Job.model_validate(settings), [2, 2, 3], [2, 2, 2], 2)
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(CLIENTS)}
    directory = RunDirectory.create(tmp_path, "stopped")
    run = coordinator(
        models["llama"], tmp_path, plan, shares, Recorder(after_step=stop), directory=directory, **settings
    )
    faulty = FaultyInProcess(run._executor, [Fault("c1", "forward", 5)])  # type: ignore[arg-type]
    run = reached_by(faulty, run)
    assert not run.run()
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    assert checkpoint.name == "round-0001-step-0005" and run.state.to_return == ["c1"]
    resumed = coordinator(models["llama"], tmp_path, plan, shares, Recorder(), directory=directory, **settings)
    assert resumed.run(checkpoint)
    assert [row["available_clients"] for row in rows_of(resumed)] == [3] * 4


def test_a_single_node_that_dies_after_its_round_repeats_it(models: dict[str, Path], tmp_path: Path) -> None:
    """It alone holds what was learned: a round without it would have trained nothing."""
    from hsplit.config import ClientConfig, RunConfig
    from tests.in_process import planned_run

    found = []
    for name, faults in (("whole", []), ("hit", [Fault("central", "validate", 3)])):
        job = Job.model_validate({**SETTINGS, "dtype": "fp32", "max_length": 32})
        clients = tuple(ClientConfig(name=f"c{i}", kind=f"c{i}", memory_gb=1.0, tflops=0.01) for i in range(2))
        config = RunConfig(clients=clients, job=job, policy=Policy.model_validate(FULL_FINE_TUNING))
        shares = {f"c{i}": random_examples(24, seed=i) for i in range(2)}
        made = planned_run(config, models["llama"], RunDirectory.create(tmp_path, name), shares, Recorder())
        faulty = FaultyInProcess(made._executor, faults)  # type: ignore[arg-type]
        made = reached_by(faulty, made)
        made.run()
        found.append(metrics(made))
    assert found[0] == found[1] and len(events_of(made, "repeated")) == 1
