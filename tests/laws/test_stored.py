"""How a holder stores its part changes no number: codes or a copy of the base, rows of the embedding (METHOD 1, 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hsplit.actors.client import Client
from hsplit.actors.executor import ActorFailure
from hsplit.config import Importance, Job, Policy
from hsplit.data import Example
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import DenseWeight
from hsplit.planning.plan import HolderPlan, Plan
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples
from tests.laws.reference import keep_double
from tests.tiny import LAYERS, WORDS

TOLERANCE = {"fp32": 1e-5, "fp64": 1e-12}
ROUNDS, STEPS = 3, 2

laws = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

STORED = st.sampled_from(["dense", "codes"])
HOLDING = st.tuples(st.integers(0, LAYERS), st.integers(0, LAYERS), STORED, STORED)
"""A client's split point in the first round and after it, and what it stores in each."""


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


def _losses(to: Path, model: Path, plans: list[Plan], policy: Policy, job: dict[str, Any]) -> list[float]:
    """Every client's loss of each step, and the validation loss of each round, by plans that change after a round."""
    shares = {c.name: random_examples(12, i) for i, c in enumerate(plans[0].clients)}
    recorder = Recorder()
    run = coordinator(model, to, plans[0], shares, recorder, policy, later={1: plans[1], 2: plans[0]}, **job)
    assert run.run()
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    for part in plans[0].available:
        linears = actors[part.name].holder.segment.linears.values()
        assert {isinstance(linear.weight, DenseWeight) for linear in linears} <= {part.stored == "dense"}
    deep = actors["server"].holder.segment.linears.values()
    assert {linear.has_working_copy for linear in deep} <= {plans[0].server.working_copy}
    assert len(recorder.losses) == ROUNDS * STEPS
    return [*(loss for step in recorder.losses for loss in step.values()), *(row.val_loss for row in run.rows)]


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    holdings=st.lists(HOLDING, min_size=1, max_size=3),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["int8", "nf4"]),
    dtype=st.sampled_from(["fp32", "fp64"]),
    reinit=st.sampled_from(["svd", "random", "mean"]),
    moments=st.sampled_from(["drop", "fit"]),
    copies=st.tuples(st.booleans(), st.booleans()),
)
@example(
    family="llama",
    holdings=[(2, 2, "dense", "codes"), (3, 3, "codes", "dense"), (1, 4, "codes", "codes")],
    labels="server",
    base="nf4",
    dtype="fp64",
    reinit="mean",
    moments="fit",
    copies=(True, False),
)
@example(
    family="gpt2",
    holdings=[(4, 1, "dense", "codes"), (0, 3, "codes", "dense"), (2, 2, "dense", "dense")],
    labels="client",
    base="int8",
    dtype="fp32",
    reinit="svd",
    moments="drop",
    copies=(False, True),
)
def test_codes_on_clients_working_copies_on_the_server_and_changes_to_and_fro_change_no_loss(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    holdings: list[tuple[int, int, str, str]],
    labels: str,
    base: str,
    dtype: str,
    reinit: str,
    moments: str,
    copies: tuple[bool, bool],
) -> None:
    job = {"dtype": dtype, "wire": dtype, "base": base, "rounds": ROUNDS, "local_steps": STEPS, "lr": 0.05}
    job["privacy"] = {"labels": labels}
    policy = Policy(reinit=reinit, moments=moments, importance=Importance(metric="equal"))
    found: dict[str, list[float]] = {}
    for kept in ("dense", "as drawn", *(["with copies"] if any(copies) else [])):
        plans = []
        for when in (0, 1):
            stored = ["dense" if kept == "dense" else holding[2 + when] for holding in holdings]
            splits, ranks = [holding[when] for holding in holdings], [2] * len(holdings)
            copy = kept == "with copies" and copies[when]
            made = fixed_plan(
                models[family], Job.model_validate(job), splits, ranks, 4, stored=stored, working_copy=copy
            )
            plans.append(made)
        found[kept] = _losses(tmp_path_factory.mktemp("run"), models[family], plans, policy, job)
    assert found["as drawn"] == pytest.approx(found["dense"], rel=TOLERANCE[dtype])
    # Codes have the same bits as dense values; a working copy's sum is rounded otherwise, and Adam amplifies that.
    rounding = 10 if dtype == "fp32" else 1
    assert found.get("with copies", found["dense"]) == pytest.approx(found["dense"], rel=rounding * TOLERANCE[dtype])


