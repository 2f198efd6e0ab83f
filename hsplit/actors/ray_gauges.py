"""Gauges as Ray actors, in the places and with the resources and threads that a run's actors would have."""

from __future__ import annotations

from hsplit.actors.gauge import Gauge
from hsplit.actors.participant import base_model
from hsplit.actors.ray_executor import RayExecutor
from hsplit.actors.shells import settle_process
from hsplit.config import Job, Policy
from hsplit.models.source import ModelReference


class ClientGaugeActor(Gauge):
    """In a client's place."""

    def __init__(
        self, name: str, job: Job, policy: Policy, model: ModelReference, device: str, threads: int | None
    ) -> None:
        settle_process(threads)
        super().__init__(job, policy, base_model(model.locate(), job), device)


class ServerGaugeActor(Gauge):
    """In the server's place."""

    def __init__(self, job: Job, policy: Policy, model: ModelReference, device: str, sharing: int) -> None:
        settle_process(None, sharing)
        super().__init__(job, policy, base_model(model.locate(), job), device, at_server=True)


class ReplicaGaugeActor(ServerGaugeActor):
    """In the place of a server that does not aggregate."""

    def __init__(self, name: str, job: Job, policy: Policy, model: ModelReference, device: str, sharing: int) -> None:
        super().__init__(job, policy, model, device, sharing)


class GaugeExecutor(RayExecutor):
    """As the executor of a run, with gauges for clients and servers, and nobody to plan."""

    _server_class = ServerGaugeActor
    _replica_class = ReplicaGaugeActor
    _client_class = ClientGaugeActor
    _helpers = ()
