"""AdamW's step counts for each direction, so that one that restarts has no past (METHOD 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hsplit.lora.adapters import AdapterSet
from hsplit.lora.optimizer import FIRST, SECOND, moment_views


class DirectionSteps:
    """Step counts of the single directions of a holder's adapters.

    Direction ``i`` of a weight is row ``i`` of ``A`` and column ``i`` of ``B``. Torch's AdamW has one step count for
    a whole buffer and divides both moments by the bias that follows from it. A direction that began at step ``b`` of
    ``t`` needs the bias of ``t - b`` steps: with moments of zero and the bias of ``t``, its first step would be 0.7
    times as long after 50 steps, and three times after thousands.

    Args:
        adapters: the holder's.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self._adapters = adapters
        self.begun: dict[str, Tensor] = {}
        """The optimizer's step count when each direction began, by weight name: ``(r,)``, int64, never decreasing."""
        self.clear()

    def clear(self) -> None:
        """Make every direction as old as the optimizer."""
        self.begun = {name: torch.zeros(rank, dtype=torch.int64) for name, rank in self._adapters.ranks.items()}

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer, stay: Mapping[str, int]) -> None:
        """Clear the moments of the directions that restart.

        Args:
            optimizer: an AdamW over the adapters.
            stay: number of leading directions of each weight that continue, by name; the others begin.
        """
        view = moment_views(optimizer)
        if view is None:
            return
        for name, begun in self.begun.items():
            first = min(stay.get(name, 0), len(begun))
            begun[first:] = step_count(optimizer)
            for side, span in enumerate(self._adapters.spans(name)):
                for key in (FIRST, SECOND):
                    view(key, span).narrow(side, first, len(begun) - first).zero_()

    @torch.no_grad()
    def fit(self, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> None:
        """Adapt the moments of adapters that restart in other directions.

        The squared gradient in one column of ``A (r, d_in)``, summed over the rank, does not depend on the basis of the
        directions; nor does that in a row of ``B (d_out, r)``. So each column of ``A`` and each row of ``B`` continues
        with the mean of its second moments, freed of their bias. The first moments begin at zero, which warms the steps
        up.

        Args:
            optimizer: an AdamW over the adapters.
            names: the weights that restart in other directions.
        """
        view = moment_views(optimizer)
        if view is None:
            return
        decay = _settings(optimizer)["betas"][1]
        for name in names:
            own = step_count(optimizer) - self.begun[name]
            bias = 1 - decay ** own.double()
            # Directions that have made no step have nothing to average.
            weight = torch.where(own > 0, 1 / bias.clamp_min(1e-300), 0.0) / (own > 0).sum().clamp_min(1)
            for side, span in enumerate(self._adapters.spans(name)):
                view(FIRST, span).zero_()
                second = view(SECOND, span)
                to, back = (factor.to(second).unsqueeze(1 - side) for factor in (weight, bias))
                second.copy_((second * to).sum(dim=side, keepdim=True) * back)

    @torch.no_grad()
    def correct(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of ``optimizer``, correct the directions that began later by their own step counts.

        Up to rounding, a direction's steps are then those of an AdamW that began with it.
        """
        late = {name: begun for name, begun in self.begun.items() if begun[-1]}
        view = moment_views(optimizer) if late else None
        if view is None:
            return
        settings, step = _settings(optimizer), step_count(optimizer)
        for name, begun in late.items():
            # Directions are in the order in which they began.
            old = int((begun == 0).sum())
            factors = self._adapters.A(name), self._adapters.B(name)
            for side, (factor, span) in enumerate(zip(factors, self._adapters.spans(name), strict=True)):
                moving, first, second = (
                    values.narrow(side, old, len(begun) - old)
                    for values in (factor, view(FIRST, span), view(SECOND, span))
                )
                counts = torch.stack([torch.full_like(begun[old:], step), step - begun[old:]]).to(first)
                counted, own = counts.unsqueeze(2 - side).unbind()
                change = _adam_step(first, second, counted, settings) - _adam_step(first, second, own, settings)
                moving.add_(change, alpha=settings["lr"])

    def state(self) -> Tensor:
        """:attr:`begun` of all weights, end to end in layer order, for a checkpoint."""
        return torch.cat([*self.begun.values(), torch.zeros(0, dtype=torch.int64)])

    def load_state(self, state: Tensor | None) -> None:
        """Load the result of :meth:`state`; ``None``: every direction is as old as the optimizer."""
        self.clear()
        if state is not None:
            parts = state.split([len(begun) for begun in self.begun.values()])
            self.begun = {name: part.clone() for name, part in zip(self.begun, parts, strict=True)}


def step_count(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of steps that an AdamW has made, which all its parameters share."""
    return int(next(iter(optimizer.state.values()))["step"])


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (group,) = optimizer.param_groups
    return group


def _adam_step(first: Tensor, second: Tensor, steps: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Compute Adam's step for a learning rate of 1 from its moments after ``steps`` steps."""
    decay_first, decay_second = settings["betas"]
    denominator = second.sqrt() / (1 - decay_second**steps).sqrt() + settings["eps"]
    return first / (1 - decay_first**steps) / denominator
