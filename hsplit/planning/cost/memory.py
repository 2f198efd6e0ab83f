"""The bytes of a client and of the server: deep layers over joined rows, and the aggregator's store (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.lora.holder import SWAPPED_AT_ONCE
from hsplit.models.checkpoint_reader import CHUNK_BYTES
from hsplit.models.tail import CLIENT_CHUNK_ROWS, SERVER_CHUNK_ROWS
from hsplit.planning.cost.counted_model import CountedModel, Floats, Ints, prefix
from hsplit.planning.cost.counting import UNSEEN
from hsplit.planning.cost.serving import counts_of_deepest
from hsplit.planning.wire import packing_bytes


@dataclass(frozen=True)
class ClientMemory:
    """Peak bytes of a client at every split: a constant, and an amount for each unit of rank of each weight.

    They hold for one number of rows in a batch, one stored form of the base, and one number of rows of the embedding.

    Attributes:
        constant: bytes at each split from 0 to ``layers`` apart from its ranks, ``(L + 1,)``.
        per_rank: bytes that one more unit of rank of each weight costs, ``(W,)``.
    """

    constant: Floats
    per_rank: Floats
    _model: CountedModel

    @staticmethod
    def of(model: CountedModel, codes: bool = False) -> ClientMemory:
        """Count a client that brings ``model.job.batch_size`` examples and holds the whole embedding.

        Args:
            model: the counts, for that many examples.
            codes: it stores a quantized base as codes.
        """
        return ClientMemory(_Client(model, codes).constant, model.adapter_bytes + model.saved_per_rank, model)

    def with_embedding(self, rows: int) -> ClientMemory:
        """The same for a client that holds ``rows`` rows of the token embedding alone."""
        return replace(self, constant=self.constant - self._model.unread_embedding_bytes(rows))

    def with_adapters_kept(self) -> ClientMemory:
        """The same for a client that keeps a copy of its adapters, which it swaps in a part at a time."""
        model, item = self._model, self._model.master.itemsize
        scratch = item * SWAPPED_AT_ONCE
        return replace(self, constant=self.constant + scratch, per_rank=self.per_rank + item * model.sides)

    def peak_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """Peak bytes of a client that holds layers ``[0, split)`` with ``ranks`` by weight name."""
        vector = self._model.rank_vector(ranks) * (self._model.weight_layer < split)
        return round(float(self.constant[split] + self.per_rank @ vector))


class _Client:
    """Parts of a client's bytes, see :meth:`ClientMemory.of`."""

    def __init__(self, model: CountedModel, codes: bool) -> None:
        self._model, self._codes = model, codes

    @property
    def constant(self) -> Floats:
        model, codes = self._model, self._codes
        layers = prefix(model.stored_bytes if codes else model.dense_bytes)
        fixed = layers + model.embedding_bytes + model.rotary_bytes + model.optimizer_bytes
        fixed[0] -= model.rotary_bytes
        # Stored bytes of codes include the residual beside them.
        if model.quantized and not codes:
            fixed += prefix(model.by_layer(model.dtype.itemsize * model.residual_entries))
        if model.tail_at_client:
            fixed += model.tail_bytes(head=not model.tied)
        total: Floats = np.ceil(fixed + np.maximum.reduce([self._step_bytes, self._round_bytes, self._loading_bytes]))
        return total

    @cached_property
    def _step_bytes(self) -> Floats:
        """Bytes of a local step or an importance probe, beside those that a client always holds, by split."""
        model = self._model
        wire = model.wire_bytes(1)
        # The gradient as received; in the backward its converted form is its layer's.
        transient = model.transient_bytes(model.job.batch_size, model.job.base if self._codes else None)
        layers = _running_maximum(transient) + wire.down
        layers = np.maximum(layers, model.stepping_bytes(prefix(model.copied_bytes)))
        # A client without layers, and the beginning of all others: the embedding's work, then the message.
        message = model.hidden_bytes + wire.up + packing_bytes(model.job.wire, model.rows * model.width)
        layers = np.maximum(layers, max(model.embedding_working_bytes, message))
        if model.tail_at_client:
            # The front's output, the deep layers' output as received and unpacked, then norm, head and loss.
            unpacked = 2 * model.hidden_bytes + wire.deep
            layers = np.maximum(layers, unpacked + model.tail_run(CLIENT_CHUNK_ROWS).peak_bytes(model.rows))
        if model.job.privacy.noise:
            # The clipped states are kept beside the result; clipping, noise and its scaling come before a backward.
            layers = np.maximum(layers + model.hidden_bytes, 6 * model.hidden_bytes)
        return UNSEEN * (prefix(model.saved) + layers) + model.batch_bytes

    @cached_property
    def _round_bytes(self) -> Floats:
        """Bytes of a round's end or a resumption, by split, when no activation is alive.

        As received: the residual's change for all weights held and the common restarts, which are no larger than the
        adapters; at a resumption also factors and moments, but then no earlier residual where it is kept as received.
        Beside them the bytes to follow the residual, one weight at a time. Bytes in proportion to the ranks count at
        the largest rank, as far as they exceed the activations in :attr:`per_rank`.
        """
        model = self._model
        residual = prefix(model.by_layer(model.residual_itemsize * model.residual_entries))
        restart = residual + self._copies(model.sent_itemsize)
        held = model.sent_itemsize + (1 + model.moments) * model.master.itemsize
        # A quantized base keeps it beside its codes as received.
        resumption = (0.0 if model.quantized else residual) + self._copies(held) + model.optimizer_bytes
        return np.maximum(restart, resumption) + _running_maximum(model.restart_bytes)

    def _copies(self, itemsize: float) -> Floats:
        """Bytes of copies of the adapters at the largest rank, less the activations of a unit of rank, by split.

        Args:
            itemsize: bytes of an entry in all copies together.
        """
        model = self._model
        beyond = np.maximum(itemsize * model.sides - model.saved_per_rank, 0)
        return prefix(model.by_layer(model.top_rank * beyond))

    @cached_property
    def _loading_bytes(self) -> Floats:
        """Bytes to read the layers, by split, before the last layer's residual exists.

        Of the adapters only moments that outlive a change of plan exist; embedding and head are converted in chunks.
        """
        model = self._model
        most = np.maximum(_running_maximum(model.loading_bytes(self._codes)), CHUNK_BYTES)
        if model.quantized:
            most[1:] -= model.by_layer(model.dtype.itemsize * model.residual_entries)
        values_and_gradients = 2 * model.master.itemsize * model.sides.astype(np.float64)
        return np.maximum(
            most - prefix(model.by_layer(min(model.rank_set[0], model.top_rank) * values_and_gradients)), 0.0
        )


