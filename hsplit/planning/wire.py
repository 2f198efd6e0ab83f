"""Formats of the tensors in messages: the bytes of each, and those that a plan may choose from."""

from __future__ import annotations

from hsplit.config.job import Wire
from hsplit.models.dtype import DTYPES

WIRES: tuple[Wire, ...] = ("fp64", "fp32", "bf16", "int8", "int4")
"""All formats, the widest first."""
BITS = {"int8": 8, "int4": 4}
"""Bits of an entry's code in the formats that have codes."""
BLOCK = 64
"""Entries of a row that share one scale, a power of 2 (see :mod:`hsplit.actors.wire_codes`).

Measured on SmolLM2-135M's activations in ``int4`` (``hsplit bench wire --only error``): 5 bits an entry and an error of
8.8 % with blocks of 16, 4.5 and 10.2 % with 32, 4.25 and 11.7 % with 64. A quarter of a bit is worth 16 % of the error,
and blocks of 32 instead of 64 save 12 %; blocks of 128 would be filled up in many models, of 576 entries in this one.
"""
PACKED_AT_ONCE = 1 << 15
"""Entries that are turned into codes at once: the fp32 copies that it takes stay small beside a message."""


def row_bytes(wire: str, width: int) -> int:
    """Bytes of one token, ``(width,)``, with its scales."""
    if wire in BITS:
        # Codes and a bf16 scale for each block; the last one is filled up.
        return -(-width // BLOCK) * (BLOCK * BITS[wire] // 8 + 2)
    return width * DTYPES[wire].itemsize


def packing_bytes(wire: str, entries: int) -> int:
    """Bytes to pack a tensor of so many entries beside the tensor and the message (measured by ``tests/actors``)."""
    copies = {"int8": 3.25, "int4": 3.5}.get(wire, 0.0)
    return round(4 * copies * min(entries, PACKED_AT_ONCE))


def wires_within(widest: Wire) -> tuple[Wire, ...]:
    """Formats that a client's messages may have where ``job.wire`` is ``widest``: that one, then the narrower ones."""
    return WIRES[WIRES.index(widest) :]
