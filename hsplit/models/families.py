"""Model families: module paths of a transformers causal LM, and the calling conventions of its layers.

Two families are written down, for speed: their layers compute packed rows, their tails need no more than norm and head.
Every other model is served by its own forward (:mod:`hsplit.models.recorded_family`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from hsplit.config.section import shown
from hsplit.errors import InputError

# Keys with which transformers would load other files, or other modules.
_NOT_SERVED = {
    "fusion_config": "fused modules are not served; remove it",
    "transformers_weights": "weights under other names are not read; rename them to model.safetensors",
}


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

    def window(self, layer: nn.Module, config: Any) -> int | None:
        """Length of the layer's sliding attention window, ``None`` for full causal attention."""
        return None

    def positions(self, config: Any) -> int | None:
        """Number of learned positions, beyond which no text can be embedded; ``None`` where none are learned."""
        return None

    def check(self, config: Any) -> None:
        """Refuse configurations that transformers would compute in another way than the segments do.

        Raises:
            InputError: a key of ``config`` asks for it; one line with the key.
        """
        for key, reason in _NOT_SERVED.items():
            if getattr(config, key, None) is not None:
                raise InputError(f"job.model: config.json: {key}: {reason}")
        if not getattr(config, "is_causal", True):
            raise InputError("job.model: config.json: is_causal: must be true: training is on causal attention")

    def linears(self, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the adaptable linears of a decoder layer with their paths in it."""
        return linears_in(layer)

    @property
    def prefix(self) -> str:
        """Name of the bare model in the causal LM."""
        return self.layers.partition(".")[0]

    @property
    def embedding_weight(self) -> str:
        """Name of the token embedding in a checkpoint, to which a head may be tied."""
        return f"{self.embeddings[0]}.weight"

    @property
    def head_weight(self) -> str:
        """Name of the head in a checkpoint."""
        return f"{self.head}.weight"

    def layer_name(self, index: int) -> str:
        """A layer's module path in the causal LM."""
        return f"{self.layers}.{index}"

    def linear_shape(self, linear: nn.Module) -> tuple[int, int]:
        """``(d_out, d_in)`` of a linear, however it is stored."""
        rows, columns = cast(Tensor, linear.weight).shape
        return (columns, rows) if self.transposed else (rows, columns)


class WrittenFamily(Family, ABC):
    """A family whose embedding is written down too."""

    @abstractmethod
    def embed(self, modules: nn.ModuleDict, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed packed token ids at their positions, both ``(n,)``: the first hidden state ``(n, d)``."""


class LlamaFamily(WrittenFamily):
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
        # Mistral has one window for the model; Qwen decides per layer; Llama has none, whatever its configuration says.
        if config.model_type == "mistral":
            window: int | None = config.sliding_window
            return window
        return getattr(layer.self_attn, "sliding_window", None)

    def check(self, config: Any) -> None:
        super().check(config)
        kinds = config.layer_types if config.model_type.startswith("qwen") else []
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise InputError(f"job.model: config.json: layer_types: {shown(kind)} is not served")
        window = getattr(config, "sliding_window", None)
        is_set = window is not None and config.model_type != "llama"
        if (is_set or "sliding_attention" in kinds) and (type(window) is not int or window < 1):
            raise InputError(f"job.model: config.json: sliding_window: must be at least 1 (got {shown(window)})")


class GPT2Family(WrittenFamily):
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

    def check(self, config: Any) -> None:
        super().check(config)
        if config.add_cross_attention:
            raise InputError("job.model: config.json: add_cross_attention: must be false: there is no encoder")


FAMILIES: tuple[WrittenFamily, ...] = (LlamaFamily(), GPT2Family())


def written_family(model_type: str) -> WrittenFamily | None:
    """Find the family that is written down for ``config.model_type``, if there is one."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def linears_in(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears of a decoder layer with their paths in it; a list, so that they can be replaced meanwhile."""
    from transformers.pytorch_utils import Conv1D

    yield from [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]
