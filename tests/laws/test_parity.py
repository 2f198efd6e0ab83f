"""Laws E1 (parity with centralized LoRA in a first round) and E2 (parity with an unsplit model), METHOD section 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsplit.config import Job, Policy
from hsplit.data import Example
from hsplit.lora import holder as holding
from hsplit.lora.learned import learned
from hsplit.models.spec import ModelSpec
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.laws.reference import clip_each_weight, keep_double, lora_A, lora_B, mean_loss, peft_model
from tests.tiny import LAYERS

LR, ALPHA = 0.05, 16.0
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# As a user gets them.
CLIP, MAX_RANK = Job().clip, Job().residual.max_rank

# Every fast path on or off, and batches whole or cut: the laws hold whichever way it is computed.
fast_paths = st.fixed_dictionaries(
    {
        path: st.booleans()
        for path in ("packed", "loss_rows", "fused_lora", "short_attention", "flat_optimizer", "depth_joined")
    }
)
FAST, PLAIN = (
    dict.fromkeys(("packed", "loss_rows", "fused_lora", "short_attention", "flat_optimizer", "depth_joined"), on)
    for on in (True, False)
)

laws = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


@contextmanager
def _clipped() -> Iterator[list[bool]]:
    """Record for each clipping of a holder's gradients whether it changed any, in the order of the steps."""
    changed: list[bool] = []
    clip_each = holding.clip_each

    def watched(gradients: Any, limits: Any) -> None:
        before = {name: gradient.clone() for name, gradient in gradients.items()}
        clip_each(gradients, limits)
        changed.append(any(not torch.equal(before[name], gradient) for name, gradient in gradients.items()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "clip_each", watched)
        yield changed


def _unsupervised(client: Any) -> None:
    """Take every target out of a client's training data: it computes, but has no supervised token."""
    for data in client.data.clients:
        data.train = [replace(e, prompt_length=len(e.ids)) for e in data.train]


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    splits=st.lists(st.integers(0, LAYERS), min_size=1, max_size=4),
    rows=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "bf16", "int8", "nf4"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
    accumulation=st.integers(1, 2),
    microbatches=st.integers(1, 2),
    fast=fast_paths,
    silent=st.booleans(),
    servers=st.integers(1, 3),
    shipped=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(
    family="llama",
    splits=[0, 2, 4],
    rows=[1, 4, 2, 1],
    labels="server",
    base="nf4",
    dtype="fp64",
    accumulation=2,
    microbatches=2,
    fast=FAST,
    silent=True,
    servers=2,
    shipped=True,
    seed=1,
)
@example(
    family="gpt2",
    splits=[0, 0],
    rows=[3, 1, 1, 1],
    labels="client",
    base="int8",
    dtype="fp64",
    accumulation=1,
    microbatches=2,
    fast=PLAIN,
    silent=False,
    servers=1,
    shipped=False,
    seed=2,
)
@example(
    family="llama",
    splits=[4, 4],
    rows=[2, 2, 1, 1],
    labels="server",
    base="bf16",
    dtype="fp32",
    accumulation=1,
    microbatches=1,
    fast=PLAIN,
    silent=False,
    servers=1,
    shipped=True,
    seed=3,
)
@example(
    family="gpt2",
    splits=[1, 3],
    rows=[1, 3, 1, 1],
    labels="server",
    base="nf4",
    dtype="fp64",
    accumulation=1,
    microbatches=1,
    fast=PLAIN,
    silent=False,
    servers=3,
    shipped=False,
    seed=4,
)
@example(
    family="llama",
    splits=[1, 3],
    rows=[1, 3, 1, 1],
    labels="client",
    base="fp32",
    dtype="fp64",
    accumulation=2,
    microbatches=2,
    fast=FAST,
    silent=False,
    servers=2,
    shipped=True,
    seed=5,
)
def test_e1_one_aggregated_step_is_the_centralized_step(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    splits: list[int],
    rows: list[int],
    labels: str,
    base: str,
    dtype: str,
    accumulation: int,
    microbatches: int,
    fast: dict[str, bool],
    silent: bool,
    servers: int,
    shipped: bool,
    seed: int,
) -> None:
    """``shipped``: with the default clip, which does not bite where alpha is small, and the default cap."""
    rank, alpha = 3, 0.02 if shipped else ALPHA
    job = {
        "base": base,
        "dtype": dtype,
        "wire": dtype,
        "local_steps": 1,
        "lr": LR,
        "optimizer": "sgd",
        "alpha": alpha,
        "clip": CLIP if shipped else None,
        "seed": seed,
        "grad_accumulation": accumulation,
        "pipeline": {"microbatches": microbatches},
        "fast": fast,
        "privacy": {"labels": labels},
        "residual": {"max_rank": MAX_RANK if shipped else "full"},
    }
    shares = {f"c{i}": random_examples(8, seed + i) for i in range(len(splits))}
    plan_job = _job(job)
    plan = fixed_plan(models[family], plan_job, splits, [rank] * len(splits), rank, servers)
    clients = tuple(replace(client, rows=own) for client, own in zip(plan.clients, rows, strict=False))
    plan = replace(plan, clients=clients)
    run = coordinator(
        models[family], tmp_path_factory.mktemp("e1"), plan, shares, Recorder(), Policy(init="shared"), **job
    )
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    if silent and len(splits) > 1:
        load = actors["c1"].load_data

        def load_then_silence(*arguments: Any) -> Any:
            report = load(*arguments)
            _unsupervised(actors["c1"])
            return report

        actors["c1"].load_data = load_then_silence
    batches = []
    original = {name: actors[name].data.step_batches for name in shares}

    def recording(name: str) -> Any:
        def step_batches(step: int) -> Any:
            drawn = original[name](step)
            if (name, step) not in seen:
                seen.add((name, step))
                batches.extend(drawn.values())
            return drawn

        return step_batches

    seen: set[tuple[str, int]] = set()
    for name in shares:
        actors[name].data.step_batches = recording(name)
    with _clipped() as clipped:
        run.run()
    assert not any(clipped) and bool(clipped) == shipped

    assert sum(len(batch.lengths) for batch in batches) == accumulation * sum(rows[: len(splits)])
    reference = peft_model(models[family], base, DTYPES[dtype], rank, alpha, f"{seed}|shared|{{name}}|1")
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=LR)
    mean_loss(reference, batches).backward()
    optimizer.step()
    sums = learned(actors["server"].state())
    assert sums
    for name, term in sums.items():
        expected = (alpha / rank) * lora_B(reference, name) @ lora_A(reference, name)
        error = (term.dense() - expected).norm() / expected.norm()
        assert error < TOLERANCE[dtype], (name, float(error))


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    split=st.integers(0, LAYERS),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "bf16", "int8", "nf4"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
    clip=st.sampled_from([None, CLIP, 0.05]),
    fast=fast_paths,
    seed=st.integers(0, 2**16),
)
@example(family="llama", split=0, labels="client", base="nf4", dtype="fp64", clip=None, fast=FAST, seed=0)
@example(family="gpt2", split=4, labels="server", base="fp32", dtype="fp64", clip=0.05, fast=FAST, seed=1)
@example(family="llama", split=2, labels="server", base="nf4", dtype="fp64", clip=None, fast=PLAIN, seed=2)
# With clipping that bites, for every split point and both places of the tail.
@example(family="llama", split=0, labels="server", base="nf4", dtype="fp64", clip=CLIP, fast=FAST, seed=3)
@example(family="llama", split=1, labels="client", base="nf4", dtype="fp64", clip=CLIP, fast=FAST, seed=3)
@example(family="gpt2", split=1, labels="server", base="nf4", dtype="fp32", clip=CLIP, fast=FAST, seed=4)
@example(family="llama", split=2, labels="client", base="bf16", dtype="fp64", clip=CLIP, fast=PLAIN, seed=5)
@example(family="gpt2", split=2, labels="server", base="int8", dtype="fp64", clip=0.05, fast=FAST, seed=6)
@example(family="llama", split=3, labels="client", base="nf4", dtype="fp32", clip=0.05, fast=FAST, seed=7)
@example(family="gpt2", split=3, labels="server", base="fp32", dtype="fp64", clip=CLIP, fast=FAST, seed=8)
@example(family="llama", split=4, labels="client", base="nf4", dtype="fp64", clip=CLIP, fast=FAST, seed=9)
def test_e2_losses_of_twenty_adamw_steps_are_those_of_the_unsplit_model(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    split: int,
    labels: str,
    base: str,
    dtype: str,
    clip: float | None,
    fast: dict[str, bool],
    seed: int,
) -> None:
    rank, steps = 4, 20
    job = {
        "base": base,
        "dtype": dtype,
        "wire": dtype,
        "local_steps": steps,
        "lr": 2e-3,
        "alpha": ALPHA,
        "clip": clip,
        "seed": seed,
        "privacy": {"labels": labels},
        "fast": fast,
    }
    recorder = Recorder()
    plan = fixed_plan(models[family], _job(job), [split], [rank], rank)
    run = coordinator(
        models[family],
        tmp_path_factory.mktemp("e2"),
        plan,
        {"c0": random_examples(30, seed)},
        recorder,
        Policy(init="shared"),
        **job,
    )
    run.run()
    client = run._executor.actors["c0"]  # type: ignore[attr-defined]  # in-process by construction

    reference = peft_model(models[family], base, DTYPES[dtype], rank, ALPHA, f"{seed}|shared|{{name}}|1")
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    names, clipped = [shape.name for shape in ModelSpec.read(models[family]).linears], 0
    for step in range(steps):
        loss = mean_loss(reference, list(client.data.step_batches(step).values()))
        optimizer.zero_grad()
        loss.backward()
        clipped += clip_each_weight(reference, names, clip)
        optimizer.step()
        assert recorder.losses[step]["c0"] == pytest.approx(float(loss.detach()), rel=TOLERANCE[dtype]), step
    assert bool(clipped) == (clip is not None)


