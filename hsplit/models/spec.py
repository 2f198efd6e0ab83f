"""The model as its configuration describes it, without weights: read once in a process and passed on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hsplit.config.section import MAX_LAYERS, shown
from hsplit.errors import InputError, error_text
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.families import Family, family_of
from hsplit.models.packing import ATTENTION, register_attention

# Larger sizes than any model has: building such a configuration would take hours, or all memory.
_LARGEST = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 28,
}


@dataclass(frozen=True)
class LinearShape:
    """An adaptable weight: its name (module path in the causal LM), its layer, and its shape ``(d_out, d_in)``."""

    name: str
    layer: int
    d_out: int
    d_in: int

    @property
    def parameters(self) -> int:
        """Entries of the weight."""
        return self.d_out * self.d_in


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """One model: its directory, its configuration, and what follows from that.

    Make one in a process (:meth:`read`) and pass it on; to another process send the directory. The meta model is built
    at most once, when something first needs it.

    Attributes:
        directory: model directory (config.json, safetensors); only :meth:`open_checkpoint` reads weights from it.
        config: the transformers configuration; not to be changed.
    """

    directory: Path
    config: Any

    @staticmethod
    def read(directory: Path) -> ModelSpec:
        """Read the configuration of the model in ``directory``, for which ``config.json`` is enough.

        ``tie_word_embeddings`` is as transformers would leave it after loading: false where the weights have a head
        with other values than the embedding's, whatever the file says.

        Raises:
            InputError: there is none, no family serves it, or it asks for what the segments do not compute.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers' readers raise anything on a file that is none
            raise InputError(f"job.model: {directory}/config.json: {error_text(error)}") from error
        family = family_of(config.model_type)
        if getattr(config, "is_heterogeneous", False):
            raise InputError(f"job.model: {directory}/config.json: per_layer_config: layers that differ are not served")
        for name, most in _LARGEST.items():
            size = getattr(config, name, None)
            if size is not None and (type(size) is not int or not 0 < size <= most):
                raise InputError(
                    f"job.model: {directory}/config.json: {name}: must be from 1 to {most} (got {shown(size)})"
                )
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise InputError(
                f"job.model: {directory}/config.json: quantization_config: weights quantized beforehand "
                f"({shown(method)}) are not read; take the original model, and job.base to quantize it"
            )
        family.check(config)
        if config.tie_word_embeddings and _has_separate_head(directory, family):
            config.tie_word_embeddings = False
        return ModelSpec(directory, config)

    @cached_property
    def family(self) -> Family:
        """The family that serves the model."""
        return family_of(self.config.model_type)

    @property
    def layers(self) -> int:
        """``L``, the number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings."""
        return int(self.config.vocab_size)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The causal LM with every parameter on the meta device and its small buffers real; not to be changed.

        Raises:
            InputError: the configuration makes no model.
        """
        return build_skeleton(self.config)

    def module(self, path: str) -> nn.Module:
        """Copy the module at ``path`` of :attr:`skeleton`, to be filled with values."""
        # Modules refer to the whole configuration, which is not copied with each of them.
        config = self.skeleton.config
        return copy.deepcopy(self.skeleton.get_submodule(path), {id(config): config})

    @cached_property
    def linears(self) -> tuple[LinearShape, ...]:
        """Every linear of every decoder layer, in layer order."""
        shapes = []
        for index, layer in enumerate(cast(nn.ModuleList, self.skeleton.get_submodule(self.family.layers))):
            for path, module in linears_in(layer):
                d_out, d_in = self.family.linear_shape(module)
                shapes.append(LinearShape(f"{self.family.layer_name(index)}.{path}", index, d_out, d_in))
        return tuple(shapes)

    def targeted(self, targets: str | Sequence[str]) -> list[LinearShape]:
        """Select the weights that ``job.targets`` names: all, or those whose path ends in a name (PEFT's rule).

        Raises:
            InputError: a name matches nothing.
        """
        if targets == "all-linear":
            return list(self.linears)
        for target in targets:
            if not any(f".{shape.name}".endswith(f".{target}") for shape in self.linears):
                known = ", ".join(sorted({shape.name.rpartition(".")[2] for shape in self.linears}))
                raise InputError(f"job.targets: the model has no linear named {target!r}; it has: {known}")
        return [s for s in self.linears if any(f".{s.name}".endswith(f".{target}") for target in targets)]

    def open_checkpoint(self) -> CheckpointReader:
        """Open the weights, with one tensor for a tied head and its embedding."""
        reader = CheckpointReader(self.directory, self.family.prefix)
        if self.config.tie_word_embeddings:
            reader.tie(self.family.embedding_weight, self.family.head_weight)
        return reader

    def check_weights(self) -> None:
        """Refuse weights that are not all that the configuration asks for; only the files' headers are read.

        Raises:
            InputError: a weight is missing, or has another shape; one line with the first one.
        """
        if (self.directory / "adapter_config.json").is_file():
            raise InputError(
                f"job.model: {self.directory}: has an adapter beside its weights (adapter_config.json), which"
                " transformers would add; merge it into a directory of its own, or remove it"
            )
        reader, head = self.open_checkpoint(), self.family.head_weight
        if head not in reader and not self.config.tie_word_embeddings:
            raise InputError(
                f"job.model: {self.directory}: the checkpoint has no tensor {head}, and by config.json"
                " (tie_word_embeddings: false) the embedding is no head"
            )
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            reader.check(name, parameter.shape)


def _has_separate_head(directory: Path, family: Family) -> bool:
    """True if the weights have a head, with other values than the embedding's."""
    names = (family.embedding_weight, family.head_weight)
    try:
        reader = CheckpointReader(directory, family.prefix)
        return all(name in reader for name in names) and not reader.same_values(*names)
    except InputError:
        # Planning needs no weights, nor sound ones; reading them, later, refuses them.
        return False


class _EmptyOnMeta(TorchFunctionMode):
    """Gives weights no memory from the start: accelerate alone lets each be allocated and frees it at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = dict(kwargs or {})
        if func is torch.empty and settings.get("device") is None:
            settings["device"] = "meta"
        return func(*args, **settings)


def build_skeleton(config: Any) -> nn.Module:
    """Build the causal LM of ``config`` with every parameter on the meta device and its small buffers real.

    Raises:
        InputError: the configuration makes no model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    register_attention()
    # Drawing initial values takes nine tenths of the time, even on the meta device.
    with init_empty_weights(include_buffers=False), no_init_weights(), _EmptyOnMeta():
        try:
            return cast(
                nn.Module,
                AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, trust_remote_code=False),
            )
        except Exception as error:  # sizes that do not go with one another fail anywhere in a model's own code
            raise InputError(f"job.model: its config.json makes no model: {error_text(error)}") from error


def linears_in(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linears of a decoder layer with their paths in it; a list, so that they can be replaced meanwhile."""
    from transformers.pytorch_utils import Conv1D

    yield from [(path, module) for path, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]
