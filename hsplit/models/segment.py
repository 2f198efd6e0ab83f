"""Segments: the part of a causal LM that one holder hosts (front, deep, tail), built from its own tensors only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hsplit.config.section import MAX_LAYERS, shown
from hsplit.errors import InputError
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.device_map import place_layers
from hsplit.models.families import Family, family_of
from hsplit.models.packing import ATTENTION, Packing, register_attention, rotary_tables
from hsplit.models.tail import CLIENT_CHUNK_ROWS, SERVER_CHUNK_ROWS, Tail
from hsplit.models.tokenizer_files import missing_packages, vocabulary_file
from hsplit.models.weights import ReadWeight, freeze, is_quantized, read_dense

# Sizes that no model has: what is built by such a configuration takes hours, or all memory.
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
class SegmentSpec:
    """Which part of the model a holder hosts.

    Attributes:
        first, last: decoder layers ``[first, last)``.
        embedding: hosts the embedding (clients).
        tail: hosts final norm and head.
    """

    first: int
    last: int
    embedding: bool = False
    tail: bool = False


@dataclass(frozen=True)
class BaseModel:
    """The frozen model that a run fine-tunes, as every holder must read it (METHOD 1).

    Attributes:
        directory: model directory (config.json, safetensors).
        base: fp32, bf16, int8 or nf4: fixes the values of ``W_0``.
        dtype: compute dtype.
    """

    directory: Path
    base: str
    dtype: torch.dtype


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


class Segment(nn.Module):
    """Decoder layers ``[first, last)`` with, where held, the embedding before them and the tail after them."""

    short_attention: bool = True
    """See :mod:`hsplit.models.packing`."""

    def __init__(self, family: Family, config: Any, spec: SegmentSpec) -> None:
        super().__init__()
        self.family = family
        self.config = config
        self.spec = spec
        self.embeddings = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self.rotary: nn.Module | None = None
        self.tail: Tail | None = None
        # By layer, where they are on several; all else is then on the first, and what ``run`` takes and gives too.
        self.layer_devices: dict[int, torch.device] = {}

    @property
    def linears(self) -> dict[str, AdaptedLinear]:
        """The layers' linears by weight name, in layer order."""
        return {m.name: m for m in self.layers.modules() if isinstance(m, AdaptedLinear)}

    def remove_adapters(self) -> None:
        """Compute without adapters from now on, and let go of those that there were."""
        for linear in self.linears.values():
            linear.remove_adapter()

    def embed(self, ids: Tensor, packing: Packing) -> Tensor:
        """Packed token ids ``(n,)`` to hidden states ``(n, d)``."""
        return self.family.embed(self.embeddings, ids, packing.positions)

    def place(self, device: torch.device) -> None:
        """Move to ``device``, or a server's layers to all GPUs that ``cuda`` stands for.

        A segment with the embedding is a client's, which computes on one device.

        Raises:
            InputError: the layers do not fit on the GPUs.
        """
        several = device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1
        if self.spec.embedding or not several:
            self.to(device)
        else:
            self.layer_devices = place_layers(self, self.layers)

    def run(self, hidden: Tensor, packing: Packing, start: int, stop: int) -> Tensor:
        """Run layers ``[start, stop)`` over packed tokens ``(n, d)``, each sequence attending causally to itself."""
        if start == stop:
            return hidden
        batch = hidden.unsqueeze(0)
        arguments: dict[str, Any] = {"packing": packing, "short_attention": self.short_attention}
        if self.rotary is not None:
            arguments["position_embeddings"] = rotary_tables(self.rotary, batch, packing)
        for index in range(start, stop):
            layer = self.layers[str(index)]
            device = self.layer_devices.get(index, batch.device)
            if device != batch.device:
                batch, arguments = batch.to(device), _moved(arguments, device)
            window = self.family.window(layer, self.config)
            mask = _window_mask(window, packing.longest, device)
            batch = layer(batch, attention_mask=mask, **arguments)
        return batch.squeeze(0).to(hidden.device)


