"""The cost of one decoder layer, counted on tensors without memory instead of estimated (METHOD 4).

The layer is built from the model's configuration alone, with the run's own :class:`AdaptedLinear` in place of every
linear, and called once forward and once backward on fake tensors: autograd, the shapes and the lifetimes are the real
ones, only the numbers are missing. Counted are the bytes that autograd keeps, the most bytes alive at once, and
operations.
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hsplit.config.reading import read_json
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.home import cache_root
from hsplit.models.loading import new_segment
from hsplit.models.outer_model import LayerCall
from hsplit.models.packing import Packing
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.recorded_segment import RecordedSegment
from hsplit.models.segment import Segment, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import OwnTail, Tail
from hsplit.planning.cost.fake_layer import (
    LayerKind,
    LayerSetting,
    Linear,
    RotaryTables,
    fill_layer,
    fill_parameters,
    full_packing,
    rotary_tables_of,
    watch_linears,
)


@contextmanager
def saved_storages(held: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Collect the bytes of every distinct storage that autograd saves inside, by storage.

    Args:
        held: tensors that exist anyway and do not count: weights, adapters, tables.
    """
    known = _storages(held)
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            # A freed storage's address may be reused by the next one, which would then not count.
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def flop_counter() -> FlopCounterMode:
    """Make a counter of multiplications and additions of all matrix products, attention's included."""
    aten = torch.ops.aten
    # torch's own list lacks the CPU kernel of scaled dot product attention and the product in place.
    missing = {
        aten.addmm_: _addmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
        aten._grouped_mm: _grouped_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=missing)


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def _grouped_flops(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Each row meets the one matrix of its group.
    return 2 * int(left[0]) * int(left[1]) * int(right[-1])


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _sdpa_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations allocate, and the most bytes of them alive at once."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._held = _storages(held)
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def begin_peak(self) -> None:
        """Begin a new peak at the bytes that are alive now."""
        self.peak = self._now

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._held or key in self._alive:
            return

        def freed(_: Any) -> None:
            self._now -= nbytes
            self._alive.pop(key, None)

        self._now += nbytes
        self._alive[key] = weakref.ref(storage, freed)


class _GroupedProducts(TorchDispatchMode):
    """Products of rows with the experts of their groups, which torch counts in bf16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dim() == 2 and args[1].dim() == 3:
            rows, experts = args[0], args[1]
            return rows.new_empty(rows.shape[0], experts.shape[2])
        return func(*args, **(kwargs or {}))


# Reserved for each byte counted of a step: operations allocate a little that is not seen (measured: 0.3 %).
UNSEEN = 1.01


@dataclass(frozen=True)
class LayerRun:
    """Bytes and operations of one forward and one backward of a layer.

    Attributes:
        saved_bytes: kept from the forward for the backward: with the layer's input, without its output, parameters,
            adapters and rotary tables.
        peak_bytes: most bytes alive at once over both passes, without the same, but with the output and its gradient.
            Workspaces inside a kernel are not seen.
        forward_flops, backward_flops: multiplications and additions, each counted.
    """

    saved_bytes: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class TailRun:
    """Most bytes alive at once in the tail, forward and then backward, each linear in the supervised tokens.

    Norm, head and the tail's input do not count; the input's gradient does.

    Attributes:
        forward, backward: bytes for each token, and bytes that do not depend on tokens (a chunk of logits).
    """

    forward: tuple[int, int]
    backward: tuple[int, int]

    def peak_bytes(self, tokens: int | NDArray[np.int64]) -> Any:
        """Most bytes for ``tokens`` supervised tokens, or for each number of them."""
        (slope, constant), (back_slope, back_constant) = self.forward, self.backward
        return np.maximum(slope * tokens + constant, back_slope * tokens + back_constant)


def layer_kinds(model: ModelSpec, adapted: set[str], length: int) -> list[LayerKind]:
    """List the kind of every decoder layer.

    Args:
        model: the model.
        adapted: names of the weights that have an adapter.
        length: tokens a row; a window at least as long has no effect.
    """
    kinds, family = [], model.family
    calls = _calls(model, 1, length, torch.float32) if isinstance(family, RecordedFamily) else {}
    for index, layer in enumerate(cast(nn.ModuleList, model.skeleton.get_submodule(family.layers))):
        linears, inside = [], 0
        for path, module in family.linears(layer):
            d_out, d_in = family.linear_shape(module)
            name = f"{family.layer_name(index)}.{path}"
            linears.append(Linear(path, d_out, d_in, module.bias is not None, name in adapted))
            inside += sum(p.numel() for p in module.parameters())
        window = family.window(layer, model.config)
        others = sum(p.numel() for p in layer.parameters()) - inside
        signature = _signature(layer, calls[index]) if calls else ""
        bound = window if window is not None and window < length else None
        kinds.append(LayerKind(tuple(linears), others, bound, signature))
    return kinds


def _calls(model: ModelSpec, rows: int, length: int, dtype: torch.dtype) -> Mapping[int, LayerCall]:
    """Arguments of the layers of a model by its own forward, by layer, as real tensors."""
    segment = RecordedSegment(model, SegmentSpec(0, 0), dtype)
    return segment.layer_calls(Packing.of((length,) * rows), torch.device("cpu"))


def _signature(layer: nn.Module, call: LayerCall) -> str:
    """Describe a layer's modules and arguments: layers of one description cost the same."""

    def shown(value: Any) -> Any:
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value

    arguments = tree_map(shown, (call.args, call.kwargs))
    described = f"{[type(module).__name__ for module in layer.modules()]} {arguments}"
    return hashlib.sha256(described.encode()).hexdigest()


_PACKAGE = Path(__file__).resolve().parents[2]
# Folders with the code that a traced layer runs.
_TRACED = ("models", "lora", "planning/cost")
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")


class CountStore:
    """Counts in the user's cache directory, as lists of integers by key: tracing a layer takes half a second.

    A count is found again only by the same code: its name has a digest over this package's files and the versions of
    the libraries. Nothing fails where the directory cannot be written.
    """

    def __init__(self) -> None:
        self._folder = cache_root() / "counts"

    def get(self, *key: Any) -> list[int] | None:
        """Return the counts kept for ``key``, or ``None``."""
        try:
            return read_json(self._path(key), list[int])
        except InputError:
            return None

    def put(self, counts: list[int], *key: Any) -> None:
        """Keep ``counts`` for ``key``."""
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Other processes may read it, or write the same.
            write_text_atomically(path, json.dumps(counts), durable=False)
        except OSError:
            return

    def _path(self, key: tuple[Any, ...]) -> Path:
        digest = hashlib.sha256("\n".join([_code(), *map(str, key)]).encode())
        return self._folder / f"{digest.hexdigest()[:32]}.json"


@functools.cache
def _code() -> str:
    """Digest over the code that counts."""
    digest = hashlib.sha256()
    for name in _LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    for file in traced_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def traced_files() -> list[Path]:
    """Files of this package with the code that a traced layer runs, and that counts it."""
    return [file for folder in _TRACED for file in sorted((_PACKAGE / folder).glob("*.py"))]


class LayerCounter:
    """Counts the layers of one model, each kind of layer once for a setting.

    Args:
        model: the model; no weights are read.
        adapted: names of the weights that have an adapter.
        length: tokens a row.
    """

    def __init__(self, model: ModelSpec, adapted: set[str], length: int) -> None:
        self._model, self._config = model, model.config
        self.kinds = layer_kinds(model, adapted, length)
        self._runs: dict[tuple[LayerKind, LayerSetting], LayerRun] = {}
        self._tails: dict[tuple[torch.dtype, int], TailRun] = {}
        self._rotary: dict[LayerSetting, int] = {}
        # Made once: a transformers configuration takes a millisecond to write.
        self._text = self._config.to_json_string()
        self._store = CountStore()

    def run(self, index: int, setting: LayerSetting) -> LayerRun:
        """Count layer ``index`` in ``setting``.

        Its input requires a gradient. That of a client's first layer does not, so that it saves and computes a little
        less than counted, on the safe side.
        """
        kind = self.kinds[index]
        if (kind, setting) not in self._runs:
            key = ("layer", self._text, kind, setting)
            kept = self._store.get(*key)
            if kept is None:
                counted = self._run(index, kind, setting)
                self._store.put(list(astuple(counted)), *key)
            self._runs[kind, setting] = LayerRun(*kept) if kept is not None else counted
        return self._runs[kind, setting]

    def tail(self, dtype: torch.dtype, chunk_rows: int) -> TailRun:
        """Count norm, head and loss with ``chunk_rows`` rows of logits at once."""
        if (dtype, chunk_rows) not in self._tails:
            self._tails[dtype, chunk_rows] = self._tail(dtype, chunk_rows)
        return self._tails[dtype, chunk_rows]

    def _tail(self, dtype: torch.dtype, chunk_rows: int) -> TailRun:
        # Two sizes give slope and constant; whole chunks, so that both have full ones.
        key = ("tail", self._text, dtype, chunk_rows)
        kept = self._store.get(*key)
        if kept is None:
            kept = [n for count in (2, 4) for n in self._run_tail(dtype, chunk_rows, count * chunk_rows)]
            self._store.put(kept, *key)
        few, many = kept[:2], kept[2:]
        lines = []
        for low, high in zip(few, many, strict=True):
            slope = -(-(high - low) // (2 * chunk_rows))
            lines.append((slope, max(low - 2 * chunk_rows * slope, 0)))
        (slope, constant), backward = lines
        # logsumexp takes another chunk, inside one operation and so unseen here.
        exact = torch.promote_types(dtype, torch.float32)
        return TailRun((slope, constant + chunk_rows * self._model.vocab_size * exact.itemsize), backward)

    def _run_tail(self, dtype: torch.dtype, chunk_rows: int, tokens: int) -> tuple[int, int]:
        family, words, width = self._model.family, self._model.vocab_size, self._model.width
        own = isinstance(family, RecordedFamily) and family.anatomy.plain is None
        plain = family.anatomy.plain if isinstance(family, RecordedFamily) else (family.norm, "")
        norm = nn.Identity() if plain is None else self._model.module(plain[0])
        with FakeTensorMode() as fake:
            if own:
                logits = _FakeLogits(self._model, dtype, fake)
                tail: Tail | OwnTail = OwnTail(logits, chunk_rows)
                held = list(logits.values.values())
            else:
                fill_parameters(norm, dtype)
                tail = Tail(norm, torch.empty(words, width, dtype=dtype), chunk_rows)
                held = [*tail.parameters(), *tail.buffers()]
            hidden = torch.empty(tokens, width, dtype=dtype, requires_grad=True)
            with LiveBytes([*held, hidden]) as live:
                # Indexed as on holders, where a mask selects the supervised positions.
                at = torch.zeros(tokens, dtype=torch.int64)
                loss = tail.token_losses(hidden[at], at[at]).sum()
                forward = live.peak
                live.begin_peak()
                loss.backward()
        return forward, live.peak

    def parameters(self, path: str) -> int:
        """Number of parameters of the module at ``path``."""
        return sum(p.numel() for p in self._model.skeleton.get_submodule(path).parameters())

    def rotary_bytes(self, setting: LayerSetting) -> int:
        """Bytes of the rotary tables that a segment's layers share."""
        if setting not in self._rotary:
            if isinstance(self._model.family, RecordedFamily):
                calls = _calls(self._model, setting.rows, setting.length, setting.dtype)
                storages = {
                    t.untyped_storage()._cdata: t.untyped_storage() for call in calls.values() for t in call.tensors
                }
                self._rotary[setting] = sum(storage.nbytes() for storage in storages.values())
            else:
                tables = rotary_tables_of(self._model, setting)
                self._rotary[setting] = 0 if tables is None else tables[0].nbytes + tables[1].nbytes
        return self._rotary[setting]

    def _run(self, index: int, kind: LayerKind, setting: LayerSetting) -> LayerRun:
        layer = self._model.module(self._model.family.layer_name(index))
        recorded = isinstance(self._model.family, RecordedFamily)
        tables = None if recorded else rotary_tables_of(self._model, setting)
        calls = _calls(self._model, setting.rows, setting.length, setting.dtype) if recorded else {}
        segment = new_segment(self._model, SegmentSpec(index, index + 1), setting.dtype)
        with FakeTensorMode() as fake:
            segment.layers[str(index)] = layer
            held = list(fill_layer(layer, kind, setting))
            if isinstance(segment, RecordedSegment):
                _make_buffers_fake(layer, fake)
                call = calls[index].mapped(fake.from_tensor)
                segment.keep_calls(full_packing(setting), torch.device("cpu"), {index: call})
                held += call.tensors
            if tables is not None:
                segment.rotary = RotaryTables(fake.from_tensor(tables[0]), fake.from_tensor(tables[1]))
                held += [segment.rotary.cos, segment.rotary.sin]
            segment.eval()
            for linear in segment.linears.values():
                linear.train(setting.dropout > 0)
            if setting.probed:
                watch_linears(segment.linears.values(), kind, setting)
            held += [*segment.parameters(), *segment.buffers()]
            return _count(segment, index, held, setting, self._model.width)


def _make_buffers_fake(module: nn.Module, fake: FakeTensorMode) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                part._buffers[name] = fake.from_tensor(buffer)


class _FakeLogits:
    """Logits of a model by its own forward, of which only what follows the layers computes fake tensors.

    What precedes them reads values, of masks and positions, that fake tensors do not have.
    """

    def __init__(self, model: ModelSpec, dtype: torch.dtype, fake: FakeTensorMode) -> None:
        family = cast(RecordedFamily, model.family)
        self._last, self._fake = model.layers - 1, fake
        with unset_fake_temporarily():
            self._outer = family.outer(dtype)
        self.values = {name: torch.empty(self._outer.shape(name), dtype=dtype) for name in family.anatomy.tail}

    def __call__(self, hidden: Tensor) -> Tensor:
        with ExitStack() as after_the_layers:

            def give(index: int, reached: Tensor, call: LayerCall) -> Tensor:
                if index != self._last:
                    return reached
                after_the_layers.enter_context(self._fake)
                for name, values in self.values.items():
                    self._outer.lend(name, nn.Parameter(values, requires_grad=False))
                return hidden.unsqueeze(1)

            with unset_fake_temporarily():
                ids = torch.zeros(hidden.shape[0], 1, dtype=torch.int64)
                logits: Tensor = self._outer(ids, give).logits
                after_the_layers.close()
            return logits.squeeze(1)


def _count(segment: Segment, index: int, held: Sequence[Tensor], setting: LayerSetting, width: int) -> LayerRun:
    packing = full_packing(setting)
    # The flop counter decomposes operations, so the bytes must be seen before it: it is entered first.
    with _GroupedProducts(), flop_counter() as flops, LiveBytes(held) as live:
        hidden = torch.empty((setting.rows * setting.length, width), dtype=setting.dtype, requires_grad=True)
        with saved_storages(held) as saved:
            output = segment.run(hidden, packing, index, index + 1)
        forward = flops.get_total_flops()
        output.backward(torch.empty_like(output))
    return LayerRun(sum(saved.values()), live.peak, forward, flops.get_total_flops() - forward)
