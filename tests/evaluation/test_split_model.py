"""The split model computes as the run's holders do, and generates as the merged export does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hsplit.actors.messages import WireTensor
from hsplit.config import RunConfig
from hsplit.data import Example, hold_out, tokenize
from hsplit.evaluation.generation import generate
from hsplit.evaluation.perplexity import cross_entropy
from hsplit.evaluation.split_model import Cut, split_model
from hsplit.exporting.export import export
from hsplit.lora.learned import learned_parts
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import DenseWeight
from hsplit.observe.tables import MetricsRow, read_rows
from hsplit.run.inputs import read_inputs
from hsplit.seeds import hash_seed
from tests.finished_run import FinishedRun, finished_run, logits_of


def _split_model(run: FinishedRun, split: int = 3, wire: str | None = None, learned: bool = True) -> Any:
    _, tensors = run.checkpoint()
    job = run.config.job
    cut = Cut(split, wire or job.wire, job.privacy.labels)
    parts = learned_parts(tensors["server"]) if learned else {}
    return split_model(BaseModel.of_job(ModelSpec.read(run.model), job), parts, cut)


def _validation(config: RunConfig, model: Path) -> list[Any]:
    """The rows that the clients validated on, tokenized."""
    tokenizer, job, examples = AutoTokenizer.from_pretrained(model), config.job, []
    for client, share in read_inputs(config, find_model(str(model))).shares.items():
        _, held = hold_out(share or [], job.validation.share, job.validation.max_examples, hash_seed(job.seed, client))
        examples += held
    return tokenize(examples, tokenizer, job.max_length)[0]


@pytest.mark.parametrize(
    ("family", "base", "labels"),
    [("llama", "nf4", "server"), ("llama", "bf16", "client"), ("gpt2", "int8", "client"), ("gpt2", "fp32", "server")],
)
def test_its_loss_is_the_coordinators_own_validation_loss(
    tmp_path: Path, models: dict[str, Path], family: str, base: str, labels: str
) -> None:
    run = finished_run(tmp_path, models[family], base=base, privacy={"labels": labels})
    rows = _validation(run.config, run.model)
    before, *_, after = [row.val_loss for row in read_rows(run.directory.metrics, MetricsRow)]
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    for split in (1, 3):
        found = cross_entropy(_split_model(run, split), tokenizer, rows, batch_size=4)
        assert found.total / found.tokens == pytest.approx(after, rel=1e-5)
    # The test can fail: without what was learned the loss is that before any training.
    bare = cross_entropy(_split_model(run, learned=False), tokenizer, rows, batch_size=4)
    assert bare.total / bare.tokens == pytest.approx(before, rel=1e-5)
    assert before - after > 0.01


def prompt_ids(tokenizer: Any, prompts: list[str]) -> list[tuple[int, ...]]:
    """The tokens before a response in training, for each prompt."""
    tokenized, _ = tokenize([Example(prompt, " w2", None) for prompt in prompts], tokenizer, 99)
    return [example.ids[: example.prompt_length] for example in tokenized]


def test_holders_store_the_base_as_in_the_run(runs: dict[str, FinishedRun]) -> None:
    model = _split_model(runs["llama"])
    kinds = [type(layer.mlp.up_proj.weight) for layer in model.model.layers]
    assert [kind is DenseWeight for kind in kinds] == [True, True, True, False]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("split", "wire"), [(0, "bf16"), (3, "int8"), (4, "bf16")])
def test_hidden_states_pass_the_wire_at_the_cut(
    runs: dict[str, FinishedRun], family: str, split: int, wire: str
) -> None:
    exact, narrow = _split_model(runs[family], split, "fp32"), _split_model(runs[family], split, wire)
    assert 1e-4 < (logits_of(exact) - logits_of(narrow)).abs().max() < 0.5
    layers, norm = ("model.layers", "model.norm") if family == "llama" else ("transformer.h", "transformer.ln_f")
    path = f"{layers}.{split}" if split < 4 else norm
    received: list[torch.Tensor] = []
    for model in (exact, narrow):
        model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
        logits_of(model)
    rows = WireTensor.pack(received[0].flatten(0, 1), wire).unpack(torch.float32, "cpu")
    assert torch.equal(rows.view_as(received[0]), received[1])
    assert not torch.equal(received[0], received[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_generation_and_beams_are_those_of_the_merged_export(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    # Small steps: with large ones the tiny models learn little but to end at once.
    run = finished_run(tmp_path, models[family], base="nf4", rounds=1, lr=1e-3)
    model = _split_model(run)
    merged = AutoModelForCausalLM.from_pretrained(export(run.path, tmp_path / "merged", format="merged"))
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    prompts = prompt_ids(tokenizer, ["w5 w6 w7 w8 w9 w10", "w30", "w4 w44 w14", "w88 w2"])
    for beams in (1, 3):
        settings = {"beams": beams, "max_new_tokens": 8}
        found = generate(model, tokenizer, prompts, batch_size=4, **settings)
        assert found == generate(merged, tokenizer, prompts, batch_size=4, **settings)
        # Each alone, without any padding, gives the same.
        assert found == generate(model, tokenizer, prompts, batch_size=1, **settings)
        assert any(found)


def test_generation_is_the_argmax_step_by_step_and_ends_before_the_eos(runs: dict[str, FinishedRun]) -> None:
    run = runs["llama"]
    model, tokenizer = _split_model(run), AutoTokenizer.from_pretrained(run.model)
    for prompt in ("w5 w6 w7", "w21 w11"):
        (ids,) = prompt_ids(tokenizer, [prompt])
        expected = list(ids)
        for _ in range(6):
            with torch.no_grad():
                best = int(model(torch.tensor([expected]), use_cache=False).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            expected.append(best)
        (text,) = generate(model, tokenizer, [ids], beams=1, max_new_tokens=6, batch_size=1)
        assert text == tokenizer.decode(expected[len(ids) :])
