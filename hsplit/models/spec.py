"""The model as its configuration describes it, without weights: read once in a process and passed on."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hsplit.config.section import MAX_LAYERS, shown
from hsplit.errors import InputError, error_text
from hsplit.models.checkpoint_reader import CheckpointReader, has_weights
from hsplit.models.converted_checkpoint import ConvertedCheckpoint
from hsplit.models.families import Family, written_family
from hsplit.models.packed_types import PACKED_TYPES
from hsplit.models.packing import ATTENTION, register_attention
from hsplit.models.recorded_family import RecordedFamily

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
        packed: layers of a model by its own forward compute packed rows; ``None``: as its type is known to be exact.
    """

    directory: Path
    config: Any
    packed: bool | None = None

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
        family = written_family(config.model_type)
        if family is None:
            check_type(config)
        elif getattr(config, "is_heterogeneous", False):
            raise InputError(f"job.model: {directory}/config.json: per_layer_config: layers that differ are not served")
        text = config.get_text_config(decoder=True)
        for name, most in _LARGEST.items():
            size = _size(text, name)
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
        spec = ModelSpec(directory, config)
        if family is not None:
            family.check(config)
        if spec.tied and has_weights(os.listdir(directory)) and _has_separate_head(spec):
            # Names of other models than those of the written families are known from their skeleton, tied by then.
            config.tie_word_embeddings = text.tie_word_embeddings = False
            spec = ModelSpec(directory, config)
        return spec

    @cached_property
    def family(self) -> Family:
        """The family that serves the model: a written one, else by the model's own forward.

        Raises:
            InputError: the model cannot be split.
        """
        kind = self.config.model_type
        packed = kind in PACKED_TYPES if self.packed is None else self.packed
        return written_family(kind) or RecordedFamily(self.skeleton, packed)

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder; of a model with other parts, a part of :attr:`config`."""
        return self.config.get_text_config(decoder=True)

    @property
    def tied(self) -> bool:
        """True if the head is the token embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))

    @property
    def layers(self) -> int:
        """``L``, the number of decoder layers."""
        family = self.family
        return family.anatomy.count if isinstance(family, RecordedFamily) else int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """``d``, the width of the hidden states between layers."""
        family = self.family
        return family.anatomy.width if isinstance(family, RecordedFamily) else int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of token embeddings."""
        return int(self.text_config.vocab_size)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The causal LM with every parameter on the meta device and its small buffers real; not to be changed.

        Raises:
            InputError: the configuration makes no model.
        """
        return self.new_skeleton()

    def new_skeleton(self) -> nn.Module:
        """Make another causal LM like :attr:`skeleton`."""
        return build_skeleton(self.config, ATTENTION if written_family(self.config.model_type) else None)

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
            for path, module in self.family.linears(layer):
                d_out, d_in = self.family.linear_shape(module)
                shapes.append(LinearShape(f"{self.family.layer_name(index)}.{path}", index, d_out, d_in))
        return tuple(shapes)

    @cached_property
    def unadaptable(self) -> tuple[float, tuple[str, ...]]:
        """Share of the layers' matrices that can have no adapter, such as experts, and their names, largest first."""
        layers = cast(nn.ModuleList, self.skeleton.get_submodule(self.family.layers))
        adaptable = {f"{shape.name}.weight" for shape in self.linears}
        total, sizes = 0, dict[str, int]()
        for index, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                if parameter.dim() < 2:
                    continue
                total += parameter.numel()
                if f"{self.family.layer_name(index)}.{name}" not in adaptable:
                    short = ".".join(name.removesuffix(".weight").split(".")[-2:])
                    sizes[short] = sizes.get(short, 0) + parameter.numel()
        names = sorted(sizes, key=lambda name: -sizes[name])
        return sum(sizes.values()) / max(total, 1), tuple(names)

    @property
    def front_parameters(self) -> int:
        """Number of parameters that make the first hidden state."""
        family = self.family
        if isinstance(family, RecordedFamily):
            return sum(self._parameters[name].numel() for name in family.anatomy.front)
        return sum(self._count(path) for path in family.embeddings)

    def tail_parameters(self, head: bool) -> int:
        """Number of parameters that make logits of the last hidden state.

        Args:
            head: count those that a tied head shares with the embedding, or an untied head.
        """
        family = self.family
        if isinstance(family, RecordedFamily):
            known = () if head else family.anatomy.front
            return sum(self._parameters[name].numel() for name in family.anatomy.tail if name not in known)
        return self._count(family.norm) + (self.vocab_size * self.width if head else 0)

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """Rows and columns of the token embedding."""
        family = self.family
        if isinstance(family, RecordedFamily):
            rows, columns = self._parameters[family.embedding_weight].shape
            return rows, columns
        return self.vocab_size, self.width

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.skeleton.named_parameters(remove_duplicate=False))

    def _count(self, path: str) -> int:
        return sum(p.numel() for p in self.skeleton.get_submodule(path).parameters())

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

    def open_checkpoint(self, tied: bool = True) -> CheckpointReader:
        """Open the weights.

        Args:
            tied: let one tensor stand for all that are tied to it.
        """
        family = self.family
        if isinstance(family, RecordedFamily):
            reader: CheckpointReader = ConvertedCheckpoint(self.directory, self.skeleton)
            pairs = family.tied_weights
        else:
            reader = CheckpointReader(self.directory, family.prefix)
            pairs = [(family.embedding_weight, family.head_weight)] if self.tied else []
        for name, other in pairs if tied else ():
            reader.tie(name, other)
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
        if head and head not in reader and not self.tied:
            raise InputError(
                f"job.model: {self.directory}: the checkpoint has no tensor {head}, and by config.json"
                " (tie_word_embeddings: false) the embedding is no head"
            )
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            reader.check(name, parameter.shape)


