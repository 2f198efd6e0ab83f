"""The bytes of the server: deep layers over joined rows, and the aggregator's store (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from hsplit.models.tail import SERVER_CHUNK_ROWS
from hsplit.scheduling.counted_model import CountedModel, Floats, Ints, prefix, transient_bytes


class ServerMemory:
    """Peak bytes of the server beside given clients: a constant, and so much a unit of rank a weight."""

    def __init__(self, model: CountedModel) -> None:
        self._model = model
        self._transients: dict[int, int] = {}

    def constant(self, counts: Ints) -> Floats:
        """Bytes of the server apart from its own ranks: ``(M,)``.

        Args:
            counts: rows of :meth:`clients_at`, ``(M, L + 1)``, all of equally many clients.
        """
        clients, joined = int(counts[0].sum()), self._model.joined_clients(counts)
        held = joined > 0
        fixed = held @ self._model.stored_bytes + float(self._store_bytes) + self._model.rotary_bytes
        transient = float(self._transient(clients))
        if self._model.job.privacy.labels == "server":
            fixed = fixed + self._model.tail_bytes(head=True)
            transient = max(transient, self._model.tail_working_bytes(clients, SERVER_CHUNK_ROWS))
        wire = self._model.wire_bytes(1)
        # Rows as received, their leaf in the graph and the leaf's gradient.
        boundary = clients * (wire.to_server + wire.to_client + 2 * self._model.hidden_bytes)
        step = joined @ self._model.saved + transient + boundary
        received = counts @ prefix(self._model.copied_bytes) + held @ self._model.copied_bytes
        total: Floats = np.ceil(fixed + np.maximum(step, received + self._recompression_bytes(clients)))
        return total

    def per_rank(self, counts: Ints) -> Floats:
        """Bytes that one more unit of rank of each weight costs, ``(M, W)``; 0 for what it does not hold.

        Args:
            counts: as for :meth:`constant`.
        """
        joined = self._model.joined_clients(counts)[:, self._model.weight_layer]
        per_rank: Floats = np.where(joined > 0, self._model.adapter_bytes + joined * self._model.saved_per_rank, 0.0)
        return per_rank

    def peak_bytes(self, splits: Sequence[int], ranks: Mapping[str, int]) -> int:
        """Peak bytes of the server beside clients that split at ``splits``, with ``ranks`` of its own."""
        counts = self._model.clients_at(splits)[None]
        vector = self._model.rank_vector(ranks)
        return round(float((self.constant(counts) + self.per_rank(counts) @ vector)[0]))

    @cached_property
    def _store_bytes(self) -> int:
        """The aggregator's residuals of all weights, and one copy of them on its way to the holders."""
        return 2 * self._model.master.itemsize * int(self._model.residual_entries.sum())

    def _transient(self, clients: int) -> int:
        if clients not in self._transients:
            codes = self._model.job.base if self._model.quantized else None
            setting = self._model.setting(self._model.top_rank, clients * self._model.job.batch_size, codes)
            runs = [self._model.counter.run(layer, setting) for layer in range(self._model.layers)]
            self._transients[clients] = max(map(transient_bytes, runs)) + clients * self._model.hidden_bytes
        return self._transients[clients]

    def _recompression_bytes(self, clients: int) -> float:
        """One weight's residual on its way through the cap: concatenation, QR, core and result in fp64."""
        if not self._model.keeps_residual:
            return 0.0
        cap = self._model.job.residual.max_rank
        rank = (0 if cap == "full" else cap) + (clients + 1) * self._model.top_rank
        return float(int(self._model.forming.max(initial=0)) + 4 * 8 * rank * int(self._model.sides.max(initial=0)))
