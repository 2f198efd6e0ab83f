"""Packed rows: sequences of unequal lengths laid end to end, so that nothing but attention ever sees padding.

Every linear, norm and message works on the real tokens alone, ``(n, d)``. Only attention needs sequences apart: there
queries, keys and values are padded to the longest, run as one causal batch, and packed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hsplit.errors import InputError
from hsplit.models.short_attention import LONGEST, short_attention

# The name under which transformers' layers find the attention below.
ATTENTION = "hsplit_packed"


@dataclass(frozen=True)
class Packing:
    """How ``n`` packed tokens make ``b`` sequences.

    Attributes:
        lengths: tokens of each sequence; they sum to ``n``.
        positions: ``(n,)`` int64, each token's position in its sequence.
        padded: ``(b * T,)`` int64, for each place of the padded batch the packed token that stands there; padding
            repeats a token whose value no real position reads. ``None`` when all sequences are of one length.
        packed: ``(n,)`` int64, for each packed token its place in the padded batch; ``None`` likewise.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    padded: Tensor | None
    packed: Tensor | None

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """The packing of sequences of these lengths, in order."""
        longest = max(lengths)
        columns = torch.arange(longest)
        if min(lengths) == longest:
            return Packing(tuple(lengths), columns.repeat(len(lengths)).to(device), None, None)
        sizes = torch.tensor(lengths)
        real = columns[None, :] < sizes[:, None]
        positions = columns.expand(len(lengths), longest)[real].to(device)
        starts = sizes.cumsum(0) - sizes
        # Padding stands on the right and attention is causal, so any token will do there: its sequence's last.
        padded = starts[:, None] + torch.minimum(columns[None, :], sizes[:, None] - 1)
        packed = real.flatten().nonzero().squeeze(1)
        return Packing(tuple(lengths), positions, padded.flatten().to(device), packed.to(device))

    def to(self, device: torch.device) -> Packing:
        """The same packing for tensors on ``device``."""
        padded = None if self.padded is None else self.padded.to(device)
        packed = None if self.packed is None else self.packed.to(device)
        return Packing(self.lengths, self.positions.to(device), padded, packed)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def pad(self, tensor: Tensor) -> Tensor:
        """``(1, heads, n, d)`` to ``(b, heads, T, d)``."""
        heads = tensor[0]
        if self.padded is not None:
            heads = heads.index_select(1, self.padded)
        return heads.unflatten(1, (len(self.lengths), self.longest)).transpose(0, 1)

    def pack(self, tensor: Tensor) -> Tensor:
        """``(b, T, heads, d)`` to ``(1, n, heads, d)``."""
        rows = tensor.flatten(0, 1)
        if self.packed is not None:
            rows = rows.index_select(0, self.packed)
        return rows.unsqueeze(0)


def pack_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The real entries ``(n, ...)`` of right-padded rows ``(b, T, ...)``."""
    real = torch.arange(rows.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return rows[real]


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' layers over packed tokens ``(1, heads, n, d_head)``: torch's SDPA, or on a CPU plain
    products where sequences are short.

    A window is in the mask.

    Raises:
        InputError: the layer asks for something else, such as a soft cap of the scores or attention sinks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short: bool = others.pop("short_attention")
    # Switches that are off ask for nothing.
    asked = [name for name, value in others.items() if value is not None and value is not False]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        asked.append("sight of later tokens")
    if asked:
        raise InputError(
            f"job.model: {type(module).__name__} asks its attention for {', '.join(asked)}, which is not served"
        )
    queries, keys, values = (packing.pad(tensor) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if short and query.device.type == "cpu" and packing.longest <= LONGEST:
        return packing.pack(short_attention(queries, keys, values, attention_mask, scale).transpose(1, 2)), None
    output, _ = sdpa_attention_forward(module, queries, keys, values, attention_mask, dropout, scale)
    return packing.pack(output), None


def register_attention() -> None:
    """Make the attention above known to transformers; needed once a process, harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)
