"""Where a simulated model's configuration comes from: a directory, the hub, or a shape that is known by its name."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hsplit.models.source import find_model

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "meta-llama/Llama-2-70b-hf": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
"""Published shapes of models that are too large, or too closed, to be fetched for their configuration."""


@contextmanager
def shape_directory(model: str) -> Iterator[Path]:
    """A directory with the ``config.json`` of ``model``, for as long as it is needed; no weights are looked for.

    Args:
        model: the value of ``job.model``; a name in :data:`SHAPES` is not looked up anywhere.

    Raises:
        InputError: it is not found.
    """
    if model in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "config.json").write_text(json.dumps(SHAPES[model]))
            yield Path(name)
    else:
        yield find_model(model, weights=False).directory
