"""The rows of a token embedding that one holder's texts use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OwnRows(nn.Module):
    """Some rows of a token embedding, looked up by the ids that they have in the whole one.

    Args:
        ids: ids of the rows, increasing, ``(n,)`` int64.
        rows: their values, ``(n, d)``.
    """

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.ids: Tensor
        self.register_buffer("ids", ids)
        self.weight = nn.Parameter(rows, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids ``(...)``: ``(..., d)``.

        Raises:
            IndexError: an id has no row here.
        """
        places = torch.searchsorted(self.ids, ids).clamp_max_(max(len(self.ids) - 1, 0))
        if not torch.equal(self.ids[places], ids):
            raise IndexError("a token that is in none of the texts that the embedding was read for")
        return nn.functional.embedding(places, self.weight)
