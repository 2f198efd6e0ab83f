"""Every placement through the same coordinator, against plain loops: full models on clients, one node with all data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from hsplit.config import ClientConfig, Job, Policy, RunConfig, ServerConfig, load_run_config
from hsplit.config.cluster import CENTRAL
from hsplit.data import Batch
from hsplit.errors import InputError
from hsplit.lora.learned import WEIGHT, learned, of_kind, trained_weights
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import base_values
from hsplit.observe.events import read_events
from hsplit.planning.cost.model import CostModel
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, planned_run, random_examples
from tests.laws.reference import keep_double, lora_A, lora_B, mean_loss, peft_model
from tests.tiny import LAYERS

ALPHA, RANK, LR = 16.0, 4, 2e-3
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
CENLORA = {"placement": "single", "ranks": RANK, "aggregation": "none", "moments": "keep", "init": "shared"}
FT = {"placement": "single", "train": "weights", "aggregation": "none", "moments": "keep"}
NAMES = ("c0", "c1", "c2")


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


def a_run(policy: dict[str, Any], **job: Any) -> RunConfig:
    settings = {"dtype": "fp32", "wire": "fp32", "clip": None, "alpha": ALPHA, "lr": LR, "max_length": 24, **job}
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0) for name in NAMES)
    policy = {"name": "tested", "importance": {"metric": "equal"}, **policy}
    return RunConfig(
        clients=clients, server=ServerConfig(), job=Job.model_validate(settings), policy=Policy.model_validate(policy)
    )


def started(run: RunConfig, model: Path, to: Path, recorder: Recorder) -> Coordinator:
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    return planned_run(run, model, RunDirectory.create(to, None), shares, recorder)


def actors(run: Coordinator) -> dict[str, Any]:
    found: dict[str, Any] = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    return found


def batches_of(run: Coordinator, steps: int) -> list[list[Batch]]:
    """The rows of all clients, by step."""
    holders = [actor for name, actor in actors(run).items() if hasattr(actor, "data")]
    return [[batch for holder in holders for batch in holder.data.step_batches(step).values()] for step in range(steps)]


@pytest.mark.parametrize(
    ("family", "base", "dtype", "accumulation"),
    [
        ("llama", "nf4", "fp64", 1),
        ("gpt2", "int8", "fp64", 2),
        ("llama", "bf16", "fp32", 1),
        ("gpt2", "fp32", "fp32", 1),
    ],
)
def test_e1_full_models_on_clients_take_the_centralized_step(
    models: dict[str, Path], tmp_path: Path, family: str, base: str, dtype: str, accumulation: int
) -> None:
    policy = {"placement": "full", "ranks": RANK, "init": "shared"}
    job = {"base": base, "dtype": dtype, "wire": dtype, "rounds": 1, "local_steps": 1, "optimizer": "sgd"}
    run = a_run(policy, **job, grad_accumulation=accumulation, residual={"max_rank": "full"})
    made = started(run, models[family], tmp_path, Recorder())
    made.run()
    reference = peft_model(models[family], base, DTYPES[dtype], RANK, ALPHA, "0|shared|{name}|1")
    mean_loss(reference, batches_of(made, 1)[0]).backward()
    torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=LR).step()
    sums = learned(actors(made)["server"].state())
    assert len(sums) == len(ModelSpec.read(models[family]).linears)
    for name, term in sums.items():
        expected = (ALPHA / RANK) * lora_B(reference, name) @ lora_A(reference, name)
        assert (term.dense() - expected).norm() <= TOLERANCE[dtype] * expected.norm(), name


@pytest.mark.parametrize(("family", "base", "dtype"), [("llama", "nf4", "fp64"), ("gpt2", "fp32", "fp32")])
def test_cenlora_is_plain_lora_on_everybodys_batches(
    models: dict[str, Path], tmp_path: Path, family: str, base: str, dtype: str
) -> None:
    rounds, local = 3, 4
    recorder = Recorder()
    run = a_run(CENLORA, base=base, dtype=dtype, wire=dtype, rounds=rounds, local_steps=local)
    made = started(run, models[family], tmp_path, recorder)
    assert made.run()
    reference = peft_model(models[family], base, DTYPES[dtype], RANK, ALPHA, "0|shared|{name}|1")
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    for step, batches in enumerate(batches_of(made, rounds * local)):
        loss = mean_loss(reference, batches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Rounds end without a trace: nothing is averaged, nothing restarts.
        assert recorder.losses[step][CENTRAL] == pytest.approx(float(loss.detach()), rel=TOLERANCE[dtype]), step
    assert [len(batch.lengths) for batch in batches_of(made, 1)[0]] == [len(NAMES) * run.job.batch_size]


@pytest.mark.parametrize(("family", "base"), [("llama", "nf4"), ("gpt2", "fp32"), ("llama", "bf16")])
def test_ft_is_plain_training_of_every_weight(models: dict[str, Path], tmp_path: Path, family: str, base: str) -> None:
    from transformers import AutoModelForCausalLM

    recorder = Recorder()
    # In fp64: biases of keys have no gradient but rounding, which Adam would make steps of.
    run = a_run(FT, base=base, dtype="fp64", rounds=2, local_steps=4, clip=1.0, weight_decay=0.01)
    made = started(run, models[family], tmp_path, recorder)
    assert made.run()
    reference = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float64).train()
    spec = ModelSpec.read(models[family])
    transposed = spec.family.transposed
    with torch.no_grad():
        for shape in spec.linears:
            weight = reference.get_submodule(shape.name).weight
            values = base_values((weight.T if transposed else weight).contiguous(), base, torch.float64)
            weight.copy_(values.T if transposed else values)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR, weight_decay=0.01)
    for step, batches in enumerate(batches_of(made, 8)):
        loss = mean_loss(reference, batches)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        assert recorder.losses[step][CENTRAL] == pytest.approx(float(loss.detach()), rel=1e-12), step
    trained = of_kind(WEIGHT, actors(made)[CENTRAL].state())
    for name, parameter in reference.named_parameters():
        assert torch.allclose(trained[name], parameter.detach(), rtol=1e-9, atol=1e-9), name
    assert trained.keys() == {name for name, _ in reference.named_parameters()}


@pytest.mark.parametrize(
    "policy",
    [
        CENLORA,
        FT,
        {
            "placement": "full",
            "ranks": 8,
            "aggregation": "hetlora",
            "moments": "drop",
            "self_pruning": {"decay": 0.7, "penalty": 50.0},
        },
        {"placement": "full", "ranks": "importance", "importance": {"metric": "rngwp"}},
        {"placement": "split", "ranks": "budget", "aggregation": "raflora"},
        {"placement": "split", "ranks": "budget", "aggregation": "fedplora", "moments": "drop"},
    ],
    ids=["cenlora", "ft", "hetlora", "full-importance", "split-raflora", "split-fedplora"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    models: dict[str, Path], tmp_path: Path, policy: dict[str, Any]
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    run = a_run(policy, rounds=3, local_steps=2)
    started(run, models["llama"], tmp_path / "whole", whole).run()
    interrupted = started(run, models["llama"], tmp_path / "cut", first)
    first.after_step = lambda step: setattr(interrupted, "stopping", step == 3)
    assert not interrupted.run()
    directory = interrupted.context.directory
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    again = planned_run(run, models["llama"], directory, shares, second)
    assert again.run(checkpoint)
    assert [*first.losses, *second.losses] == whole.losses
    assert [row.val_loss for row in (*first.rows, *second.rows)] == [row.val_loss for row in whole.rows]
    table = pandas.read_csv(directory.metrics)
    assert table["virtual_time_s"].is_monotonic_increasing


def test_clients_that_cannot_hold_the_full_model_are_counted_with_their_data(
    models: dict[str, Path], tmp_path: Path
) -> None:
    run = a_run({"placement": "full", "ranks": "budget", "aggregation": "concat"}, rounds=1)
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    whole = cost.client_bytes(LAYERS, {w.name: 1 for w in cost.model.weights})
    small = run.clients[1].changed({"memory_gb": (whole - 1) / 1e9})
    run = run.model_copy(update={"clients": (run.clients[0], small, run.clients[2])})
    recorder = Recorder()
    made = started(run, models["llama"], tmp_path, recorder)
    assert made.run()
    assert any("c1 is unavailable: it lacks 0.0 MB" in note for note in recorder.notes)
    assert any(
        "1 of 3 clients are unavailable, and with them 12 of 36 examples (33.3%) are not trained on" in note
        for note in recorder.notes
    )
    (lost,) = [e for e in read_events(made.context.directory.events) if e["event"] == "data_lost"]
    assert (lost["clients"], lost["examples"], lost["of_examples"]) == (["c1"], 12, 36)
    assert [row.available_clients for row in recorder.rows] == [2, 2]
    plans = pandas.read_csv(made.context.directory.plan)
    assert not plans[plans["name"] == "c1"]["available"].any()
    # Nothing of a step travels: only adapters do, once a round.
    assert recorder.rows[0].bytes_up == 0
    sent = sum(actors(made)[name].collect()[1].nbytes for name in ("c0", "c2"))
    assert recorder.rows[1].bytes_up == sent


def test_self_pruning_gives_up_ranks_and_sends_less(models: dict[str, Path], tmp_path: Path) -> None:
    policy = {"placement": "full", "ranks": 4, "aggregation": "hetlora"}
    pruning = {**policy, "moments": "drop", "self_pruning": {"decay": 0.5, "penalty": 50.0}}
    sent = []
    for name, settings in (("kept", policy), ("pruned", pruning)):
        recorder = Recorder()
        made = started(a_run(settings, rounds=4, local_steps=3), models["llama"], tmp_path / name, recorder)
        made.run()
        sent.append([row.bytes_up for row in recorder.rows[1:]])
        ranks = {rank for held in ("c0", "c1", "c2") for rank in actors(made)[held].collect()[1].ranks.values()}
        assert (ranks == {4}) == (name == "kept")
    assert len(set(sent[0])) == 1
    assert sent[1][-1] < sent[0][-1]


@pytest.mark.parametrize(
    "preset",
    ["fedlora", "hetlora", "flora", "florist", "fed-plora", "flexlora", "raflora", "cenlora", "ft", "splitlora"],
)
def test_every_preset_runs(models: dict[str, Path], tmp_path: Path, preset: str) -> None:
    policy = load_run_config("hetero", preset).policy
    run = a_run({}, rounds=2, local_steps=2, base="nf4").model_copy(update={"policy": policy})
    recorder = Recorder()
    made = started(run, models["llama"], tmp_path, recorder)
    assert made.run()
    assert recorder.rows[-1].val_loss < recorder.rows[0].val_loss
    assert recorder.rows[-1].virtual_time_s > 0
    checkpoint, _ = latest_checkpoint(made.context.directory.checkpoints)
    _, tensors = read_checkpoint(checkpoint)
    if preset == "ft":
        assert trained_weights(tensors)
    else:
        assert learned(tensors["server"])
    assert json.dumps(made.state.to_json())


@pytest.mark.parametrize(
    ("policy", "key", "reason"),
    [
        ({"placement": "full", "aggregation": "none"}, "aggregation", "needs placement 'single'"),
        ({"placement": "single"}, "aggregation", "must be 'none' on a single node"),
        ({"placement": "full", "split": 3}, "split", "splits nothing"),
        ({"train": "weights"}, "train", "needs placement 'single'"),
        ({"aggregation": "fedavg"}, "aggregation", "needs one rank for all"),
        ({"aggregation": "fedavg", "ranks": "budget"}, "aggregation", "needs one rank for all"),
        ({"self_pruning": {"decay": 0.5}, "moments": "drop"}, "self_pruning", "needs aggregation 'hetlora'"),
        ({"aggregation": "hetlora2"}, "aggregation", "package.module:name"),
        ({"pace": {"ahead": True}}, "pace", "ahead needs periods"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    tmp_path: Path, policy: dict[str, Any], key: str, reason: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(policy))
    with pytest.raises(InputError) as refused:
        load_run_config("hetero", file)
    assert f"mine.yaml: {key}: " in str(refused.value) and reason in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "override", "reason"),
    [
        ("fedlora", "job.privacy.noise=0.1", "sends no activations"),
        ("cenlora", "job.privacy.labels=client", "labels included"),
        ("cenlora", "clients.workstation.data=notes.csv", "workstation keeps its own"),
    ],
)
def test_settings_without_a_meaning_under_a_placement_are_refused(policy: str, override: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        load_run_config("hetero", policy, [override])


def unequal(policy: dict[str, Any], model: Path, **job: Any) -> RunConfig:
    """A run whose clients have memory for the full model at ranks 32, 8 and 2."""
    run = a_run(policy, **job)
    cost = CostModel.of_run(ModelSpec.read(model), run)
    sizes = [cost.client_bytes(LAYERS, {w.name: rank for w in cost.model.weights}) + 1 for rank in (32, 8, 2)]
    clients = tuple(c.changed({"memory_gb": size / 1e9}) for c, size in zip(run.clients, sizes, strict=True))
    return run.model_copy(update={"clients": clients})


@pytest.mark.parametrize("aggregation", ["hetlora", "flexlora", "raflora"])
def test_holders_of_smaller_ranks_go_on_with_the_leading_directions_and_a_resumed_run_too(
    models: dict[str, Path], tmp_path: Path, aggregation: str
) -> None:
    policy = {"placement": "full", "ranks": "budget", "aggregation": aggregation, "init": "shared"}
    run = unequal(policy, models["llama"], rounds=3, local_steps=2)
    whole, first, second = Recorder(), Recorder(), Recorder()
    made = started(run, models["llama"], tmp_path / "whole", whole)
    made.run()
    assert [set(client.ranks.values()) for client in made.context.plan.clients] == [{32}, {8}, {2}]
    _, tensors = read_checkpoint(latest_checkpoint(made.context.directory.checkpoints)[0])
    learnt = learned(tensors["server"])
    # Nothing was trained since the last restart, so every holder still has what it took.
    for name, rank in zip(NAMES, (32, 8, 2), strict=True):
        adapters = actors(made)[name].holder.adapters
        for weight, term in learnt.items():
            expected = term.up_to_rank(rank)
            live = adapters.live(weight, expected.rank)
            assert torch.allclose(live.dense(), expected.dense(), atol=1e-6), (name, weight)
    interrupted = started(run, models["llama"], tmp_path / "cut", first)
    first.after_step = lambda step: setattr(interrupted, "stopping", step == 3)
    assert not interrupted.run()
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    checkpoint, _ = latest_checkpoint(interrupted.context.directory.checkpoints)
    assert planned_run(run, models["llama"], interrupted.context.directory, shares, second).run(checkpoint)
    assert [row.val_loss for row in (*first.rows, *second.rows)] == [row.val_loss for row in whole.rows]


@pytest.mark.parametrize("policy", [{"ranks": "uniform", "aggregation": "fedavg", "init": "shared"}, CENLORA])
def test_e4_holds_for_rules_without_a_residual_when_ranks_fall(
    models: dict[str, Path], tmp_path: Path, policy: dict[str, Any]
) -> None:
    """The common rank falls between two rounds: the part beyond the adapters' rank joins the residual."""
    from hsplit.lora.aggregation import Aggregator
    from hsplit.lora.holder import HeldAdapters
    from hsplit.models.factors import LowRank

    run = a_run(policy)
    shape = ModelSpec.read(models["llama"]).linears[0]
    aggregator = Aggregator([shape], run.job, run.policy, torch.float32, merges=False)
    term = LowRank(torch.randn(shape.d_out, 4), torch.randn(4, shape.d_in))
    held = HeldAdapters("c0", {shape.name: term}, {shape.layer: 3}, {shape.name: shape.layer})
    aggregator.aggregate([held])
    _, changed = aggregator.fit_restarts({"c0": {shape.name: 2}})
    assert changed == {shape.name}
    update = aggregator.update_for(2, {shape.name: 2}, whole=[shape.name])
    kept, moved = update.common[shape.name], update.residuals[shape.name].factors
    assert kept.rank == 2 and moved is not None
    assert torch.allclose(kept.dense() + moved.dense(), term.dense(), atol=1e-5)
