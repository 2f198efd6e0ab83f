"""Relative Frobenius errors over many weights: of each, the worst, and of all together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RelativeError:
    """``||error||_F / ||reference||_F`` over a set of weights.

    Attributes:
        total: over all weights as one vector.
        worst: of the weight where it is largest.
        weight: that weight's name.
    """

    total: float
    worst: float
    weight: str

    @staticmethod
    def of(norms: Mapping[str, tuple[float, float]]) -> RelativeError | None:
        """From the Frobenius norms of error and reference by weight; ``None`` where every reference is zero."""
        relative = {name: error / reference for name, (error, reference) in norms.items() if reference}
        if not relative:
            return None
        worst = max(relative, key=lambda name: relative[name])
        error = math.sqrt(math.fsum(error**2 for error, _ in norms.values()))
        reference = math.sqrt(math.fsum(reference**2 for _, reference in norms.values()))
        return RelativeError(error / reference, relative[worst], worst)

    def __str__(self) -> str:
        return f"{self.total:.3e} over all weights, at worst {self.worst:.3e} ({self.weight})"
