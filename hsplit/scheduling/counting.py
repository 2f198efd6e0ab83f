"""What one decoder layer costs, counted on tensors without memory instead of guessed (METHOD 4).

The layer is built from the model's configuration alone, with the run's own :class:`AdaptedLinear` in place of every
linear, and called once forward and once backward on fake tensors: autograd, the shapes and the lifetimes are the real
ones, only the numbers are missing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hsplit.lora.adapted_linear import AdaptedLinear
from hsplit.lora.low_rank import LowRank
from hsplit.models.families import Family, family_of
from hsplit.models.segment import Segment, SegmentSpec, skeleton
from hsplit.models.weights import DenseWeight, FrozenWeight


@dataclass(frozen=True)
class Linear:
    """A linear of a layer: its path in the layer, shape ``(d_out, d_in)``, whether it has a bias and an adapter."""

    path: str
    d_out: int
    d_in: int
    bias: bool
    adapted: bool

    @property
    def rank_cap(self) -> int:
        """Largest residual rank that is still factors and not half a matrix (METHOD 6)."""
        return min(self.d_out, self.d_in) // 2


@dataclass(frozen=True)
class LayerKind:
    """All that the cost of a layer depends on: layers of one kind are counted once.

    Attributes:
        linears: in the layer's order.
        other_parameters: number of the parameters that are no linear's (norms).
        window: the attention's window, ``None`` where it is full.
    """

    linears: tuple[Linear, ...]
    other_parameters: int
    window: int | None

    @property
    def weight_parameters(self) -> int:
        return sum(linear.d_out * linear.d_in for linear in self.linears)

    @property
    def small_parameters(self) -> int:
        """Parameters that stay in the compute dtype on every base: norms and biases."""
        return self.other_parameters + sum(linear.d_out for linear in self.linears if linear.bias)


@dataclass(frozen=True)
class LayerSetting:
    """How a layer is run when it is counted.

    Attributes:
        rows, length: the batch, ``(rows, length)`` tokens.
        dtype: compute dtype.
        ranks: adapter rank of every adapted linear.
        residual_rank: rank of the residual applied beside a quantized base, 0 for none; at most ``rank_cap``.
        codes: ``nf4`` or ``int8`` for a holder that dequantizes in every pass, ``None`` for a dense store.
        dropout: the adapters' dropout.
    """

    rows: int
    length: int
    dtype: torch.dtype
    ranks: int = 1
    residual_rank: int = 0
    codes: str | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class LayerRun:
    """What one forward and one backward of a layer took.

    Attributes:
        saved_bytes: kept from the forward for the backward: the layer's input included, its output, parameters,
            adapters and rotary tables not.
        peak_bytes: most bytes alive at once over both passes, the same things left out, the output and its gradient
            included. Workspaces inside a kernel are not seen.
        forward_flops, backward_flops: multiplications and additions, each counted.
    """

    saved_bytes: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int


def layer_kinds(
    model: nn.Module, family: Family, config: Any, adapted: set[str], length: int
) -> list[LayerKind]:
    """The kind of every decoder layer.

    Args:
        model: the causal LM on the meta device (``segment.skeleton``).
        adapted: names of the weights that have an adapter.
        length: tokens a row; a window at least as long does not bite.
    """
    kinds = []
    for index, layer in enumerate(cast(nn.ModuleList, model.get_submodule(family.layers))):
        linears, inside = [], 0
        for path, module in _linears(layer):
            rows, columns = cast(Tensor, module.weight).shape
            d_out, d_in = (columns, rows) if family.transposed else (rows, columns)
            name = f"{family.layer_name(index)}.{path}"
            linears.append(Linear(path, d_out, d_in, module.bias is not None, name in adapted))
            inside += sum(p.numel() for p in module.parameters())
        window = family.window(layer, config)
        others = sum(p.numel() for p in layer.parameters()) - inside
        kinds.append(
            LayerKind(tuple(linears), others, window if window is not None and window < length else None)
        )
    return kinds


def _linears(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    return [(path, m) for path, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)]


class LayerCounter:
    """Counts the layers of one model, each kind of layer once a setting.

    Args:
        config: the transformers configuration; no weights are read.
        adapted: names of the weights that have an adapter.
        length: tokens a row.
    """

    def __init__(self, config: Any, adapted: set[str], length: int) -> None:
        self.model = skeleton(config)
        self._family = family_of(config.model_type)
        self._config = config
        self.kinds = layer_kinds(self.model, self._family, config, adapted, length)
        self._runs: dict[tuple[LayerKind, LayerSetting], LayerRun] = {}

    def run(self, index: int, setting: LayerSetting) -> LayerRun:
        """What layer ``index`` takes in ``setting``.

        The input is taken to require a gradient. A client's first layer's does not, so it saves and computes a
        little less than counted: the plan errs on the safe side there.
        """
        kind = self.kinds[index]
        if (kind, setting) not in self._runs:
            self._runs[kind, setting] = self._run(index, kind, setting)
        return self._runs[kind, setting]

    def parameters(self, path: str) -> int:
        """Number of parameters of the module at ``path``."""
        return sum(p.numel() for p in self.model.get_submodule(path).parameters())

    def rotary_bytes(self, setting: LayerSetting) -> int:
        """Bytes of the rotary tables that a segment's layers share."""
        tables = _rotary_tables(self.model, self._family, setting)
        return 0 if tables is None else tables[0].nbytes + tables[1].nbytes

    def _run(self, index: int, kind: LayerKind, setting: LayerSetting) -> LayerRun:
        layer = copy.deepcopy(self.model.get_submodule(self._family.layer_name(index)))
        tables = _rotary_tables(self.model, self._family, setting)
        with FakeTensorMode() as fake:
            segment = Segment(self._family, self._config, SegmentSpec(index, index + 1))
            segment.layers[str(index)] = layer
            held = list(_fill(layer, kind, setting))
            if tables is not None:
                segment.rotary = _Tables(fake.from_tensor(tables[0]), fake.from_tensor(tables[1]))
                held += [segment.rotary.cos, segment.rotary.sin]
            segment.eval()
            for linear in segment.linears.values():
                linear.train(setting.dropout > 0)
            held += [*segment.parameters(), *segment.buffers()]
            return _count(segment, index, held, setting, int(self._config.hidden_size))


