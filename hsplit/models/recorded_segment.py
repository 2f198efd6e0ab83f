"""Segments of a model by its own forward, packed or padded on the right around each run of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.outer_model import LayerCall
from hsplit.models.own_attention import packed_by, packed_calls
from hsplit.models.packing import Packing, depends_on_length
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import CLIENT_CHUNK_ROWS, SERVER_CHUNK_ROWS, OwnTail, Tail


class RecordedSegment(Segment):
    """Decoder layers called as the model's own forward calls them, and the parts of that forward around them.

    Where the model's attention alone mixes tokens, and can be padded around, rows are packed as everywhere. Elsewhere
    they are padded on the right around each run of layers, where a causal layer's real tokens never see padding.

    Args:
        model: the model.
        spec: the part that is held.
        dtype: compute dtype.
    """

    def __init__(self, model: ModelSpec, spec: SegmentSpec, dtype: torch.dtype) -> None:
        super().__init__(model, spec)
        self.family: RecordedFamily
        family = cast(RecordedFamily, model.family)
        self.anatomy = family.anatomy
        self.outer = family.outer(dtype)
        self._dtype = dtype
        self.own_rows: Tensor | None = None
        self._calls: tuple[tuple[object, ...], Mapping[int, LayerCall]] = (), {}

    # -- values -----------------------------------------------------------------------------------------------------

    def load_embedding(
        self, reader: CheckpointReader, model: BaseModel, kept: Segment | None, vocabulary: Tensor | None
    ) -> None:
        token_embedding = self.family.embedding_weight
        for name in self.anatomy.front:
            rows = vocabulary if name == token_embedding else None
            self._hold(name, reader, model, kept, rows)
        if vocabulary is not None and token_embedding in self.anatomy.front:
            self.own_rows = vocabulary
            self.outer.any_token = int(vocabulary[0]) if len(vocabulary) else 0
            module = self.outer.model.get_submodule(token_embedding.rpartition(".")[0])
            # Its rows are looked up by their places, whatever the model's own embedding then makes of them.
            module.register_forward_pre_hook(lambda _, given: (_places(self.own_rows, given[0]), *given[1:]))
        self._hold_buffers(reader)

    def load_tail(self, reader: CheckpointReader, model: BaseModel, kept: Segment | None) -> None:
        for name in self.anatomy.tail:
            self._hold(name, reader, model, kept, None)
        self._hold_buffers(reader)
        chunk_rows = CLIENT_CHUNK_ROWS if self.spec.embedding else SERVER_CHUNK_ROWS
        if self.anatomy.plain is not None:
            norm, head = self.anatomy.plain
            self.tail = Tail(self.outer.model.get_submodule(norm), self.outer.held(head).data, chunk_rows)
        else:
            self.tail = OwnTail(self._logits, chunk_rows)

    def train_outer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Make the parameters around the layers trainable: then all logits are held at once. Yields each, by name."""
        self.tail = OwnTail(self._logits, None)
        for name in self.outer.held_names:
            parameter = self.outer.held(name)
            parameter.requires_grad_(True)
            yield name, parameter

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.outer.logits(hidden, self.anatomy.count - 1)

    def _hold(
        self, name: str, reader: CheckpointReader, model: BaseModel, kept: Segment | None, rows: Tensor | None
    ) -> None:
        """Hold a parameter: that of ``kept`` if it has the same rows, else the checkpoint's."""
        if name in self.outer.held_names:
            return
        if isinstance(kept, RecordedSegment) and name in kept.outer.held_names and _same(kept.rows_of(name), rows):
            self.outer.hold(name, kept.outer.held(name))
            return
        stored = next((path for path in self.outer.paths_of(name) if path in reader), name)
        reader.check(stored, self.outer.shape(name))
        dtype = model.dtype_of(name)
        value = reader.read(stored, dtype) if rows is None else reader.read_rows(stored, rows.tolist(), dtype)
        self.outer.hold(name, nn.Parameter(value, requires_grad=False))

    def rows_of(self, name: str) -> Tensor | None:
        """The rows that are held of a parameter, ``None`` for all."""
        return self.own_rows if name == self.family.embedding_weight else None

    def _hold_buffers(self, reader: CheckpointReader) -> None:
        for name, buffer in self.outer.persistent_buffers().items():
            if name in reader:
                reader.check(name, buffer.shape)
                buffer.copy_(reader.read(name, buffer.dtype))

    # -- computation ------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, packing: Packing) -> Tensor:
        batch = _padded(ids, packing)
        return _packed(self.outer.embed(batch), packing)

    def run(self, hidden: Tensor, packing: Packing, start: int, stop: int) -> Tensor:
        if start == stop:
            return hidden
        calls = self.layer_calls(packing, hidden.device)
        packed = self.family.packed
        batch = hidden.unsqueeze(0) if packed else _padded(hidden, packing)
        self.places = None if packed else packing.packed
        for index in range(start, stop):
            call = calls[index]
            device = self.layer_devices.get(index, batch.device)
            if device != hidden.device:
                batch, call = batch.to(device), call.mapped(partial(Tensor.to, device=device))
            there = packing if device == hidden.device else packing.to(device)
            with packed_by(there) if packed else nullcontext():
                batch = call(self.layers[str(index)], batch)
        batch = batch.to(hidden.device)
        return batch.squeeze(0) if packed else _packed(batch, packing)

    def layer_calls(self, packing: Packing, device: torch.device) -> Mapping[int, LayerCall]:
        """Arguments of the layers for a padded batch, by layer; the last ones are kept."""
        if self._calls[0] != self._key(packing, device):
            # The last ones are freed before.
            self._calls = (), {}
            rows = 1 if self.family.packed else len(packing.lengths)
            calls = self._recorded(rows, packing.longest, device)
            if self.family.packed:
                calls = packed_calls(calls, packing)
            elif depends_on_length(self.config):
                own = {length: self._recorded(1, length, device) for length in set(packing.lengths)}
                calls = _of_own_length(calls, own, packing)
            self.keep_calls(packing, device, dict(enumerate(calls)))
        return self._calls[1]

    def _recorded(self, rows: int, length: int, device: torch.device) -> list[LayerCall]:
        outer = self.outer
        if depends_on_length(self.config):
            # A rotary embedding remembers the longest text that it has seen.
            outer = self.family.outer(self._dtype).to(device)
        return outer.layer_calls(rows, length, self.model_layers, device)

    def keep_calls(self, packing: Packing, device: torch.device, calls: Mapping[int, LayerCall]) -> None:
        """Call layers with ``calls`` as long as batches are like ``packing`` on ``device``."""
        self._calls = self._key(packing, device), calls

    def _key(self, packing: Packing, device: torch.device) -> tuple[object, ...]:
        by_length = self.family.packed or depends_on_length(self.config)
        lengths = packing.lengths if by_length else len(packing.lengths)
        return lengths, packing.longest, device