def _moved(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A layer's packing and rotary tables (a pair of tensors) on ``device``."""
    return {name: value if isinstance(value, bool) else _to(value, device) for name, value in arguments.items()}


def _to(value: Any, device: torch.device) -> Any:
    return tuple(table.to(device) for table in value) if isinstance(value, tuple) else value.to(device)


def _window_mask(window: int | None, length: int, device: torch.device) -> Tensor | None:
    """Boolean mask ``(1, 1, T, T)`` of a sliding window; ``None`` (plain causal) where the window does not bite."""
    if window is None or window >= length:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def model_config(directory: Path) -> Any:
    """The transformers configuration of the model in ``directory``, for which ``config.json`` is enough.

    ``tie_word_embeddings`` is as transformers would leave it after loading: false where the weights have a head with
    other values than the embedding's, whatever the file says.

    Raises:
        InputError: it is none, of no family that is served, or asks for what the segments do not compute.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers' readers raise anything on a file that is none
        raise InputError(f"job.model: {directory}/config.json: {_one_line(error)}") from error
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
    if config.tie_word_embeddings and _has_head_of_its_own(directory, family):
        config.tie_word_embeddings = False
    return config


def _has_head_of_its_own(directory: Path, family: Family) -> bool:
    """True if the weights have a head, with other values than the embedding's."""
    names = (family.embedding_weight, family.head_weight)
    try:
        reader = CheckpointReader(directory, family.prefix)
        return all(name in reader for name in names) and not reader.same_values(*names)
    except InputError:
        # Planning needs no weights, nor sound ones; reading them, later, refuses them.
        return False


def open_checkpoint(directory: Path, config: Any) -> CheckpointReader:
    """The weights of the model in ``directory``, with one tensor for a tied head and its embedding."""
    family = family_of(config.model_type)
    reader = CheckpointReader(directory, family.prefix)
    if config.tie_word_embeddings:
        reader.tie(family.embedding_weight, family.head_weight)
    return reader


def check_checkpoint(directory: Path) -> None:
    """Refuse weights that are not all that the configuration asks for; only the files' headers are read.

    Raises:
        InputError: a weight is missing, or has another shape; one line with the first one.
    """
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"job.model: {directory}: has an adapter beside its weights (adapter_config.json), which transformers"
            " would add; merge it into a directory of its own, or remove it"
        )
    config = model_config(directory)
    reader, head = open_checkpoint(directory, config), family_of(config.model_type).head_weight
    if head not in reader and not config.tie_word_embeddings:
        raise InputError(
            f"job.model: {directory}: the checkpoint has no tensor {head}, and by config.json"
            " (tie_word_embeddings: false) the embedding is no head"
        )
    for name, parameter in skeleton(config).named_parameters(remove_duplicate=False):
        reader.check(name, parameter.shape)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of the model in ``directory``.

    Raises:
        InputError: there is none that transformers can read without running code that comes with it, or a package
            that it needs for that is not installed.
    """
    from transformers import AutoTokenizer

    vocabulary = vocabulary_file(directory)
    try:
        # Before transformers tries, which takes any vocabulary that it cannot read for one of tiktoken.
        missing = [] if vocabulary is None else missing_packages(vocabulary)
        if vocabulary is not None and missing:
            raise InputError(
                f"job.model: {directory}: {vocabulary.name}, its tokenizer, needs {' and '.join(missing)}: pip install"
                f" {' '.join(missing)} (on every node)"
            )
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # transformers' and tokenizers' readers raise anything on files that they do not know
        if "instantiate the backend tokenizer" in str(error):
            raise InputError(
                f"job.model: {directory}: has no tokenizer.json, nor anything that one can be made of; put the"
                " tokenizer's files beside config.json"
            ) from error
        raise InputError(f"job.model: {directory}: its tokenizer cannot be read: {_one_line(error)}") from error


def layer_count(config: Any) -> int:
    """``L``, the number of decoder layers."""
    return int(config.num_hidden_layers)


class _EmptyOnMeta(TorchFunctionMode):
    """Gives weights no memory from the first: accelerate alone lets each be allocated and frees it at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def skeleton(config: Any) -> nn.Module:
    """The causal LM of ``config`` with every parameter on the meta device and its small buffers real."""
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
            raise InputError(f"job.model: its config.json makes no model: {_one_line(error)}") from error


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def linear_shapes(config: Any) -> list[LinearShape]:
    """Every linear of every decoder layer, in order, read off the meta model."""
    family = family_of(config.model_type)
    model = skeleton(config)
    shapes = []
    for index, layer in enumerate(cast(nn.ModuleList, model.get_submodule(family.layers))):
        for path, module in layer.named_modules():
            if _is_linear(module):
                rows, columns = cast(Tensor, module.weight).shape
                d_out, d_in = (columns, rows) if family.transposed else (rows, columns)
                shapes.append(LinearShape(f"{family.layer_name(index)}.{path}", index, d_out, d_in))
    return shapes


def targeted(shapes: list[LinearShape], targets: str | Sequence[str]) -> list[LinearShape]:
    """The weights that ``job.targets`` names: all, or those whose path ends in one of the names (PEFT's rule).

    Raises:
        InputError: a name matches nothing.
    """
    if targets == "all-linear":
        return shapes
    for target in targets:
        if not any(f".{shape.name}".endswith(f".{target}") for shape in shapes):
            known = ", ".join(sorted({shape.name.rpartition(".")[2] for shape in shapes}))
            raise InputError(f"job.targets: the model has no linear named {target!r}; it has: {known}")
    return [s for s in shapes if any(f".{s.name}".endswith(f".{target}") for target in targets)]


