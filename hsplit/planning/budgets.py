"""Budgets of holders, as planning needs them; the clients and the server of ``hsplit.config`` have them too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ServerBudget(Protocol):
    """A holder's memory and compute: all that planning needs of the server."""

    @property
    def memory_bytes(self) -> int:
        """Declared memory."""

    @property
    def flops(self) -> float:
        """Declared compute, FLOP/s."""


class ClientBudget(ServerBudget, Protocol):
    """A client's memory, compute and link."""

    @property
    def name(self) -> str:
        """Its name in the cluster file."""

    @property
    def bandwidth_bps(self) -> float:
        """Declared link to the server, bit/s."""

    @property
    def latency_s(self) -> float:
        """Declared seconds of a message one way."""


@dataclass(frozen=True)
class Budget:
    """A client's budget, or the server's, whose link does not count: bytes, FLOP/s, bit/s, seconds."""

    name: str
    memory_bytes: int
    flops: float
    bandwidth_bps: float = 1.0
    latency_s: float = 0.0


def budget_of(client: ClientBudget) -> tuple[float, float, float, float]:
    """Memory, compute, bandwidth and latency: clients with the same ones are the same to the planner."""
    return client.memory_bytes, client.flops, client.bandwidth_bps, client.latency_s


@dataclass(frozen=True)
class BudgetRequest:
    """New values of one holder's budget.

    Attributes:
        holder: client name or ``server``.
        values: budget field to new value, in the units of the cluster file.
    """

    holder: str
    values: dict[str, float]
