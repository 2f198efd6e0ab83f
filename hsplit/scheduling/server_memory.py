"""The bytes of the server: deep layers over joined rows, and the aggregator's store (METHOD 4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.models.tail import SERVER_CHUNK_ROWS
from hsplit.scheduling.counted_model import CountedModel, Floats, Ints, prefix
from hsplit.scheduling.counting import UNSEEN
from hsplit.scheduling.serving import counts_of_deepest

# Up to the first number of clients each is counted for itself, beyond it only these: counting takes time and memory
# that grow with the rows.
COUNTED_CLIENTS = (8, 16, 32, 64)


class ServerMemory:
    """Peak bytes of the server beside given clients: a constant, and so much a unit of rank a weight.

    Of several servers they are those of the first, which aggregates and serves most.
    """

    def __init__(self, model: CountedModel) -> None:
        self._model = model
        self._transients: dict[int, float] = {}

    def constant(self, counts: Ints) -> Floats:
        """Bytes of the server apart from its own ranks: ``(M,)``.

        Args:
            counts: rows of :meth:`clients_at`, ``(M, L + 1)``, all of equally many clients.
        """
        model, served = self._model, self._model.served(counts)
        clients, joined = int(served[0].sum()), model.joined_clients(served)
        held = joined > 0
        fixed = held @ model.stored_bytes + model.rotary_bytes + model.optimizer_bytes + float(self._store_bytes)
        copies = held @ model.copied_bytes
        working: Floats = np.maximum(self._transients_of(joined[:, -1]), model.stepping_bytes(copies))
        wire = model.wire_bytes(1)
        if not model.tail_at_client:
            fixed = fixed + model.tail_bytes(head=True)
            tail = model.tail_run(SERVER_CHUNK_ROWS).peak_bytes(clients * model.rows)
            working = np.maximum(working, clients * model.hidden_bytes + tail)
        # Messages as received, each client's rows as a leaf of the graph, targets and owners of all tokens.
        boundary = clients * (wire.to_server + model.hidden_bytes + 4 * 8 * model.rows)
        if model.whole:
            # Nothing of a step comes here.
            boundary = 0
        step = UNSEEN * (joined @ model.saved + working + boundary)
        # The first server aggregates: all that train hand in to it, the other servers too.
        deepest = counts_of_deepest(counts, model.job.clients_per_round)
        received = deepest @ prefix(model.copied_bytes) + model.servers * copies
        if model.truncates:
            # What each holder takes of the restarts is its own copy.
            received = received + counts @ prefix(model.copied_bytes) + model.servers * copies
        holders = model.training(int(counts[0].sum())) + model.servers - 1
        passing = np.maximum(self._recompression_bytes(holders), self._residual_bytes + self._following(held))
        # Resuming instead: own factors and moments as received.
        resumed = (1 + model.moments) * copies + model.optimizer_bytes
        round_end = np.maximum(received + passing, resumed + self._residual_bytes + self._following(held))
        load = np.where(held, model.loading(codes=True), 0.0).max(axis=1)
        total: Floats = np.ceil(fixed + np.maximum.reduce([step, round_end, load]))
        return total

    def per_rank(self, counts: Ints) -> Floats:
        """Bytes that one more unit of rank of each weight costs, ``(M, W)``; 0 for what it does not hold.

        Args:
            counts: as for :meth:`constant`.
        """
        joined = self._model.joined_clients(self._model.served(counts))[:, self._model.weight_layer]
        per_rank: Floats = np.where(joined > 0, self._model.adapter_bytes + joined * self._model.saved_per_rank, 0.0)
        return per_rank

    def peak_bytes(self, splits: Sequence[int], ranks: Mapping[str, int]) -> int:
        """Peak bytes of the server beside clients that split at ``splits``, with ``ranks`` of its own."""
        counts = self._model.clients_at(splits)[None]
        vector = self._model.rank_vector(ranks)
        return round(float((self.constant(counts) + self.per_rank(counts) @ vector)[0]))

    @cached_property
    def _residual_bytes(self) -> int:
        """All weights' residuals as they are kept, or as they travel to the holders."""
        return self._model.master.itemsize * int(self._model.residual_entries.sum())

    @cached_property
    def _store_bytes(self) -> float:
        """What the aggregator keeps of all weights: residuals and common restarts."""
        return self._residual_bytes + float(self._model.copied_bytes.sum())

    def _following(self, held: NDArray[np.bool_]) -> Floats:
        return np.where(held, self._model.following, 0.0).max(axis=1)

    def _transients_of(self, joined: Ints) -> Floats:
        """Most that a layer needs at once with so many clients' rows, ``(M,)``."""
        distinct, places = np.unique(joined, return_inverse=True)
        return np.array([self._transient(int(clients)) for clients in distinct])[places]

    def _transient(self, clients: int) -> float:
        """Counted for few clients; for more, on the chord between numbers that were counted.

        Each moment of a layer takes bytes linear in the rows, so the most of them is convex: a chord is never below it.
        Beyond the largest number counted it goes on as between the last two.
        """
        if clients <= COUNTED_CLIENTS[0]:
            return self._counted_transient(clients)
        above = bisect_left(COUNTED_CLIENTS, min(clients, COUNTED_CLIENTS[-1]))
        few, many = COUNTED_CLIENTS[above - 1], COUNTED_CLIENTS[above]
        least, most = self._counted_transient(few), self._counted_transient(many)
        return least + (clients - few) * (most - least) / (many - few)

    def _counted_transient(self, clients: int) -> float:
        if clients == 0:
            return 0.0
        if clients not in self._transients:
            model = self._model
            codes, rows = model.job.base if model.quantized else None, clients * model.job.batch_size
            most = max(model.transient_bytes(layer, rows, codes) for layer in range(model.layers))
            self._transients[clients] = float(most)
        return self._transients[clients]

    def _recompression_bytes(self, holders: int) -> float:
        """One weight's update on its way into its residual: the decomposition in fp64 (``lora.low_rank.spectral``).

        Measured on 100 holders of a 4096 x 4096 weight: 4 % less than this. With one server no weight has more holders
        than there are clients, since it holds what some client does not; a common restart joins their terms. Without a
        cap a residual may become a matrix.
        """
        model = self._model
        if not model.decomposes:
            return 0.0
        cap, exact = model.job.residual.max_rank if model.keeps_residual else 0, model.master.itemsize
        rank = (0 if cap == "full" else cap) + (holders + 1) * model.top_rank
        most = 0
        for d_out, d_in in {(w.d_out, w.d_in) for w in model.weights}:
            small, sides = min(d_out, d_in), d_out + d_in
            r = min(rank, small)
            kept = r if cap == "full" else min(cap, r)
            # One factor and two triangles, or what the core's decomposition takes; of so many terms, the matrix's own.
            core = max(r * max(d_out, d_in) + 2 * r * r, 4 * r * r)
            working = core if rank < small else 2 * d_out * d_in + 2 * r * r
            # Then the directions that are kept: the core's, their products with the triangles, and their factors.
            forming = 3 * r * r + kept * (r + sides)
            matrix = d_out * d_in if cap == "full" else 0
            most = max(most, 8 * max(working, forming) + exact * (kept * sides + matrix))
        return float(most)
