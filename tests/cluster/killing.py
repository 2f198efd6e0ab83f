"""Real actors on Ray that are killed at a chosen moment of a run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from hsplit.actors.executor import Ref
from hsplit.cluster.ray_executor import NAMESPACE, RayExecutor
from hsplit.config import RunConfig, load_run_config
from hsplit.models.lookup import find_model
from hsplit.observe.events import read_events
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Coordinator
from hsplit.run.inputs import read_inputs, resolved_config
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, rows_of

# Of all actors; a round of the drill's cluster is some sixty.
CALLS_BETWEEN_KILLS = (10, 80)
MOST_TAKEN_BYTES, PIECE_BYTES = 8 << 30, 64 << 20


@dataclass
class Kill:
    """SIGKILL ``victim`` while ``actor`` does its ``nth`` call of ``method``, counted from 1."""

    victim: str
    actor: str
    method: str
    nth: int
    done: bool = False


@dataclass
class Happening:
    """Call ``what`` with the executor before the ``nth`` call of ``actor.method``."""

    actor: str
    method: str
    nth: int
    what: Callable[[KillingExecutor], None]
    done: bool = False


class KillingExecutor(RayExecutor):
    """The product's executor; processes die, or something else happens, at chosen calls."""

    happenings: list[Kill | Happening]

    def __init__(self, *arguments: Any) -> None:
        self.happenings = []
        self.closed = False
        self._calls: Counter[tuple[str, str]] = Counter()
        super().__init__(*arguments)

    @property
    def called(self) -> int:
        """How many calls there were of any actor."""
        return self._calls.total()

    def close(self) -> None:
        self.closed = True
        super().close()

    def pid(self, actor: str) -> int:
        return int(ray.get(self._handles[actor].__ray_call__.remote(lambda self: os.getpid())))

    def within(self, actor: str, what: Callable[[Any], Any]) -> Any:
        """Call ``what`` with the actor's own object, in its process."""
        return ray.get(self._handles[actor].__ray_call__.remote(lambda shell: what(shell.actor)))

    def have_memory_taken(self, actor: str) -> None:
        """Have the actor take memory, before anything that it is asked for later, until its process is ended."""
        self._handles[actor].__ray_call__.remote(_take_memory)

    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        self._calls[actor, method.__name__] += 1
        victims = []
        for happening in self.happenings:
            meant = (happening.actor, happening.method) == (actor, method.__name__)
            if happening.done or not meant or self._calls[actor, method.__name__] < happening.nth:
                continue
            happening.done = True
            if isinstance(happening, Happening):
                happening.what(self)
                continue
            # Stopped first, so that the call is under way, and cannot be over, when the kill comes.
            victims.append(self.pid(happening.victim))
            if happening.victim == actor:
                os.kill(victims[-1], signal.SIGSTOP)
        refs = super().begin(actor, method, arguments, returns)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        return refs


def end_actor(name: str) -> None:
    """End the actor that Ray calls ``name``; from then on every call of it fails, the next one included.

    ``ray.kill`` alone only asks for that: how many more calls are answered says how busy the machine is. And where a
    process ends before Ray knows, Ray calls it unavailable.
    """
    actor = ray.get_actor(name, namespace=NAMESPACE)
    ray.kill(actor)
    while True:
        try:
            ray.get(actor.__ray_ready__.remote())
        except ActorUnavailableError:
            continue
        except ActorDiedError:
            return


def _take_memory(actor: Any) -> None:
    import numpy as np

    taken = []
    for _ in range(MOST_TAKEN_BYTES // PIECE_BYTES):
        taken.append(np.ones(PIECE_BYTES, dtype=np.uint8))
    # The memory monitor looks several times a second.
    time.sleep(60)


@dataclass
class Drill:
    """A run on real Ray with what happened in it.

    Attributes:
        coordinator: that drove it.
        path: the run's directory.
        complete: whether all rounds are done.
    """

    coordinator: Coordinator
    path: Path
    complete: bool

    def events_of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.path / "events.jsonl") if event["event"] in kinds]

    @property
    def final_ppl(self) -> float:
        return float(rows_of(self.coordinator)[-1]["val_ppl"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.csv without the wall's clock."""
        return [{k: v for k, v in row.items() if not k.endswith("wall_time_s")} for row in rows_of(self.coordinator)]


def drill(
    cluster_file: Path,
    runs_dir: Path,
    *happenings: Kill | Happening,
    overrides: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] | None = None,
    beside: Callable[[KillingExecutor], None] | None = None,
    name: str = "drill",
    checkpoint: Path | None = None,
    stop_after: int | None = None,
) -> Drill:
    """Run ``cluster_file`` on the Ray that is there; ``beside`` is called in a thread of its own meanwhile.

    With a ``checkpoint`` of that run it goes on from there; it is stopped after the step ``stop_after``.
    """
    run: RunConfig = resolved_config(load_run_config(cluster_file, None, overrides or {}))
    source = find_model(run.job.model)
    inputs = read_inputs(run, source)
    if checkpoint is None:
        directory = RunDirectory.create(runs_dir, name)
        run.save(directory.config)
    else:
        directory = RunDirectory.open(runs_dir / name)
    executor = KillingExecutor(directory.path.name, run, source.directory)
    executor.happenings = list(happenings)

    def stepped(step: int) -> None:
        coordinator.stopping = step == stop_after
        if after_step is not None:
            after_step(step)

    clock_of = Scheduler(run, source.spec).clock
    thread = None if beside is None else threading.Thread(target=beside, args=[executor], daemon=True)
    try:
        coordinator = Coordinator(run, executor, directory, inputs, Recorder(after_step=stepped), clock_of)
        if thread is not None:
            thread.start()
        complete = coordinator.run(checkpoint)
    finally:
        executor.close()
    assert all(happening.done for happening in happenings), "what was to happen has happened"
    return Drill(coordinator, directory.path, complete)


class RandomKills:
    """SIGKILL of ``count`` actors drawn from ``names``, one after another; to be called beside a run.

    Between two of them as many calls pass as are drawn, so that a run has room for all of them on any machine.

    Attributes:
        killed: the actors, in the order of their ends.
    """

    def __init__(self, seed: int, count: int, names: Sequence[str]) -> None:
        self._draw, self._count, self._names = random.Random(seed), count, names
        self.killed: list[str] = []

    def __call__(self, executor: KillingExecutor) -> None:
        while len(self.killed) < self._count:
            until = executor.called + self._draw.randint(*CALLS_BETWEEN_KILLS)
            while executor.called < until:
                if executor.closed:
                    return
                time.sleep(0.005)
            name = self._draw.choice(self._names)
            try:
                os.kill(executor.pid(name), signal.SIGKILL)
            except Exception:  # it is dead already, or not there yet
                continue
            self.killed.append(name)


def without_wall_time(metrics: Path) -> list[list[str]]:
    """The cells of a ``metrics.csv`` as they are written, but for the columns of the wall's clock."""
    heads, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    kept = [column for column, head in enumerate(heads) if not head.endswith("wall_time_s")]
    return [[row[column] for column in kept] for row in (heads, *rows)]