def _fill(module: nn.Module, path: str, reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Give every meta parameter of ``module`` its checkpoint values, frozen."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta":
            owner = module.get_submodule(name.rpartition(".")[0])
            reader.check(f"{path}.{name}", parameter.shape)
            value = nn.Parameter(reader.read(f"{path}.{name}", dtype), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)


def _linears_in(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from [(path, module) for path, module in layer.named_modules() if _is_linear(module)]


def _adapt_linears(
    layer: nn.Module, path: str, family: Family, reader: CheckpointReader, model: BaseModel, quantized: bool
) -> None:
    """Replace every linear of ``layer`` by an :class:`AdaptedLinear` holding its ``W_0``."""
    for inner, module in _linears_in(layer):
        name = f"{path}.{inner}"
        reader.check(f"{name}.weight", cast(Tensor, module.weight).shape)
        bias = reader.read(f"{name}.bias", model.dtype) if module.bias is not None else None
        read = partial(reader.read, f"{name}.weight", transposed=family.transposed)
        weight = freeze(read, model.base, model.dtype, quantized=quantized)

        def pristine(read: ReadWeight = read) -> Tensor:
            # fp64 runs keep their sum in fp64; everything else forms it in fp32.
            return read_dense(read, model.base, torch.promote_types(model.dtype, torch.float32))

        adapted = AdaptedLinear(
            name, weight, bias, None if is_quantized(model.base) else pristine, compute_dtype=model.dtype
        )
        owner, _, attribute = inner.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, adapted)


def load_segment(
    model: BaseModel,
    spec: SegmentSpec,
    *,
    quantized: bool = False,
    device: torch.device | str = "cpu",
    kept: Segment | None = None,
) -> Segment:
    """Read one segment: only its own tensors are ever read from the checkpoint.

    Args:
        model: where and how the base is read.
        spec: which part.
        quantized: keep an int8 or NF4 base as bitsandbytes codes; the server does.
        device: where the segment computes; layers after a client's are spread over all GPUs that ``cuda`` stands for.
        kept: the segment held so far: what ``spec`` has in common with it is taken over, residuals included, and not
            read again.

    Returns:
        The segment, frozen, in eval mode: the base's own dropout (GPT-2's) stays off in fine-tuning, so that the
        output does not depend on where the model is split.
    """
    config = model_config(model.directory)
    family = family_of(config.model_type)
    reader = open_checkpoint(model.directory, config)
    empty = skeleton(config)
    segment = Segment(family, config, spec)
    if spec.embedding:
        for path in family.embeddings:
            name = path.rpartition(".")[2]
            if kept is not None and name in kept.embeddings:
                segment.embeddings[name] = kept.embeddings[name]
                continue
            module = empty.get_submodule(path)
            _fill(module, path, reader, model.dtype)
            segment.embeddings[name] = module
    for index in range(spec.first, spec.last):
        if kept is not None and str(index) in kept.layers:
            segment.layers[str(index)] = kept.layers[str(index)]
            continue
        path = family.layer_name(index)
        layer = empty.get_submodule(path)
        _adapt_linears(layer, path, family, reader, model, quantized)
        _fill(layer, path, reader, model.dtype)
        segment.layers[str(index)] = layer
    if family.rotary is not None and spec.last > spec.first:
        segment.rotary = empty.get_submodule(family.rotary)
    if spec.tail:
        segment.tail = kept.tail if kept is not None else None
        segment.tail = segment.tail or _load_tail(segment, empty, reader, model)
    segment.place(torch.device(device))
    # Base dropout stays off; AdaptedLinear's own dropout follows segment.train().
    return segment.eval()


def _load_tail(segment: Segment, empty: nn.Module, reader: CheckpointReader, model: BaseModel) -> Tail:
    family = segment.family
    norm = empty.get_submodule(family.norm)
    _fill(norm, family.norm, reader, model.dtype)
    if segment.config.tie_word_embeddings and segment.spec.embedding:
        # One tensor serves as embedding and as tied head on a holder that has both.
        head = cast(nn.Embedding, segment.embeddings[family.embeddings[0].rpartition(".")[2]]).weight.data
    else:
        reader.check(family.head_weight, (segment.config.vocab_size, segment.config.hidden_size))
        head = reader.read(family.head_weight, model.dtype)
    return Tail(norm, head, CLIENT_CHUNK_ROWS if segment.spec.embedding else SERVER_CHUNK_ROWS)


def set_adapter_dropout(segment: Segment, active: bool) -> None:
    """Switch the adapters' dropout on for training and off for evaluation; nothing else changes."""
    for linear in segment.linears.values():
        linear.train(active)