def test_a_plan_with_codes_of_a_base_that_has_none_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    plan = fixed_plan(models["llama"], Job(), [2], [2], 2, stored=["codes"])
    run = coordinator(models["llama"], tmp_path, plan, {"c0": random_examples(6, 1)}, Recorder(), base="fp32")
    with pytest.raises(ActorFailure, match="c0: a plan says codes, and a base in fp32 has none"):
        run.start()


def test_weights_that_become_dense_are_not_read_again(models: dict[str, Path], tmp_path: Path) -> None:
    job: dict[str, Any] = {"base": "nf4"}
    plan = fixed_plan(models["llama"], Job.model_validate(job), [2], [2], 2, stored=["codes"])
    run = coordinator(models["llama"], tmp_path, plan, {"c0": random_examples(6, 1)}, Recorder(), **job)
    run.start()
    client = run._executor.actors["c0"]  # type: ignore[attr-defined]
    held = client.holder.segment.layers["0"]
    (part,) = plan.available
    client.shrink(HolderPlan(part.name, "client", True, 1, part.ranks))
    assert client._kept.layers["0"] is held
    assert all(isinstance(linear.weight, DenseWeight) for linear in client._kept.linears.values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packed", [True, False])
def test_own_rows_of_the_embedding_change_no_bit(
    models: dict[str, Path], tmp_path: Path, family: str, packed: bool
) -> None:
    job = {"dtype": "fp32", "wire": "fp32", "base": "fp32", "rounds": ROUNDS, "local_steps": STEPS, "lr": 0.05}
    job["fast"] = {"packed": packed}
    plans = [fixed_plan(models[family], Job.model_validate(job), splits, [2, 2], 4) for splits in ([0, 3], [2, 1])]
    found = {}
    for embedding in ("whole", "own"):
        policy = Policy.model_validate({"pace": {"embedding": embedding}})
        found[embedding] = _losses(tmp_path / embedding, models[family], plans, policy, job)
    assert found["own"] == found["whole"]


def test_a_client_reads_the_rows_of_its_own_texts_and_more_when_it_is_given_others(models: dict[str, Path]) -> None:
    base = BaseModel(ModelSpec.read(models["gpt2"]), "fp32", torch.float32)
    client = Client("c", Job(dtype="fp32", base="fp32"), Policy.model_validate({"pace": {"embedding": "own"}}), base)
    part = HolderPlan("c", "client", True, 1)
    held = {}
    for words in (("w2 w3", "w3 w4"), ("w2 w9", "w3 w8 w7")):
        report = client.load_data({"c": [Example("", f" {text}", None) for text in words] * 2}, None)
        client.configure(part)
        held[report.vocabulary] = client.parameters_held()
        embedded = client.holder.segment.embeddings["wte"](client.data.vocabulary)
        assert torch.equal(embedded, whole_embedding(models["gpt2"])[client.data.vocabulary])
    # The words and the end of a text.
    assert list(held) == [4, 6]
    assert [found["embeddings.wte.weight"] // 32 for found in held.values()] == [4, 6]
    assert {found["embeddings.wpe.weight"] // 32 for found in held.values()} == {64}
    with pytest.raises(IndexError, match="none of the texts"):
        client.holder.segment.embeddings["wte"](torch.tensor([4]))


def whole_embedding(model: Path) -> Tensor:
    segment = load_segment(BaseModel(ModelSpec.read(model), "fp32", torch.float32), SegmentSpec(0, 0, embedding=True))
    return cast(Tensor, segment.embeddings["wte"].weight)


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_client_with_the_tail_has_the_whole_embedding(models: dict[str, Path], labels: str) -> None:
    job = Job.model_validate({"dtype": "fp32", "base": "fp32", "privacy": {"labels": labels}})
    client = Client(
        "c",
        job,
        Policy.model_validate({"pace": {"embedding": "own"}}),
        BaseModel(ModelSpec.read(models["llama"]), "fp32", torch.float32),
    )
    client.load_data({"c": random_examples(4, 1)}, None)
    client.configure(HolderPlan("c", "client", True, 1))
    assert (client.parameters_held()["embeddings.embed_tokens.weight"] == 32 * WORDS) == (labels == "client")
