"""The virtual clock: what everything would have taken at the declared budgets (METHOD 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsplit.scheduling.budgets import ClientBudget, ServerBudget
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.plan import Plan


@dataclass
class VirtualClock:
    """An account of virtual seconds, kept beside a run; deterministic, and no statement about the wall.

    Not accounted: reading a segment's layers, which every holder does from its own disk, and the arithmetic
    of an aggregation, which is small beside its transfers.

    Attributes:
        cost: what steps cost.
        clients, server: the declared budgets.
        virtual_time_s: the account: all that a checkpoint has to keep.
    """

    cost: CostModel
    clients: Sequence[ClientBudget]
    server: ServerBudget
    virtual_time_s: float = 0.0

    def step(self, plan: Plan, steps: int = 1, absent: Sequence[str] = ()) -> float:
        """Account for local steps of all available clients; returns their seconds.

        Args:
            plan: the plan in force.
            steps: how many.
            absent: available clients that take no part in these steps.
        """
        splits = {c.name: c.split or 0 for c in plan.available if c.name not in absent}
        return self._add(steps * self._step_s(splits)) if splits else 0.0

    def transfer(self, up_bytes: Mapping[str, int], down_bytes: Mapping[str, int]) -> float:
        """Account for a round's end: adapters up to the aggregator, then residual changes and restarts down.

        Args:
            up_bytes, down_bytes: by client name; the clients' links work side by side.
        """
        return self._add(self._slowest_link_s(up_bytes) + self._slowest_link_s(down_bytes))

    def validation(self, plan: Plan, batches: Mapping[str, int]) -> float:
        """Account for forward passes over each client's validation batches, joined one by one.

        Args:
            plan: the plan in force.
            batches: number of validation batches by client name, each counted as a full one.
        """
        splits = {c.name: c.split or 0 for c in plan.available if batches.get(c.name, 0) > 0}
        seconds, done = 0.0, 0
        # Between two distinct batch counts the same clients take part.
        for count in sorted({batches[name] for name in splits}):
            taking_part = {name: split for name, split in splits.items() if batches[name] >= count}
            seconds += (count - done) * self._forward_s(taking_part)
            done = count
        return self._add(seconds)

    def _add(self, seconds: float) -> float:
        self.virtual_time_s += seconds
        return seconds

    def _budget(self, name: str) -> ClientBudget:
        return next(c for c in self.clients if c.name == name)

    def _step_s(self, splits: Mapping[str, int]) -> float:
        """METHOD 5's makespan of the clients in ``splits``."""
        phases = np.array([self.cost.times.client_times(self._budget(n))[k] for n, k in splits.items()])
        counts = self.cost.model.clients_at(list(splits.values()))[None]
        return float(phases.max(axis=0).sum() + self.cost.times.server_times(self.server, counts)[0])

    def _forward_s(self, splits: Mapping[str, int]) -> float:
        clients = [self.cost.times.client_forward_s(self._budget(n), k) for n, k in splits.items()]
        counts = self.cost.model.clients_at(list(splits.values()))[None]
        up, tail = (max(phase) for phase in zip(*clients, strict=True))
        return up + self.cost.times.server_forward_s(self.server, counts[0]) + tail

    def _slowest_link_s(self, nbytes: Mapping[str, int]) -> float:
        return max((self.cost.times.sent_s(size, self._budget(name)) for name, size in nbytes.items()), default=0.0)
