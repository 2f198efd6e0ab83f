"""Segments: the part of a causal LM that one holder hosts (front, deep, tail), built from its own tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.config import Job
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.device_map import place_layers
from hsplit.models.dtype import resolve_dtype
from hsplit.models.embedding import OwnRows
from hsplit.models.families import Family
from hsplit.models.packing import Packing, rotary_tables
from hsplit.models.spec import ModelSpec, linears_in
from hsplit.models.tail import CLIENT_CHUNK_ROWS, SERVER_CHUNK_ROWS, Tail
from hsplit.models.weights import ReadWeight, freeze, is_quantized, read_dense, stored_again


@dataclass(frozen=True)
class SegmentSpec:
    """The part of the model that a holder hosts.

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
    """The frozen model that a run fine-tunes, the same for every holder (METHOD 1).

    Attributes:
        spec: the model.
        base: fp32, bf16, int8 or nf4: determines the values of ``W_0``.
        dtype: compute dtype.
    """

    spec: ModelSpec
    base: str
    dtype: torch.dtype

    @staticmethod
    def of_job(spec: ModelSpec, job: Job) -> BaseModel:
        """The base as ``job`` defines it; ``job.dtype`` is resolved for the CPU where it is ``auto``."""
        return BaseModel(spec, job.base, resolve_dtype(job.dtype))


class Segment(nn.Module):
    """Decoder layers ``[first, last)`` and, where held, the embedding before them and the tail after them."""

    short_attention: bool = True
    """See :mod:`hsplit.models.packing`."""

    def __init__(self, model: ModelSpec, spec: SegmentSpec) -> None:
        super().__init__()
        self.family, self.config = model.family, model.config
        self.spec = spec
        self.embeddings = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self.rotary: nn.Module | None = None
        self.tail: Tail | None = None
        # By layer, where they are on several; everything else is then on the first, input and output of ``run`` too.
        self.layer_devices: dict[int, torch.device] = {}

    @property
    def linears(self) -> dict[str, AdaptedLinear]:
        """The layers' linears by weight name, in layer order."""
        return {m.name: m for m in self.layers.modules() if isinstance(m, AdaptedLinear)}

    def remove_adapters(self) -> None:
        """Compute without adapters, and release them."""
        for linear in self.linears.values():
            linear.remove_adapter()

    def embed(self, ids: Tensor, packing: Packing) -> Tensor:
        """Embed packed token ids ``(n,)``: hidden states ``(n, d)``."""
        return self.family.embed(self.embeddings, ids, packing.positions)

    def place(self, device: torch.device) -> None:
        """Move to ``device``, or spread a server's layers over all GPUs where it is ``cuda``.

        A segment with the embedding belongs to a client, which computes on one device.

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
    """Copy a layer's packing and rotary tables (a pair of tensors) to ``device``."""
    moved = dict(arguments, packing=arguments["packing"].to(device))
    if "position_embeddings" in arguments:
        moved["position_embeddings"] = tuple(table.to(device) for table in arguments["position_embeddings"])
    return moved


def _window_mask(window: int | None, length: int, device: torch.device) -> Tensor | None:
    """Boolean mask ``(1, 1, T, T)`` of a sliding window; ``None`` (plain causal) where no sequence exceeds it."""
    if window is None or window >= length:
        return None
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _fill(module: nn.Module, path: str, reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Give every meta parameter of ``module`` its checkpoint values, frozen."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta":
            owner = module.get_submodule(name.rpartition(".")[0])
            reader.check(f"{path}.{name}", parameter.shape)
            value = nn.Parameter(reader.read(f"{path}.{name}", dtype), requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)


def _adapt_linears(
    layer: nn.Module, path: str, family: Family, reader: CheckpointReader, model: BaseModel, quantized: bool
) -> None:
    """Replace every linear of ``layer`` by an :class:`AdaptedLinear` with its ``W_0``."""
    for inner, module in linears_in(layer):
        name = f"{path}.{inner}"
        reader.check(f"{name}.weight", cast(Tensor, module.weight).shape)
        bias = reader.read(f"{name}.bias", model.dtype) if module.bias is not None else None
        read = _reading(name, family, reader)
        weight = freeze(read, model.base, model.dtype, quantized=quantized)

        def pristine(read: ReadWeight = read) -> Tensor:
            # fp64 runs keep their sum in fp64; everything else forms it in fp32.
            return read_dense(read, model.base, torch.promote_types(model.dtype, torch.float32))

        adapted = AdaptedLinear(
            name, weight, bias, None if is_quantized(model.base) else pristine, compute_dtype=model.dtype
        )
        owner, _, attribute = inner.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, adapted)