def _count(
    segment: Segment, index: int, held: Sequence[Tensor], setting: LayerSetting, width: int
) -> LayerRun:
    # The flop counter takes operations apart, so the bytes must be seen before it: it is entered first.
    with _flop_counter() as flops, _LiveBytes(held) as live:
        shape = (setting.rows, setting.length, width)
        hidden = torch.empty(shape, dtype=setting.dtype, requires_grad=True)
        with saved_storages(held) as saved:
            output = segment.run(hidden, index, index + 1)
        forward = flops.get_total_flops()
        output.backward(torch.empty_like(output))
    return LayerRun(sum(saved.values()), live.peak, forward, flops.get_total_flops() - forward)


@contextmanager
def saved_storages(held: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every distinct storage that autograd saves inside, by storage.

    Args:
        held: tensors that are there anyway and do not count: weights, adapters, tables.
    """
    known = _storages(held)
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            # A freed storage's address may be given to the next one, which would then not count.
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def _flop_counter() -> FlopCounterMode:
    aten = torch.ops.aten
    # torch's own list lacks the CPU kernel of scaled dot product attention and the product in place.
    missing = {
        aten.addmm_: _addmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=missing)


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _sdpa_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, and the most bytes of them that were alive at once."""

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

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._held or key in self._alive:
            return

        def freed(_: Any) -> None:
            self._now -= nbytes
            self._alive.pop(key, None)

        self._now += nbytes
        self._alive[key] = weakref.ref(storage, freed)


class _Tables(nn.Module):
    """A rotary embedding whose tables are given; they are the segment's, not a layer's, so they do not count."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


def _rotary_tables(model: nn.Module, family: Family, setting: LayerSetting) -> tuple[Tensor, Tensor] | None:
    if family.rotary is None:
        return None
    # Run for real: some rotary embeddings look at the positions' values, which fake tensors do not have.
    positions = torch.arange(setting.length).unsqueeze(0)
    hidden = torch.zeros(1, setting.length, 1, dtype=setting.dtype)
    cos, sin = model.get_submodule(family.rotary)(hidden, position_ids=positions)
    return cos, sin


class _Codes(nn.Module):
    """Stands for a quantized weight: allocates what dequantizing it allocates (see ``models.weights``)."""

    def __init__(self, base: str, d_out: int, d_in: int) -> None:
        super().__init__()
        self._base, self.shape = base, (d_out, d_in)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self._base == "nf4":
            return torch.empty(self.shape, dtype=dtype)
        # Int8: codes widened to fp32, times the rows' scales, then narrowed.
        return (torch.empty(self.shape, dtype=torch.float32) * 1.0).to(dtype)


def _fill(layer: nn.Module, kind: LayerKind, setting: LayerSetting) -> Iterator[Tensor]:
    """Give the meta ``layer`` fake weights, adapters and residuals; yields those that are no parameter or buffer."""
    master = torch.promote_types(setting.dtype, torch.float32)
    for linear in kind.linears:
        d_out, d_in = linear.d_out, linear.d_in
        weight: Any = DenseWeight(torch.empty(d_out, d_in, dtype=setting.dtype))
        if setting.codes is not None:
            weight = _Codes(setting.codes, d_out, d_in)
        # Beside codes the bias is left out: it changes nothing that is counted.
        bias = torch.empty(d_out, dtype=setting.dtype) if linear.bias and setting.codes is None else None
        adapted = AdaptedLinear(linear.path, cast(FrozenWeight, weight), bias, None, setting.dtype)
        adapted.dropout = setting.dropout
        if linear.adapted:
            shapes = ((setting.ranks, d_in), (d_out, setting.ranks))
            A, B = (nn.Parameter(torch.empty(shape, dtype=master)) for shape in shapes)
            # As in AdapterSet, gradients exist before the backward and are added into.
            A.grad, B.grad = torch.empty_like(A), torch.empty_like(B)
            adapted.set_adapter(A, B, 1.0)
            yield from (A, B, A.grad, B.grad)
            if rank := min(setting.residual_rank, linear.rank_cap):
                down, up = (torch.empty(s, dtype=setting.dtype) for s in ((rank, d_in), (d_out, rank)))
                adapted.append_residual(0, LowRank(up, down))
                yield from (up, down)
        owner, _, attribute = linear.path.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, adapted)
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                values = torch.empty(parameter.shape, dtype=setting.dtype)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