def _of_own_length(calls: list[LayerCall], own: Mapping[int, list[LayerCall]], packing: Packing) -> list[LayerCall]:
    """Give each text the rotary tables of its own length, not of the longest text in its batch.

    Args:
        calls: of the batch.
        own: of a text of each length.
        packing: the batch.
    """
    rows, longest = len(packing.lengths), packing.longest
    changed = []
    for index, call in enumerate(calls):
        # In the order in which a call's tensors are mapped.
        places = iter(range(len(call.tensors)))

        def by_text(tensor: Tensor, index: int = index, places: Iterator[int] = places) -> Tensor:
            place = next(places)
            if not tensor.is_floating_point() or tensor.dim() != 3 or tensor.shape[1] != longest:
                return tensor
            table = tensor.expand(rows, -1, -1).clone()
            for row, length in enumerate(packing.lengths):
                table[row, :length] = own[length][index].tensors[place][0]
            return table

        changed.append(call.mapped(by_text))
    return changed


def _padded(packed: Tensor, packing: Packing) -> Tensor:
    """Pad ``(n, ...)`` to ``(b, T, ...)`` by repeating each sequence's last token."""
    rows = packed if packing.padded is None else packed.index_select(0, packing.padded)
    return rows.unflatten(0, (len(packing.lengths), packing.longest))


def _packed(padded: Tensor, packing: Packing) -> Tensor:
    """Pack ``(b, T, ...)`` to ``(n, ...)``."""
    rows = padded.flatten(0, 1)
    return rows if packing.packed is None else rows.index_select(0, packing.packed)


def _places(ids: Tensor, given: Tensor) -> Tensor:
    """Places of token ids among ``ids``, increasing; IndexError for one that is not there."""
    places = torch.searchsorted(ids, given).clamp_max_(max(len(ids) - 1, 0))
    if not torch.equal(ids[places], given):
        raise IndexError("a token that is in none of the texts that the embedding was read for")
    return places


def _same(rows: Tensor | None, others: Tensor | None) -> bool:
    if rows is None or others is None:
        return rows is others
    return torch.equal(rows, others)
