"""Model families: where a transformers causal LM keeps its parts and what a decoder layer is called with.

A new family is one subclass and one line in ``FAMILIES``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from hsplit.errors import InputError


class Family:
    """Module paths and calling conventions shared by the models of one architecture.

    Attributes:
        model_types: values of ``config.model_type`` that this family serves.
        layers: path of the list of decoder layers.
        embeddings: paths of the modules that make the first hidden state.
        rotary: path of the rotary embedding, if there is one.
        norm, head: paths of the tail's modules.
        transposed: linears are stored ``(d_in, d_out)`` (GPT-2's Conv1D).
    """

    model_types: ClassVar[frozenset[str]]
    layers: ClassVar[str]
    embeddings: ClassVar[tuple[str, ...]]
    rotary: ClassVar[str | None] = None
    norm: ClassVar[str]
    head: ClassVar[str] = "lm_head"
    transposed: ClassVar[bool] = False

    def embed(self, modules: nn.ModuleDict, ids: Tensor, positions: Tensor) -> Tensor:
        """Packed token ids and their positions, both ``(n,)``, to the first hidden state ``(n, d)``."""
        raise NotImplementedError

    def window(self, layer: nn.Module, config: Any) -> int | None:
        """Length of the layer's sliding attention window, ``None`` for full causal attention."""
        return None

    def positions(self, config: Any) -> int | None:
        """Number of learned positions, beyond which no text can be embedded; ``None`` where none are learned."""
        return None

    def layer_name(self, index: int) -> str:
        """A layer's module path in the causal LM."""
        return f"{self.layers}.{index}"


class LlamaFamily(Family):
    """Llama, Mistral, Qwen2, Qwen3, SmolLM: rotary positions, RMS norms, gated MLP."""

    model_types = frozenset({"llama", "mistral", "qwen2", "qwen3"})
    layers = "model.layers"
    embeddings = ("model.embed_tokens",)
    rotary = "model.rotary_emb"
    norm = "model.norm"

    def embed(self, modules: nn.ModuleDict, ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = modules["embed_tokens"](ids)
        return hidden

    def window(self, layer: nn.Module, config: Any) -> int | None:
        # Qwen decides per layer; Mistral has one window for the model; Llama has none.
        default = getattr(config, "sliding_window", None)
        return getattr(layer.self_attn, "sliding_window", default)


class GPT2Family(Family):
    """GPT-2: learned positions, layer norms, Conv1D linears."""

    model_types = frozenset({"gpt2"})
    layers = "transformer.h"
    embeddings = ("transformer.wte", "transformer.wpe")
    norm = "transformer.ln_f"
    transposed = True

    def embed(self, modules: nn.ModuleDict, ids: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = modules["wte"](ids) + modules["wpe"](positions)
        return hidden

    def positions(self, config: Any) -> int | None:
        return int(config.max_position_embeddings)


FAMILIES: tuple[Family, ...] = (LlamaFamily(), GPT2Family())


def family_of(model_type: str) -> Family:
    """The family that serves ``config.model_type``.

    Raises:
        InputError: no family serves it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(t for f in FAMILIES for t in f.model_types))
    raise InputError(f"job.model: model type {model_type!r} is not supported; supported: {known}")
