"""Optimizer moments that outlive a change of ranks, so that training does not slow down when a plan changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.lora.adapters import AdapterSet
from hsplit.lora.direction_steps import DirectionSteps, step_count
from hsplit.lora.optimizer import FIRST, SECOND, moment_views, restore_state


@dataclass(frozen=True)
class CarriedMoments:
    """Adam's moments of the leading directions of weights that stay with a holder.

    Attributes:
        step: how many steps the optimizer had made.
        begun: step at which each direction began, ``(r,)``, by weight name.
        of_A: first and second moments of ``A (r, d_in)``, by weight name.
        of_B: those of ``s B (d_out, r)``, the scale folded in, since another rank has another scale.
    """

    step: int
    begun: dict[str, Tensor]
    of_A: dict[str, tuple[Tensor, Tensor]]
    of_B: dict[str, tuple[Tensor, Tensor]]


def carried_moments(
    adapters: AdapterSet, optimizer: torch.optim.Optimizer, steps: DirectionSteps, ranks: Mapping[str, int]
) -> CarriedMoments | None:
    """Copy the moments that ``adapters`` can keep at other ranks.

    A gradient of ``B`` is ``s`` times that of ``s B``, so its moments are divided by ``s`` and by its square.

    Args:
        steps: the directions' own step counts.
        ranks: the next ranks, by weight name; no more directions than these are copied.

    Returns:
        ``None`` where there are no moments yet, and for every optimizer but AdamW.
    """
    view = moment_views(optimizer) if isinstance(optimizer, torch.optim.AdamW) else None
    if view is None:
        return None
    begun, of_A, of_B = {}, {}, {}
    for name in adapters.names:
        rank, scale = ranks.get(name, 0), adapters.scale(name)
        if rank:
            span_A, span_B = adapters.spans(name)
            begun[name] = steps.begun[name][:rank].clone()
            of_A[name] = view(FIRST, span_A)[:rank].clone(), view(SECOND, span_A)[:rank].clone()
            of_B[name] = view(FIRST, span_B)[:, :rank] / scale, view(SECOND, span_B)[:, :rank] / scale**2
    return CarriedMoments(step_count(optimizer), begun, of_A, of_B) if begun else None


def resume_moments(
    carried: CarriedMoments,
    adapters: AdapterSet,
    optimizer: torch.optim.Optimizer,
    steps: DirectionSteps,
    stay: Mapping[str, int],
) -> None:
    """Put carried moments into a new ``optimizer`` of ``adapters``, and their ages into ``steps``.

    New directions have no moments and make their first step next. Each carried moment is freed once it is copied.

    Args:
        stay: number of leading directions of each weight that continue, by name; the others begin.
    """
    sizes = {name: min(len(begun), stay.get(name, 0)) for name, begun in carried.begun.items() if name in steps.begun}
    if not any(sizes.values()):
        return
    flat = adapters.flat
    kept = {key: torch.zeros_like(flat.detach()) for key in (FIRST, SECOND)}
    for name, begun in steps.begun.items():
        begun.fill_(carried.step)
        size = sizes.get(name, 0)
        if not size:
            continue
        begun[:size] = carried.begun[name][:size]
        scales = (1.0, adapters.scale(name))
        for side, (start, shape) in enumerate(adapters.spans(name)):
            # A's directions are its rows, B's its columns.
            known = (carried.of_B if side else carried.of_A).pop(name)
            for power, (key, moment) in enumerate(zip((FIRST, SECOND), known, strict=True), start=1):
                values = kept[key][start : start + shape[0] * shape[1]].view(shape)
                values.narrow(side, 0, size).copy_(moment.narrow(side, 0, size) * scales[side] ** power)
    restore_state(optimizer, {"step": torch.tensor(float(carried.step)), **kept})
