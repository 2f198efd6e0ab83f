"""The laws over models that no family is written for, one of each kind; their bodies are those of the other laws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.laws import (
    test_parity,
    test_periods,
    test_reconfiguration,
    test_replicas,
    test_scores_in_training,
    test_split_independence,
)
from tests.laws.test_parity import FAST, PLAIN
from tests.tiny import save_tiny_model

# Model types, and what is changed of their default configuration so that four layers show it.
KINDS: dict[str, dict[str, Any]] = {
    # Soft-caps of scores and logits, and a window.
    "gemma2": {},
    # Two rotary tables, a scaled embedding, a tied head.
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    # Parallel attention, scaled logits.
    "cohere": {},
    # ALiBi, a norm after the embedding.
    "bloom": {},
    # Recurrent.
    "mamba": {},
    # A mixture, a head of its own.
    "mixtral": {},
    # A head of its own under another name, parallel attention.
    "gpt_neox": {},
}


# Each kind with one tail, split and base of two.
ONE = tuple(KINDS)[::2]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a tiny random model of each kind, with a tokenizer."""
    return {kind: save_tiny_model(kind, tmp_path_factory.mktemp(kind), **more) for kind, more in KINDS.items()}


def _body(law: Any) -> Any:
    return law.hypothesis.inner_test


E1 = _body(test_parity.test_e1_one_aggregated_step_is_the_centralized_step)
E2 = _body(test_parity.test_e2_losses_of_twenty_adamw_steps_are_those_of_the_unsplit_model)
E3 = _body(test_replicas.test_e3_the_residual_takes_up_what_every_server_has_learned)
E4 = _body(test_reconfiguration.test_e4_another_plan_changes_no_output)
E5 = _body(test_split_independence.test_e5_scores_are_those_of_each_client_alone_before_an_unsplit_server)
E6 = _body(test_periods.test_e6_overlap_changes_no_number)
E5_IN_TRAINING = _body(test_scores_in_training.test_e5_scores_of_a_training_step_do_not_depend_on_the_split_points)


@pytest.mark.parametrize("kind", KINDS)
def test_e1(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    job: dict[str, Any] = {"base": "fp32", "dtype": "fp32", "shipped": False, "microbatches": 1, "servers": 1}
    if kind in ONE:
        job |= {"labels": "server", "splits": [0, 2, 4], "fast": FAST, "silent": False}
    else:
        job |= {"labels": "client", "splits": [3, 1], "fast": PLAIN, "silent": True}
    E1(kinds, tmp_path_factory, family=kind, rows=[2, 3, 1], accumulation=1, seed=1, **job)


@pytest.mark.parametrize("kind", KINDS)
def test_e2(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    base, split, labels = ("nf4", 4, "client") if kind in ONE else ("fp32", 2, "server")
    job: dict[str, Any] = {"base": base, "dtype": "fp32", "clip": 0.05, "fast": FAST, "seed": 3}
    E2(kinds, tmp_path_factory, family=kind, split=split, labels=labels, **job)


@pytest.mark.parametrize("kind", KINDS)
def test_e3(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    E3(
        kinds,
        tmp_path_factory,
        family=kind,
        splits=[1, 4, 2],
        ranks=[2, 1, 3, 1, 1],
        server_rank=3,
        servers=2,
        training=None,
        labels="server",
        base="nf4",
        reinit="svd",
        init="independent",
        max_rank="full",
        seed=2,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_e4(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    E4(
        kinds,
        tmp_path_factory,
        family=kind,
        holdings=[(2, 2, 3, 4), (4, 4, 1, 8)],
        server_ranks=(4, 8),
        labels="client",
        base="fp32",
        reinit="svd",
        moments="keep",
        max_rank="full",
        wait=0.0,
        seed=5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_e5(kinds: dict[str, Path], kind: str) -> None:
    job: dict[str, Any] = {"base": "fp32", "dtype": "fp32"}
    if kind in ONE:
        E5(kinds, family=kind, splits=[0, 2, 4], labels="server", matrices=False, round_=1, **job)
    else:
        E5_IN_TRAINING(kinds, family=kind, splits=[3, 1], labels="client", **job)


@pytest.mark.parametrize("kind", KINDS)
def test_e6(kinds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    job: dict[str, Any] = {"accumulation": 1, "servers": 1, "clients": [(2, 3, 0, 1, 0), (1, 1, 1, 2, 1)]}
    if kind in ONE:
        job |= {"labels": "server", "base": "nf4", "microbatches": 2, "step": "cycle", "optimizer": "sgd"}
    else:
        job |= {"labels": "client", "base": "fp32", "microbatches": 1, "step": "group", "optimizer": "adamw"}
    if kind == "mixtral":
        # torch multiplies experts in groups, but not in fp64.
        model = shutil.copytree(kinds[kind], tmp_path_factory.mktemp("one-by-one") / kind)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"experts_implementation": "eager"}))
        kinds = kinds | {kind: model}
    E6(kinds, tmp_path_factory, family=kind, **job)