def test_a_norm_for_each_holder_would_break_e2(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law's tolerance is tight enough to notice a clip that depends on who holds what."""

    def by_holder(gradients: dict[str, torch.Tensor], limits: dict[str, float]) -> None:
        parts = [torch.nn.Parameter(gradient) for gradient in gradients.values()]
        for part, gradient in zip(parts, gradients.values(), strict=True):
            part.grad = gradient
        torch.nn.utils.clip_grad_norm_(parts, CLIP or 1.0)

    monkeypatch.setattr(holding, "clip_each", by_holder)
    job = {"base": "fp32", "local_steps": 5, "lr": 2e-3, "alpha": ALPHA, "clip": CLIP}
    curves = []
    for split in (0, 2):
        recorder = Recorder()
        plan = fixed_plan(models["llama"], _job(job), [split], [4], 4)
        shares = {"c0": random_examples(30, 0)}
        coordinator(models["llama"], tmp_path / str(split), plan, shares, recorder, **job).run()
        curves.append([losses["c0"] for losses in recorder.losses])
    assert curves[0] != pytest.approx(curves[1], rel=1e-4)


def test_a_rounded_wire_would_break_e2(models: dict[str, Path], tmp_path: Path) -> None:
    """The law's tolerance is tight enough to notice bf16 on the wire."""
    job = {"base": "fp32", "local_steps": 5, "lr": 2e-3, "alpha": ALPHA}
    curves = []
    for wire in ("fp32", "bf16"):
        recorder = Recorder()
        plan = fixed_plan(models["llama"], _job(job), [2], [4], 4)
        shares: dict[str, list[Example]] = {"c0": random_examples(30, 0)}
        coordinator(models["llama"], tmp_path / wire, plan, shares, recorder, **{**job, "wire": wire}).run()
        curves.append([losses["c0"] for losses in recorder.losses])
    assert curves[0] != pytest.approx(curves[1], rel=1e-5)


def _job(job: dict[str, Any]) -> Job:
    return Job.model_validate(job)
