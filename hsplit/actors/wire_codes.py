"""Tensors as codes of 8 or 4 bits with scales, for the wire.

Both formats are unbiased: the mean of what arrives, over seeds, is what was sent, to the rounding of fp32. Each block
of 64 entries of a row (the last one filled up with zeros) is

1. multiplied by the orthonormal Hadamard matrix, which is its own inverse: it spreads the few large entries that hidden
   states have over their block (the error of SmolLM2's in ``int4`` is 12 % instead of 28 %, ``hsplit bench wire --only
   error``);
2. divided by a bf16 scale that clips nothing: codes of 4 bits are -8 to 7 and the scale has a sign, so that the side
   with the larger entries gets the eighth level (an error of 11 % less than with codes from -7 to 7);
3. rounded at random to one of the two integers beside it, so that its mean is kept (both as in arXiv 1611.00429).

Rounding to the nearest with one scale for a token, in 8 bits, errs by 2.7 % of an activation's norm,
four times as much.

The random numbers are a function of the seed and the tensor's shape, on each kind of device. Entries of up to 1e37 are
represented. A block with one that is not finite arrives as NaN throughout.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from hsplit.planning.wire import BITS, BLOCK, PACKED_AT_ONCE, row_bytes

# A magnitude that is increased by this part is not less than before once it is rounded to bf16.
_ROUNDING = 2.0**-8


def quantized(tensor: Tensor, wire: str, seed: int) -> Tensor:
    """Quantize a tensor ``(..., d)`` to scales and codes, uint8.

    Args:
        tensor: the values.
        wire: ``int8`` or ``int4``.
        seed: of the random numbers.
    """
    rows, width = _rows_of(tuple(tensor.shape))
    values, most = tensor.reshape(rows, width), 2 ** (BITS[wire] - 1)
    data = torch.empty(rows * row_bytes(wire, width), dtype=torch.uint8, device=tensor.device)
    draw = torch.Generator(tensor.device).manual_seed(seed)
    scales, codes = _views(data, wire, rows, width)
    blocks, rotation = scales.shape[1], hadamard(BLOCK, values.device)
    for part in _parts(rows, blocks * BLOCK):
        filled = pad(values[part].float(), (0, blocks * BLOCK - width))
        rotated = filled.view(-1, blocks, BLOCK) @ rotation
        scales[part] = signed_scales(rotated, most)
        rotated /= scales[part].float()[..., None]
        rotated += torch.rand(rotated.shape, generator=draw, device=values.device)
        # A scale that is not finite makes NaN of every code.
        code = rotated.nan_to_num_(nan=0.0).floor_().clamp_(-most, most - 1).add_(most).to(torch.uint8)
        codes[part] = code if wire == "int8" else code[..., 0::2] | code[..., 1::2] << 4
    return data


def dequantized(data: Tensor, wire: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Restore a tensor of ``shape`` from the result of :func:`quantized`, in ``dtype``."""
    rows, width = _rows_of(shape)
    values = torch.empty((rows, width), dtype=dtype, device=data.device)
    scales, codes = _views(data, wire, rows, width)
    blocks, rotation = scales.shape[1], hadamard(BLOCK, values.device)
    for part in _parts(rows, blocks * BLOCK):
        code = codes[part]
        if wire == "int4":
            code = torch.stack((code & 15, code >> 4), dim=-1).flatten(-2)
        rotated = code.float().sub_(2 ** (BITS[wire] - 1)).mul_(scales[part].float()[..., None])
        values[part] = (rotated @ rotation).flatten(1)[:, :width]
    return values.view(shape)


def signed_scales(rotated: Tensor, most: int = 8) -> Tensor:
    """Scales that divide blocks ``(..., b)`` to entries from ``-most`` to ``most - 1``: ``(...)``, in bf16."""
    above, below = rotated.amax(dim=-1), -rotated.amin(dim=-1)
    upright = torch.maximum(above / (most - 1), below / most)
    turned = torch.maximum(above / most, below / (most - 1))
    # The smallest one is a normal number, which a block of zeros can be divided by.
    least = torch.minimum(upright, turned).mul_(1 + _ROUNDING).clamp_(min=torch.finfo(torch.float32).tiny)
    return torch.where(upright <= turned, least, -least).to(torch.bfloat16)


def _views(data: Tensor, wire: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Views of ``data``: bf16 scales ``(rows, blocks)`` and uint8 codes, those of 4 bits in pairs."""
    blocks = -(-width // BLOCK)
    scales = data[: 2 * rows * blocks].view(torch.bfloat16).view(rows, blocks)
    return scales, data[2 * rows * blocks :].view(rows, blocks, BLOCK * BITS[wire] // 8)


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
