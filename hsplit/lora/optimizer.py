"""Optimizers of ``job.optimizer``, the learning rate by step, and gradient clipping.

The optimizers of bitsandbytes keep 8-bit codes of the moments, page them out of a GPU that is short of memory, or both.
They are for a holder's adapters, which are one flat buffer; a client that trains every weight uses torch's. The
learning rate is a pure function of the step, so that resuming needs no scheduler state. Clipping does not depend on
where the model is split (METHOD 2).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hsplit.config import Job
from hsplit.models.spec import LinearShape


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: int) -> float:
    """Compute the learning rate of local step ``step`` (counted from 0 over the whole run).

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


NOT_SCALED: Mapping[int, float] = MappingProxyType({})
"""Factors of the learning rate by layer where ``policy.lr_scaling`` is off."""
_EPSILON = 1e-6
"""Added to a norm before it divides, as in ``torch.nn.utils.clip_grad_norm_``."""


def clip_limits(shapes: Sequence[LinearShape], clip: float) -> dict[str, float]:
    """Compute the largest L2 norm of each adapted weight's gradient: ``clip`` times the root of its share of entries.

    Factors of rank ``r`` have ``r (d_out + d_in)`` entries. Shares assume the same rank for all, so ``r`` cancels:

        limit_w = clip * sqrt((d_out + d_in)_w / sum_v (d_out + d_in)_v)

    They depend on the model and ``job.targets`` alone, not on split points, holders or the ranks of a plan. The
    squares of the limits sum to ``clip ** 2``, so the gradient of the whole model has a norm of at most ``clip``.

    Args:
        shapes: every adapted weight of the whole model.
        clip: ``job.clip``.
    """
    total = sum(shape.d_out + shape.d_in for shape in shapes)
    return {shape.name: clip * math.sqrt((shape.d_out + shape.d_in) / total) for shape in shapes}


@torch.no_grad()
def clip_each(gradients: Mapping[str, Tensor], limits: Mapping[str, float]) -> None:
    """Scale each gradient down, in place, to the L2 norm that ``limits`` allows, by weight name.

    Does not synchronize with the device.
    """
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()])
    allowed = torch.tensor([limits[name] for name in gradients], dtype=norms.dtype, device=norms.device)
    for gradient, factor in zip(gradients.values(), (allowed / (norms + _EPSILON)).clamp_(max=1.0), strict=True):
        gradient.mul_(factor)


MOMENT_BLOCK = 256
"""Entries of a moment that share one fp32 scale (bitsandbytes' own number)."""
CODE_BOOK_BYTES = 2 * 256 * 4
"""The two tables that give 8-bit codes their values, fp32; all parameters of an optimizer share them."""
STEPPED_AT_ONCE = 1 << 18
"""Entries that an 8-bit optimizer steps at once on a CPU: a whole number of blocks."""
PASSING_BYTES = 20
"""Temporary bytes of bitsandbytes for each entry that it steps on a CPU (measured); on a GPU there are none."""

Span = tuple[int, tuple[int, int]]
"""Start of a factor in the flat buffer, and its shape."""
FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""AdamW's names of its moments."""

# State that all parameters of an optimizer share.
_SHARED = frozenset({"step", "qmap1", "qmap2"})


