"""The bytes of a client (METHOD 4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from hsplit.models.checkpoint_reader import CHUNK_BYTES
from hsplit.models.tail import CLIENT_CHUNK_ROWS
from hsplit.scheduling.counted_model import CountedModel, Floats, prefix
from hsplit.scheduling.counting import UNSEEN


class ClientMemory:
    """Peak bytes of a client at every split: a constant, and so much for each unit of rank of each weight."""

    def __init__(self, model: CountedModel) -> None:
        self._model = model

    @cached_property
    def constant(self) -> Floats:
        """Bytes of a client at each split from 0 to ``layers`` apart from its ranks, ``(L + 1,)``."""
        model = self._model
        codes = model.client_codes is not None
        layers = prefix(model.stored_bytes if codes else model.dense_bytes)
        fixed = layers + model.embedding_bytes + model.rotary_bytes + model.optimizer_bytes
        fixed[0] -= model.rotary_bytes
        # What is stored as codes has the residual beside it counted already.
        if model.quantized and not codes:
            fixed += prefix(model.by_layer(model.dtype.itemsize * model.residual_entries))
        if model.tail_at_client:
            fixed += model.tail_bytes(head=not model.tied)
        total: Floats = np.ceil(fixed + np.maximum.reduce([self._step_bytes, self._round_bytes, self._loading_bytes]))
        return total

    @cached_property
    def per_rank(self) -> Floats:
        """Bytes that one more unit of rank of each weight costs a client, ``(W,)``."""
        return self._model.adapter_bytes + self._model.saved_per_rank

    @cached_property
    def training_bytes(self) -> int:
        """Peak bytes of a node that trains every weight.

        It always holds each value with two Adam moments in the master dtype; in a step the gradients too, activations,
        and the logits of all positions with what the loss makes of them; for a checkpoint, or from one, a copy of all.
        """
        model = self._model
        nbytes = model.dense_bytes.sum() + model.embedding_bytes + model.tail_bytes(head=not model.tied)
        values = model.master.itemsize * nbytes / model.dtype.itemsize
        logits = 4 * model.master.itemsize * model.rows * model.words
        # The input of every linear is counted; norms keep theirs too where they are trained, twice a layer and last.
        norms = (2 * model.layers + 1) * model.hidden_bytes
        work = prefix(model.saved)[-1] + norms + model.transient.max() + logits
        narrow = model.narrow_bytes * values / model.master.itemsize
        step = 4 * values + narrow + UNSEEN * work + model.batch_bytes
        return round(float(max(step, 2 * 3 * values)))

    def peak_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """Peak bytes of a client that holds layers ``[0, split)`` with ``ranks`` by weight name."""
        vector = self._model.rank_vector(ranks) * (self._model.weight_layer < split)
        return round(float(self.constant[split] + self.per_rank @ vector))

    @cached_property
    def _step_bytes(self) -> Floats:
        """A local step or an importance probe, beside what a client always holds, by split."""
        model = self._model
        wire = model.wire_bytes(1)
        # The gradient as received; in the backward its converted form is its layer's.
        layers = _running_maximum(model.transient) + wire.down
        layers = np.maximum(layers, model.stepping_bytes(prefix(model.copied_bytes)))
        # A client without layers, and the beginning of all others: the embedding's work, then the message.
        layers = np.maximum(layers, max(model.embedding_working_bytes, model.hidden_bytes + wire.up))
        if model.tail_at_client:
            # The front's output, the deep layers' as received and as unpacked, then norm, head and loss.
            unpacked = 2 * model.hidden_bytes + wire.deep
            layers = np.maximum(layers, unpacked + model.tail_run(CLIENT_CHUNK_ROWS).peak_bytes(model.rows))
        if model.job.privacy.noise:
            # What was clipped is kept beside the result; clipping, noise and its scaled form pass before a backward.
            layers = np.maximum(layers + model.hidden_bytes, 6 * model.hidden_bytes)
        return UNSEEN * (prefix(model.saved) + layers) + model.batch_bytes

    @cached_property
    def _round_bytes(self) -> Floats:
        """What a round's end or a resumption needs, by split, when no activation is alive.

        As received: the residual's change for all weights held and the common restarts, which are no larger than the
        adapters; at a resumption factors and moments too, but then a residual that is kept as it is received
        is not there before. Beside it what following the residual takes, one weight at a time. What is proportional to
        the ranks counts at the largest, as far as it is more than the activations in :attr:`per_rank`.
        """
        model = self._model
        residual = prefix(model.by_layer(model.master.itemsize * model.residual_entries))
        kept_as_received = model.quantized and model.dtype == model.master
        restart = residual + self._copies(1)
        resumption = (0.0 if kept_as_received else residual) + self._copies(2 + model.moments) + model.optimizer_bytes
        return np.maximum(restart, resumption) + _running_maximum(model.following)

    def _copies(self, count: float) -> Floats:
        """So many copies of the adapters at the largest rank, less the activations of a unit of rank, by split."""
        model = self._model
        beyond = np.maximum(count * model.master.itemsize * model.sides - model.saved_per_rank, 0)
        return prefix(model.by_layer(model.top_rank * beyond))

    @cached_property
    def _loading_bytes(self) -> Floats:
        """Reading the layers, by split, when the last layer's residual is not there yet.

        Of the adapters there are no more than moments that outlive a change of plan, and embedding and head are
        converted in chunks.
        """
        model = self._model
        most = np.maximum(_running_maximum(model.loading(codes=model.client_codes is not None)), CHUNK_BYTES)
        if model.quantized:
            most[1:] -= model.by_layer(model.dtype.itemsize * model.residual_entries)
        values_and_gradients = 2 * model.master.itemsize * model.sides.astype(np.float64)
        return np.maximum(
            most - prefix(model.by_layer(min(model.rank_set[0], model.top_rank) * values_and_gradients)), 0.0
        )


def _running_maximum(values: Floats) -> Floats:
    """Largest over layers ``[0, k)`` for every k from 0."""
    return np.concatenate([[0.0], np.maximum.accumulate(values)])
