"""Rotary tables whose frequencies may depend on the length of the text: every text gets its own.

transformers takes the longest text of a batch, and for ``dynamic`` the longest before it too: what a text computes
would depend on who else is in the server's batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hsplit.models.packing import Packing

_BY_LENGTH = frozenset({"dynamic", "longrope"})


def depends_on_length(config: Any) -> bool:
    """True if a text's rotary frequencies depend on its length, or on that of the longest text in its batch."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") in _BY_LENGTH


def _forget_longer(rotary: nn.Module) -> None:
    """Undo what longer texts have changed."""
    state: Any = rotary
    state.max_seq_len_cached = state.original_max_seq_len
    # A copy: longrope writes into it.
    state.inv_freq = state.original_inv_freq.clone()


def rotary_tables(rotary: nn.Module, hidden: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(1, n, d_head)`` of packed tokens.

    Args:
        rotary: transformers' rotary embedding.
        hidden: ``(1, n, d)``; gives type and device.
        packing: of the texts.
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
