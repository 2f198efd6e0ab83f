"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: int) -> float:
    """Learning rate of local step ``step`` (counted from 0 over the whole run).

    Args:
        total: local steps of the whole run.
        peak: ``job.lr``.
        schedule: ``constant``, ``linear`` (to zero) or ``cosine`` (to zero), after the warm-up.
        warmup: steps of linear warm-up from ``peak / warmup``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
