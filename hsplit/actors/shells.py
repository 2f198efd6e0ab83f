"""What Ray makes actors of: plain classes that settle their process first, and find the model on their node."""

from __future__ import annotations

import os
from typing import Any

from hsplit.actors.client import Client
from hsplit.actors.participant import Participant, base_model
from hsplit.actors.replica import Replica
from hsplit.actors.scheduler import Scheduler
from hsplit.actors.server import Server
from hsplit.actors.whole_client import WholeClient
from hsplit.config import Job, Policy, RunConfig
from hsplit.dependency_messages import quieten_bitsandbytes
from hsplit.models.source import ModelReference


def settle_process(threads: int | None, sharing: int = 1) -> None:
    """Threads on purpose, and no library chatter on the user's terminal.

    Processes with idle thread pools fight over cores. A client therefore runs as many threads as it reserved CPUs,
    one by default, which needs no pool; the server computes while the clients wait and uses every core of its node,
    of which several servers there have equal parts.
    """
    import torch
    import transformers

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // sharing))
    transformers.logging.set_verbosity_error()
    quieten_bitsandbytes()


class _Returning:
    """Hands out what a method returned one value at a time: Ray Direct Transport moves one value a call.

    Its tensors stay on their device until the receiver takes them, or for good where that is the same device.
    """

    def begin(self, ticket: int, method: str, *arguments: Any) -> Any:
        """Call ``method`` and return the first of the values that it returns; :meth:`rest` has the others."""
        report, *rest = getattr(self, method)(*arguments)
        self._returned: dict[tuple[int, int], Any] = getattr(self, "_returned", {})
        self._returned |= {(ticket, index): value for index, value in enumerate(rest)}
        return report

    def rest(self, ticket: int, index: int) -> Any:
        return self._returned.pop((ticket, index))


class _ParticipantActor(Participant, _Returning):
    """The shell of a participant: settles threads and finds the model on its node."""

    def __init__(
        self, name: str, job: Job, policy: Policy, model: ModelReference, device: str, threads: int | None
    ) -> None:
        settle_process(threads)
        super().__init__(name, job, policy, base_model(model.locate(), job), device)


class ClientActor(_ParticipantActor, Client):
    """A client of a split model."""


class WholeClientActor(_ParticipantActor, WholeClient):
    """A participant with the whole model."""


class ServerActor(Server, _Returning):
    """The shell of the server."""

    def __init__(self, job: Job, policy: Policy, model: ModelReference, device: str, sharing: int) -> None:
        settle_process(None, sharing)
        super().__init__(job, policy, base_model(model.locate(), job), device)


class ReplicaActor(Replica, _Returning):
    """The shell of a server that does not aggregate."""

    def __init__(self, name: str, job: Job, policy: Policy, model: ModelReference, device: str, sharing: int) -> None:
        settle_process(None, sharing)
        super().__init__(job, policy, base_model(model.locate(), job), device, name=name)


class SchedulerActor(Scheduler):
    """The shell of the scheduler."""

    def __init__(self, run: RunConfig, model: ModelReference) -> None:
        settle_process(1)
        super().__init__(run, model.locate())
