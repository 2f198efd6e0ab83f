"""Segments: the part of a causal LM that one holder hosts (front, deep, tail), built from its own tensors only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.config import Job
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.device_map import place_layers
from hsplit.models.dtype import resolve_dtype
from hsplit.models.embedding import OwnRows
from hsplit.models.families import WrittenFamily
from hsplit.models.packing import Packing, rotary_tables
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import CLIENT_CHUNK_ROWS, SERVER_CHUNK_ROWS, Tail, TailLosses


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

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of the parameter ``name``: the compute dtype, but fp32 where the model's authors keep it so in bf16."""
        kept = getattr(self.spec.skeleton, "_keep_in_fp32_modules_strict", None) or ()
        strict = self.dtype == torch.bfloat16 and any(f".{part}." in f".{name}." for part in kept)
        return torch.float32 if strict else self.dtype


class Segment(nn.Module):
    """Decoder layers ``[first, last)`` and, where held, the embedding before them and the tail after them."""

    short_attention: bool = True
    """See :mod:`hsplit.models.packing`."""

    def __init__(self, model: ModelSpec, spec: SegmentSpec) -> None:
        super().__init__()
        self.family, self.config = model.family, model.config
        self.model_layers, self.width, self.vocab_size = model.layers, model.width, model.vocab_size
        self.spec = spec
        self.embeddings = nn.ModuleDict()
        self.layers = nn.ModuleDict()
        self.rotary: nn.Module | None = None
        self.tail: TailLosses | None = None
        # Place of each token among the rows that the linears see, where these are padded.
        self.places: Tensor | None = None
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
        # Segments of any other family embed in their own way.
        return cast(WrittenFamily, self.family).embed(self.embeddings, ids, packing.positions)

    def load_embedding(
        self, reader: CheckpointReader, model: BaseModel, kept: Segment | None, vocabulary: Tensor | None
    ) -> None:
        """Read the embedding, or take that of ``kept``; of the tokens' only the rows ``vocabulary``, if given."""
        for path in self.family.embeddings:
            rows = vocabulary if path == self.family.embeddings[0] else None
            name = path.rpartition(".")[2]
            if kept is not None and name in kept.embeddings and _has_rows(kept.embeddings[name], rows):
                self.embeddings[name] = kept.embeddings[name]
            else:
                self.embeddings[name] = _embedding(path, reader, model, rows)

    def load_tail(self, reader: CheckpointReader, model: BaseModel, kept: Segment | None) -> None:
        """Read the tail, or take that of ``kept``; after the embedding."""
        family = self.family
        if kept is not None and kept.tail is not None:
            self.tail = kept.tail
            return
        norm = model.spec.module(family.norm)
        fill(norm, family.norm, reader, model)
        if self.config.tie_word_embeddings and self.spec.embedding:
            # One tensor serves as embedding and as tied head on a holder that has both.
            head = cast(nn.Embedding, self.embeddings[family.embeddings[0].rpartition(".")[2]]).weight.data
        else:
            reader.check(family.head_weight, (self.vocab_size, self.width))
            head = reader.read(family.head_weight, model.dtype)
        self.tail = Tail(norm, head, CLIENT_CHUNK_ROWS if self.spec.embedding else SERVER_CHUNK_ROWS)

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


def fill(module: nn.Module, path: str, reader: CheckpointReader, model: BaseModel) -> None:
    """Give every meta parameter of ``module`` its checkpoint values, frozen."""
    for name, parameter in list(module.named_parameters()):
        if parameter.device.type == "meta":
            owner = module.get_submodule(name.rpartition(".")[0])
            reader.check(f"{path}.{name}", parameter.shape)
            values = reader.read(f"{path}.{name}", model.dtype_of(f"{path}.{name}"))
            value = nn.Parameter(values, requires_grad=False)
            setattr(owner, name.rpartition(".")[2], value)
    for owner_path, owner in module.named_modules():
        for attribute, buffer in owner._buffers.items():
            name = f"{path}.{owner_path}.{attribute}"
            # Such as the correction of an expert's score; what a checkpoint lacks stays as the configuration makes it.
            if buffer is not None and attribute not in owner._non_persistent_buffers_set and name in reader:
                reader.check(name, buffer.shape)
                buffer.copy_(reader.read(name, buffer.dtype))


def _embedding(path: str, reader: CheckpointReader, model: BaseModel, rows: Tensor | None) -> nn.Module:
    """Read an embedding, or ``rows`` of it alone."""
    module = model.spec.module(path)
    if rows is None:
        fill(module, path, reader, model)
        return module
    name = f"{path}.weight"
    reader.check(name, cast(Tensor, module.weight).shape)
    return OwnRows(rows, reader.read_rows(name, rows.tolist(), model.dtype))


def _has_rows(embedding: nn.Module, rows: Tensor | None) -> bool:
    """True if ``embedding`` has exactly ``rows``, or all where they are ``None``."""
    if isinstance(embedding, OwnRows):
        return rows is not None and torch.equal(embedding.ids.cpu(), rows)
    return rows is None


def set_adapter_dropout(segment: Segment, active: bool) -> None:
    """Switch the adapters' dropout on for training and off for evaluation; nothing else changes."""
    for linear in segment.linears.values():
        linear.train(active)
