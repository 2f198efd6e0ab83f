"""Adapters of unequal ranks, as different tools scale them, and as training continues from them."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hsplit.exporting.adapter_files import PREFIX, export_peft
from hsplit.models.factors import LowRank
from hsplit.models.spec import LinearShape
from tests.conftest import FAMILIES
from tests.tiny import WORDS, spec_of, tiny_config

# Layers 1, 10 and 11: one's name is the beginning of another's.
DEEP = 12


def _deep_config(family: str) -> Any:
    config = tiny_config(family)
    config.num_hidden_layers = DEEP
    return config


SHAPES = {family: spec_of(_deep_config(family)).linears for family in FAMILIES}


def _term(shape: LinearShape, rank: int, draw: torch.Generator) -> LowRank:
    B = torch.randn(shape.d_out, rank, generator=draw)
    return LowRank(B / 4, torch.randn(rank, shape.d_in, generator=draw))


def _with_zeros(term: LowRank, kind: str) -> LowRank:
    """``term`` with one more direction, of product zero."""
    B = torch.cat([term.B, (torch.ones if kind == "A" else torch.zeros)(len(term.B), 1)], dim=1)
    A = torch.cat([term.A, (torch.ones if kind == "B" else torch.zeros)(1, term.A.shape[1])], dim=0)
    return LowRank(B, A)


@st.composite
def learned_terms(draw: st.DrawFn) -> tuple[str, dict[str, LowRank]]:
    """A family with learned updates: none, more directions than the weight has sides, some of them zero."""
    family = draw(st.sampled_from(FAMILIES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    by_layer = draw(st.lists(st.integers(0, 9), min_size=DEEP, max_size=DEEP))
    wide = draw(st.sampled_from(SHAPES[family])).name
    terms = {}
    for shape in SHAPES[family]:
        term = _term(shape, 40 if shape.name == wide else by_layer[shape.layer], generator)
        zero = draw(st.sampled_from(["none", "A", "B", "both"])) if shape.layer < 2 else "none"
        terms[shape.name] = term if zero == "none" else _with_zeros(term, zero)
    return family, {name: term for name, term in terms.items() if term.rank}


def _export(family: str, terms: dict[str, LowRank], to: Path) -> float | None:
    return export_peft(terms, SHAPES[family], "a-base", family == "gpt2", to)


def _peft(family: str, path: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_config(_deep_config(family)), path, **options)


def _as_peft_reads(family: str, path: Path) -> dict[str, Tensor]:
    model = _peft(family, path)
    found = {s.name: model.get_submodule(PREFIX + s.name).get_delta_weight("default").data for s in SHAPES[family]}
    return {name: update.T if family == "gpt2" else update for name, update in found.items()}


def _as_others_read(path: Path, rank_of: str) -> dict[str, Tensor]:
    """The product as tools with one ``lora_alpha`` form it: ``lora_alpha / rank B A``.

    Args:
        rank_of: ``config``, where they divide by its ``r``, or ``tensor``, where by that of the factors.
    """
    config, tensors = (
        json.loads((path / "adapter_config.json").read_text()),
        load_file(path / "adapter_model.safetensors"),
    )
    updates = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            scale = config["lora_alpha"] / (config["r"] if rank_of == "config" else len(A))
            updates[name] = scale * (tensors[key.replace("lora_A", "lora_B")] @ A)
    return updates


def _assert_learned(found: dict[str, Tensor], family: str, terms: dict[str, LowRank]) -> None:
    assert found.keys() == {shape.name for shape in SHAPES[family]}
    for name, update in found.items():
        if name not in terms:
            assert not update.any(), name
            continue
        term = terms[name].to(torch.float64)
        # Products of this size are summed in fp32.
        size = float(term.B.norm() * term.A.norm())
        assert float((update.double() - term.dense()).norm()) <= 1e-6 * size, name


@settings(max_examples=15)
@given(learned_terms())
def test_every_reader_scales_modules_of_unequal_ranks_alike(drawn: tuple[str, dict[str, LowRank]]) -> None:
    family, terms = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        assert _export(family, terms, path) is None
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        for key, tensor in load_file(path / "adapter_model.safetensors").items():
            assert tensor.shape[0 if "lora_A" in key else 1] == config["r"], key
        _assert_learned(_as_peft_reads(family, path), family, terms)
        _assert_learned(_as_others_read(path, "config"), family, terms)
        _assert_learned(_as_others_read(path, "tensor"), family, terms)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_one_rank_would_cost_too_much_peft_reads_each_modules_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    ranks = {
        s.name: 64 if (s.layer, s.name) == (11, SHAPES[family][-1].name) else 1 + s.layer % 3 for s in SHAPES[family]
    }
    terms = {shape.name: _term(shape, ranks[shape.name], draw) for shape in SHAPES[family]}
    assert _export(family, terms, tmp_path / "one") is None
    monkeypatch.setattr("hsplit.exporting.adapter_files.MOST_PADDING_BYTES", 0)
    growth = _export(family, terms, tmp_path / "own")
    sizes = {
        name: sum(t.nbytes for t in load_file(tmp_path / name / "adapter_model.safetensors").values())
        for name in ("own", "one")
    }
    assert growth is not None and growth > 2 and growth == pytest.approx(sizes["one"] / sizes["own"], rel=1e-12)
    for key, tensor in load_file(tmp_path / "own" / "adapter_model.safetensors").items():
        if "lora_A" in key:
            assert len(tensor) == ranks[key.removeprefix(PREFIX).removesuffix(".lora_A.weight")]
    _assert_learned(_as_peft_reads(family, tmp_path / "own"), family, terms)
    _assert_learned(_as_others_read(tmp_path / "own", "config"), family, terms)
    # No module takes another one's rank, in PEFT's own way of matching (layers.1 and layers.11).
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] and len(config["rank_pattern"]) == len(ranks) - 1
    for key in config["rank_pattern"]:
        assert [name for name in ranks if re.match(rf"(.*\.)?({key})$", name)] == [key]
    # Twice the size is no reason to leave anybody out.
    few = {name: term.up_to_rank(2) for name, term in terms.items() if ranks[name] > 1}
    assert _export(family, few, tmp_path / "few") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_in_every_direction(tmp_path: Path, family: str) -> None:
    draw = torch.Generator().manual_seed(0)
    terms = {s.name: _term(s, s.layer % 5, draw) for s in SHAPES[family] if s.layer != 3}
    first = SHAPES[family][0].name
    terms[first] = _with_zeros(_with_zeros(_term(SHAPES[family][0], 1, draw), "both"), "A")
    _export(family, terms, tmp_path)
    model = _peft(family, tmp_path, is_trainable=True).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert len(before) == 2 * len(SHAPES[family])
    ids = torch.randint(2, WORDS, (8, 32), generator=draw)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    unmoved = set(before)
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in before:
                # A new direction's A has a gradient as soon as its B is not zero any more.
                along = 1 if "lora_A" in name else 0
                if (parameter.detach() != before[name]).any(dim=along).all():
                    unmoved.discard(name)
        if step == 0:
            assert not [name for name in unmoved if "lora_B" in name]
    assert not unmoved


def test_an_export_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    terms = {s.name: _term(s, s.layer, torch.Generator().manual_seed(s.layer)) for s in SHAPES["llama"]}
    for name in ("one", "two"):
        torch.manual_seed(len(name))
        torch.rand(3 if name == "one" else 4)
        _export("llama", terms, tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
