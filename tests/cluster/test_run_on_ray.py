"""The product end to end on real Ray, with a tiny model."""

from __future__ import annotations

import builtins
import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hsplit
from hsplit.actors.client import Client
from hsplit.actors.holder_actor import HolderActor
from hsplit.config import RunConfig
from hsplit.errors import InputError, RunError
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel
from hsplit.observe.events import read_events
from hsplit.observe.tables import read_plan
from hsplit.planning.plan import Plan
from hsplit.run.coordinator import Coordinator
from hsplit.run.inputs import read_inputs
from hsplit.run_directory import RunDirectory
from tests.cluster.killing import end_actor
from tests.in_process import Recorder, planned_run, random_examples, rows_of
from tests.laws.reference import lora_A, lora_B, mean_loss, peft_model

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def whole(
    ray_cluster: None, cluster_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[hsplit.Run, dict[str, dict[str, int]]]:
    """An uninterrupted run, and what each of its actors held while it went on."""
    import ray

    held: dict[str, dict[str, int]] = {}

    def look(step: int) -> None:
        if step == 1:
            for name in ("client:small", "client:large-0", "server"):
                actor = ray.get_actor(f"hsplit:whole:{name}", namespace="hsplit")
                held[name.removeprefix("client:")] = ray.get(actor.call.remote(HolderActor.parameters_held.__name__))

    runs = tmp_path_factory.mktemp("runs")
    run = hsplit.launch(cluster_file, runs_dir=runs, name="whole", display=Recorder(after_step=look))
    return run, held


def test_workers_have_the_niceness_of_the_run() -> None:
    import ray

    niceness = ray.remote(lambda: os.nice(0))
    assert ray.get(niceness.remote()) == os.nice(0)


def test_a_run_leaves_everything_and_learns(whole: tuple[hsplit.Run, Any]) -> None:
    run, _ = whole
    assert run.complete
    metrics = run.metrics
    assert list(metrics["round"]) == [0, 1, 2, 3]
    assert metrics["val_loss"].iloc[-1] < metrics["val_loss"].iloc[0]
    assert (metrics["bytes_up"] > 0).all() and (metrics["bytes_down"].iloc[1:] > 0).all()
    assert (metrics["available_clients"] == 3).all()
    for left in ("config.yaml", "plan.csv", "events.jsonl", "report.html", "adapter/adapter_model.safetensors"):
        assert (run.path / left).stat().st_size > 0, left
    assert [p.name for p in sorted((run.path / "checkpoints").iterdir())] == ["round-0002", "round-0003"]


def test_a_run_can_be_watched_from_its_directory_while_it_goes_on(
    ray_cluster: None, cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen, found = Recorder(), []
    watching = threading.Thread(target=lambda: found.append(hsplit.watch(tmp_path / "seen", display=seen)))

    def begin(step: int) -> None:
        if step == 1:
            watching.start()

    shown = Recorder(after_step=begin)
    logs = {"log": ["tensorboard", "wandb"]}
    run = hsplit.launch(cluster_file, None, logs, runs_dir=tmp_path, name="seen", display=shown)
    watching.join()
    (state,) = found
    assert (state.state, state.round, state.val_ppl) == ("complete", 3, run.metrics["val_ppl"].iloc[-1])
    assert seen.rows == shown.rows and seen.tables == shown.tables
    assert seen.notes == shown.notes
    assert seen.losses[-1] == shown.losses[-1]
    logged = EventAccumulator(str(run.path / "tensorboard")).Reload()
    perplexities = [event.value for event in logged.Scalars("validation/perplexity")]
    assert perplexities == pytest.approx(list(run.metrics["val_ppl"]))
    assert [event.step for event in logged.Scalars("loss/large-0")] == list(range(1, 13))
    assert len(list(run.path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert not any("has failed" in note for note in shown.notes)


def test_a_smaller_budget_moves_layers_on_the_way(whole: tuple[hsplit.Run, Any]) -> None:
    run, _ = whole
    plans = read_plan(run.path / "plan.csv").set_index(["round", "name"])
    assert plans.loc[(3, "large-0"), "split"] < plans.loc[(2, "large-0"), "split"]
    assert plans.loc[(3, "large-0"), "declared_bytes"] == 1_180_000
    clients = plans[plans["kind"] == "client"]
    assert (clients["measured_bytes"] > 0).all()
    assert (clients["measured_bytes"] <= clients["declared_bytes"]).all()


def test_every_actor_holds_its_own_segment_only(whole: tuple[hsplit.Run, dict[str, dict[str, int]]]) -> None:
    run, held = whole
    plan = _plan(run)
    splits = {client.name: client.split for client in plan.clients}
    assert splits["small"] < splits["large-0"], "unequal budgets must give unequal splits"
    for name in ("small", "large-0"):
        split = splits[name]
        assert _layers(held[name]) == set(range(split))
        # Rows of the embedding that its texts use and their ids, the layers' linears and norms, rotary tables; no tail:
        # the labels are the server's.
        own = sum(size for key, size in held[name].items() if not key.startswith("embeddings"))
        beside = split * 2 * 32 + 2 * 4
        if plan.client(name).stored == "codes":
            # Two NF4 codes a byte, and the scales of blocks and of blocks of scales.
            assert 0.5 < (own - beside) / (split * _linear_values()) < 0.6
        else:
            assert own == split * _linear_values() + beside
        assert held[name]["embeddings.embed_tokens.weight"] <= 96 * 32
    assert _layers(held["server"]) == set(range(plan.server.split or 0, 4))
    assert not any(name.startswith("embeddings") for name in held["server"])
    assert any(name.startswith("tail") for name in held["server"])


def test_ray_and_in_process_give_the_same_numbers(whole: tuple[hsplit.Run, Any], tmp_path: Path) -> None:
    """The code of the method is one; what the laws show in one process therefore holds on Ray."""
    _assert_same_in_process(whole[0], tmp_path)


def test_splitlora_with_labels_at_home_is_the_same_in_process(cluster_file: Path, tmp_path: Path) -> None:
    # Rounded at random: by the same numbers here and there.
    overrides = {"privacy.labels": "client", "rounds": 2, "wire": "int4"}
    run = hsplit.launch(cluster_file, "splitlora", overrides, runs_dir=tmp_path, display=Recorder())
    assert len({client.split for client in _plan(run).clients}) == 1
    _assert_same_in_process(run, tmp_path)


def test_full_models_on_clients_with_an_own_rule_are_the_same_in_process(cluster_file: Path, tmp_path: Path) -> None:
    own = {"policy.aggregation": "tests.cluster.own_rule:equal_voices"}
    # The small client cannot hold the whole model.
    overrides = {"rounds": 2, "clients.small.memory_gb": 0.0002, "clients.large.memory_gb": 0.005, **own}
    recorder = Recorder()
    run = hsplit.launch(cluster_file, "flora", overrides, runs_dir=tmp_path, display=recorder)
    assert [client.split for client in _plan(run).clients] == [None, 4, 4]
    assert any("1 of 3 clients are unavailable, and with them 27 of 80 examples" in note for note in recorder.notes)
    # The log says whose code it was.
    (code,) = [event["text"] for event in read_events(run.path / "events.jsonl") if event["event"] == "code"]
    assert code == f"{own['policy.aggregation']} is code from {Path(__file__).with_name('own_rule.py')}"
    assert (run.metrics["available_clients"] == 2).all()
    plans = read_plan(run.path / "plan.csv")
    measured = plans[(plans["kind"] == "client") & plans["available"]]
    assert (measured["measured_bytes"] <= measured["declared_bytes"]).all()
    _assert_same_in_process(run, tmp_path)


def test_full_fine_tuning_leaves_a_model_and_a_report(cluster_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = hsplit.launch(cluster_file, "ft", {"rounds": 1, "lr": 1e-3}, runs_dir=tmp_path, display=Recorder())
    assert run.complete and (run.path / "report.html").stat().st_size > 0
    assert (run.metrics[["bytes_up", "bytes_down"]] == 0).all(axis=None)
    exported = AutoModelForCausalLM.from_pretrained(run.path / "model")
    base = AutoModelForCausalLM.from_pretrained(_model(run))
    assert not torch.equal(exported.lm_head.weight, base.lm_head.weight)
    _assert_same_in_process(run, tmp_path)


def test_two_servers_and_clients_that_are_drawn_are_the_same_in_process(cluster_file: Path, tmp_path: Path) -> None:
    import ray

    held: list[set[int]] = []

    def look(step: int) -> None:
        if step == 1:
            for name in ("server", "server-1"):
                actor = ray.get_actor(f"hsplit:shared:{name}", namespace="hsplit")
                held.append(_layers(ray.get(actor.call.remote(HolderActor.parameters_held.__name__))))

    overrides = {"server.replicas": 2, "clients_per_round": 2}
    run = hsplit.launch(
        cluster_file, None, overrides, runs_dir=tmp_path, name="shared", display=Recorder(after_step=look)
    )
    plans = read_plan(run.path / "plan.csv").set_index(["round", "name"])
    assert held == [set(range(int(plans.loc[(0, "server"), "split"]), 4))] * 2
    assert (plans.loc[(slice(None), "server-1"), "kind"] == "server").all()
    cohorts = [event["clients"] for event in read_events(run.path / "events.jsonl") if event["event"] == "cohort"]
    assert [len(cohort) for cohort in cohorts] == [2, 2, 2]
    _assert_same_in_process(run, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        # A batch ahead takes memory for a second one.
        {"policy.pace.ahead": True, "clients.small.memory_gb": 0.0026, "clients.large.memory_gb": 0.003},
        {"privacy.labels": "client", "pipeline.microbatches": 2},
    ],
)
def test_clients_in_turn_and_ahead_of_the_server_are_the_same_in_process(
    cluster_file: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Law E6 on Ray, where calls overlap; in one process each call is over before the next begins."""
    overrides = {"policy.pace.periods": 3, "rounds": 2, **settings}
    run = hsplit.launch(cluster_file, None, overrides, runs_dir=tmp_path, display=Recorder())
    clients = _plan(run).clients
    assert len({client.group for client in clients}) > 1
    _assert_same_in_process(run, tmp_path)


def test_a_client_joins_and_another_leaves_on_the_way(cluster_file: Path, tmp_path: Path) -> None:
    import ray

    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"{e.prompt}||{e.response.strip()}" for e in random_examples(40, seed=9)))
    path = tmp_path / "changing"
    there: list[bool] = []

    def come_and_go(step: int) -> None:
        if step == 2:
            hsplit.join(path, f"{{name: tablet, memory_gb: 0.0014, tflops: 0.01, data: {own}}}")
            hsplit.leave(path, "large-0")
        if step in (5, 9):
            names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
            there.append("hsplit:changing:client:large-0" in names)
            assert "hsplit:changing:client:tablet" in names

    display = Recorder(after_step=come_and_go)
    run = hsplit.launch(cluster_file, runs_dir=tmp_path, name="changing", display=display)
    assert run.complete and run.metrics["available_clients"].tolist() == [3, 3, 3, 3]
    plans = read_plan(run.path / "plan.csv")
    trained = {round_: set(rows["name"]) for round_, rows in plans[plans["kind"] == "client"].groupby("round")}
    before, after = {"small", "large-0", "large-1"}, {"small", "large-1", "tablet"}
    assert trained == {0: before, 1: before, 2: after, 3: after}
    # Its process ends when no round can be repeated any more that it had a part in.
    assert there == [True, False]
    assert display.losses[-1].keys() == {"small", "large-1", "tablet", "large-0"}


def _assert_same_in_process(on_ray: hsplit.Run, tmp_path: Path) -> None:
    run = RunConfig.load(on_ray.path / "config.yaml")
    source = find_model(run.job.model)
    shares = read_inputs(run, source).shares
    here = planned_run(run, source.directory, RunDirectory.create(tmp_path, "here"), shares, Recorder())
    here.run()
    ours = rows_of(here)
    for column in ("val_loss", "train_loss"):
        assert [row[column] for row in ours][1:] == pytest.approx(on_ray.metrics[column].tolist()[1:], rel=1e-6)
    for column in ("virtual_time_s", "bytes_up", "bytes_down", "captured_importance"):
        assert [row[column] for row in ours] == pytest.approx(on_ray.metrics[column].tolist(), rel=1e-6)


def test_law_e1_on_ray(cluster_file: Path, tmp_path: Path) -> None:
    """One SGD step on actors with unequal splits is the centralized step on the union of their batches."""
    from safetensors.torch import load_file

    settings = {"optimizer": "sgd", "rounds": 1, "local_steps": 1, "lr": 0.05, "clip": None, "wire": "fp32"}
    overrides = {**settings, "policy.init": "shared", "policy.ranks": 2, "residual.max_rank": "full"}
    # All layers train on the loss of the union, with nothing rounded on the way.
    overrides |= {"policy.freeze": "never", "policy.pace.weights": "tokens", "policy.pace.wire": "job"}
    run = hsplit.launch(cluster_file, None, overrides, runs_dir=tmp_path, display=Recorder())
    config = RunConfig.load(run.path / "config.yaml")
    plan = _plan(run)
    twins = [client for client in _twins(config, plan) if plan.client(client.name).takes_part_in(0)]
    batches = [batch for client in twins for batch in client.data.step_batches(0).values()]
    assert len(twins) > 1
    reference = peft_model(_model(run), "nf4", torch.float32, 2, config.job.alpha, "0|shared|{name}|1")
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.05)
    mean_loss(reference, batches).backward()
    optimizer.step()
    exported = load_file(run.adapter / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in exported}
    assert len(names) == 4 * 7
    for name in names:
        key = f"base_model.model.{name}.lora_"
        learned = exported[f"{key}B.weight"] @ exported[f"{key}A.weight"]
        expected = (config.job.alpha / 2) * lora_B(reference, name) @ lora_A(reference, name)
        assert (learned - expected).norm() <= 1e-5 * expected.norm(), name


def test_law_e2_on_ray_with_data_that_the_driver_cannot_read(cluster_file: Path, tmp_path: Path) -> None:
    """One client with a file of its own follows the unsplit PEFT model over twenty AdamW steps."""
    own = tmp_path / "private.txt"
    own.write_text("\n".join(f"{e.prompt}||{e.response.strip()}" for e in random_examples(60, seed=9)))
    overrides = {"rounds": 1, "local_steps": 20, "wire": "fp32", "clip": None, "policy.init": "shared"}
    overrides |= {"policy.ranks": 2, "policy.freeze": "never", "policy.pace.wire": "job"}
    overrides |= {"clients.small.data": str(own)}
    recorder = Recorder()
    with _unreadable_here(own):
        with pytest.raises(PermissionError):
            own.read_text()
        run = hsplit.launch(_single(cluster_file, tmp_path), None, overrides, runs_dir=tmp_path, display=recorder)
    assert "small: 54 examples to train on, 6 held out" in (run.path / "events.jsonl").read_text()

    config = RunConfig.load(run.path / "config.yaml")
    (client,) = _twins(config, _plan(run))
    reference = peft_model(_model(run), "nf4", torch.float32, 2, config.job.alpha, "0|shared|{name}|1")
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step, losses in enumerate(recorder.losses):
        loss = mean_loss(reference, list(client.data.step_batches(step).values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses["small"] == pytest.approx(float(loss.detach()), rel=1e-5), step


def test_a_clients_unusable_data_is_one_clear_line(cluster_file: Path, tmp_path: Path) -> None:
    overrides = {"clients.small.data": "/nowhere.csv"}
    with pytest.raises(InputError, match=r"nowhere\.csv") as refusal:
        hsplit.launch(_single(cluster_file, tmp_path), None, overrides, runs_dir=tmp_path, display=Recorder())
    assert "\n" not in str(refusal.value)


def test_stops_failures_and_resumes_change_no_number(
    whole: tuple[hsplit.Run, Any], cluster_file: Path, tmp_path: Path
) -> None:
    """Stopped in round 2, resumed, and then a client, the scheduler and the server killed: the same metrics."""

    def interrupt(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    victims = {7: "client:large-1", 9: "scheduler", 11: "server"}

    def kill(step: int) -> None:
        if step in victims:
            end_actor(f"hsplit:disturbed:{victims.pop(step)}")

    repeat = {"faults.recovery": "repeat"}
    recorder = Recorder(after_step=interrupt)
    stopped = hsplit.launch(cluster_file, None, repeat, runs_dir=tmp_path, name="disturbed", display=recorder)
    assert not stopped.complete
    assert (stopped.path / "checkpoints" / "round-0001-step-0006").is_dir()
    resumed = hsplit.resume(stopped.path, display=Recorder(after_step=kill))
    assert resumed.complete and not victims
    assert _comparable(resumed) == _comparable(whole[0])
    told = [event["text"] for event in read_events(stopped.path / "events.jsonl") if event["event"] == "repeated"]
    assert [text.split(" failed in ")[0] for text in told] == ["round 2: large-1", "round 3: server"]
    # Nobody asks the scheduler for anything during local steps.
    assert "(gone too: scheduler)" in told[1]


def test_a_client_that_dies_is_left_out_and_comes_back(cluster_file: Path, tmp_path: Path) -> None:
    def kill(step: int) -> None:
        if step == 2:
            end_actor("hsplit:bereft:client:large-1")

    run = hsplit.launch(cluster_file, runs_dir=tmp_path, name="bereft", display=Recorder(after_step=kill))
    assert run.complete
    events = [event for event in read_events(run.path / "events.jsonl") if event["event"] in ("lost", "returned")]
    assert [(event["event"], event["client"], event["round"]) for event in events] == [
        ("lost", "large-1", 1),
        ("returned", "large-1", 2),
    ]
    # In whichever call is under way.
    text = r"large-1 failed in its (forward|backward) \(its process ended\); the others go on"
    assert re.search(text, events[0]["text"])
    assert run.metrics["val_loss"].iloc[-1] < run.metrics["val_loss"].iloc[0]
    assert (run.metrics["available_clients"] == 3).all()


def test_an_error_that_nothing_foresaw_ends_the_run_in_one_line_and_it_is_resumed(
    cluster_file: Path, tmp_path: Path, whole: tuple[hsplit.Run, Recorder]
) -> None:
    aggregate = Coordinator.aggregate

    def fail(coordinator: Coordinator) -> None:
        if coordinator.round == 2:
            raise ZeroDivisionError("nothing to divide by")
        aggregate(coordinator)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(RunError) as error:
        patched.setattr(Coordinator, "aggregate", fail)
        hsplit.launch(cluster_file, runs_dir=tmp_path, name="hit", display=Recorder())
    path, text = tmp_path / "hit", str(error.value)
    log = path / "traceback.log"
    assert text.startswith(f"round 2: ZeroDivisionError: nothing to divide by; the traceback is in {log}; ")
    assert text.endswith(f"hsplit resume {path}") and "in fail" in log.read_text()
    (failed,) = (event for event in read_events(path / "events.jsonl") if event["event"] == "failed")
    assert failed["text"] == text.partition("; go on")[0]
    resumed = hsplit.resume(path, display=Recorder())
    assert resumed.complete and _comparable(resumed) == _comparable(whole[0])


def test_a_run_without_a_checkpoint_begins_again_with_its_own_configuration(
    cluster_file: Path, tmp_path: Path, whole: tuple[hsplit.Run, Recorder]
) -> None:
    def fail(coordinator: Coordinator) -> None:
        raise ZeroDivisionError("nothing to divide by")

    path = tmp_path / "early"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RunError) as error:
        patched.setattr(Coordinator, "validate", fail)
        hsplit.launch(cluster_file, runs_dir=tmp_path, name="early", display=Recorder())
    assert str(error.value).endswith(
        f"there is no checkpoint yet; begin it again from round 0 with: hsplit resume {path}"
    )
    with pytest.raises(InputError, match=f"continue that run with `hsplit resume {path}`"):
        hsplit.launch(cluster_file, runs_dir=tmp_path, name="early", display=Recorder())
    with pytest.raises(InputError, match="no complete checkpoint yet; the run begins from round 0 with: hsplit resume"):
        hsplit.export(path, tmp_path / "exported")
    with pytest.raises(InputError, match=r"--set job\.rounds: a run that has begun keeps it"):
        hsplit.resume(path, {"job.rounds": 9}, display=Recorder())
    resumed = hsplit.resume(path, display=Recorder())
    assert resumed.complete and _comparable(resumed) == _comparable(whole[0])
    told = [event["text"] for event in read_events(path / "events.jsonl") if event["event"] == "resumed"]
    assert told == ["there is no checkpoint yet: the run begins again from round 0"]


def test_a_run_that_diverges_goes_on_with_the_rate_that_is_advised(cluster_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"training diverged in round 1: .*job\.lr = 1e\+08 is too large") as error:
        hsplit.launch(cluster_file, None, {"job.lr": 1e8}, runs_dir=tmp_path, name="far", display=Recorder())
    path = tmp_path / "far"
    _, command = str(error.value).split("such as: ")
    assert command == f"hsplit resume {path} --set job.lr=0.001"
    resumed = hsplit.resume(path, ["job.lr=0.001"], display=Recorder())
    assert resumed.complete and RunConfig.load(path / "config.yaml").job.lr == 1e-3
    assert resumed.metrics["val_loss"].iloc[-1] < resumed.metrics["val_loss"].iloc[0]
    assert "job.lr is now 0.001 (was 100000000.0)" in [e["text"] for e in read_events(path / "events.jsonl")]


def test_a_gpu_that_no_node_has_is_refused_by_name(cluster_file: Path, tmp_path: Path) -> None:
    overrides = {"clients.small.num_gpus": 0.25}
    with pytest.raises(
        InputError, match=r"small: num_gpus: 0\.25 asked, no node has more than 0; run on CPUs with --cpu"
    ):
        hsplit.launch(cluster_file, None, overrides, runs_dir=tmp_path, display=Recorder())
    with pytest.raises(InputError, match="node: elsewhere is not in the Ray cluster"):
        hsplit.launch(cluster_file, None, {"server.node": "elsewhere"}, runs_dir=tmp_path, display=Recorder())


def _comparable(run: hsplit.Run) -> str:
    """metrics.csv without its wall-clock columns."""
    text: str = run.metrics.drop(columns=["wall_time_s", "train_wall_time_s"]).to_csv(index=False)
    return text


def _model(run: hsplit.Run) -> Path:
    return Path(RunConfig.load(run.path / "config.yaml").job.model)


def _plan(run: hsplit.Run) -> Plan:
    """The plan that the run began with."""
    return Plan.from_json(next(e for e in read_events(run.path / "events.jsonl") if e["event"] == "planned")["plan"])


def _single(cluster_file: Path, tmp_path: Path) -> Path:
    """The cluster with its small client only."""
    single = tmp_path / "single.yaml"
    lines = cluster_file.read_text().splitlines()
    single.write_text("\n".join(line for line in lines if "name: large" not in line))
    return single


def _twins(config: RunConfig, plan: Plan) -> list[Client]:
    """The run's clients once more in this process, to see the batches that they drew."""
    source = find_model(config.job.model)
    shares = read_inputs(config, source).shares
    twins = []
    for client in config.clients:
        twin = Client(client.name, config.job, config.policy, BaseModel.of_job(source.spec, config.job))
        twin.load_data({client.name: shares[client.name]}, client.data)
        twin.data.follow(plan.client(client.name))
        twins.append(twin)
    return twins


def _layers(held: dict[str, int]) -> set[int]:
    return {int(name.split(".")[1]) for name in held if name.startswith("layers.")}


def _linear_values() -> int:
    """Values of one tiny Llama layer's seven linears."""
    return 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32


@contextmanager
def _unreadable_here(path: Path) -> Iterator[None]:
    """Make ``path`` unreadable in this process only; actors are other processes."""
    patch = pytest.MonkeyPatch()
    opened = builtins.open

    def refusing(file: Any, *arguments: Any, **keywords: Any) -> Any:
        if isinstance(file, str | Path) and Path(file) == path:
            raise PermissionError(f"{file} is not readable here")
        return opened(file, *arguments, **keywords)

    patch.setattr(builtins, "open", refusing)
    patch.setattr(io, "open", refusing)
    try:
        yield
    finally:
        patch.undo()


@pytest.mark.parametrize(
    "changed",
    [
        ["job.transport=gloo", "job.wire=bf16", "job.pipeline.microbatches=2"],
        ["job.transport=gloo", "job.wire=int8", "job.privacy.labels=client"],
    ],
)
def test_a_direct_transport_changes_no_number(cluster_file: Path, tmp_path: Path, changed: list[str]) -> None:
    """Activations and gradients go round the object store, and arrive as they would have."""
    common = ["job.rounds=1", "job.local_steps=2", "job.validation.max_examples=2"]
    stored = hsplit.launch(
        cluster_file, overrides=[*common, *changed[1:]], runs_dir=tmp_path, name="stored", display=Recorder()
    )
    direct = hsplit.launch(
        cluster_file, overrides=[*common, *changed], runs_dir=tmp_path, name="direct", display=Recorder()
    )
    columns = ["train_loss", "val_loss", "tokens", "bytes_up", "bytes_down"]
    assert direct.metrics[columns].equals(stored.metrics[columns])
