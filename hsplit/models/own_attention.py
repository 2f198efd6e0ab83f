"""A model's own attention over packed rows: padded around it, and nowhere else.

Where a model's layers find their attention through transformers' interface, the rest of a layer works on each token
alone. So its linears and norms see packed rows. Inside the attention these are padded, computed by the function that
the model would have used itself (with its scale, soft-cap, sinks and groups), and packed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from hsplit.models.outer_model import LayerCall
from hsplit.models.packing import Packing

# Names under which transformers' layers find the attention below, by that of the attention that it stands for.
NAMES = {"sdpa": "hsplit_own_sdpa", "eager": "hsplit_own_eager"}

_PACKING: ContextVar[Packing | None] = ContextVar("packing", default=None)


@contextmanager
def packed_by(packing: Packing) -> Iterator[None]:
    """Take rows inside for packed ones, in the arrangement ``packing``."""
    token = _PACKING.set(packing)
    try:
        yield
    finally:
        _PACKING.reset(token)


def _own(module: Any, kind: str) -> Any:
    if kind == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward
    # Each model's file has its own.
    return sys.modules[type(module).__module__].eager_attention_forward


def _attention(kind: str) -> Any:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
        packing, own = _PACKING.get(), _own(module, kind)
        if packing is None:
            return own(module, query, key, value, mask, **others)
        queries, keys, values = (packing.pad(tensor) for tensor in (query, key, value))
        output, weights = own(module, queries, keys, values, mask, **others)
        return packing.pack(output), weights

    return attention


def register_own_attention() -> None:
    """Register the attention above with transformers; needed once a process, harmless when repeated."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    for kind, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        AttentionInterface.register(NAMES[kind], _attention(kind))
        AttentionMaskInterface.register(NAMES[kind], mask)


def packed_calls(calls: Sequence[LayerCall], packing: Packing) -> list[LayerCall]:
    """Make the arguments of layers for packed rows from those for one text of the greatest length.

    Tables by position ``(1, T, ...)`` become tables by token ``(1, n, ...)``; masks ``(1, 1, T, T)`` stay. What layers
    share they share afterwards.
    """
    made: dict[int, Tensor] = {}

    def by_token(tensor: Tensor) -> Tensor:
        if tensor.dim() not in (2, 3) or tensor.shape[:2] != (1, packing.longest):
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = tensor.index_select(1, packing.positions)
        return made[id(tensor)]

    return [call.mapped(by_token) for call in calls]
