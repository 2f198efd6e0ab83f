"""Runs of models that no family is written for: evaluated split, exported, and loaded by transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from hsplit.evaluation.split_model import Cut, split_model
from hsplit.evaluation.targets import open_target
from hsplit.exporting.adapter_files import export_peft
from hsplit.exporting.export import ExportOptions, export_run
from hsplit.lora.learned import learned_parts
from hsplit.models.factors import LowRank
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from tests.finished_run import finished_run, logits_of
from tests.run.test_placements import test_ft_is_plain_training_of_every_weight as ft
from tests.tiny import save_tiny_model

# Soft-caps after the head, ALiBi, merged experts; and corrections of experts' scores, which are no parameters.
KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "bloom": {},
    "mixtral": {},
    "deepseek_v3": {"first_k_dense_replace": 1},
}


def _load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_exported_as_both_formats_and_has_the_split_model_s_logits(kind: str, tmp_path: Path) -> None:
    model = save_tiny_model(kind, tmp_path / "model", **KINDS[kind])
    run = finished_run(tmp_path, model, base="nf4")
    base = BaseModel.of_job(ModelSpec.read(model), run.config.job)
    _, tensors = run.checkpoint()
    learned = learned_parts(tensors["server"])
    wanted = logits_of(split_model(base, learned, Cut(3, "fp32", "server")))
    assert (logits_of(split_model(base, learned, Cut(0, "fp32", "client"))) - wanted).abs().max() < 1e-4
    assert (logits_of(_load(model)) - wanted).abs().max() > 1e-2
    merged = export_run(run.path, tmp_path / "merged", ExportOptions(format="merged")).path
    assert (logits_of(_load(merged)) - wanted).abs().max() < 1e-4
    adapter = export_run(run.path, tmp_path / "adapter", ExportOptions()).path
    assert (logits_of(open_target(adapter).model) - wanted).abs().max() < 1e-4


def test_full_fine_tuning_trains_every_weight(tmp_path: Path) -> None:
    # Its norms stay in fp64, which others leave for fp32.
    models = {"gpt_neox": save_tiny_model("gpt_neox", tmp_path / "model")}
    ft(models, tmp_path, "gpt_neox", "fp32")


def test_a_wire_rounds_what_is_between_the_layers(tmp_path: Path) -> None:
    model = save_tiny_model("bloom", tmp_path / "model")
    base = BaseModel(ModelSpec.read(model), "fp32", torch.float32)
    exact = logits_of(split_model(base, {}, None))
    for split in (0, 2, 4):
        rounded = logits_of(split_model(base, {}, Cut(split, "int8", "server")))
        assert 1e-6 < (rounded - exact).abs().max() < 1


# The converter's name of each kind's architecture; it maps an adapter's names as it maps the model's.
ARCHITECTURES = {"gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "cohere": "COMMAND_R", "bloom": "BLOOM"}
ARCHITECTURES |= {"mamba": "MAMBA", "mixtral": "LLAMA", "gpt_neox": "GPTNEOX", "deepseek_v3": "DEEPSEEK2"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_adapter_names_modules_as_llama_cpp_and_vllm_look_them_up(kind: str, tmp_path: Path) -> None:
    spec = ModelSpec.read(save_tiny_model(kind, tmp_path / "model", **KINDS.get(kind, {})))
    terms = {s.name: LowRank(torch.ones(s.d_out, 1 + s.layer), torch.ones(1 + s.layer, s.d_in)) for s in spec.linears}
    export_peft(terms, spec.linears, "a-base", False, tmp_path / "adapter")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, ARCHITECTURES[kind]), spec.layers)
    modules = dict(spec.skeleton.named_modules())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(spec.linears)
    for name in tensors:
        # vLLM: a fixed prefix, a module of transformers' model, `lora_A` or `lora_B`, `weight`.
        base, model, *module, factor, weight = name.split(".")
        assert (base, model, weight) == ("base_model", "model", "weight") and factor in ("lora_A", "lora_B")
        assert ".".join(module) in modules
        # llama.cpp: the weight's name in the checkpoint.
        assert names.get_name(".".join(module) + ".weight", try_suffixes=(".weight",)), name
