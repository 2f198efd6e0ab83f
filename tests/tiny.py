"""Tiny random models: the real architectures, four layers deep and 32 wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hsplit.models.spec import ModelSpec
from hsplit.models.twin import small_twin

LAYERS = 4
WORDS = 96


def tiny_config(family: str, **changes: Any) -> Any:
    """Configuration of a tiny model of ``family``: llama, gpt2, or any model type of transformers."""
    from transformers import AutoConfig, GPT2Config, LlamaConfig

    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes, **dropout, **changes)
    if family != "llama":
        made = AutoConfig.for_model(family, vocab_size=WORDS, **{"num_hidden_layers": LAYERS, **changes})
        return small_twin(made, least=LAYERS)
    return LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        **changes,
    )


def spec_of(config: Any) -> ModelSpec:
    """A model of ``config`` that is in no directory."""
    return ModelSpec(Path(), config)


def tiny_spec(family: str, **changes: Any) -> ModelSpec:
    """The tiny model of ``family`` without a directory."""
    return spec_of(tiny_config(family, **changes))


def tiny_tokenizer() -> Any:
    """A word-level tokenizer of ``WORDS`` words ``w1 w2 …``, without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def wordless_tokenizer() -> Any:
    """A tokenizer of the letters of ``w1 w2 …`` that drops all others and has no special token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = models.BPE(vocab={letter: index for index, letter in enumerate("w0123456789")}, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(letters))


def save_tiny_model(family: str, directory: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of ``family`` with its tokenizer into ``directory``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config)
    # Larger than the default init, so that losses move and layers matter; a few types draw as large values themselves.
    larger = min(4.0, 0.08 / getattr(config, "initializer_range", 0.02))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(larger)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
