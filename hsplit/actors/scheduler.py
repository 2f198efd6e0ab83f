"""The scheduler: from budgets and importance to the plan of a round. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hsplit.config import RunConfig
from hsplit.models.segment import model_config
from hsplit.scheduling.budgets import ClientBudget
from hsplit.scheduling.clock import VirtualClock
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.importance import equal_importance
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.planner import EQUAL, plan


class Scheduler:
    """Plans rounds.

    Args:
        config: the run's configuration.
        directory: model directory; no tensor is read from it.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._config = config
        policy, job = config.policy, config.job
        self.cost = CostModel(
            model_config(directory),
            job,
            # FedAvg of the factors leaves the residual empty.
            residual=policy.aggregation != "fedavg",
            top_rank=policy.ranks if isinstance(policy.ranks, int) else None,
        )
        self._importance: Mapping[str, float] = equal_importance(self.cost.model.weights)
        self._source = EQUAL

    def set_importance(self, scores: Mapping[str, float], source: str) -> None:
        """Plan with ``H_w`` by weight name from now on; ``source`` says in words where it is from."""
        self._importance, self._source = dict(scores), source

    def plan(self, current: Plan | None = None, clients: Sequence[ClientBudget] | None = None) -> Plan:
        """The next plan.

        Args:
            current: the plan in force, which the search then starts from too.
            clients: budgets in place of the declared ones, after a change or a measurement.

        Raises:
            InputError: see :func:`hsplit.scheduling.planner.plan`.
        """
        budgets = self._config.clients if clients is None else clients
        policy, server = self._config.policy, self._config.server
        return plan(budgets, server, self.cost, self._importance, policy, current, self._source)

    def transfer_time_s(self, up_bytes: Mapping[str, int], down_bytes: Mapping[str, int]) -> float:
        """Virtual seconds of a round's end: adapters up, then residual changes and restarts down, by client name."""
        return self._clock().transfer(up_bytes, down_bytes)

    def validation_time_s(self, plan: Plan, batches: Mapping[str, int]) -> float:
        """Virtual seconds of one validation under ``plan``; ``batches`` by client name."""
        return self._clock().validation(plan, batches)

    def _clock(self) -> VirtualClock:
        return VirtualClock(self.cost, self._config.clients, self._config.server)
