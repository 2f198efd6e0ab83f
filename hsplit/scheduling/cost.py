"""What an assignment costs a holder in bytes and seconds, before anything runs (METHOD 4).

Everything is counted once when the model is made; after that every question is a few array look-ups, so that a
planner can ask for thousands of splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hsplit.config import Job
from hsplit.models.dtype import DTYPES, resolve_dtype
from hsplit.models.families import family_of
from hsplit.models.segment import LinearShape, layer_count, linear_shapes, targeted
from hsplit.models.tail import CHUNK_ROWS
from hsplit.models.weights import NF4_BLOCK, is_quantized
from hsplit.scheduling.counting import LayerCounter, LayerKind, LayerRun, LayerSetting

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class ClientBudget(Protocol):
    """What the cost model and the planner need of a client: ``config.Client`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def flops(self) -> float: ...
    @property
    def bandwidth_bps(self) -> float: ...
    @property
    def latency_s(self) -> float: ...


class ServerBudget(Protocol):
    """What they need of the server: ``config.ServerSpec`` is one."""

    @property
    def memory_bytes(self) -> int: ...
    @property
    def flops(self) -> float: ...


@dataclass(frozen=True)
class WireBytes:
    """Bytes of one batch of one client on the wire.

    Attributes:
        up: hidden states, lengths, count, and the labels where the server may see them.
        deep: U-shape only: the last layer's output, to the client.
        slope: U-shape only: its gradient, to the server.
        down: the gradient at the split point; nothing for a client without layers.
    """

    up: int
    deep: int
    slope: int
    down: int

    @property
    def to_server(self) -> int:
        return self.up + self.slope

    @property
    def to_client(self) -> int:
        return self.deep + self.down


@dataclass(frozen=True)
class StepTime:
    """Seconds of one client's part of a local step (virtual).

    Attributes:
        up_s: front forward and hidden states up.
        turn_s: U-shape only: deep output down, tail, its gradient up.
        down_s: gradient down and front backward.
    """

    up_s: float
    turn_s: float
    down_s: float

    @property
    def total_s(self) -> float:
        return self.up_s + self.turn_s + self.down_s


class CostModel:
    """Bytes and seconds of every split and rank for one model and one job.

    What is reserved, so that a plan holds for the whole run: the residual at its cap; every batch at ``batch_size``
    rows of ``max_length`` tokens, all of them supervised; copies that a round's end makes at the largest rank.
    Times are those with the residual at its cap and every adapter at the largest rank, so that they depend on the
    splits alone, as METHOD 5's ``makespan(K)`` does. All times are virtual.

    Args:
        config: the model's transformers configuration; no weights are read.
        job: the run's settings.
        residual: whether the run's aggregation keeps a residual at all.
        top_rank: the largest rank that a plan may give; by default that of ``job.rank_set``.

    Attributes:
        weights: the adapted weights, in layer order: the order of every array over weights.
        weight_layer: their layers, ``(W,)``.
    """

    def __init__(self, config: Any, job: Job, *, residual: bool = True, top_rank: int | None = None) -> None:
        self.layers = layer_count(config)
        self._job = job
        # Read once: attributes of a transformers configuration are slow.
        self._width, self._words = int(config.hidden_size), int(config.vocab_size)
        self._tied = bool(config.tie_word_embeddings)
        self._dtype = resolve_dtype(job.dtype)
        self._master = torch.promote_types(self._dtype, torch.float32)
        self._quantized = is_quantized(job.base)
        self._family = family_of(config.model_type)
        targets = "all-linear" if job.targets == "all-linear" else list(job.targets)
        self.weights: list[LinearShape] = targeted(linear_shapes(config), targets)
        self.weight_layer: Ints = np.array([w.layer for w in self.weights], dtype=np.int64)
        self._index = {w.name: i for i, w in enumerate(self.weights)}
        self._sides: Ints = np.array([w.d_out + w.d_in for w in self.weights], dtype=np.int64)
        self.rank_set: tuple[int, ...] = tuple(job.rank_set)
        self.top_rank = top_rank or max(job.rank_set)
        self._keeps_residual = residual
        self._counter = LayerCounter(config, set(self._index), job.max_length)
        self._server_transients: dict[int, int] = {}
        self._count_layers()

    # -- counting -------------------------------------------------------------------------------------------------

    def _setting(self, ranks: int, rows: int, codes: str | None) -> LayerSetting:
        cap = self._job.residual.max_rank
        # Uncapped factors become one matrix when they would outgrow it: they cost at most what the cap may be there.
        cap_rank = 10**9 if cap == "full" else cap
        beside = cap_rank if self._quantized and self._keeps_residual else 0
        length = self._job.max_length
        return LayerSetting(rows, length, self._dtype, ranks, beside, codes, self._job.dropout)

    def _count_layers(self) -> None:
        job, counter = self._job, self._counter
        rows = job.batch_size
        low = [counter.run(layer, self._setting(1, rows, None)) for layer in range(self.layers)]
        high = [counter.run(layer, self._setting(self.top_rank, rows, None)) for layer in range(self.layers)]
        spread = max(self.top_rank - 1, 1)
        adapted = [max(sum(linear.adapted for linear in kind.linears), 1) for kind in counter.kinds]
        # Every adapted weight keeps x A^T, of the same rows and of its rank's width: the growth is shared equally.
        growth = [
            -(-(much.saved_bytes - little.saved_bytes) // (spread * count))
            for much, little, count in zip(high, low, adapted, strict=True)
        ]
        self._saved_per_rank: Floats = np.array([growth[w.layer] for w in self.weights], dtype=np.float64)
        if self.top_rank == 1:
            self._saved_per_rank = np.full(len(self.weights), float(self._rows * self._dtype.itemsize))
        held = np.bincount(self.weight_layer, weights=self._saved_per_rank, minlength=self.layers)
        self._saved: Floats = np.array([run.saved_bytes for run in low]) - held
        self._transient: Floats = np.array([_transient(run) for run in high], dtype=np.float64)
        self.forward_flops: Floats = np.array([run.forward_flops for run in high], dtype=np.float64)
        self.backward_flops: Floats = np.array([run.backward_flops for run in high], dtype=np.float64)

    @property
    def _rows(self) -> int:
        """Tokens of one client's batch."""
        return self._job.batch_size * self._job.max_length

    @cached_property
    def _hidden_bytes(self) -> int:
        return self._rows * self._width * self._dtype.itemsize

    @cached_property
    def _residual_entries(self) -> Ints:
        """Entries reserved for each weight's residual: its factors at the cap, or one matrix where that is less."""
        cap = self._job.residual.max_rank
        entries = []
        for w in self.weights:
            factors = (
                w.parameters if cap == "full" else min(cap, min(w.d_out, w.d_in) // 2) * (w.d_out + w.d_in)
            )
            entries.append(min(factors, w.parameters) if self._keeps_residual else 0)
        return np.array(entries, dtype=np.int64)

    # -- bytes ----------------------------------------------------------------------------------------------------

    @cached_property
    def client_per_rank(self) -> Floats:
        """Bytes that one more unit of rank of each weight costs a client, ``(W,)``."""
        return self._adapter_bytes + self._saved_per_rank

    @cached_property
    def _adapter_bytes(self) -> Floats:
        # Parameter, gradient and two Adam moments in the master dtype: 16 bytes in fp32 (METHOD 3).
        return 4.0 * self._master.itemsize * self._sides

    @cached_property
    def client_constant(self) -> Floats:
        """Bytes of a client at each split from 0 to ``layers`` apart from its ranks, ``(L + 1,)``."""
        item = self._dtype.itemsize
        fixed = _prefix(self._dense_bytes) + self._embedding_bytes + self._rotary_bytes
        fixed[0] -= self._rotary_bytes
        if self._quantized:
            fixed += _prefix(self._by_layer(item * self._residual_entries))
        at_home = self._job.privacy.labels == "client"
        transient = np.maximum.accumulate(np.concatenate([[2.0 * self._hidden_bytes], self._transient]))
        if at_home:
            fixed += self._tail_bytes(head=not self._tied)
            transient = np.maximum(transient, self._tail_working_bytes(1))
        wire = self.wire_bytes(1)
        # A message is alive as it was received and as the copy that it is unpacked from.
        step = _prefix(self._saved) + transient + 2 * max(wire.up, wire.deep, wire.slope, wire.down)
        total: Floats = np.ceil(fixed + np.maximum(step, self._round_bytes))
        return total

    @cached_property
    def _dense_bytes(self) -> Floats:
        """Each layer stored dense in the compute dtype, as clients hold it, ``(L,)``."""
        kinds = self._counter.kinds
        return np.array(
            [self._dtype.itemsize * float(k.weight_parameters + k.small_parameters) for k in kinds]
        )

    @cached_property
    def _round_bytes(self) -> Floats:
        """What a round's end needs beside what a client always holds, by split, when no activation is alive.

        Copies of the adapters, the residual's change for all weights held, and for one weight at a time either the
        new factors (quantized bases) or its working weight formed anew: residual, ``W_0`` and their sum.
        """
        master = self._master.itemsize
        copies = _prefix(self._by_layer(master * (self.top_rank * self._sides + self._residual_entries)))
        return copies + np.concatenate(
            [[0.0], np.maximum.accumulate(self._by_layer(self._forming, np.maximum))]
        )

    @cached_property
    def _forming(self) -> Ints:
        if not self._keeps_residual:
            return np.zeros(len(self.weights), dtype=np.int64)
        if self._quantized:
            return 2 * self._dtype.itemsize * self._residual_entries
        parameters: Ints = np.array([w.parameters for w in self.weights], dtype=np.int64)
        return 3 * self._master.itemsize * parameters

    def client_bytes(self, split: int, ranks: Mapping[str, int]) -> int:
        """Peak bytes of a client that holds layers ``[0, split)`` with ``ranks`` by weight name."""
        vector = self.rank_vector(ranks) * (self.weight_layer < split)
        return round(float(self.client_constant[split] + self.client_per_rank @ vector))

    def server_bytes(self, splits: Sequence[int], ranks: Mapping[str, int]) -> int:
        """Peak bytes of the server beside clients that split at ``splits``, with ``ranks`` of its own by name."""
        counts = self.clients_at(splits)[None]
        vector = self.rank_vector(ranks)
        return round(float((self.server_constant(counts) + self.server_per_rank(counts) @ vector)[0]))

    def clients_at(self, splits: Sequence[int] | Ints) -> Ints:
        """How many clients split at each layer: ``(L + 1,)``."""
        return np.bincount(np.asarray(splits, dtype=np.int64), minlength=self.layers + 1)

    def joined_clients(self, counts: Ints) -> Ints:
        """How many clients' rows pass each layer at the server: ``(M, L)`` for ``counts`` ``(M, L + 1)``."""
        joined: Ints = np.cumsum(counts, axis=1)[:, : self.layers]
        return joined

    def server_constant(self, counts: Ints) -> Floats:
        """Bytes of the server apart from its own ranks: ``(M,)``.

        Args:
            counts: rows of :meth:`clients_at`, ``(M, L + 1)``, all of equally many clients.
        """
        clients, joined = int(counts[0].sum()), self.joined_clients(counts)
        held = joined > 0
        fixed = held @ self._server_layer_bytes + float(self._store_bytes) + self._rotary_bytes
        transient = float(self._server_transient(clients))
        if self._job.privacy.labels == "server":
            fixed = fixed + self._tail_bytes(head=True)
            transient = max(transient, self._tail_working_bytes(clients))
        wire = self.wire_bytes(1)
        # Rows as received, their leaf in the graph and the leaf's gradient.
        boundary = clients * (wire.to_server + wire.to_client + 2 * self._hidden_bytes)
        step = joined @ self._saved + transient + boundary
        received = counts @ _prefix(self._copied_bytes) + held @ self._copied_bytes
        total: Floats = np.ceil(fixed + np.maximum(step, received + self._recompression_bytes(clients)))
        return total

    def server_per_rank(self, counts: Ints) -> Floats:
        """Bytes that one more unit of rank of each weight costs the server, ``(M, W)``; 0 for what it does not hold.

        Args:
            counts: as for :meth:`server_constant`.
        """
        joined = self.joined_clients(counts)[:, self.weight_layer]
        per_rank: Floats = np.where(joined > 0, self._adapter_bytes + joined * self._saved_per_rank, 0.0)
        return per_rank

    @cached_property
    def _copied_bytes(self) -> Floats:
        """A copy of each layer's adapters at the largest rank, ``(L,)``."""
        return self._by_layer(self._master.itemsize * self.top_rank * self._sides)

    @cached_property
    def _server_layer_bytes(self) -> Floats:
        item, base = self._dtype.itemsize, self._job.base
        beside = self._by_layer(item * self._residual_entries) if self._quantized else np.zeros(self.layers)
        stored = [
            _stored_bytes(kind, base, item) + item * kind.small_parameters for kind in self._counter.kinds
        ]
        return np.array(stored, dtype=np.float64) + beside

    @cached_property
    def _store_bytes(self) -> int:
        """The aggregator's residuals of all weights, and one copy of them on its way to the holders."""
        return 2 * self._master.itemsize * int(self._residual_entries.sum())

    def _server_transient(self, clients: int) -> int:
        if clients not in self._server_transients:
            codes = self._job.base if self._quantized else None
            setting = self._setting(self.top_rank, clients * self._job.batch_size, codes)
            runs = [self._counter.run(layer, setting) for layer in range(self.layers)]
            self._server_transients[clients] = max(map(_transient, runs)) + clients * self._hidden_bytes
        return self._server_transients[clients]

    def _recompression_bytes(self, clients: int) -> float:
        """One weight's residual on its way through the cap: concatenation, QR, core and result in fp64."""
        if not self._keeps_residual:
            return 0.0
        cap = self._job.residual.max_rank
        rank = (0 if cap == "full" else cap) + (clients + 1) * self.top_rank
        return float(int(self._forming.max(initial=0)) + 4 * 8 * rank * int(self._sides.max(initial=0)))

    @cached_property
    def _embedding_bytes(self) -> int:
        return self._dtype.itemsize * sum(self._counter.parameters(path) for path in self._family.embeddings)

    @cached_property
    def _rotary_bytes(self) -> int:
        return self._counter.rotary_bytes(self._setting(1, 1, None))

    def _tail_bytes(self, head: bool) -> int:
        entries = self._words * self._width if head else 0
        return self._dtype.itemsize * (entries + self._counter.parameters(self._family.norm))

    def _tail_working_bytes(self, clients: int) -> float:
        """Norm and loss: a chunk of logits, in the compute dtype and twice in fp32, and five rows of hidden states.

        The five: input, what the norm keeps (two), its output, and the gradient that the loss keeps.
        """
        exact = self._master.itemsize
        logits = CHUNK_ROWS * self._words * (2 * exact + self._dtype.itemsize)
        return float(logits + 5 * clients * self._hidden_bytes * exact // self._dtype.itemsize)

    # -- seconds --------------------------------------------------------------------------------------------------

    def wire_bytes(self, split: int) -> WireBytes:
        """Bytes of one full batch of a client that splits at ``split`` (see ``actors.messages``)."""
        rows, job = self._rows, self._job
        hidden = rows * self._width * DTYPES[job.wire].itemsize
        at_home = job.privacy.labels == "client"
        up = hidden + 4 * job.batch_size + 8 + (0 if at_home else 4 * rows)
        turn = hidden if at_home else 0
        return WireBytes(up, turn, turn, hidden if split else 0)

    def client_times(self, client: ClientBudget) -> Floats:
        """Seconds of a client's phases up, turn and down of one local step at each split: ``(L + 1, 3)``."""
        times = np.zeros((self.layers + 1, 3))
        wire = self.wire_bytes(1)
        times[:, 0] = _prefix(self.forward_flops) / client.flops + self.sent_s(wire.up, client)
        if self._job.privacy.labels == "client":
            times[:, 1] = (
                self.sent_s(wire.deep, client)
                + self._tail_flops / client.flops
                + self.sent_s(wire.slope, client)
            )
        times[1:, 2] = _prefix(self.backward_flops)[1:] / client.flops + self.sent_s(wire.down, client)
        return times * self._job.grad_accumulation

    def step_time_s(self, client: ClientBudget, split: int) -> StepTime:
        """Virtual seconds of a client's part of one local step."""
        up, turn, down = self.client_times(client)[split]
        return StepTime(float(up), float(turn), float(down))

    def server_times(self, server: ServerBudget, counts: Ints) -> Floats:
        """Virtual seconds of the server's phase of one local step: ``(M,)`` for ``counts`` ``(M, L + 1)``."""
        flops = self.joined_clients(counts) @ (self.forward_flops + self.backward_flops)
        if self._job.privacy.labels == "server":
            flops = flops + counts.sum(axis=1) * self._tail_flops
        times: Floats = flops / server.flops * self._job.grad_accumulation
        return times

    def client_forward_s(self, client: ClientBudget, split: int) -> tuple[float, float]:
        """Virtual seconds of a client's forward of one batch: the front with its message up, and the tail if held."""
        wire = self.wire_bytes(split)
        up = float(self.forward_flops[:split].sum()) / client.flops + self.sent_s(wire.up, client)
        if self._job.privacy.labels == "server":
            return up, 0.0
        return up, self.sent_s(wire.deep, client) + self.tail_forward_flops / client.flops

    def server_forward_s(self, server: ServerBudget, counts: Ints) -> float:
        """Virtual seconds of the server's forward of one joined batch; ``counts`` ``(L + 1,)`` of :meth:`clients_at`."""
        flops = float((self.joined_clients(counts[None]) @ self.forward_flops)[0])
        if self._job.privacy.labels == "server":
            flops += int(counts.sum()) * self.tail_forward_flops
        return flops / server.flops

    @staticmethod
    def sent_s(nbytes: int, client: ClientBudget) -> float:
        """Virtual seconds for ``nbytes`` over a client's link, in either direction."""
        return 8 * nbytes / client.bandwidth_bps + client.latency_s

    @cached_property
    def _tail_flops(self) -> float:
        """Head forward and the gradient at its input, at every position (in a batch, only supervised ones are)."""
        return 2.0 * self.tail_forward_flops

    @property
    def tail_forward_flops(self) -> float:
        return 2.0 * self._rows * self._width * self._words

    # -- weights --------------------------------------------------------------------------------------------------

    def rank_vector(self, ranks: Mapping[str, int]) -> Ints:
        """``ranks`` by weight name as an array ``(W,)``; a weight that is not named has rank 0."""
        vector = np.zeros(len(self.weights), dtype=np.int64)
        for name, rank in ranks.items():
            vector[self._index[name]] = rank
        return vector

    def _by_layer(self, values: Any, combine: np.ufunc = np.add) -> Floats:
        """Values over weights gathered to values over layers, ``(L,)``."""
        total = np.zeros(self.layers)
        combine.at(total, self.weight_layer, values)
        return total


def _prefix(values: Any) -> Floats:
    """Sums over layers ``[0, k)`` for every k from 0."""
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])


def _transient(run: LayerRun) -> int:
    """Most that a layer needs at once beyond what it keeps for the backward."""
    return run.peak_bytes - run.saved_bytes


def _stored_bytes(kind: LayerKind, base: str, item: int) -> int:
    """Bytes of a layer's linears as the server stores them (see ``models.weights``)."""
    if base == "nf4":
        # Half a byte an entry, one fp32 scale a block, one code book of 16 fp32 values a weight.
        sizes = [linear.d_out * linear.d_in for linear in kind.linears]
        return sum(-(-n // 2) + 4 * -(-n // NF4_BLOCK) + 64 for n in sizes)
    if base == "int8":
        return sum(linear.d_out * linear.d_in + 4 * linear.d_out for linear in kind.linears)
    return item * kind.weight_parameters
