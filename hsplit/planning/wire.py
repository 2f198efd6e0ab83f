"""Formats of the tensors in messages: the bytes of each, and those that a plan may choose from."""

from __future__ import annotations

from hsplit.config.job import Wire
from hsplit.models.dtype import DTYPES

WIRES: tuple[Wire, ...] = ("fp64", "fp32", "bf16", "int8", "int4")
"""All formats, the widest first."""
INT4_BLOCK = 64
"""Entries of a row that share one scale in ``int4``: a power of 2, see :mod:`hsplit.actors.wire_codes`.

Measured on SmolLM2-135M (``hsplit bench wire --only error``), bytes of 576 entries and relative error: 360 and 8.9 %
with blocks of 16, 324 and 10.3 % with 32, 306 and 11.8 % with 64. A quarter of a bit an entry, which is what halving a
block of 64 costs, would lower the error by more if codes were wider by it.
"""


def row_bytes(wire: str, width: int) -> int:
    """Bytes of one token, ``(width,)``, with its scales."""
    if wire == "int8":
        # One fp32 scale.
        return width + 4
    if wire == "int4":
        # Two codes a byte and a bf16 scale for each block; the last one is filled up.
        return -(-width // INT4_BLOCK) * (INT4_BLOCK // 2 + 2)
    return width * DTYPES[wire].itemsize


def wires_within(widest: Wire) -> tuple[Wire, ...]:
    """Formats that a client's messages may have where ``job.wire`` is ``widest``: that one, then the narrower ones."""
    return WIRES[WIRES.index(widest) :]
