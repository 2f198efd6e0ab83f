"""Training that diverges: no checkpoint is lost, and the error says how to continue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hsplit.actors.executor import ActorFailure
from hsplit.actors.holder_actor import HolderActor
from hsplit.config import ClientConfig, Job, Policy, RunConfig, ServerConfig
from hsplit.errors import InputError, RunError
from hsplit.models.spec import ModelSpec
from hsplit.observe.events import read_events
from hsplit.run.checkpoint import read_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run.in_process import local_run
from hsplit.run_directory import RunDirectory
from hsplit.session import report_failures
from tests.faulty import FaultyInProcess
from tests.in_process import Recorder, planned_run, random_examples, reached_by
from tests.tiny import save_tiny_model

POLICIES = Path(__file__).parents[2] / "policies"
SETTINGS: dict[str, Any] = {"base": "fp32", "dtype": "fp32", "rounds": 3, "local_steps": 2, "max_length": 32}


def a_run(model: Path, to: Path, policy: str = "hsplitlora", **job: Any) -> Coordinator:
    """Three clients, one of which holds little."""
    how = Policy.model_validate({"name": policy, **yaml.safe_load((POLICIES / f"{policy}.yaml").read_text())})
    sizes = {"large": 0.3, "small": 0.0011, "middle": 0.2}
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=size, tflops=1.0) for name, size in sizes.items())
    settings = Job.model_validate({**SETTINGS, **job})
    run = RunConfig(clients=clients, server=ServerConfig(memory_gb=1.0, tflops=0.001), job=settings, policy=how)
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(clients)}
    directory = RunDirectory.create(to, "run")
    run.save(directory.config)
    return planned_run(run, model, directory, shares, Recorder())


def every_tensor_is_finite(directory: RunDirectory) -> bool:
    tensors = [read_checkpoint(path)[1] for path in directory.checkpoints.glob("round-*")]
    every = [tensor for found in tensors for named in found.values() for tensor in named.values()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in every if tensor.is_floating_point())


@pytest.mark.parametrize("lr", [1e6, 1e9])
@pytest.mark.parametrize(
    ("policy", "job"),
    [
        ("hsplitlora", {}),
        ("hsplitlora", {"local_steps": 1}),
        ("hsplitlora", {"base": "nf4", "dtype": "bf16"}),
        ("hsplitlora", {"optimizer": "sgd", "clip": 1.0}),
        ("hsplitlora", {"privacy": {"labels": "client"}}),
        ("hsplitlora", {"faults": {"recovery": "repeat"}}),
        ("hsplitlora", {"fast": {"depth_joined": False}}),
        ("splitlora", {"optimizer": "sgd", "clip": None}),
        ("flora", {}),
        ("cenlora", {}),
        ("ft", {}),
    ],
)
def test_a_rate_that_is_too_large_ends_the_run_at_once_and_leaves_a_finite_checkpoint(
    models: dict[str, Path], tmp_path: Path, policy: str, job: dict[str, Any], lr: float
) -> None:
    made = a_run(models["llama"], tmp_path, policy, lr=lr, **job)
    with pytest.raises(ActorFailure, match=r"not finite|no numbers") as failure:
        made.run()
    directory = made.context.directory
    assert failure.value.kind == "diverged"
    assert made.last_checkpoint is not None and made.last_checkpoint.name == f"round-{made.round - 1:04d}"
    assert every_tensor_is_finite(directory)
    kinds = [event["event"] for event in read_events(directory.events)]
    assert "repeated" not in kinds and "set_aside" not in kinds


def test_one_line_names_the_rate_the_round_the_checkpoint_and_a_command_that_works(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = a_run(models["llama"], Path("my runs"), lr=1e6)
    directory = made.context.directory
    with pytest.raises(RunError) as failed, report_failures(directory) as progress:
        progress.coordinator = made
        made.run()
    first = str(failed.value).partition("the loss of ")[2].partition(" ")[0]
    assert first in ("small", "middle", "large")
    assert str(failed.value) == (
        f"training diverged in round 1: the loss of {first} is not finite; job.lr = 1e+06 is too large; go on from the"
        " last finite checkpoint, round-0000, with a smaller one, such as:"
        " hsplit resume 'my runs/run' --set job.lr=0.001"
    )
    run, changes = RunConfig.load(directory.config).resumed_with(["job.lr=0.001"])
    assert (run.job.lr, changes) == (1e-3, ["job.lr is now 0.001 (was 1000000.0)"])
    # The command that is advised works.
    assert planned_run(run, models["llama"], directory, made.context.inputs.shares, Recorder()).run(
        made.last_checkpoint
    )


def test_a_checkpoint_worse_than_the_start_is_not_advised(models: dict[str, Path], tmp_path: Path) -> None:
    made = a_run(models["llama"], tmp_path, lr=1.0, optimizer="sgd", clip=None)
    directory = made.context.directory
    diverged: list[bool] = []

    def poison(actor: str, method: str, server: Any) -> None:
        if (actor, method) == ("server", "aggregate") and made.state.round == 1:
            diverged.append(True)
            with torch.no_grad():
                server.holder.adapters.flat.fill_(float("nan"))
        if (actor, method) == ("server", "aggregate") and made.state.round == 0:
            # Far from where the model was, and finite.
            with torch.no_grad():
                server.holder.adapters.flat.mul_(100).add_(1.0)

    made = reached_by(FaultyInProcess(made._executor, [], poison), made)  # type: ignore[arg-type]
    with (
        pytest.raises(
            RunError, match=r"round-0001, .*--set job\.lr=0\.001 \(its validation loss is above that"
        ) as failed,
        report_failures(directory) as progress,
    ):
        progress.coordinator = made
        made.run()
    assert diverged and "better launch a new run with --set job.lr=0.001" in str(failed.value)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("where", ["validation_forward", "collect", "backward"])
def test_a_client_alone_that_is_not_finite_is_lost_and_no_divergence(
    models: dict[str, Path], tmp_path: Path, base: str, where: str
) -> None:
    made = a_run(models["llama"], tmp_path, base=base)
    poisoned: list[bool] = []

    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("middle", where) and made.state.round == 1 and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                client.holder.adapters.flat.fill_(float("nan"))

    made = reached_by(FaultyInProcess(made._executor, [], poison), made)  # type: ignore[arg-type]
    assert made.run() and poisoned
    events = read_events(made.context.directory.events)
    assert [e["client"] for e in events if e["event"] == "lost"] == ["middle"]
    assert every_tensor_is_finite(made.context.directory)


def test_a_client_that_stays_not_finite_is_set_aside_and_the_rate_is_named(
    models: dict[str, Path], tmp_path: Path
) -> None:
    made = a_run(models["llama"], tmp_path, faults={"max_failures": 1})

    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("middle", "collect"):
            with torch.no_grad():
                client.holder.adapters.flat[0] = float("inf")

    made = reached_by(FaultyInProcess(made._executor, [], poison), made)  # type: ignore[arg-type]
    assert made.run()
    (aside,) = [e for e in read_events(made.context.directory.events) if e["event"] == "set_aside"]
    assert aside["client"] == "middle" and aside["text"].endswith("job.lr may be too large for its data")


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_server_whose_own_adapters_are_not_finite_aggregates_nothing(
    models: dict[str, Path], tmp_path: Path, base: str
) -> None:
    made = a_run(models["llama"], tmp_path, base=base)

    def poison(actor: str, method: str, server: Any) -> None:
        if (actor, method) == ("server", "aggregate"):
            with torch.no_grad():
                server.holder.adapters.flat.fill_(float("inf"))

    made = reached_by(FaultyInProcess(made._executor, [], poison), made)  # type: ignore[arg-type]
    with pytest.raises(ActorFailure, match=r"server has an adapter of .* that are no numbers") as failure:
        made.run()
    assert failure.value.kind == "diverged" and every_tensor_is_finite(made.context.directory)


def test_no_checkpoint_is_written_of_what_is_no_number(models: dict[str, Path], tmp_path: Path) -> None:
    made = a_run(models["llama"], tmp_path)

    def poison(actor: str, method: str, client: Any) -> None:
        if (actor, method) == ("small", "state") and made.state.round == 1:
            with torch.no_grad():
                client.holder.adapters.flat[-1] = float("nan")

    made = reached_by(FaultyInProcess(made._executor, [], poison), made)  # type: ignore[arg-type]
    with pytest.raises(ActorFailure, match=r"of small has entries that are no numbers") as failure:
        made.run()
    assert failure.value.kind == "diverged" and every_tensor_is_finite(made.context.directory)


def test_a_model_that_is_no_number_from_the_first_is_the_model_s_fault(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_tiny_model("llama", tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"^job\.model: .* before any training .*set both to fp32"):
        a_run(model, tmp_path).run()


def test_what_has_no_gradient_left_to_score_does_not_end_a_run(models: dict[str, Path], tmp_path: Path) -> None:
    """Drawn examples may all be without a supervised token, or known by heart."""
    made = a_run(models["llama"], tmp_path)
    take_scores, probe = HolderActor.take_scores, made.context.training.probe

    def nothing(reports: Any) -> None:
        for report in reports:
            report.scores.update(dict.fromkeys(report.scores, 0.0))

    def taken(actor: Any) -> Any:
        found = take_scores(actor)
        nothing(found)
        return found

    def probed(*given: Any) -> Any:
        found = probe(*given)
        nothing(found.reports)
        return found

    made.context.training.probe = probed  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HolderActor, "take_scores", taken)
        assert made.run()
    assert not [e for e in read_events(made.context.directory.events) if e["event"] in ("importance", "repeated")]


@pytest.mark.parametrize("key", ["lr", "clip", "weight_decay", "warmup", "schedule"])
def test_how_far_a_step_goes_may_change_in_a_run_that_has_begun(
    models: dict[str, Path], tmp_path: Path, key: str
) -> None:
    run = RunConfig.load(a_run(models["llama"], tmp_path).context.directory.config)
    value = {"schedule": "cosine", "warmup": 1}.get(key, 0.25)
    changed, changes = run.resumed_with([f"{key}={value}"])
    assert getattr(changed.job, key) == value and changes[0].startswith(f"job.{key} is now ")
    assert changed.model_copy(update={"job": run.job}) == run
    assert changed.resumed_with([f"job.{key}={value}"]) == (changed, [])


def test_patience_may_change_in_a_run_that_has_begun_and_is_named_where_it_ended(
    models: dict[str, Path], tmp_path: Path
) -> None:
    made = a_run(models["llama"], tmp_path)
    directory = made.context.directory
    (directory.checkpoints / "round-0000").mkdir()
    with pytest.raises(RunError) as failed, report_failures(directory) as progress:
        progress.coordinator = made
        raise ActorFailure("server", "train_step", "it has not answered in time", "late")
    waited = "waited for: job.faults.patience_s = 600, which `hsplit resume` changes with --set"
    assert f"it has not answered in time ({waited}); go on" in str(failed.value)
    changed, changes = made.context.run.resumed_with(["job.faults.patience_s=900", "faults.max_failures=5"])
    assert (changed.job.faults.patience_s, changed.job.faults.max_failures) == (900, 5)
    assert changes == ["job.faults.patience_s is now 900.0 (was 600.0)", "job.faults.max_failures is now 5 (was 3)"]


@pytest.mark.parametrize(("key", "source"), [("model", "SmolLM2"), ("data.source", "restaurants")])
def test_a_resume_with_another_model_or_other_data_names_what_to_put_back(
    models: dict[str, Path], tmp_path: Path, key: str, source: str
) -> None:
    made = a_run(models["llama"], tmp_path, rounds=1)
    assert made.run()
    directory, inputs = made.context.directory, made.context.inputs
    changed = replace(inputs, **{"model_fingerprint" if key == "model" else "data_sha256": "another"})
    resumed = local_run(made.context.run, ModelSpec.read(models["llama"]), directory, changed, Recorder())
    with pytest.raises(
        InputError, match=rf"job\.{key} \S*{source}\S* is not what it was when this run was started: put"
    ):
        resumed.run(made.last_checkpoint)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("job.rounds=9", "--set job.rounds: a run that has begun keeps it; job.lr, job.schedule, "),
        ("policy.ranks=4", "--set policy.ranks: a run that has begun keeps it"),
        ("clients.small.tflops=4", "--set clients.small.tflops: a run that has begun keeps it"),
        ("job.lr.x=4", "--set job.lr.x: a run that has begun keeps it"),
        ("job.lr=-1", "--set job.lr: must be"),
        ("job.warmup=7", "--set job.warmup: must be at most rounds"),
        ("job.lr", "must be KEY=VALUE"),
    ],
)
def test_nothing_else_may(models: dict[str, Path], tmp_path: Path, given: str, reason: str) -> None:
    run = RunConfig.load(a_run(models["llama"], tmp_path).context.directory.config)
    with pytest.raises(InputError) as refused:
        run.resumed_with([given])
    assert reason in str(refused.value)