def _size(config: Any, name: str) -> Any:
    """A size in the configuration, ``None`` where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' own, for what layers differ in
        return None


def check_type(config: Any) -> None:
    """Refuse a model type of which transformers has no causal LM, and encoder-decoders."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"job.model: model type {shown(config.model_type)} is not served: it is an encoder-decoder")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"job.model: model type {shown(config.model_type)} is not served: transformers has no causal LM of it"
        )


def _has_separate_head(spec: ModelSpec) -> bool:
    """True if the weights have a head, with other values than the embedding's."""
    names = (spec.family.embedding_weight, spec.family.head_weight)
    try:
        reader = spec.open_checkpoint(tied=False)
        return all(name in reader for name in names) and not reader.same_values(*names)
    except InputError:
        # Planning needs no weights, nor sound ones; reading them, later, refuses them.
        return False


# Entries of a tensor of three dimensions, as of many experts, from which on it is a weight and no table.
_WEIGHT_ENTRIES = 1 << 20


class _EmptyOnMeta(TorchFunctionMode):
    """Gives weights no memory from the start: accelerate alone lets each be allocated and frees it at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = dict(kwargs or {})
        if settings.get("device") is None and (func is torch.empty or _makes_experts(func, args)):
            settings["device"] = "meta"
        return func(*args, **settings)


def _makes_experts(func: Any, args: Any) -> bool:
    if func not in (torch.zeros, torch.ones, torch.randn, torch.rand):
        return False
    sizes = args[0] if args and isinstance(args[0], tuple | list) else args
    return len(sizes) > 2 and math.prod(sizes) > _WEIGHT_ENTRIES


def build_skeleton(config: Any, attention: str | None) -> nn.Module:
    """Build the causal LM of ``config`` with every parameter on the meta device and its small buffers real.

    Args:
        config: its configuration.
        attention: name of the layers' attention; ``None`` for transformers' choice.

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
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)
        except Exception as error:  # sizes that do not go with one another fail anywhere in a model's own code
            raise InputError(f"job.model: its config.json makes no model: {error_text(error)}") from error
    if attention is None:
        # Parameters that were put on the meta device one by one are no longer tied.
        model.tie_weights()
    return cast(nn.Module, model)
