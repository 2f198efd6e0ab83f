"""What planning needs to know of a holder; the clients and the server of ``hsplit.config`` fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ClientBudget(Protocol):
    """What the cost model and the planner need of a client."""

    @property
    def name(self) -> str:
        """Its name in the cluster file."""

    @property
    def memory_bytes(self) -> int:
        """Declared memory."""

    @property
    def flops(self) -> float:
        """Declared compute, FLOP/s."""

    @property
    def bandwidth_bps(self) -> float:
        """Declared link to the server, bit/s."""

    @property
    def latency_s(self) -> float:
        """Declared seconds of a message one way."""


class ServerBudget(Protocol):
    """What they need of the server: ``config.ServerSpec`` is one."""

    @property
    def memory_bytes(self) -> int:
        """Declared memory."""

    @property
    def flops(self) -> float:
        """Declared compute, FLOP/s."""


@dataclass(frozen=True)
class BudgetRequest:
    """New values of one holder's budget.

    Attributes:
        holder: client name or ``server``.
        values: budget field to new value, in the units of the cluster file.
    """

    holder: str
    values: dict[str, float]