def training_bytes(model: CountedModel) -> int:
    """Peak bytes of a node that trains every weight.

    It always holds each value with two Adam moments in the master dtype; in a step also the gradients, activations,
    and the logits of all positions with the loss's copies; to write or read a checkpoint, a copy of all.
    """
    nbytes = model.dense_bytes.sum() + model.embedding_bytes + model.tail_bytes(head=not model.tied)
    values = model.master.itemsize * nbytes / model.dtype.itemsize
    logits = 4 * model.master.itemsize * model.rows * model.words
    # Inputs of linears are counted; trained norms keep theirs too, twice a layer and once at the end.
    norms = (2 * model.layers + 1) * model.hidden_bytes
    work = prefix(model.saved)[-1] + norms + model.transient.max() + logits
    narrow = model.narrow_bytes * values / model.master.itemsize
    step = 4 * values + narrow + UNSEEN * work + model.batch_bytes
    return round(float(max(step, 2 * 3 * values)))


def _running_maximum(values: Floats) -> Floats:
    """Largest over layers ``[0, k)`` for every k from 0."""
    return np.concatenate([[0.0], np.maximum.accumulate(values)])


class ServerMemory:
    """Peak bytes of the server beside given clients: a constant, and an amount for each unit of rank of each weight.

    With several servers they are those of the first, which aggregates and serves most.

    Args:
        model: the counts.
        waits: whether residual changes may wait (``pace.residual_wait``).
    """

    def __init__(self, model: CountedModel, *, waits: bool = False) -> None:
        self._model, self._waits = model, waits
        self._one = model.at_rows(1)
        self._transients: dict[int, float] = {}

    def constant(self, counts: Ints, rows: Ints | None = None) -> Floats:
        """Bytes of the server apart from its own ranks: ``(M,)``.

        Args:
            counts: rows of ``CountedModel.clients_at``, ``(M, L + 1)``, all with the same number of clients.
            rows: examples that join a batch of the first server at each split, ``(M, L + 1)``; by default those of all
                clients that it serves, ``job.batch_size`` each.
        """
        model, one = self._model, self._one
        joined = self._joined_rows(counts, rows)
        held, examples = model.joined_clients(counts) > 0, joined[:, -1]
        fixed = held @ model.stored_bytes + examples * one.rotary_bytes + model.optimizer_bytes + self._store_bytes
        copies = held @ model.copied_bytes
        working: Floats = np.maximum(self._transients_of(joined[:, -2]), model.stepping_bytes(copies))
        wire = one.wire_bytes(1)
        if not model.tail_at_client:
            fixed = fixed + self._tail_bytes
            tail = model.tail_run(SERVER_CHUNK_ROWS).peak_bytes(examples * one.rows)
            working = np.maximum(working, examples * one.hidden_bytes + tail)
        # Messages as received, each client's rows as a leaf of the graph, targets and owners of all tokens.
        boundary = examples * (wire.to_server + one.hidden_bytes + 4 * 8 * one.rows)
        if model.whole:
            # A step sends nothing to the server.
            boundary = 0 * examples
        step = UNSEEN * (joined[:, :-1] @ one.saved + working + boundary)
        # The first server aggregates the adapters of all training clients and of the other servers.
        deepest = counts_of_deepest(counts, model.job.clients_per_round)
        sent = held @ model.sent_bytes
        received = deepest @ prefix(model.sent_bytes) + model.servers * sent
        if model.truncates:
            # Each holder's part of the restarts is a copy of its own.
            received = received + counts @ prefix(model.sent_bytes) + model.servers * sent
        holders = model.training(int(counts[0].sum())) + model.servers - 1
        joining = max(self._recompression_bytes(holders), self._widened_bytes(holders), self._averaging_bytes)
        restarting = self._residual_bytes + self._restart_bytes(held) + self._rounded_restarts
        if not model.decomposes:
            # The last weight is averaged when the restarts of all others are there.
            joining += self._rounded_restarts
        passing = np.maximum(joining, restarting)
        # At a resumption instead: own factors and moments as received.
        resumed = (1 + model.moments) * copies + model.optimizer_bytes
        round_end = np.maximum(received + passing, resumed + restarting)
        load = np.where(held, model.loading_bytes(codes=True), 0.0).max(axis=1)
        total: Floats = np.ceil(fixed + np.maximum.reduce([step, round_end, load]))
        return total

    def per_rank(self, counts: Ints, rows: Ints | None = None) -> Floats:
        """Bytes that one more unit of rank of each weight costs, ``(M, W)``; 0 for weights that it does not hold.

        Args:
            counts, rows: as for :meth:`constant`.
        """
        model, layer = self._model, self._model.weight_layer
        held, joined = model.joined_clients(counts)[:, layer] > 0, self._joined_rows(counts, rows)[:, layer]
        per_rank: Floats = np.where(held, model.adapter_bytes + joined * self._one.saved_per_rank, 0.0)
        return per_rank

    def per_common_rank(self, counts: Ints, rows: Ints | None = None) -> Floats:
        """Bytes that one more unit of rank of all its weights costs, ``(M,)``: the sum of :meth:`per_rank`."""
        adapters, saved = self._by_layer
        held, joined = self._model.joined_clients(counts) > 0, self._joined_rows(counts, rows)[:, :-1]
        summed: Floats = held @ adapters + (held * joined) @ saved
        return summed

    @cached_property
    def _by_layer(self) -> tuple[Floats, Floats]:
        """Bytes of a unit of rank of all weights, and of what an example's pass keeps for it, ``(L,)`` each."""
        return self._model.by_layer(self._model.adapter_bytes), self._model.by_layer(self._one.saved_per_rank)

    def _joined_rows(self, counts: Ints, rows: Ints | None) -> Ints:
        """Examples that have joined a batch by each layer, ``(M, L + 1)``; the last number is of all."""
        if rows is None:
            rows = self._model.job.batch_size * self._model.served(counts)
        joined: Ints = np.cumsum(rows, axis=1)
        return joined

    def peak_bytes(self, splits: Sequence[int], ranks: Mapping[str, int]) -> int:
        """Peak bytes of the server beside clients that split at ``splits``, with ``ranks`` of its own."""
        counts = self._model.clients_at(splits)[None]
        vector = self._model.rank_vector(ranks)
        return round(float((self.constant(counts) + self.per_rank(counts) @ vector)[0]))

    @cached_property
    def _tail_bytes(self) -> int:
        """Bytes of the last norm and the output head."""
        return self._model.tail_bytes(head=True)

    @cached_property
    def _residual_bytes(self) -> int:
        """Bytes of all weights' residuals as they are kept, or as they travel to the holders."""
        return self._model.master.itemsize * int(self._model.residual_entries.sum())

    @cached_property
    def _store_bytes(self) -> float:
        """Bytes that the aggregator keeps: residuals and common restarts of all weights."""
        # While changes wait, the residual that the holders have is kept too.
        residuals = 1 + self._waits
        return residuals * self._residual_bytes + float(self._model.copied_bytes.sum())

    @cached_property
    def _rounded_restarts(self) -> float:
        """Bytes of the common restarts in the exchange's format, where that is another than the aggregator's."""
        model = self._model
        return float(model.sent_bytes.sum()) if model.sent_itemsize != model.master.itemsize else 0.0

    def _widened_bytes(self, holders: int) -> float:
        """Bytes of one weight's adapters of all holders, widened from the exchange's format."""
        model = self._model
        if model.sent_itemsize == model.master.itemsize:
            return 0.0
        return float((1 + holders) * model.master.itemsize * model.top_rank * model.sides.max(initial=0))

    @cached_property
    def _averaging_bytes(self) -> float:
        """Bytes of one weight's new mean beside the last one's terms, where rules average factors."""
        model = self._model
        if model.decomposes:
            return 0.0
        return float(2 * model.master.itemsize * model.top_rank * model.sides.max(initial=0))

    def _restart_bytes(self, held: NDArray[np.bool_]) -> Floats:
        return np.where(held, self._model.restart_bytes, 0.0).max(axis=1)

    def _transients_of(self, joined: Ints) -> Floats:
        """Most bytes of a layer at once with ``joined`` examples, ``(M,)``."""
        distinct, places = np.unique(joined, return_inverse=True)
        return np.array([self._transient(int(rows)) for rows in distinct])[places]

    def _transient(self, rows: int) -> float:
        if rows not in self._transients:
            model = self._model
            codes = model.job.base if model.quantized else None
            self._transients[rows] = float(model.transient_bytes(rows, codes).max()) if rows else 0.0
        return self._transients[rows]

    def _recompression_bytes(self, holders: int) -> float:
        """Bytes to join one weight's update to its residual: the decomposition in fp64 (``lora.low_rank.spectral``).

        Measured on 100 holders of a 4096 x 4096 weight: 4 % less than this. With one server no weight has more holders
        than there are clients, since the server holds only weights that some client lacks; a common restart joins their
        terms. Without a cap a residual may become a matrix.
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
            # One factor and two triangles, or the core's decomposition; of terms of full rank, the matrix's own.
            core = max(r * max(d_out, d_in) + 2 * r * r, 4 * r * r)
            working = core if rank < small else 2 * d_out * d_in + 2 * r * r
            # Then the kept directions: the core's, their products with the triangles, and their factors.
            forming = 3 * r * r + kept * (r + sides)
            matrix = d_out * d_in if cap == "full" else 0
            most = max(most, 8 * max(working, forming) + exact * (kept * sides + matrix))
        return float(most)