def new_optimizer(job: Job, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the job's optimizer, without moments."""
    settings: dict[str, Any] = {"lr": job.lr, "weight_decay": job.weight_decay}
    if job.optimizer == "sgd":
        return torch.optim.SGD(parameters, **settings)
    if job.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes import optim

    kinds: Mapping[str, Any] = {
        "adamw8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw8bit": optim.PagedAdamW8bit,
    }
    # By default small tensors keep fp32 moments, which is meant for norms and biases; plans count codes alone.
    made: torch.optim.Optimizer = kinds[job.optimizer](parameters, min_8bit_size=0, **settings)
    return made


def as_parameters(job: Job, flat: nn.Parameter) -> list[nn.Parameter]:
    """Return the job's optimizer's parameters: the buffer ``flat`` ``(n,)``, or slices of its values and gradient.

    On a CPU bitsandbytes widens all moments of a parameter at once, which takes more memory than 8 bits save.
    """
    if not passing_bytes(job) or flat.device.type != "cpu":
        return [flat]
    assert flat.grad is not None
    slices = []
    for start in range(0, max(flat.numel(), 1), STEPPED_AT_ONCE):
        part = nn.Parameter(flat.data[start : start + STEPPED_AT_ONCE])
        part.grad = flat.grad[start : start + STEPPED_AT_ONCE]
        slices.append(part)
    return slices


def kept_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy the state of ``optimizer`` to the CPU, by name with the values of all its parameters end to end.

    With 8-bit moments these are codes, their blocks' scales, and the tables of the codes' values. Empty before the
    first step.
    """
    states = [optimizer.state[p] for p in _parameters(optimizer) if p in optimizer.state]
    kept = {}
    for key, first in states[0].items() if states else ():
        if key in _SHARED:
            kept[key] = torch.as_tensor(first).detach().cpu().clone()
        else:
            kept[key] = torch.cat([state[key].detach().cpu().flatten() for state in states])
    return kept


def restore_state(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Load a result of :func:`kept_state` into a new ``optimizer``, which then continues exactly as the old one."""
    begin = dict.fromkeys(kept, 0)

    def next_part(key: str, like: Tensor) -> Tensor:
        if key in _SHARED:
            return kept[key]
        start, begin[key] = begin[key], begin[key] + like.numel()
        return kept[key][start : begin[key]].view_as(like)

    for index, parameter in enumerate(_parameters(optimizer) if kept else ()):
        if isinstance(optimizer, torch.optim.AdamW):
            state = {key: next_part(key, parameter).to(parameter.device).clone() for key in kept}
            optimizer.state[parameter] = state
            continue
        # bitsandbytes allocates its state itself, so that paged moments stay paged.
        own: Any = optimizer
        own.init_state(own.param_groups[0], parameter, 0, index)
        for key, value in own.state[parameter].items():
            if key == "step":
                own.state[parameter][key] = int(kept[key])
            else:
                value.copy_(next_part(key, value))


def without_moments(job: Job, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return a new optimizer without moments, or ``optimizer`` itself with them cleared where it is paged.

    bitsandbytes never frees paged memory, so a new optimizer in each round would leak.
    """
    if not getattr(optimizer, "is_paged", False):
        return new_optimizer(job, _parameters(optimizer))
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "step":
                state[key] = 0
            elif key not in _SHARED:
                value.zero_()
    return optimizer


def moment_views(optimizer: torch.optim.Optimizer) -> Callable[[str, Span], Tensor] | None:
    """Return a function that views AdamW's :data:`FIRST` or :data:`SECOND` moments at a span of the flat buffer.

    It works for optimizers of the whole buffer and of its parts; ``None`` before the first step.
    """
    states = [optimizer.state.get(parameter) for parameter in _parameters(optimizer)]
    if not states or not all(states):
        return None
    moments = {key: [state[key].view(-1) for state in states if state] for key in (FIRST, SECOND)}
    begins = [0, *accumulate(map(len, moments[FIRST]))]

    def view(key: str, span: Span) -> Tensor:
        start, shape = span
        index = bisect_right(begins, start) - 1
        return moments[key][index][start - begins[index] :][: shape[0] * shape[1]].view(shape)

    return view


def moment_bytes(job: Job, exact: torch.dtype) -> float:
    """Count the bytes that the job's optimizer keeps for each entry of an adapter of dtype ``exact``.

    Paged moments count in full, wherever they are at the time. Plain SGD keeps none, but copies the gradient to add
    weight decay to it.
    """
    if job.optimizer == "sgd":
        return float(exact.itemsize) if job.weight_decay else 0.0
    if job.optimizer.endswith("8bit"):
        return 2 * (1 + 4 / MOMENT_BLOCK)
    return 2.0 * exact.itemsize


def constant_bytes(job: Job) -> int:
    """Count the bytes that do not depend on the adapters' size: code books, and rounding up to whole blocks."""
    return CODE_BOOK_BYTES + 2 * 4 if job.optimizer.endswith("8bit") else 0


def passing_bytes(job: Job) -> int:
    """Count the temporary bytes of an optimizer step for each of at most :data:`STEPPED_AT_ONCE` entries."""
    return PASSING_BYTES if job.optimizer == "adamw8bit" else 0


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
