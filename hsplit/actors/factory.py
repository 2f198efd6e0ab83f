"""The one map from actors' names to their classes, for Ray and for runs in one process."""

from __future__ import annotations

from typing import Any

from hsplit.actors.client import Client
from hsplit.actors.participant import Participant
from hsplit.actors.replica import Replica
from hsplit.actors.server import Server
from hsplit.actors.whole_client import WholeClient
from hsplit.config import SCHEDULER, SERVER, Job, Policy, RunConfig
from hsplit.models.lookup import ModelReference
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.planning.scheduler import Scheduler

HolderClass = type[Participant] | type[Replica]


def participant_class(policy: Policy) -> type[Participant]:
    """Return ``Client`` where the model is split, ``WholeClient`` where each client holds all of it."""
    return Client if policy.placement == "split" else WholeClient


def holder_class(run: RunConfig, name: str) -> HolderClass:
    """Return the class of a client or of a server, of which the first aggregates."""
    if name == SERVER:
        return Server
    return Replica if name in run.server.names else participant_class(run.policy)


def make_holder(
    cls: HolderClass,
    name: str,
    job: Job,
    policy: Policy,
    model: ModelReference,
    device: str = "cpu",
    measure: bool = True,
) -> Participant | Replica:
    """Make a client or server, in its own process, which keeps to its memory on a GPU.

    Args:
        cls: see :func:`holder_class`.
        name: its name.
        job, policy: the run's settings.
        model: finds the base model there.
        device: where it computes.
        measure: follow the peak of allocated memory.

    Raises:
        InputError: the model is not there, or is not the run's.
    """
    holder = cls(name, job, policy, BaseModel.of_job(model.read(), job), device, measure)
    holder.gpu_memory.limited = True
    return holder


def make_scheduler(run: RunConfig, model: ModelReference) -> Scheduler:
    """Make the scheduler, which reads only the model's configuration; errors as :func:`make_holder`."""
    return Scheduler(run, model.read())


def make_actor(run: RunConfig, name: str, model: ModelSpec, device: str, measure: bool) -> Any:
    """Make any actor of a run in this process."""
    if name == SCHEDULER:
        return Scheduler(run, model)
    base = BaseModel.of_job(model, run.job)
    return holder_class(run, name)(name, run.job, run.policy, base, device, measure)
