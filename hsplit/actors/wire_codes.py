"""Tensors as codes of 8 or 4 bits with scales, for the wire.

``int8``: one code for each entry and one fp32 scale for each token (a row of the last dimension): ``code * scale`` with
``scale = max |row| / 127``, rounded to the nearest, so that no error exceeds half a scale. A row with an entry that is
not finite arrives as NaN throughout.

``int4`` is unbiased: the mean of what arrives, over seeds, is what was sent, to the rounding of fp32. Each block of 64
entries of a row (the last one filled up with zeros) is

1. multiplied by the orthonormal Hadamard matrix, which is its own inverse: it spreads the few large entries that hidden
   states have over their block (the error of SmolLM2's is 12 % instead of 28 %, ``hsplit bench wire --only error``);
2. divided by a bf16 scale that clips nothing: codes are -8 to 7 and the scale has a sign, so that the side with the
   larger entries gets the eighth level (an error of 11 % less than with codes from -7 to 7);
3. rounded at random to one of the two integers beside it, so that its mean is kept (both as in arXiv 1611.00429).

The random numbers are a function of the seed and the tensor's shape, on each kind of device. Entries of up to 1e37 are
represented. A block with one that is not finite arrives as NaN throughout.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsplit.planning.wire import INT4_BLOCK, PACKED_AT_ONCE, row_bytes

_LARGEST_INT8 = 127
# A magnitude that is increased by this part is not less than before once it is rounded to bf16.
_ROUNDING = 2.0**-8


def quantized(tensor: Tensor, wire: str, seed: int) -> Tensor:
    """Quantize a tensor ``(..., d)`` to scales and codes, uint8.

    Args:
        tensor: the values.
        wire: ``int8`` or ``int4``.
        seed: of the random numbers of ``int4``.
    """
    rows, width = _rows_of(tuple(tensor.shape))
    values = tensor.reshape(rows, width)
    data = torch.empty(rows * row_bytes(wire, width), dtype=torch.uint8, device=tensor.device)
    if wire == "int8":
        _to_int8(values, data)
    else:
        _to_int4(values, data, torch.Generator(tensor.device).manual_seed(seed))
    return data


def dequantized(data: Tensor, wire: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Restore a tensor of ``shape`` from the result of :func:`quantized`, in ``dtype``."""
    values = torch.empty(_rows_of(shape), dtype=dtype, device=data.device)
    if wire == "int8":
        _from_int8(data, values)
    else:
        _from_int4(data, values)
    return values.view(shape)


# -- int8 ---------------------------------------------------------------------------------------------------------


def _to_int8(values: Tensor, data: Tensor) -> None:
    scales, codes = _int8_views(data, *values.shape)
    for part in _parts(*values.shape):
        exact = values[part].float()
        # A NaN is the largest of its row, and so in the scale; an infinite scale makes NaN of every code.
        scales[part] = exact.abs().amax(dim=1) / _LARGEST_INT8
        # A row of zeros has no scale to divide by.
        scaled = exact / torch.where(scales[part] == 0, 1.0, scales[part])[:, None]
        codes[part] = scaled.nan_to_num_(nan=0.0).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)


def _from_int8(data: Tensor, values: Tensor) -> None:
    scales, codes = _int8_views(data, *values.shape)
    for part in _parts(*values.shape):
        values[part] = codes[part].float().mul_(scales[part, None])


def _int8_views(data: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of ``data``: fp32 scales ``(rows,)`` and int8 codes ``(rows, width)``."""
    return data[: 4 * rows].view(torch.float32), data[4 * rows :].view(torch.int8).view(rows, width)


# -- int4 ---------------------------------------------------------------------------------------------------------


def _to_int4(values: Tensor, data: Tensor, draw: torch.Generator) -> None:
    rows, width = values.shape
    scales, codes = _int4_views(data, rows, width)
    blocks, rotation = scales.shape[1], hadamard(INT4_BLOCK, values.device)
    for part in _parts(rows, blocks * INT4_BLOCK):
        filled = pad(values[part].float(), (0, blocks * INT4_BLOCK - width))
        rotated = filled.view(-1, blocks, INT4_BLOCK) @ rotation
        scales[part] = signed_scales(rotated)
        rotated /= scales[part].float()[..., None]
        rotated += torch.rand(rotated.shape, generator=draw, device=values.device)
        # A scale that is not finite makes NaN of every code.
        code = rotated.nan_to_num_(nan=0.0).floor_().clamp_(-8, 7).add_(8).to(torch.uint8)
        codes[part] = code[..., 0::2] | code[..., 1::2] << 4


def signed_scales(rotated: Tensor) -> Tensor:
    """Scales that divide blocks ``(..., b)`` to entries from -8 to 7: ``(...)``, in bf16."""
    above, below = rotated.amax(dim=-1), -rotated.amin(dim=-1)
    upright, turned = torch.maximum(above / 7, below / 8), torch.maximum(above / 8, below / 7)
    # The smallest one is a normal number, which a block of zeros can be divided by.
    least = torch.minimum(upright, turned).mul_(1 + _ROUNDING).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.where(upright <= turned, least, -least).to(torch.bfloat16)


def _from_int4(data: Tensor, values: Tensor) -> None:
    rows, width = values.shape
    scales, codes = _int4_views(data, rows, width)
    blocks, rotation = scales.shape[1], hadamard(INT4_BLOCK, values.device)
    for part in _parts(rows, blocks * INT4_BLOCK):
        code = torch.stack((codes[part] & 15, codes[part] >> 4), dim=-1).flatten(-2)
        rotated = code.float().sub_(8).mul_(scales[part].float()[..., None])
        values[part] = (rotated @ rotation).flatten(1)[:, :width]


def _int4_views(data: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of ``data``: bf16 scales ``(rows, blocks)`` and uint8 pairs of codes ``(rows, blocks, 32)``."""
    blocks = -(-width // INT4_BLOCK)
    scales = data[: 2 * rows * blocks].view(torch.bfloat16).view(rows, blocks)
    return scales, data[2 * rows * blocks :].view(rows, blocks, INT4_BLOCK // 2)


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Orthonormal Hadamard matrix ``(size, size)``, fp32, for a power of 2."""
    places = range(size)
    signs = [[(-1.0) ** (row & column).bit_count() for column in places] for row in places]
    return torch.tensor(signs, dtype=torch.float32, device=device) / math.sqrt(size)


# -- rows ---------------------------------------------------------------------------------------------------------


def _rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of rows and their width; an empty tensor has no rows, a scalar one entry."""
    size = math.prod(shape)
    return (size // shape[-1], shape[-1]) if size and shape else (size, 1)


def _parts(rows: int, width: int) -> list[slice]:
    at_once = max(1, PACKED_AT_ONCE // width)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
