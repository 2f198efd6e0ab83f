"""Rounds of a simulation equal a run's by the virtual clock, are deterministic, and have lost and returning clients."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hsplit.config import ClientConfig, Job, Policy, RunConfig, ServerConfig, load_run_config
from hsplit.config.cluster import ScheduledChange
from hsplit.errors import InputError
from hsplit.models.spec import ModelSpec
from hsplit.planning.cost.serving import drawn_cohort
from hsplit.planning.scheduler import Scheduler
from hsplit.run_directory import RunDirectory
from hsplit.simulation.fleet import Traffic, links, read_trace
from hsplit.simulation.rounds import Simulated, simulated
from tests.in_process import Recorder, planned_run, random_examples


def a_run(model: Path, policy: str = "splitlora", count: int = 3, servers: int = 1, **job: Any) -> RunConfig:
    clients = tuple(
        ClientConfig(name=f"c{i}", kind="c", memory_gb=1.0, tflops=1e-3 * (i + 1), bandwidth_mbps=20 + i, latency_ms=1)
        for i in range(count)
    )
    settings = {"base": "fp32", "dtype": "fp32", "rounds": 3, "local_steps": 2, "max_length": 16, **job}
    return RunConfig(
        clients=clients,
        server=ServerConfig(memory_gb=1.0, tflops=1e-3, replicas=servers),
        job=Job.model_validate({"model": str(model), **settings}),
        policy=load_run_config("hetero", policy).policy,
    )


def simulation(run: RunConfig, traffic: Traffic | None = None, rounds: int = 3) -> Simulated:
    return simulated(run, Scheduler(run, ModelSpec.read(Path(run.job.model))), rounds, traffic)


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"clients_per_round": 2},
        {"privacy": {"labels": "client"}, "pipeline": {"microbatches": 2}},
        {"grad_accumulation": 2},
    ],
    ids=["plain", "drawn", "labels at home", "accumulated"],
)
@pytest.mark.parametrize("servers", [1, 2])
def test_it_tells_the_virtual_time_of_a_run_to_the_last_bit(
    models: dict[str, Path], tmp_path: Path, job: dict[str, Any], servers: int
) -> None:
    run, recorder = a_run(models["llama"], servers=servers, **job), Recorder()
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    made = planned_run(run, models["llama"], RunDirectory.create(tmp_path, None), shares, recorder)
    assert made.run()
    batches = made.context.validation_batches
    found = simulated(run, Scheduler(run, ModelSpec.read(models["llama"])), 3, validation_batches=batches)
    assert [r.virtual_time_s for r in found.rounds] == [row.virtual_time_s for row in recorder.rows]
    # Real batches are shorter than full ones.
    for told, row in zip(found.rounds[1:], recorder.rows[1:], strict=True):
        assert told.bytes_up >= row.bytes_up > 0


def test_with_a_residual_and_a_probe_it_tells_no_less_than_a_run(models: dict[str, Path], tmp_path: Path) -> None:
    run, recorder = a_run(models["llama"], "hsplitlora", residual={"max_rank": 4}), Recorder()
    # Clients may be frozen: with memory for every rank nothing else would depend on a probe.
    changes: dict[str, Any] = {"replan": {"tau": None}, "freeze": "planned"}
    changes["importance"] = {"metric": "rngwp", "back_off": False}
    policy = Policy.model_validate({**run.policy.model_dump(), **changes})
    run = run.model_copy(update={"policy": policy})
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    made = planned_run(run, models["llama"], RunDirectory.create(tmp_path, None), shares, recorder)
    assert made.run()
    found = simulated(
        run, Scheduler(run, ModelSpec.read(models["llama"])), 3, validation_batches=made.context.validation_batches
    )
    told, real = found.rounds[-1].virtual_time_s, recorder.rows[-1].virtual_time_s
    assert found.rounds[-1].probe_s > 0
    assert real <= told * (1 + 1e-9) and told == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_it_counts_each_clients_messages_in_its_own_format(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    run = a_run(models["llama"], wire="bf16", privacy={"labels": labels})
    plain, first = simulation(run), Scheduler.first

    def narrowed(*arguments: Any) -> Any:
        review = first(*arguments)
        wires = zip(review.made.clients, ("int4", "", "int8"), strict=True)
        return replace(review, plan=replace(review.made, clients=tuple(replace(c, wire=w) for c, w in wires)))

    monkeypatch.setattr(Scheduler, "first", narrowed)
    found, model = simulation(run), Scheduler(run, ModelSpec.read(models["llama"])).cost.model
    for before, after in zip(plain.rounds[1:], found.rounds[1:], strict=True):
        wires = [model.wire_bytes(1, wire) for wire in ("bf16", "int4", "int8")]
        up, down = ([getattr(w, which) for w in wires] for which in ("to_server", "down"))
        deep = [wire.deep for wire in wires]
        steps = run.job.local_steps
        assert before.bytes_up - after.bytes_up == steps * (2 * up[0] - up[1] - up[2])
        back = [own + turn for own, turn in zip(down, deep, strict=True)]
        assert before.bytes_down - after.bytes_down == steps * (2 * back[0] - back[1] - back[2])


def test_a_change_of_budget_that_the_file_foresees_makes_another_plan(models: dict[str, Path]) -> None:
    run = a_run(models["llama"])
    slow = run.clients[0].model_copy(update={"schedule": (ScheduledChange(round=2, tflops=1e-5),)})
    run = run.model_copy(update={"clients": (slow, *run.clients[1:])})
    found = simulation(run)
    assert found.plans == 2
    assert found.rounds[2].step_s > found.rounds[1].step_s


def test_clients_come_and_go_alike_for_one_seed(models: dict[str, Path]) -> None:
    run, traffic = a_run(models["llama"], count=20), Traffic(leave=0.3, back=0.5, variation=0.5)
    found = simulation(run, traffic, rounds=8)
    assert found == simulation(run, traffic, rounds=8)
    other = run.model_copy(update={"job": run.job.model_copy(update={"seed": 1})})
    assert found != simulation(other, traffic, rounds=8)
    present = [r.present for r in found.rounds[1:]]
    assert present[0] == 20 and min(present) < 20
    assert len({r.step_s for r in found.rounds[1:]}) > 1


def test_links_keep_their_declared_bandwidth_on_average(models: dict[str, Path]) -> None:
    clients = a_run(models["llama"], count=50).clients
    factors = np.array([fleet.factor for fleet in islice(links(clients, Traffic(variation=0.5), 0), 400)])
    assert factors.mean() == pytest.approx(1.0, abs=0.05)
    assert factors.std() == pytest.approx(0.5, abs=0.05)


def test_a_trace_slows_and_removes_clients(models: dict[str, Path], tmp_path: Path) -> None:
    run, path = a_run(models["llama"]), tmp_path / "trace.csv"
    path.write_text("round,client,bandwidth_mbps\n2,c0,0.5\n3,c0,0\n")
    found = simulation(run, Traffic(trace=read_trace(path, run.clients)))
    first, slow, without = found.rounds[1:]
    assert slow.step_s > first.step_s and (slow.bottleneck, slow.holder) == ("link", "c0")
    assert [r.present for r in found.rounds[1:]] == [3, 3, 2]
    assert without.step_s < first.step_s


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("client,round\n", "its first line must be round,client,bandwidth_mbps"),
        ("round,client,bandwidth_mbps\n1,nobody,5\n", "line 2: client: there is none of the name 'nobody'"),
        ("round,client,bandwidth_mbps\n1,c0,fast\n", "line 2: round and bandwidth_mbps must be numbers"),
        ("round,client,bandwidth_mbps\n0,c0,5\n", "line 2: round must be from 1"),
        ("round,client,bandwidth_mbps\n1,c0,nan\n", "bandwidth_mbps from 0"),
        ("round,client,bandwidth_mbps\n1,c0\n", "line 2: round and bandwidth_mbps must be numbers"),
    ],
)
def test_a_wrong_trace_is_refused(models: dict[str, Path], tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_trace(path, a_run(models["llama"]).clients)


def test_more_servers_never_take_longer_for_one_plan(models: dict[str, Path]) -> None:
    steps = []
    for servers in (1, 2, 4, 8):
        run = a_run(models["llama"], count=16, servers=servers)
        run = run.model_copy(update={"policy": run.policy.model_copy(update={"split": 2})})
        steps.append(simulation(run).rounds[-1].step_s)
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_nobody_there_and_a_single_node_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="round 2: no client is there"):
        simulation(a_run(models["llama"]), Traffic(leave=1.0))
    with pytest.raises(InputError, match="placement: 'single'"):
        simulation(a_run(models["llama"], "cenlora"))
    for wrong in ({"leave": 1.5}, {"back": -0.1}, {"variation": -1.0}, {"leave": float("nan")}):
        with pytest.raises(InputError, match="must be"):
            Traffic(**wrong)


def test_a_rounds_draw_does_not_depend_on_who_else_is_there() -> None:
    names = [f"c{i}" for i in range(50)]
    drawn = drawn_cohort(names, 0, 3, 10)
    gone = drawn[0]
    assert set(drawn) - {gone} <= set(drawn_cohort([n for n in names if n != gone], 0, 3, 10))
    assert drawn == [n for n in names if n in drawn] and len(drawn) == 10
