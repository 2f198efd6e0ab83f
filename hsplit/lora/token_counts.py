"""What a holder trained its layers on in a round: aggregation weighs by it (METHOD 6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


class TokenCounts:
    """Supervised tokens that passed through each layer since the round began."""

    def __init__(self) -> None:
        self._by_layer: Counter[int] = Counter()

    def add(self, layers: Iterable[int], tokens: int) -> None:
        """``tokens`` supervised tokens passed through each of ``layers``."""
        for layer in layers:
            self._by_layer[layer] += tokens

    def clear(self) -> None:
        """Another round begins."""
        self._by_layer.clear()

    def by_layer(self) -> dict[int, int]:
        """A copy, by layer."""
        return dict(self._by_layer)

    def state(self) -> Tensor:
        """For a checkpoint: layer and tokens, ``(n, 2)``."""
        return torch.tensor(sorted(self._by_layer.items()), dtype=torch.int64).reshape(-1, 2)

    def load_state(self, kept: Tensor) -> None:
        """Take over what :meth:`state` gave."""
        self._by_layer = Counter({int(layer): int(count) for layer, count in kept.reshape(-1, 2)})