def _embedding(path: str, reader: CheckpointReader, model: BaseModel, rows: Tensor | None) -> nn.Module:
    """Read an embedding, or ``rows`` of it alone."""
    module = model.spec.module(path)
    if rows is None:
        _fill(module, path, reader, model.dtype)
        return module
    name = f"{path}.weight"
    reader.check(name, cast(Tensor, module.weight).shape)
    return OwnRows(rows, reader.read_rows(name, rows.tolist(), model.dtype))


def _has_rows(embedding: nn.Module, rows: Tensor | None) -> bool:
    """True if ``embedding`` has exactly ``rows``, or all where they are ``None``."""
    if isinstance(embedding, OwnRows):
        return rows is not None and torch.equal(embedding.ids.cpu(), rows)
    return rows is None


def _reading(name: str, family: Family, reader: CheckpointReader) -> ReadWeight:
    return partial(reader.read, f"{name}.weight", transposed=family.transposed)


def load_segment(
    model: BaseModel,
    spec: SegmentSpec,
    *,
    quantized: bool = False,
    device: torch.device | str = "cpu",
    kept: Segment | None = None,
    vocabulary: Tensor | None = None,
) -> Segment:
    """Read one segment; of the checkpoint only its own tensors are read.

    Args:
        model: the base.
        spec: the part to read.
        quantized: keep an int8 or NF4 base as bitsandbytes codes, as the server does; else dense.
        device: device to compute on; a server's layers are spread over all GPUs where it is ``cuda``.
        kept: the segment held so far: its modules that ``spec`` has too are taken over, residuals included, and not
            read again, but for weights that become codes.
        vocabulary: ids, increasing, ``(n,)`` int64: in a segment without the tail, only their rows of the token
            embedding are read; ``None``: all are.

    Returns:
        The segment, frozen, in eval mode: the base's own dropout (GPT-2's) stays off in fine-tuning, so that the
        output does not depend on the split point.
    """
    family, reader = model.spec.family, model.spec.open_checkpoint()
    segment = Segment(model.spec, spec)
    if spec.embedding:
        for path in family.embeddings:
            rows = vocabulary if path == family.embeddings[0] else None
            name = path.rpartition(".")[2]
            if kept is not None and name in kept.embeddings and _has_rows(kept.embeddings[name], rows):
                segment.embeddings[name] = kept.embeddings[name]
            else:
                segment.embeddings[name] = _embedding(path, reader, model, rows)
    for index in range(spec.first, spec.last):
        if kept is not None and str(index) in kept.layers:
            segment.layers[str(index)] = layer = kept.layers[str(index)]
            for linear in layer.modules():
                if isinstance(linear, AdaptedLinear):
                    read = _reading(linear.name, family, reader)
                    linear.weight = stored_again(linear.weight, read, model.base, model.dtype, quantized=quantized)
            continue
        path = family.layer_name(index)
        layer = model.spec.module(path)
        _adapt_linears(layer, path, family, reader, model, quantized)
        _fill(layer, path, reader, model.dtype)
        segment.layers[str(index)] = layer
    if family.rotary is not None and spec.last > spec.first:
        segment.rotary = model.spec.module(family.rotary)
    if spec.tail:
        segment.tail = kept.tail if kept is not None else None
        segment.tail = segment.tail or _load_tail(segment, reader, model)
    segment.place(torch.device(device))
    # Base dropout stays off; AdaptedLinear's own dropout follows segment.train().
    return segment.eval()


def _load_tail(segment: Segment, reader: CheckpointReader, model: BaseModel) -> Tail:
    family = segment.family
    norm = model.spec.module(family.norm)
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
