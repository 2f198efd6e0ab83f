"""Moments that outlive a change of ranks: a holder whose plan changes goes on at the pace that it had found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.lora.adapters import AdapterSet
from hsplit.lora.optimizer import FIRST, SECOND, moment_views, restore_state


@dataclass(frozen=True)
class CarriedMoments:
    """Adam's moments of the leading directions of weights that stay with a holder.

    Attributes:
        step: how many steps they are of.
        of_A: first and second moments of ``A (r, d_in)``, by weight name.
        of_B: those of ``s B (d_out, r)``, the scale folded in, since another rank has another scale.
    """

    step: Tensor
    of_A: dict[str, tuple[Tensor, Tensor]]
    of_B: dict[str, tuple[Tensor, Tensor]]


def carried_moments(
    adapters: AdapterSet, optimizer: torch.optim.Optimizer, ranks: Mapping[str, int]
) -> CarriedMoments | None:
    """What ``optimizer`` knows that is worth keeping where ``adapters`` get other ranks.

    A gradient of ``B`` is ``s`` times that of ``s B``, so its moments are divided by ``s`` and by its square.

    Args:
        ranks: the next ranks, by weight name; no more directions are copied than they have room for.

    Returns:
        ``None`` where there are no moments yet, and of every optimizer but AdamW.
    """
    view = moment_views(optimizer) if isinstance(optimizer, torch.optim.AdamW) else None
    if view is None:
        return None
    of_A, of_B = {}, {}
    for name in adapters.names:
        rank, scale = ranks.get(name, 0), adapters.scale(name)
        if rank:
            span_A, span_B = adapters.spans(name)
            of_A[name] = view(FIRST, span_A)[:rank].clone(), view(SECOND, span_A)[:rank].clone()
            of_B[name] = view(FIRST, span_B)[:, :rank] / scale, view(SECOND, span_B)[:, :rank] / scale**2
    step = next(iter(optimizer.state.values()))["step"]
    return CarriedMoments(step.clone(), of_A, of_B) if of_A else None


def go_on_from(
    carried: CarriedMoments, adapters: AdapterSet, optimizer: torch.optim.Optimizer, stay: Mapping[str, int]
) -> None:
    """Give a new ``optimizer`` of ``adapters`` the moments that were carried over.

    A direction that begins has no moments of its own. Adam divides all by what it has squared over the run, so with
    none it would leap: its second moments begin at the mean over the weight's other directions, and those of a weight
    that is new here at the mean over weights of its kind (the same of other layers), or else over all of them; its
    first moments at zero, which warms it up. What is carried is given up as it is taken.

    Args:
        stay: how many of a weight's leading directions go on as they were, by name; the others begin.
    """
    flat = adapters.flat
    kept = {key: torch.zeros_like(flat.detach()) for key in (FIRST, SECOND)}
    for carried_over, side in ((carried.of_A, 0), (carried.of_B, 1)):
        means = _means_by_kind(carried_over, side)
        for name in adapters.names:
            start, shape = adapters.spans(name)[side]
            first, second = (kept[key][start : start + shape[0] * shape[1]].view(shape) for key in (FIRST, SECOND))
            scale = adapters.scale(name) if side else 1.0
            if name not in carried_over:
                second.copy_((_mean_of(means, name) * scale**2).expand(shape))
                continue
            known_first, known_second = carried_over.pop(name)
            # A's directions are its rows, B's its columns.
            size = min(known_first.shape[side], stay.get(name, 0))
            first.narrow(side, 0, size).copy_(known_first.narrow(side, 0, size) * scale)
            second.copy_((known_second.mean(dim=side, keepdim=True) * scale**2).expand(shape))
            second.narrow(side, 0, size).copy_(known_second.narrow(side, 0, size) * scale**2)
    restore_state(optimizer, {"step": carried.step, **kept})


def _kind(name: str) -> str:
    """A weight's name without its layer's number: GPT-2 has a ``c_proj`` in the attention and one in the MLP."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _means_by_kind(carried: Mapping[str, tuple[Tensor, Tensor]], side: int) -> dict[str, Tensor]:
    """Mean second moments over directions and layers, by the weight's kind: ``(1, d_in)`` or ``(d_out, 1)``."""
    by_kind: dict[str, list[Tensor]] = {}
    for name, (_, second) in carried.items():
        by_kind.setdefault(_kind(name), []).append(second.mean(dim=side, keepdim=True))
    return {kind: torch.stack(means).mean(dim=0) for kind, means in by_kind.items()}


def _mean_of(means: Mapping[str, Tensor], name: str) -> Tensor:
    own = means.get(_kind(name))
    return torch.stack([mean.mean() for mean in means.values()]).mean() if own is None else own
