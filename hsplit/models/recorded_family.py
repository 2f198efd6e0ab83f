"""The family of every model that no other family is written for: by the model's own forward."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from hsplit.errors import InputError, error_text
from hsplit.models.anatomy import Anatomy, anatomy_of
from hsplit.models.families import Family
from hsplit.models.outer_model import OuterModel
from hsplit.models.own_attention import NAMES, register_own_attention
from hsplit.models.packing import depends_on_length

# Names of modules whose linears stay frozen.
_FROZEN = frozenset({"experts", "indexer"})


class RecordedFamily(Family):
    """One model by its own forward (see :mod:`hsplit.models.outer_model`).

    Args:
        skeleton: the causal LM on the meta device; its attention is set here.
        packed: its layers compute packed rows.

    Attributes:
        anatomy: its parts.
        packed: as given, unless a text's rotary tables depend on its length, or layers are convolutions.

    Raises:
        InputError: the model cannot be split; one line that says why.
    """

    model_types = frozenset()
    embeddings = ()
    norm = ""

    def __init__(self, skeleton: nn.Module, packed: bool = False) -> None:
        model: Any = skeleton
        self._skeleton = model
        self.packed = packed and not depends_on_length(model.config) and not _convolves(model)
        if self.packed:
            register_own_attention()
            attention = model.config.get_text_config(decoder=True)._attn_implementation
            model.set_attn_implementation(NAMES.get(attention, attention))
        self._peft_names: dict[str, bool] = {}
        try:
            self.anatomy: Anatomy = anatomy_of(skeleton)
            self._check_layers(skeleton)
        except InputError as error:
            raise InputError(f"job.model: model type {model.config.model_type} is not served: {error}") from None
        self.layers = self.anatomy.layers  # type: ignore[misc]
        self.transposed = any(_is_transposed(type(module)) for _, module in self._linears_of(skeleton))  # type: ignore[misc]

    @property
    def prefix(self) -> str:
        return str(self._skeleton.base_model_prefix)

    @property
    def embedding_weight(self) -> str:
        return self._weight_of(self._skeleton.get_input_embeddings())

    @property
    def head_weight(self) -> str:
        return self._weight_of(self._skeleton.get_output_embeddings())

    def _weight_of(self, module: nn.Module | None) -> str:
        return next((f"{path}.weight" for path, found in self._skeleton.named_modules() if found is module), "")

    @functools.cached_property
    def tied_weights(self) -> list[tuple[str, str]]:
        """Pairs of names of one parameter: the first one, and each other."""
        first: dict[int, str] = {}
        named = self._skeleton.named_parameters(remove_duplicate=False)
        return [(one, name) for name, p in named if (one := first.setdefault(id(p), name)) != name]

    def linears(self, layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the linears that an adapter has an effect on wherever the layer runs.

        One of a class of its own may compute something else. One whose weight the layer's code reads beside calling it
        (fused kernels of recurrent layers, routers) would be computed without its adapter there. Experts see only the
        tokens that are sent to them: they stay frozen, and so do linears whose names PEFT takes for those of experts.
        What picks the tokens to attend to gets no gradient.
        """
        for path, module in super().linears(layer):
            owner, _, attribute = path.rpartition(".")
            expert = not _FROZEN.isdisjoint(path.split(".")) or not self._named_by_peft(attribute)
            holder: Any = type(layer.get_submodule(owner))
            kind: Any = type(module)
            if not expert and not _reads_weight(holder, attribute) and _is_linear(kind):
                yield path, module

    def _named_by_peft(self, name: str) -> bool:
        """True if PEFT adapts the modules that are called ``name``.

        In mixtures whose experts were modules once, PEFT takes such names for today's parameters of all experts.
        """
        if name not in self._peft_names:
            self._peft_names[name] = _adapted_by_peft(name, self._skeleton)
        return self._peft_names[name]

    def outer(self, dtype: torch.dtype) -> OuterModel:
        """Make the model around the layers, without values."""
        return OuterModel(self._skeleton, [self.layers], self.anatomy.returns, dtype)

    def check_length(self, length: int) -> None:
        """Refuse texts of ``length`` tokens that the model has no positions for.

        Raises:
            InputError: one line with the key.
        """
        outer = self.outer(torch.float32)
        try:
            outer.layer_calls(1, length, 1, torch.device("cpu"))
        except (IndexError, RuntimeError) as error:
            kind = self._skeleton.config.model_type
            raise InputError(
                f"job.max_length: {length} is more than the positions that the model ({kind}) has: {error_text(error)}"
            ) from error

    def _linears_of(self, skeleton: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for layer in cast(nn.ModuleList, skeleton.get_submodule(self.anatomy.layers)):
            yield from self.linears(layer)

    def _check_layers(self, skeleton: nn.Module) -> None:
        """Refuse layers that share weights with one another, or with what is outside of them."""
        layers = cast(nn.ModuleList, skeleton.get_submodule(self.anatomy.layers))
        owners: dict[int, int] = {}
        for index, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                if owners.setdefault(id(parameter), index) != index:
                    raise InputError(f"its layers share weights ({name} of layers {owners[id(parameter)]} and {index})")
        kinds = {_is_transposed(type(module)) for _, module in self._linears_of(skeleton)}
        if len(kinds) > 1:
            raise InputError("its linears are stored in two ways")
        if not kinds:
            raise InputError("its layers have no linear that can be adapted")


def _convolves(model: nn.Module) -> bool:
    """True if some layers mix tokens by more than attention: then rows are padded, whatever others of the type do."""
    return any(isinstance(module, nn.Conv1d) for module in model.modules())


def _adapted_by_peft(name: str, model: Any) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return True
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(asked, model, None)
    except ValueError:
        # One of several modules that have become one parameter.
        return False
    return name in (asked.target_modules or ())


@functools.cache
def _is_linear(kind: type[nn.Module]) -> bool:
    """True if modules of the class compute ``x W^T + b``."""
    if not issubclass(kind, nn.Linear):
        return _is_transposed(kind)
    if kind is nn.Linear:
        return True
    try:
        module: Any = kind(6, 4)
        x = torch.linspace(-1, 1, 12).view(2, 6)
        values = torch.linspace(-1, 1, 24).view(4, 6)
        module.weight.data.copy_(values)
        module.bias.data.fill_(0.5)
        return torch.allclose(module(x), nn.functional.linear(x, values, torch.full((4,), 0.5)))
    except Exception:  # a class of its own that is made in another way
        return False


def _is_transposed(kind: type[nn.Module]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return issubclass(kind, Conv1D)


@functools.cache
def _reads_weight(owner: type, attribute: str) -> bool:
    """True if the code of class ``owner`` reads weight or bias of its linear ``attribute`` itself."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(attribute)}\.(weight|bias)\b", source) is not None
