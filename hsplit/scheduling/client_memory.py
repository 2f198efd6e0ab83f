"""The bytes of a client (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from hsplit.models.tail import CLIENT_CHUNK_ROWS
from hsplit.scheduling.counted_model import CountedModel, Floats, prefix


class ClientMemory:
    """Peak bytes of a client at every split: a constant, and so much for each unit of rank of each weight."""

    def __init__(self, model: CountedModel) -> None:
        self._model = model

    @cached_property
    def constant(self) -> Floats:
        """Bytes of a client at each split from 0 to ``layers`` apart from its ranks, ``(L + 1,)``."""
        item = self._model.dtype.itemsize
        fixed = prefix(self._model.dense_bytes) + self._model.embedding_bytes + self._model.rotary_bytes
        fixed[0] -= self._model.rotary_bytes
        if self._model.quantized:
            fixed += prefix(self._model.by_layer(item * self._model.residual_entries))
        at_home = self._model.job.privacy.labels == "client"
        transient = np.maximum.accumulate(np.concatenate([[2.0 * self._model.hidden_bytes], self._model.transient]))
        if at_home:
            fixed += self._model.tail_bytes(head=not self._model.tied)
            transient = np.maximum(transient, self._model.tail_working_bytes(1, CLIENT_CHUNK_ROWS))
        wire = self._model.wire_bytes(1)
        # A message is alive as it was received and as the copy that it is unpacked from.
        step = prefix(self._model.saved) + transient + 2 * max(wire.up, wire.deep, wire.slope, wire.down)
        total: Floats = np.ceil(fixed + np.maximum(step, self._round_bytes))
        return total

    @cached_property
    def per_rank(self) -> Floats:
        """Bytes that one more unit of rank of each weight costs a client, ``(W,)``."""
        return self._model.adapter_bytes + self._model.saved_per_rank

    def peak_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """Peak bytes of a client that holds layers ``[0, split)`` with ``ranks`` by weight name."""
        vector = self._model.rank_vector(ranks) * (self._model.weight_layer < split)
        return round(float(self.constant[split] + self.per_rank @ vector))

    @cached_property
    def _round_bytes(self) -> Floats:
        """What a round's end needs beside what a client always holds, by split, when no activation is alive.

        Copies of the adapters, the residual's change for all weights held, and for one weight at a time
        either the new factors (quantized bases) or its working weight formed anew: residual, ``W_0`` and
        their sum.
        """
        master = self._model.master.itemsize
        copies = prefix(
            self._model.by_layer(master * (self._model.top_rank * self._model.sides + self._model.residual_entries))
        )
        return copies + np.concatenate(
            [[0.0], np.maximum.accumulate(self._model.by_layer(self._model.forming, np.maximum))]
        )
