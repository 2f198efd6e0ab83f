"""A decoder layer without numbers: real modules and shapes over fake weights, adapters and residuals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.lora.importance_probe import PROBE_CHUNK_BYTES, probe_working_bytes
from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.factors import LowRank
from hsplit.models.packing import Packing
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import DenseWeight, FrozenWeight


@dataclass(frozen=True)
class Linear:
    """A linear of a layer: its path there, its shape, and whether it has a bias and an adapter."""

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
    """The properties on which a layer's cost depends: layers of one kind are counted once.

    Attributes:
        linears: in the layer's order.
        other_parameters: number of parameters outside of linears (norms).
        window: the attention's window, ``None`` where it is full.
        signature: of a model by its own forward, the layer's modules and what they are called with.
    """

    linears: tuple[Linear, ...]
    other_parameters: int
    window: int | None
    signature: str = ""

    @property
    def weight_parameters(self) -> int:
        """Number of the linears' weights."""
        return sum(linear.d_out * linear.d_in for linear in self.linears)

    @property
    def small_parameters(self) -> int:
        """Parameters that stay in the compute dtype on every base: norms and biases."""
        return self.other_parameters + sum(linear.d_out for linear in self.linears if linear.bias)


@dataclass(frozen=True)
class LayerSetting:
    """Conditions under which a layer is counted.

    Attributes:
        rows, length: the batch, ``(rows, length)`` tokens.
        dtype: compute dtype.
        ranks: adapter rank of every adapted linear.
        residual_rank: rank of the residual applied beside a quantized base, 0 for none; at most ``rank_cap``.
        codes: ``nf4`` or ``int8`` for a holder that dequantizes in every pass, ``None`` for a dense store.
        dropout: the adapters' dropout.
        probed: every adapted weight is scored in the backward, as an importance probe does.
        spectral: such a probe finds spectra.
    """

    rows: int
    length: int
    dtype: torch.dtype
    ranks: int = 1
    residual_rank: int = 0
    codes: str | None = None
    dropout: float = 0.0
    probed: bool = False
    spectral: bool = False


class RotaryTables(nn.Module):
    """A rotary embedding with fixed tables, which belong to the segment and do not count for a layer."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


def full_packing(setting: LayerSetting) -> Packing:
    """Make the packing that plans reserve memory for: all sequences of the greatest length, without padding."""
    return Packing.of((setting.length,) * setting.rows)


def rotary_tables_of(model: ModelSpec, setting: LayerSetting) -> tuple[Tensor, Tensor] | None:
    """Compute cosines and sines ``(1, n, d_head)`` that a segment's layers share, or ``None``."""
    if model.family.rotary is None:
        return None
    # On real tensors: some rotary embeddings read the positions' values, which fake tensors do not have.
    positions = full_packing(setting).positions.unsqueeze(0)
    hidden = torch.zeros(1, positions.shape[1], 1, dtype=setting.dtype)
    cos, sin = model.module(model.family.rotary)(hidden, position_ids=positions)
    return cos, sin


class _Codes(nn.Module):
    """Stands for a quantized weight: allocates the same bytes as dequantizing it (see ``models.weights``)."""

    def __init__(self, base: str, d_out: int, d_in: int) -> None:
        super().__init__()
        self._base, self.shape = base, (d_out, d_in)

    def dense(self, dtype: torch.dtype) -> Tensor:
        if self._base == "nf4":
            return torch.empty(self.shape, dtype=dtype)
        # Int8: codes widened to fp32, scaled in place, then narrowed.
        return torch.empty(self.shape, dtype=torch.float32).to(dtype)


def fill_layer(layer: nn.Module, kind: LayerKind, setting: LayerSetting) -> Iterator[Tensor]:
    """Give the meta ``layer`` fake weights, adapters and residuals.

    Yields:
        The tensors that are no parameter or buffer of it.
    """
    master = torch.promote_types(setting.dtype, torch.float32)
    for linear in kind.linears:
        d_out, d_in = linear.d_out, linear.d_in
        weight: Any = DenseWeight(torch.empty(d_out, d_in, dtype=setting.dtype))
        if setting.codes is not None:
            weight = _Codes(setting.codes, d_out, d_in)
        # Beside codes the bias is left out: it has no effect on the counts.
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
    fill_parameters(layer, setting.dtype)


def watch_linears(linears: Iterable[AdaptedLinear], kind: LayerKind, setting: LayerSetting) -> None:
    """Allocate in the backward as an importance probe does when the gradient of a linear's output arrives."""
    tokens = setting.rows * setting.length
    for module, linear in zip(linears, kind.linears, strict=True):
        if linear.adapted:
            size, directions = linear.d_out * linear.d_in, min(setting.residual_rank, linear.rank_cap)
            shape = linear.d_out, linear.d_in, tokens
            working = probe_working_bytes(*shape, directions, setting.dtype, setting.spectral)
            # Each chunk is summed in fp64, of a copy.
            working += 0 if setting.spectral else 8 * min(max(PROBE_CHUNK_BYTES // 4, linear.d_in), size)
            _watch(module, working, setting.dtype)


def _watch(module: AdaptedLinear, working_bytes: int, dtype: torch.dtype) -> None:
    def keep_input(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept = [inputs[0].detach()]

        def score(delta: Tensor) -> None:
            # The input is freed once it is scored, although the graph keeps its hooks.
            held = kept.pop(), delta, module.weight.dense(dtype), torch.empty(working_bytes, dtype=torch.uint8)
            del held

        output.register_hook(score)

    module.register_forward_hook(keep_input)


def fill_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter of the meta ``module`` a fake value, frozen."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
