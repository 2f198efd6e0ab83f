"""Gradient clipping that does not depend on where the model is split (METHOD 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hsplit.models.segment import LinearShape

_EPSILON = 1e-6
"""Added to a norm before it divides, as in ``torch.nn.utils.clip_grad_norm_``."""


def clip_limits(shapes: Sequence[LinearShape], clip: float) -> dict[str, float]:
    """Largest L2 norm of each adapted weight's gradient: ``clip`` times the root of its share of the adapted entries.

    Factors of rank ``r`` have ``r (d_out + d_in)`` entries. The share is taken at one rank for all, so ``r`` cancels:

        limit_w = clip * sqrt((d_out + d_in)_w / sum_v (d_out + d_in)_v)

    It follows from the model and ``job.targets`` alone, not from split points, holders or the ranks of a plan. The
    squares of the limits sum to ``clip ** 2``, so the gradient of the whole model has a norm of at most ``clip``.

    Args:
        shapes: every adapted weight of the whole model, whoever holds it.
        clip: ``job.clip``.
    """
    total = sum(shape.d_out + shape.d_in for shape in shapes)
    return {shape.name: clip * math.sqrt((shape.d_out + shape.d_in) / total) for shape in shapes}


@torch.no_grad()
def clip_each(gradients: Mapping[str, Tensor], limits: Mapping[str, float]) -> None:
    """Scale each gradient down, in place, to the L2 norm that ``limits`` allows it, by weight name.

    Nothing waits for the device.
    """
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
    allowed = torch.tensor([limits[name] for name in gradients], dtype=norms.dtype, device=norms.device)
    for gradient, factor in zip(gradients.values(), (allowed / (norms + _EPSILON)).clamp_(max=1.0), strict=True):
        gradient.mul_(factor)
