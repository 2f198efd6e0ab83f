"""How much each weight matters (METHOD 3)."""

from __future__ import annotations

from collections.abc import Sequence

from hsplit.models.segment import LinearShape

# fp32 parameter, gradient and two Adam moments (METHOD 3).
BYTES_PER_PARAMETER = 16


def equal_importance(shapes: Sequence[LinearShape]) -> dict[str, float]:
    """``H_w`` before any score exists: equal importance per parameter, over the bytes to adapt the weight.

    Returns:
        ``parameters / cost_w`` by weight name, with ``cost_w = 16 (d_in + d_out)`` bytes per unit of rank.
    """
    return {s.name: s.parameters / (BYTES_PER_PARAMETER * (s.d_in + s.d_out)) for s in shapes}
