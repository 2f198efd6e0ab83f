"""Packed tokens give what a padded batch gives, for every family and for sliding windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing, pack_rows
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec


def _configs() -> dict[str, Any]:
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    llama: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return {
        "llama": LlamaConfig(**llama),
        "llama-tied": LlamaConfig(**llama, tie_word_embeddings=True),
        "mistral-window": MistralConfig(**llama, sliding_window=4),
        "qwen2-window": Qwen2Config(**llama, **window),
        "qwen3": Qwen3Config(**llama, head_dim=8),
        "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32),
    }


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-window", "qwen2-window", "qwen3", "gpt2"])
def test_segments_compute_what_the_whole_model_computes_on_a_padded_batch(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_configs()[name]).eval()
    model.save_pretrained(tmp_path)
    lengths = (9, 3, 12, 1)
    ids = torch.randint(0, 61, (4, 12))
    mask = (torch.arange(12)[None] < torch.tensor(lengths)[:, None]).long()
    base = BaseModel(ModelSpec.read(tmp_path), "fp32", torch.float32)
    front = load_segment(base, SegmentSpec(0, 2, embedding=True))
    deep = load_segment(base, SegmentSpec(2, 3, tail=True))
    packing = Packing.of(lengths)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        hidden = front.run(front.embed(pack_rows(ids, lengths), packing), packing, 0, 2)
        hidden = deep.run(hidden, packing, 2, 3)
        targets = torch.randint(0, 61, (sum(lengths),))
        assert deep.tail is not None
        losses = deep.tail.token_losses(hidden, targets)
    expected = torch.nn.functional.cross_entropy(pack_rows(logits, lengths), targets, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(deadline=None)
def test_packing_is_the_inverse_of_padding(lengths: list[int]) -> None:
    packing = Packing.of(lengths)
    tokens = torch.arange(float(sum(lengths))).view(1, 1, -1, 1)
    padded = packing.pad(tokens)
    assert padded.shape == (len(lengths), 1, max(lengths), 1)
    assert torch.equal(packing.pack(padded.transpose(1, 2)).flatten(), tokens.flatten())
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert padded[row, 0, :length, 0].tolist() == [float(start + t) for t in range(length)]
    assert packing.positions.tolist() == [t for length in lengths for t in range(length)]


def test_packed_rows_drop_padding_only() -> None:
    rows = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]])
    assert pack_rows(rows, (2, 1, 3)).tolist() == [1, 2, 3, 4, 5, 6]
