"""A run in this process, without Ray: the same coordinator and the same actors' classes, for experiments and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsplit.actors.executor import SCHEDULER, SERVER, InProcess
from hsplit.actors.participant import base_model
from hsplit.actors.participants import participant_class
from hsplit.actors.replica import Replica
from hsplit.actors.scheduler import Scheduler
from hsplit.actors.server import Server
from hsplit.config import RunConfig
from hsplit.coordinator import Coordinator, Inputs
from hsplit.observe.terminal import Display
from hsplit.run_directory import RunDirectory


def local_run(
    run: RunConfig,
    model: Path,
    directory: RunDirectory,
    inputs: Inputs,
    display: Display,
    *,
    device: str = "cpu",
    measure: bool = False,
    scheduler: Any = None,
) -> Coordinator:
    """A coordinator over plain objects, ready to run.

    Everybody's memory is in one process, so that a measured peak is one holder's only as far as it works alone.

    Args:
        run: resolved configuration, with ``job.dtype`` settled.
        model: model directory.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what to show.
        device: where everybody computes.
        measure: follow each holder's peak of allocated memory, which takes time.
        scheduler: makes the plans; the run's own by default.
    """
    base, make = base_model(model, run.job), participant_class(run.policy)

    def actor(name: str) -> Any:
        if name == SCHEDULER:
            return scheduler or Scheduler(run, model)
        if name == SERVER:
            return Server(run.job, run.policy, base, device, measure=measure)
        if name in run.server.names:
            return Replica(run.job, run.policy, base, device, measure=measure, name=name)
        return make(name, run.job, run.policy, base, device, measure=measure)

    names = [*(client.name for client in run.participants), *run.server.names, SCHEDULER]
    return Coordinator(run, InProcess({name: actor(name) for name in names}, actor), directory, inputs, display)
