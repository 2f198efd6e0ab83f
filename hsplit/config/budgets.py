"""A budget as a cluster file gives it: a number, or a distribution that each client draws its own from."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Annotated, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from hsplit.config.section import LARGEST, LIST, NOT_EMPTY, OneKey, meaning, refuse, shape, shown

SMALLEST_DRAW = 1e-9
"""Lognormal draws are clipped to [SMALLEST_DRAW, LARGEST], which keeps every budget usable."""

_Bounds = Annotated[tuple[float, float], LIST]


class Distribution(OneKey):
    """What a client's budget is drawn from, in the unit of the field that it stands for."""

    uniform: _Bounds | None = Field(default=None, description="[lowest, highest] value, equally likely between")
    lognormal: _Bounds | None = Field(
        default=None,
        description="[mean, coefficient of variation] of the value itself (not of its logarithm)",
    )
    choice: Annotated[tuple[float, ...], LIST, NOT_EMPTY] | None = Field(
        default=None, description="list of equally likely values"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise refuse(f"must be [lowest, highest] (got {shown(list(self.uniform))})", "uniform")
        if self.lognormal is not None and not (self.lognormal[0] > 0 and 0 <= self.lognormal[1] <= 100):
            raise refuse(
                "must be [mean, coefficient of variation] with a mean above 0 and a coefficient from 0 to 100"
                f" (got {shown(list(self.lognormal))})",
                "lognormal",
            )
        return self

    def bounds(self) -> tuple[float, ...]:
        """The values that must be in range for every draw to be (a lognormal's draws are clipped)."""
        if self.lognormal is not None:
            return self.lognormal[:1]
        return self.uniform or self.choice or ()

    def draw(self, source: random.Random) -> float:
        """One value, taken from ``source``."""
        if self.uniform is not None:
            return source.uniform(*self.uniform)
        if self.choice is not None:
            return source.choice(self.choice)
        assert self.lognormal is not None  # _exactly_one
        mean, variation = self.lognormal
        # for X = exp(N(mu, s^2)): E[X] = exp(mu + s^2/2) and (sd[X] / E[X])^2 = exp(s^2) - 1
        variance = math.log1p(variation**2)
        drawn = math.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * source.gauss(0.0, 1.0))
        return min(max(drawn, SMALLEST_DRAW), LARGEST)


def _in_range(budget: float | Distribution, *, zero_allowed: bool) -> float | Distribution:
    many = isinstance(budget, Distribution)
    for value in budget.bounds() if isinstance(budget, Distribution) else (budget,):
        if 0 < value <= LARGEST or (zero_allowed and value == 0):
            continue
        rule = f"at most {LARGEST:g}" if value > 0 else "at least 0" if zero_allowed else "greater than 0"
        raise refuse(f"{'every value drawn ' if many else ''}must be {rule} (got {value:g})")
    return budget


def _positive(budget: float | Distribution) -> float | Distribution:
    return _in_range(budget, zero_allowed=False)


def _non_negative(budget: float | Distribution) -> float | Distribution:
    return _in_range(budget, zero_allowed=True)


_Either = Annotated[
    Annotated[float, meaning("a finite number, or a distribution such as {uniform: [5, 20]}"), Tag("<plain>")]
    | Annotated[Distribution, Tag("<mapping>")],
    Discriminator(shape),
]
Budget = Annotated[_Either, AfterValidator(_positive)]
"""A positive number or a distribution of positive numbers."""
BudgetOrZero = Annotated[_Either, AfterValidator(_non_negative)]
"""The same where zero makes sense too, as for a latency."""


def drawn(budget: float | Distribution, seed: int, client: str, field: str) -> float:
    """The number that ``budget`` comes to for one field of one client.

    A draw depends on ``seed``, ``client`` and ``field`` only: adding a client changes no other's budget.
    """
    if not isinstance(budget, Distribution):
        return budget
    digest = hashlib.sha256(f"{seed}:{client}:{field}".encode()).digest()
    return budget.draw(random.Random(int.from_bytes(digest)))
