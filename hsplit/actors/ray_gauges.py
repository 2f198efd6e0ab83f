"""Gauges as Ray actors, in the places and with the resources and threads that a run's actors would have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hsplit.actors.gauge import Gauge
from hsplit.actors.participant import base_model
from hsplit.actors.ray_executor import RayExecutor
from hsplit.config import Job, Policy
from hsplit.models.source import ModelReference


def make_gauge(job: Job, policy: Policy, model: ModelReference, device: str, at_server: bool) -> Gauge:
    """Make a gauge on the node of the holder whose place it takes.

    Raises:
        InputError: the model is not there.
    """
    return Gauge(job, policy, base_model(model.locate(), job), device, at_server=at_server)


class GaugeExecutor(RayExecutor):
    """As the executor of a run, with gauges for clients and servers, and nobody to plan."""

    _helpers = ()

    def _maker(self, name: str, device: str) -> Callable[[], Any]:
        run, model = self._run, self._base_of(name)
        return partial(make_gauge, run.job, run.policy, model, device, name in run.server.names)
