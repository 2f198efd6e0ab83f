"""A model's layers with all counts that plans need (METHOD 4)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hsplit.config import Job
from hsplit.lora.optimizer import STEPPED_AT_ONCE, constant_bytes, moment_bytes, passing_bytes
from hsplit.models.checkpoint_reader import CHUNK_BYTES
from hsplit.models.dtype import resolve_dtype
from hsplit.models.spec import LinearShape, ModelSpec
from hsplit.models.weights import NF4_BLOCK, QUANTIZED_AT_ONCE, is_quantized
from hsplit.planning.cost.counting import LayerCounter, LayerRun, TailRun
from hsplit.planning.cost.fake_layer import LayerKind, LayerSetting
from hsplit.planning.cost.serving import counts_at_first
from hsplit.planning.wire import row_bytes

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Bytes that a layer keeps, and operations, are linear in the rows: counted at these. Not at one row: there autograd
# may keep a view where it keeps a copy of more.
LINEAR_ROWS = 2
# Layers are counted for up to so many tokens, and at least for 4 rows: beyond the constants of any layer (a weight of
# 4096 x 11008 equals the activations of 11,000 tokens) bytes are linear in the tokens.
COUNTED_TOKENS = 1 << 16

# Operations in whose time an entry kept as codes is dequantized, in each forward and each backward. Measured by steps
# of two layers of SmolLM2-135M, dense and as codes, on one core of a Xeon: 43 to 130 with NF4 and 84 to 118 with int8
# in fp32 (128 to 1024 tokens), 66 and 62 in bf16. Weights of 5632 x 2048 in fp32, whose memory is new each time, take
# 200 to 330 alone. ``hsplit probe`` measures it on a machine.
DEQUANTIZATION_FLOPS = {"nf4": 80.0, "int8": 85.0}


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
        """Bytes that a client sends."""
        return self.up + self.slope


class CountedModel:
    """One model under one job: sizes and counts by layer and by adapted weight.

    Args:
        model: the model; no weights are read.
        job: the run's settings.
        residual: the run's aggregation keeps a residual.
        decomposes: it takes singular value decompositions.
        truncates: each holder gets its own part of the common restarts.
        top_rank: the largest rank that a plan may give; by default that of ``job.rank_set``.
        whole: clients hold the full model (placement ``full`` or ``single``): they have the tail, the base stays as it
            is stored, and a step sends nothing.
        trains_weights: every weight is trained instead of adapters, so the model is kept in the master dtype.
        servers: number of servers that share the clients.
        exchange: format of adapters at a round's end, as ``pace.exchange``.
        spectral: an importance probe finds spectra.
        counter: counts layers; a new one by default.

    Attributes:
        layers: decoder layers ``L``.
        weights: the adapted weights, in layer order: the order of every array over weights, ``(W,)``.
        weight_layer: their layers, ``(W,)``.
        sides: ``d_in + d_out`` of each, ``(W,)``.
        saved: bytes that each layer keeps for the backward of one client's batch, at rank 0, ``(L,)``.
        saved_per_rank: bytes that a unit of rank of each weight adds to that, ``(W,)``.
        transient: most bytes of each layer at once beyond those, for one client's batch, in a step or in an importance
            probe, ``(L,)``.
        forward_flops, backward_flops: of each layer for one client's batch, ``(L,)``.
    """

    def __init__(
        self,
        model: ModelSpec,
        job: Job,
        *,
        residual: bool = True,
        decomposes: bool = True,
        truncates: bool = False,
        top_rank: int | None = None,
        whole: bool = False,
        trains_weights: bool = False,
        servers: int = 1,
        exchange: Literal["whole", "compute"] = "whole",
        spectral: bool = False,
        counter: LayerCounter | None = None,
    ) -> None:
        self._model = model
        self._setting: dict[str, Any] = {
            "residual": residual,
            "decomposes": decomposes,
            "truncates": truncates,
            "top_rank": top_rank,
            "whole": whole,
            "trains_weights": trains_weights,
            "servers": servers,
            "exchange": exchange,
            "spectral": spectral,
        }
        self._at_rows: dict[int, CountedModel] = {job.batch_size: self}
        self.servers, self._spectral = servers, spectral
        self.layers = model.layers
        self.job, self.whole, self.trains_weights = job, whole, trains_weights
        self.tail_at_client = whole or job.privacy.labels == "client"
        # Read once: attributes of a transformers configuration are slow.
        self.width, self.words = model.width, model.vocab_size
        self.tied = model.tied
        self.dtype = resolve_dtype(job.dtype)
        self.master = torch.promote_types(self.dtype, torch.float32)
        self.narrow_bytes = self.dtype.itemsize if trains_weights and self.dtype != self.master else 0
        if trains_weights:
            # Weights are kept in the master dtype, and so is what flows between layers under autocast.
            self.dtype = self.master
        self.sent_itemsize = self.master.itemsize if exchange == "whole" else self.dtype.itemsize
        self.quantized = is_quantized(job.base)
        # A residual's factors travel as holders compute with them, where nothing is lost by that.
        narrow = self.quantized or self.dtype.itemsize == self.sent_itemsize
        self.residual_itemsize = self.dtype.itemsize if narrow else self.master.itemsize
        # A client with the full model stores a quantized base as its codes, as the server does.
        self.client_codes = job.base if whole and self.quantized and not trains_weights else None
        targets = "all-linear" if job.targets == "all-linear" or trains_weights else list(job.targets)
        self.weights: list[LinearShape] = model.targeted(targets)
        self.weight_layer: Ints = np.array([w.layer for w in self.weights], dtype=np.int64)
        self._index = {w.name: i for i, w in enumerate(self.weights)}
        self.sides: Ints = np.array([w.d_out + w.d_in for w in self.weights], dtype=np.int64)
        self.rank_set: tuple[int, ...] = tuple(job.rank_set)
        self.top_rank = 1 if trains_weights else top_rank or max(job.rank_set)
        self.keeps_residual, self.decomposes, self.truncates = residual, decomposes, truncates
        self._loading: dict[bool, Floats] = {}
        self.counter = counter or LayerCounter(model, set(self._index), job.max_length)
        self._counted_rows = counted_rows(job.max_length)
        self._count_layers()

    def at_rows(self, rows: int) -> CountedModel:
        """The same counts for batches of ``rows`` examples instead of ``job.batch_size``."""
        if rows not in self._at_rows:
            job = self.job.model_copy(update={"batch_size": rows})
            made = CountedModel(self._model, job, **self._setting, counter=self.counter)
            made._at_rows = self._at_rows
            self._at_rows[rows] = made
        return self._at_rows[rows]

    def setting(self, ranks: int, rows: int, codes: str | None) -> LayerSetting:
        """Make the setting to count a layer at: ranks of its adapters, rows of tokens, and how its base is kept."""
        cap = self.job.residual.max_rank
        # Uncapped factors become one matrix when they would outgrow it; counted as if they stopped there.
        cap_rank = 10**9 if cap == "full" else cap
        beside = cap_rank if self.quantized and self.keeps_residual else 0
        length = self.job.max_length
        dropout = self.job.dropout
        return LayerSetting(rows, length, self.dtype, ranks, beside, codes, dropout, not dropout, self._spectral)

    def transient_bytes(self, rows: int, codes: str | None) -> Floats:
        """Most bytes of each layer at once beyond those kept for the backward, in a step or a probe, ``(L,)``.

        At each moment a layer's bytes are linear in the rows, so their maximum is convex: between two numbers of rows
        that are counted the chord is never below it. Beyond the largest counted number the last chord is extended.

        Args:
            rows: examples of the batch.
            codes: how the base is kept, as in :class:`~hsplit.planning.cost.fake_layer.LayerSetting`.
        """
        known = self._counted_rows
        below = min(bisect_right(known, rows), len(known) - 1) - 1
        few, many = known[below], known[min(bisect_left(known, rows), len(known) - 1)]
        least, most = (self._counted_transients(number, codes) for number in (few, many))
        chord: Floats = least + (rows - few) * (most - least) / max(many - few, 1)
        return chord

    def _counted_transients(self, rows: int, codes: str | None) -> Floats:
        setting = self.setting(self.top_rank, rows, codes)
        # A probe runs without dropout.
        runs, probes = (self._runs(of) for of in (setting, replace(setting, dropout=0.0, probed=True)))
        most = [max(r.peak_bytes, p.peak_bytes) - r.saved_bytes for r, p in zip(runs, probes, strict=True)]
        return np.array(most, dtype=np.float64)

    def _runs(self, setting: LayerSetting) -> list[LayerRun]:
        """Count every layer in ``setting``."""
        return [self.counter.run(layer, setting) for layer in range(self.layers)]

    def _count_layers(self) -> None:
        rows, codes = self.job.batch_size, self.client_codes
        low = self._runs(self.setting(1, LINEAR_ROWS, codes))
        # Two ranks are needed to find the growth, also where plans give only one.
        top = max(self.top_rank, 2)
        high = self._runs(self.setting(top, LINEAR_ROWS, codes))
        spread = top - 1
        adapted = [max(sum(linear.adapted for linear in kind.linears), 1) for kind in self.counter.kinds]
        # Every adapted weight keeps x A^T, of the same rows and of its rank's width: the growth is shared
        # equally.
        growth = [
            -(-(much.saved_bytes - little.saved_bytes) // (spread * count))
            for much, little, count in zip(high, low, adapted, strict=True)
        ]
        scale = rows / LINEAR_ROWS
        per_rank: Floats = np.array([growth[w.layer] for w in self.weights], dtype=np.float64)
        held = np.bincount(self.weight_layer, weights=per_rank, minlength=self.layers)
        self.saved_per_rank: Floats = scale * per_rank
        self.saved: Floats = scale * (np.array([run.saved_bytes for run in low], dtype=np.float64) - held)
        self.transient: Floats = self.transient_bytes(rows, codes)
        self.forward_flops: Floats = scale * np.array([run.forward_flops for run in high], dtype=np.float64)
        self.backward_flops: Floats = scale * np.array([run.backward_flops for run in high], dtype=np.float64)

    @property
    def rows(self) -> int:
        """Tokens of one client's batch."""
        return self.job.batch_size * self.job.max_length

    @property
    def batch_bytes(self) -> int:
        """Bytes of ids and targets of one client's batches of a step, and for packing one, int64."""
        return 8 * self.rows * (2 * self.job.grad_accumulation + 4)

    @cached_property
    def hidden_bytes(self) -> int:
        """Bytes of one client's hidden states of a batch, in the compute dtype."""
        return self.rows * self.width * self.dtype.itemsize

    @cached_property
    def residual_entries(self) -> Ints:
        """Entries reserved for each residual: its factors at the cap, or one matrix where that is less."""
        cap = self.job.residual.max_rank
        entries = []
        for w in self.weights:
            factors = w.parameters if cap == "full" else min(cap, min(w.d_out, w.d_in) // 2) * (w.d_out + w.d_in)
            entries.append(min(factors, w.parameters) if self.keeps_residual else 0)
        return np.array(entries, dtype=np.int64)

    @property
    def moments(self) -> float:
        """Optimizer state for each entry of an adapter, in entries of the master dtype: 2 with Adam."""
        return moment_bytes(self.job, self.master) / self.master.itemsize

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state that do not depend on the ranks."""
        return constant_bytes(self.job)

    @cached_property
    def adapter_bytes(self) -> Floats:
        """Bytes of one unit of rank of each weight with gradient and optimizer state, ``(W,)``."""
        # Parameter, gradient and moments: with Adam's two in fp32 16 bytes (METHOD 3).
        total: Floats = self.sides.astype(np.float64) * ((2 + self.moments) * self.master.itemsize)
        return total

    def stepping_bytes(self, copied_bytes: Floats) -> Floats:
        """Transient bytes of an optimizer step over adapters of ``copied_bytes``."""
        entries: Floats = np.minimum(copied_bytes / self.master.itemsize, STEPPED_AT_ONCE)
        return passing_bytes(self.job) * entries

    @cached_property
    def weight_gradient_flops(self) -> Floats:
        """Operations of ``delta^T x`` of every adapted weight over one client's batch, by layer, ``(L,)``."""
        return self.by_layer([2.0 * self.rows * weight.parameters for weight in self.weights])

    @cached_property
    def dequantization_flops(self) -> Floats:
        """Operations in whose time each layer's codes are dequantized in one pass, forward or backward, ``(L,)``.

        They do not depend on the rows. 0 for a base that is not quantized.
        """
        flops = DEQUANTIZATION_FLOPS.get(self.job.base, 0.0)
        return flops * np.array([kind.weight_parameters for kind in self.counter.kinds], dtype=np.float64)

    @cached_property
    def dense_bytes(self) -> Floats:
        """Bytes of each layer stored dense in the compute dtype, as on clients, ``(L,)``."""
        kinds = self.counter.kinds
        return np.array([self.dtype.itemsize * float(k.weight_parameters + k.small_parameters) for k in kinds])

    @cached_property
    def stored_bytes(self) -> Floats:
        """Bytes of each layer stored as the base is, with room for its residual beside codes, ``(L,)``."""
        item, base = self.dtype.itemsize, self.job.base
        beside = self.by_layer(item * self.residual_entries) if self.quantized else np.zeros(self.layers)
        stored = [_linear_bytes(kind, base, item) + item * kind.small_parameters for kind in self.counter.kinds]
        return np.array(stored, dtype=np.float64) + beside

    @cached_property
    def working_copy_bytes(self) -> Floats:
        """Bytes of a working copy of each layer's linears beside their codes, ``(L,)``; 0 where they have no codes."""
        item = self.dtype.itemsize if self.quantized else 0
        return np.array([item * kind.weight_parameters for kind in self.counter.kinds], dtype=np.float64)

    @cached_property
    def copied_bytes(self) -> Floats:
        """Bytes of a copy of each layer's adapters at the largest rank, ``(L,)``."""
        return self.by_layer(self.master.itemsize * self.top_rank * self.sides)

    @cached_property
    def sent_bytes(self) -> Floats:
        """Bytes of each layer's adapters on their way at a round's end, at the largest rank, ``(L,)``."""
        return self.by_layer(self.sent_itemsize * self.top_rank * self.sides)

    @cached_property
    def restart_bytes(self) -> Floats:
        """Most bytes that each layer's linears need, one at a time, to begin a round, ``(L,)``.

        A quantized base keeps its residual's new factors as they come. A dense one widens them, forms the residual and
        ``W_0`` and adds them (``AdaptedLinear``); ``W_0`` is read in chunks, and a bf16 base is read as such before it
        is widened. Then a new ``A`` is drawn, in three tensors of its size (``initial_A``).
        """
        exact = self.master.itemsize
        drawn = [3 * exact * self.top_rank * w.d_in for w in self.weights]
        formed = [0 for _ in self.weights]
        if self.keeps_residual and not self.quantized:
            entry = 2 * exact + (2 if self.job.base == "bf16" else 0)
            widened = exact * self.residual_entries * (self.residual_itemsize != exact)
            formed = [
                # Widened factors are gone once the residual is formed of them.
                max(entry * w.parameters + min(CHUNK_BYTES, exact * w.parameters), exact * w.parameters + int(more))
                for w, more in zip(self.weights, widened, strict=True)
            ]
        return self.by_layer(np.maximum(formed, drawn), np.maximum)

    def loading_bytes(self, codes: bool) -> Floats:
        """Most bytes to read each layer beyond its stored size, ``(L,)``.

        Args:
            codes: a quantized base stays as codes (the server) instead of being dequantized (clients).
        """
        if codes not in self._loading:
            kinds = self.counter.kinds
            most = [max(self._linear_loading_bytes(w.d_out * w.d_in, codes) for w in kind.linears) for kind in kinds]
            self._loading[codes] = np.array(most, dtype=np.float64)
        return self._loading[codes]

    def _linear_loading_bytes(self, size: int, codes: bool) -> int:
        """Bytes to read one linear with ``size`` entries, beyond its stored size (see ``models.weights``)."""
        item, base = self.dtype.itemsize, self.job.base
        if not self.quantized:
            return min(CHUNK_BYTES, 4 * size) + (2 * size if base == "bf16" and item > 2 else 0)
        at_once = min(size, QUANTIZED_AT_ONCE)
        if base == "nf4":
            # The checkpoint's values, fp32 at most, and 12 bytes an entry that is quantized.
            made, kept = 4 * size + 12 * at_once, -(-size // 2) + size // 16
        else:
            # The checkpoint's values in fp16, and 9 bytes an entry that is quantized; codes widened to dequantize.
            made, kept = 2 * size + 9 * at_once, size
        if codes:
            return made
        widened = 4 * size if base == "int8" and item < 4 else 0
        return kept + max(made - item * size, widened)

    @cached_property
    def embedding_bytes(self) -> int:
        """Bytes of all embeddings, in the compute dtype."""
        return self.dtype.itemsize * self._model.front_parameters

    def unread_embedding_bytes(self, rows: int) -> int:
        """Bytes of the token embedding that a client does not hold which reads ``rows`` rows of it alone.

        The rows' ids, int64, are beside them.
        """
        words, width = self._model.embedding_shape
        row = self.dtype.itemsize * width
        return max(0, row * words - (row + 8) * rows)

    @cached_property
    def embedding_working_bytes(self) -> int:
        """Bytes of hidden states alive at once while the embeddings form the first one."""
        embeddings = self._model.family.embeddings
        # By the model's own forward: embedded, scaled or normed, and packed.
        return self.hidden_bytes * (2 * len(embeddings) - 1 if embeddings else 3)

    @cached_property
    def rotary_bytes(self) -> int:
        """Bytes of one client's batch that its layers share: rotary tables, and masks of a model by its own forward."""
        return self.job.batch_size * self.counter.rotary_bytes(self.setting(1, 1, None))

    def tail_bytes(self, head: bool) -> int:
        """Bytes of the last norm, and with ``head`` of the output head, in the compute dtype."""
        return self.dtype.itemsize * self._model.tail_parameters(head)

    def tail_run(self, chunk_rows: int) -> TailRun:
        """Count norm, head and loss."""
        return self.counter.tail(self.dtype, chunk_rows)

    def wire_bytes(self, split: int, wire: str = "", examples: int | None = None) -> WireBytes:
        """Bytes of one full batch of a client that splits at ``split`` (see ``actors.messages``).

        Args:
            split: its split point.
            wire: format of its messages; empty stands for ``job.wire``.
            examples: in the batch; ``job.batch_size`` by default.
        """
        if self.whole:
            return WireBytes(0, 0, 0, 0)
        job = self.job
        examples = job.batch_size if examples is None else examples
        rows = examples * job.max_length
        hidden = rows * row_bytes(wire or job.wire, self.width)
        at_home = self.tail_at_client
        up = hidden + 4 * examples + 8 + (0 if at_home else 4 * rows)
        turn = hidden if at_home else 0
        return WireBytes(up, turn, turn, hidden if split else 0)

    def clients_at(self, splits: Sequence[int] | Ints) -> Ints:
        """Number of clients that split at each layer: ``(L + 1,)``, or ``(M, L + 1)`` for splits ``(M, N)``."""
        own, width = np.asarray(splits, dtype=np.int64), self.layers + 1
        if own.ndim == 1:
            return np.bincount(own, minlength=width)
        counts: Ints = self.summed_at(own, np.ones(own.shape)).astype(np.int64)
        return counts

    def summed_at(self, splits: Ints, values: Floats) -> Floats:
        """Sum ``values`` of the clients that split at each layer, ``(M, L + 1)``, for splits and values ``(M, N)``."""
        many, width = len(splits), self.layers + 1
        places = splits + width * np.arange(many)[:, None]
        summed: Floats = np.bincount(places.ravel(), values.ravel(), many * width).astype(np.float64)
        return summed.reshape(many, width)

    def joined_clients(self, counts: Ints) -> Ints:
        """Number of clients with rows that pass each layer at the server: ``(M, L)`` for ``counts`` ``(M, L + 1)``."""
        joined: Ints = np.cumsum(counts, axis=1)[:, : self.layers]
        return joined

    def served(self, counts: Ints) -> Ints:
        """Most clients at each split that one server serves in a round: ``(M, L + 1)`` for ``counts`` alike."""
        return counts_at_first(counts, self.job.clients_per_round, self.servers)

    def training(self, clients: int) -> int:
        """Number of ``clients`` that train in a round."""
        most = self.job.clients_per_round
        return clients if most is None else min(clients, most)

    def rank_vector(self, ranks: Mapping[str, int]) -> Ints:
        """Convert ``ranks`` by weight name to an array ``(W,)``; a weight that is not named has rank 0."""
        vector = np.zeros(len(self.weights), dtype=np.int64)
        for name, rank in ranks.items():
            vector[self._index[name]] = rank
        return vector

    def by_layer(self, values: Any, combine: np.ufunc = np.add) -> Floats:
        """Gather values over weights to values over layers, ``(L,)``."""
        total = np.zeros(self.layers)
        combine.at(total, self.weight_layer, values)
        return total


def counted_rows(length: int) -> tuple[int, ...]:
    """Numbers of rows of ``length`` tokens that layers are counted for: 1, 2, 3, 4, 6, 8, 12, 16 and so on.

    In a layer's bytes the chord between two of them is at most a tenth above what it spans.
    """
    most = max(4, COUNTED_TOKENS // length)
    numbers = sorted({part << double for part in (1, 3) for double in range(most.bit_length())})
    return tuple(number for number in numbers if number <= most)


def prefix(values: Any) -> Floats:
    """Sums over layers ``[0, k)`` for every k from 0."""
    return np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])


def _linear_bytes(kind: LayerKind, base: str, item: int) -> int:
    """Bytes of a layer's linears as the server stores them (see ``models.weights``)."""
    if base == "nf4":
        # Half a byte an entry, one fp32 scale a block, one code book of 16 fp32 values a weight.
        sizes = [linear.d_out * linear.d_in for linear in kind.linears]
        return sum(-(-n // 2) + 4 * -(-n // NF4_BLOCK) + 64 for n in sizes)
    if base == "int8":
        return sum(linear.d_out * linear.d_in + 4 * linear.d_out for linear in kind.linears)
    return item * kind.weight_parameters
