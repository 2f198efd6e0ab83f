"""A run in this process, without Ray: the same coordinator and the same actors' classes, for experiments and tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsplit.actors.executor import InProcess
from hsplit.actors.factory import make_actor
from hsplit.config import SCHEDULER, RunConfig
from hsplit.observe.observer import Observer
from hsplit.run.coordinator import Coordinator, Inputs
from hsplit.run_directory import RunDirectory


def local_run(
    run: RunConfig,
    model: Path,
    directory: RunDirectory,
    inputs: Inputs,
    display: Observer,
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

    def actor(name: str) -> Any:
        if name == SCHEDULER and scheduler is not None:
            return scheduler
        return make_actor(run, name, model, device, measure)

    names = [*(client.name for client in run.participants), *run.server.names, SCHEDULER]
    actors = {name: actor(name) for name in names}
    return Coordinator(run, InProcess(actors, actor), directory, inputs, display, actors[SCHEDULER].clock)
