"""Packed rows: sequences of unequal lengths laid end to end, so that nothing but attention ever sees padding.

Every linear, norm and message works on the real tokens alone, ``(n, d)``. Only attention must separate the sequences:
there queries, keys and values are padded to the longest, run as one causal batch, and packed again. Short sequences use
plain matrix products, which in bf16 on CPUs are faster than torch's fused kernel: at 540 tokens in 8 sequences
(SmolLM2-135M, bf16, two cores) they take 13 ms a layer, forward and backward.

Rotary tables may depend on the length of the text (``dynamic``, ``longrope``), and each text gets its own: transformers
takes the longest text of a batch, so that a result would depend on the other clients in that batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.errors import InputError

# Beyond this length the scores are larger than the activations.
LONGEST = 256


class _ShortAttention(torch.autograd.Function):
    """``softmax(q k^T scale) v`` for heads that share keys in groups; the backward recomputes the scores.

    Everything is computed in fp32 (fp64 for fp64 input), as inside the fused kernel.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, allowed)
        ctx.scale = scale
        q, k, v = _exact(query, key, value)
        output = _weights(q, k, allowed, scale) @ v
        return output.view(query.shape).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, allowed = ctx.saved_tensors
        q, k, v = _exact(query, key, value)
        grad = grads[0].to(q.dtype).reshape(q.shape)
        weights = _weights(q, k, allowed, ctx.scale)
        grad_v = weights.transpose(-1, -2) @ grad
        slope = grad @ v.transpose(-1, -2)
        # The softmax's derivative: weights * (slope - sum of weights * slope).
        slope = slope.sub_((slope * weights).sum(dim=-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        grad_q, grad_k = slope @ k, slope.transpose(-1, -2) @ q
        return (
            grad_q.view(query.shape).to(query.dtype),
            grad_k.to(key.dtype),
            grad_v.to(value.dtype),
            None,
            None,
        )


def _exact(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in fp32 or fp64; the queries of heads that share a key as rows of one matrix, ``(b, kv, g T, d)``."""
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, width = query.shape
    grouped = query.to(exact).reshape(batch, key.shape[1], heads // key.shape[1] * length, width)
    return grouped, key.to(exact), value.to(exact)


def _weights(q: Tensor, k: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Attention weights of each query, ``(b, kv, g T, T)``."""
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    length = k.shape[-2]
    if allowed is None:
        allowed = torch.ones(length, length, dtype=torch.bool, device=k.device).tril()
    scores.unflatten(2, (-1, length)).masked_fill_(~allowed, -torch.inf)
    return scores.softmax(dim=-1)


def short_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """Compute causal attention.

    Args:
        query: ``(b, heads, T, d)``.
        key, value: ``(b, kv, T, d)``; ``heads`` is a multiple of ``kv``, and head ``h`` has key ``h // (heads / kv)``.
        allowed: ``(1, 1, T, T)``, true where a query attends to a key; ``None`` for plain causal attention.
        scale: of the scores.

    Returns:
        ``(b, heads, T, d)``.
    """
    mask = None if allowed is None else allowed.flatten(0, 2)
    return cast(Tensor, _ShortAttention.apply(query, key, value, mask, scale))


# The name under which transformers' layers find the attention below.
ATTENTION = "hsplit_packed"


@dataclass(frozen=True)
class Packing:
    """The arrangement of ``n`` packed tokens in ``b`` sequences.

    Attributes:
        lengths: tokens of each sequence; they sum to ``n``.
        positions: ``(n,)`` int64, each token's position in its sequence.
        padded: ``(b * T,)`` int64, the packed token at each place of the padded batch; padding repeats a token whose
            value no real position reads. ``None`` when all sequences have the same length.
        packed: ``(n,)`` int64, the place of each packed token in the padded batch; ``None`` likewise.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    padded: Tensor | None
    packed: Tensor | None

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Make the packing of sequences of these lengths, in order."""
        longest = max(lengths)
        columns = torch.arange(longest)
        if min(lengths) == longest:
            return Packing(tuple(lengths), columns.repeat(len(lengths)).to(device), None, None)
        sizes = torch.tensor(lengths)
        real = columns[None, :] < sizes[:, None]
        positions = columns.expand(len(lengths), longest)[real].to(device)
        starts = sizes.cumsum(0) - sizes
        # Padding is on the right and attention is causal, so any token will do: the last one of the sequence.
        padded = starts[:, None] + torch.minimum(columns[None, :], sizes[:, None] - 1)
        packed = real.flatten().nonzero().squeeze(1)
        return Packing(tuple(lengths), positions, padded.flatten().to(device), packed.to(device))

    def to(self, device: torch.device) -> Packing:
        """Copy the packing to ``device``."""
        padded = None if self.padded is None else self.padded.to(device)
        packed = None if self.packed is None else self.packed.to(device)
        return Packing(self.lengths, self.positions.to(device), padded, packed)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def pad(self, tensor: Tensor) -> Tensor:
        """Pad ``(1, heads, n, d)`` to ``(b, heads, T, d)``."""
        heads = tensor[0]
        if self.padded is not None:
            heads = heads.index_select(1, self.padded)
        return heads.unflatten(1, (len(self.lengths), self.longest)).transpose(0, 1)

    def pack(self, tensor: Tensor) -> Tensor:
        """Pack ``(b, T, heads, d)`` to ``(1, n, heads, d)``."""
        rows = tensor.flatten(0, 1)
        if self.packed is not None:
            rows = rows.index_select(0, self.packed)
        return rows.unsqueeze(0)


def pack_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Select the real entries ``(n, ...)`` of right-padded rows ``(b, T, ...)``."""
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
    """Attention of transformers' layers over packed tokens ``(1, heads, n, d_head)``.

    It is torch's SDPA, or on a CPU plain products where sequences are short. A window is in the mask.

    Raises:
        InputError: the layer asks for more, such as a soft cap of the scores or attention sinks.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short: bool = others.pop("short_attention")
    # Switches that are off change nothing.
    unsupported = [name for name, value in others.items() if value is not None and value is not False]
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unsupported.append("sight of later tokens")
    if unsupported:
        raise InputError(
            f"job.model: {type(module).__name__} asks its attention for {', '.join(unsupported)}, which is not served"
        )
    queries, keys, values = (packing.pad(tensor) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if short and query.device.type == "cpu" and packing.longest <= LONGEST:
        return packing.pack(short_attention(queries, keys, values, attention_mask, scale).transpose(1, 2)), None
    output, _ = sdpa_attention_forward(module, queries, keys, values, attention_mask, dropout, scale)
    return packing.pack(output), None


def register_attention() -> None:
    """Register the attention above with transformers; needed once a process, harmless when repeated."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _packed_attention)


_BY_LENGTH = frozenset({"dynamic", "longrope"})


def depends_on_length(config: Any) -> bool:
    """True if a text's rotary frequencies depend on its length, or on that of the longest text in its batch."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some models have one for each kind of layer.
    kinds = [parameters, *(own for own in parameters.values() if isinstance(own, dict))]
    return any(own.get("rope_type") in _BY_LENGTH for own in kinds)


def _forget_longer(rotary: nn.Module) -> None:
    """Undo the changes that longer texts have made."""
    state: Any = rotary
    state.max_seq_len_cached = state.original_max_seq_len
    # A copy: longrope writes into it.
    state.inv_freq = state.original_inv_freq.clone()


def rotary_tables(rotary: nn.Module, hidden: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines ``(1, n, d_head)`` of packed tokens.

    Args:
        rotary: transformers' rotary embedding.
        hidden: ``(1, n, d)``; gives type and device.
        packing: the texts.
    """
    config = getattr(rotary, "config", None)
    if not depends_on_length(config):
        cos, sin = rotary(hidden, position_ids=packing.positions.unsqueeze(0))
        return cos, sin
    tables = {}
    for length in set(packing.lengths):
        _forget_longer(rotary)
        tables[length] = rotary(hidden, position_ids=torch.arange(length, device=hidden.device).unsqueeze(0))
    cos, sin = (torch.cat([tables[length][part] for length in packing.lengths], dim=1) for part in (0, 1))
    return cos, sin
