"""A run in this process, without Ray: the same coordinator and actors' classes, for experiments and tests."""

from __future__ import annotations

from typing import Any

from hsplit.actors.executor import InProcess
from hsplit.actors.factory import make_actor
from hsplit.config import SCHEDULER, RunConfig
from hsplit.models.spec import ModelSpec
from hsplit.observe.observer import Observer
from hsplit.run.coordinator import Coordinator, Inputs
from hsplit.run_directory import RunDirectory


def local_run(
    run: RunConfig,
    model: ModelSpec,
    directory: RunDirectory,
    inputs: Inputs,
    display: Observer,
    *,
    device: str = "cpu",
    measure: bool = False,
    scheduler: Any = None,
) -> Coordinator:
    """A coordinator over plain objects, ready to run.

    All holders' memory is in one process, so a measured peak is one holder's only while no other works.

    Args:
        run: resolved configuration, with a concrete ``job.dtype``.
        model: the base model.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: shows the run.
        device: of all holders.
        measure: record each holder's peak of allocated memory, which takes time.
        scheduler: makes the plans; the run's own by default.
    """

    def actor(name: str) -> Any:
        if name == SCHEDULER and scheduler is not None:
            return scheduler
        return make_actor(run, name, model, device, measure)

    names = [*(client.name for client in run.participants), *run.server.names, SCHEDULER]
    actors = {name: actor(name) for name in names}
    return Coordinator(run, InProcess(actors, actor), directory, inputs, display, actors[SCHEDULER].clock)
