"""Frozen weights: the values ``W_0`` of a run's base, stored dense or quantized, and kept codes.

``job.base`` determines the *values* of ``W_0`` for every holder (METHOD 1); a holder may store them quantized or
dequantized. Quantization is that of bitsandbytes: NF4 in blocks of 64 with fp32 scales, int8 by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.kept import KeptTensors, header, tensor_bytes

NF4_BLOCK = 64
# Entries quantized at once: on a CPU bitsandbytes takes up to 16 bytes an entry in passing.
QUANTIZED_AT_ONCE = 1 << 20

# Format of kept codes and way of quantizing: with a new number all are quantized again.
FORMAT_VERSION = 1
# A file saves next to nothing for smaller weights.
SMALLEST_ENTRIES = 1 << 15


@cache
def _versions() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("bitsandbytes", "torch"))


def kept_codes(base: str, values: Tensor) -> KeptTensors:
    """Codes of one weight in the user's cache directory: quantizing to NF4 takes ten times as long as reading them.

    They are found by the values that they were quantized from, not by a model's name or place: however a model
    directory changes, no weight gets another's codes (METHOD 1, one base model).

    Args:
        base: type of the codes.
        values: the unquantized weight, ``(d_out, d_in)`` in any dtype, on the CPU.
    """
    key = hashlib.sha256(f"{FORMAT_VERSION} {base} {_versions()} {header(values)}\n".encode())
    key.update(tensor_bytes(values))
    return KeptTensors("codes", base, key.digest())


def _bitsandbytes() -> Any:
    # Planning counts weights without it, and it takes seconds to import.
    from hsplit.models.quiet_bitsandbytes import functional

    return functional


class DenseWeight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` in the compute dtype."""

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

    def rows(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """Rows ``chosen`` of :meth:`dense`, without forming the others."""
        return self.values[chosen].to(dtype)


class NF4Weight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` as bitsandbytes NF4 codes: 4 bits an entry, an fp32 scale a block.

    Args:
        values: the weight, unquantized.
        once: take the codes from the user's cache directory if these values have been quantized before, and put them
            there if not. (Int8 has no such cache: quantizing takes no longer than reading.)
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
        # Slices of whole blocks have the same codes as in the whole weight.
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
        kept = kept_codes("nf4", values)
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

    def rows(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """Rows ``chosen`` of :meth:`dense`, without forming the others where rows are whole blocks."""
        d_out, d_in = self.shape
        if d_in % NF4_BLOCK:
            return self.dense(dtype)[chosen]
        codes = self.codes.view(d_out, d_in // 2)[chosen].contiguous()
        part = NF4Weight.__new__(NF4Weight)
        nn.Module.__init__(part)
        part.shape = (len(codes), d_in)
        part.codes, part.code_book = codes.view(-1, 1), self.code_book
        part.scales = self.scales.view(d_out, d_in // NF4_BLOCK)[chosen].reshape(-1)
        return part.dense(dtype)


class Int8Weight(nn.Module):
    """A weight of shape ``(d_out, d_in)`` as bitsandbytes int8 codes with one fp32 scale a row."""

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
        return self.rows(slice(None), dtype)

    def rows(self, chosen: slice, dtype: torch.dtype) -> Tensor:
        """Rows ``chosen`` of :meth:`dense`, without forming the others."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.codes[chosen].to(exact).mul_((self.scales[chosen].to(exact) / 127.0).unsqueeze(1))
        return values.to(torch.float32).to(dtype)


ReadWeight = Callable[..., Tensor]
"""Reads a weight of the checkpoint, ``(d_out, d_in)``, in a given dtype or by default in its own."""

FrozenWeight = DenseWeight | NF4Weight | Int8Weight

_QUANTIZED: dict[str, type[NF4Weight] | type[Int8Weight]] = {"nf4": NF4Weight, "int8": Int8Weight}


def is_quantized(base: str) -> bool:
    """True if the residual is applied beside ``base`` and never merged into it (METHOD 6, the exactness rule)."""
    return base in _QUANTIZED


def base_values(values: Tensor, base: str, dtype: torch.dtype) -> Tensor:
    """Form ``W_0`` of ``base`` from the checkpoint's ``values``, ``(d_out, d_in)``, in ``dtype``."""
    if base in _QUANTIZED:
        return _QUANTIZED[base](values).dense(dtype)
    if base == "bf16":
        return values.to(torch.bfloat16).to(dtype)
    return values.to(dtype)


def read_dense(read: ReadWeight, base: str, dtype: torch.dtype) -> Tensor:
    """Read ``W_0`` of a base that is not quantized, ``(d_out, d_in)`` in ``dtype``, as a new tensor."""
    return read(torch.bfloat16).to(dtype) if base == "bf16" else read(dtype)


def freeze(read: ReadWeight, base: str, dtype: torch.dtype, *, quantized: bool) -> FrozenWeight:
    """Store ``W_0`` of a linear.

    Args:
        read: reads the checkpoint's weight.
        base: ``fp32``, ``bf16``, ``int8`` or ``nf4``; determines the values.
        dtype: compute dtype, that of a dense weight.
        quantized: keep an ``int8`` or ``nf4`` base as codes (less memory, a dequantization in each pass) instead of
            dequantized; the values are the same.
    """
    if not is_quantized(base):
        return DenseWeight(read_dense(read, base, dtype))
    # Int8 is quantized from fp16, whatever the checkpoint's dtype is.
    codes = Int8Weight(read(torch.float16)) if base == "int8" else NF4Weight(read(), once=True)
    return codes if quantized else DenseWeight(codes.dense(dtype))


def stored_again(
    weight: FrozenWeight, read: ReadWeight, base: str, dtype: torch.dtype, *, quantized: bool
) -> FrozenWeight:
    """Return ``weight``, or the same values in the other form where it is not stored as ``quantized`` says.

    Args:
        weight: as :func:`freeze` made it.
        read, base, dtype, quantized: as for :func:`freeze`; codes are read again, dense values follow from codes.
    """
    dense = isinstance(weight, DenseWeight)
    if not is_quantized(base) or dense != quantized:
        return weight
    return freeze(read, base, dtype, quantized=True) if dense else DenseWeight(weight.dense(dtype))


class _DequantizedLinear(torch.autograd.Function):
    """``x W^T`` that dequantizes ``W`` in the forward and again in the backward, without keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, weight.dense(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.weight.dense(grad.dtype), None, None


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None) -> Tensor:
    """Compute ``x W^T + bias`` for ``x`` of shape ``(n, d_in)``; differentiable in ``x`` only."""
    if isinstance(weight, DenseWeight):
        return torch.nn.functional.linear(x, weight.values, bias)
    return cast(Tensor, _DequantizedLinear.apply(x, weight, bias))
