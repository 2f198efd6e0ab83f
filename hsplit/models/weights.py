"""Frozen weights: the values ``W_0`` of a run's base, and the ways in which a holder may store them.

``job.base`` fixes the *values* of ``W_0`` for every holder (METHOD 1); a holder is free to store them quantized or
dequantized. Quantization is bitsandbytes': NF4 in blocks of 64 with fp32 scales, int8 by row.

bitsandbytes is imported here, without its messages on CPUs about an optional kernel for inference, and without a
compiler: it hands two functions to ``torch.compile``, which would import torch's compiler, a second of a core. Only NF4
weights with an odd number of columns use them; here they always run uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.models.kept_codes import SMALLEST_ENTRIES, KeptCodes
from hsplit.streams import quieten_bitsandbytes


def _as_it_is(function: Any = None, **settings: Any) -> Any:
    return (lambda given: given) if function is None else function


quieten_bitsandbytes()
_compile = torch.compile
torch.compile = _as_it_is  # type: ignore[assignment]  # a stand-in for its every signature
try:
    from bitsandbytes import functional
finally:
    torch.compile = _compile

__all__ = ["functional"]


NF4_BLOCK = 64
# Entries quantized at once: on a CPU bitsandbytes takes up to 16 bytes an entry in passing.
QUANTIZED_AT_ONCE = 1 << 20


def _bitsandbytes() -> Any:

    return functional


class DenseWeight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` kept in the compute dtype."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values: Tensor
        self.register_buffer("values", values.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return cast("tuple[int, int]", tuple(self.values.shape))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, shape ``(d_out, d_in)``, in ``dtype``."""
        return self.values.to(dtype)


class NF4Weight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` kept as bitsandbytes NF4 codes: 4 bits an entry, fp32 scale a block.

    Args:
        values: of the weight.
        once: take the codes from the user's cache directory if these values have been quantized before, and leave them
            there if not. (Not so for int8: quantizing to it takes no longer than reading.)
    """

    def __init__(self, values: Tensor, *, once: bool = False) -> None:
        super().__init__()
        self.shape = cast("tuple[int, int]", tuple(values.shape))
        self.codes: Tensor
        self.scales: Tensor
        self.code_book: Tensor
        for name, tensor in (self._quantized_once(values) if once else self._quantized(values)).items():
            self.register_buffer(name, tensor)

    @staticmethod
    def _quantized(values: Tensor) -> dict[str, Tensor]:
        bnb = _bitsandbytes()
        size, flat = values.numel(), values.reshape(-1)
        codes = torch.empty((-(-size // 2), 1), dtype=torch.uint8, device=values.device)
        scales = torch.empty(-(-size // NF4_BLOCK), device=values.device)
        # Slices of whole blocks have the codes that they have in the whole.
        for start in range(0, size, QUANTIZED_AT_ONCE):
            part = flat[start : start + QUANTIZED_AT_ONCE].float()
            part_codes, state = bnb.quantize_4bit(part, blocksize=NF4_BLOCK, quant_type="nf4")
            codes[start // 2 : start // 2 + len(part_codes)] = part_codes
            scales[start // NF4_BLOCK : start // NF4_BLOCK + len(state.absmax)] = state.absmax
        return {"codes": codes, "scales": scales, "code_book": state.code}

    @classmethod
    def _quantized_once(cls, values: Tensor) -> dict[str, Tensor]:
        if values.numel() < SMALLEST_ENTRIES:
            return cls._quantized(values)
        kept = KeptCodes("nf4", values)
        tensors = kept.get()
        if tensors is None:
            tensors = cls._quantized(values)
            kept.put(tensors)
        return tensors

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that the codes stand for, shape ``(d_out, d_in)``, in ``dtype``."""
        bnb = _bitsandbytes()
        # bitsandbytes has no fp64 kernel; its fp32 product is the definition of the value, so it is widened after.
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        state = bnb.QuantState(
            absmax=self.scales,
            shape=torch.Size(self.shape),
            code=self.code_book,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=kernel_dtype,
        )
        return cast(Tensor, bnb.dequantize_4bit(self.codes, state)).to(dtype)


class Int8Weight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` kept as bitsandbytes int8 codes with one fp32 scale a row."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        bnb = _bitsandbytes()
        rows, columns = values.shape
        codes = torch.empty((rows, columns), dtype=torch.int8, device=values.device)
        scales = torch.empty(rows, device=values.device)
        at_once = max(1, QUANTIZED_AT_ONCE // columns)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            codes[part], scales[part], _ = bnb.int8_vectorwise_quant(values[part].to(torch.float16))
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return cast("tuple[int, int]", tuple(self.codes.shape))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that the codes stand for, shape ``(d_out, d_in)``, in ``dtype``."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.codes.to(exact).mul_((self.scales.to(exact) / 127.0).unsqueeze(1))
        return values.to(torch.float32).to(dtype)


ReadWeight = Callable[..., Tensor]
"""Reads a weight from the checkpoint, ``(d_out, d_in)``: in the dtype that it is called with, or in its own."""

FrozenWeight = DenseWeight | NF4Weight | Int8Weight

_QUANTIZED: dict[str, type[NF4Weight] | type[Int8Weight]] = {"nf4": NF4Weight, "int8": Int8Weight}


def is_quantized(base: str) -> bool:
    """Whether ``base`` is one whose residual is applied beside it and never merged (METHOD 6, the exactness rule)."""
    return base in _QUANTIZED


def base_values(values: Tensor, base: str, dtype: torch.dtype) -> Tensor:
    """``W_0`` as ``base`` defines it: from the checkpoint's ``values``, shape ``(d_out, d_in)``, in ``dtype``."""
    if base in _QUANTIZED:
        return _QUANTIZED[base](values).dense(dtype)
    if base == "bf16":
        return values.to(torch.bfloat16).to(dtype)
    return values.to(dtype)


def read_dense(read: ReadWeight, base: str, dtype: torch.dtype) -> Tensor:
    """``W_0`` of a base that is not quantized, ``(d_out, d_in)`` in ``dtype``, a tensor of its own."""
    return read(torch.bfloat16).to(dtype) if base == "bf16" else read(dtype)


def freeze(read: ReadWeight, base: str, dtype: torch.dtype, *, quantized: bool) -> FrozenWeight:
    """Store ``W_0`` of a linear.

    Args:
        read: gives the checkpoint's weight, ``(d_out, d_in)``, in a dtype or by default in its own.
        base: ``fp32``, ``bf16``, ``int8`` or ``nf4``; decides the values.
        dtype: compute dtype, in which a dense store is kept.
        quantized: keep an ``int8`` or ``nf4`` base as its codes (less memory, a dequantization a pass) instead of
            as the dequantized values; the values are the same either way.
    """
    if not is_quantized(base):
        return DenseWeight(read_dense(read, base, dtype))
    # Int8 is quantized from fp16, whatever the checkpoint has.
    codes = Int8Weight(read(torch.float16)) if base == "int8" else NF4Weight(read(), once=True)
    return codes if quantized else DenseWeight(codes.dense(dtype))


class _DequantizedLinear(torch.autograd.Function):
    """``x W^T`` that dequantizes ``W`` in the forward and again in the backward, and saves neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.weight.dense(grad.dtype), None, None


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
    """``x W^T + bias`` for ``x`` of shape ``(n, d_in)``; differentiable in ``x`` only."""
    if isinstance(weight, DenseWeight):
        return torch.nn.functional.linear(x, weight.values, bias)
    return cast(Tensor, _DequantizedLinear.apply(x, weight, bias))
