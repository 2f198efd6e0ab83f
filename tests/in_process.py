"""Runs in this process: the product's coordinator, clients and server, with a plan and data given by the test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsplit.actors.executor import Executor
from hsplit.config import ClientConfig as ClientConfig
from hsplit.config import Importance, Job, Policy, RunConfig, ServerConfig
from hsplit.data import Example
from hsplit.models.spec import ModelSpec
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import PlanRow, read_rows
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.scheduler import Review
from hsplit.run.coordinator import Coordinator, Inputs
from hsplit.run.in_process import local_run
from hsplit.run_directory import RunDirectory
from tests.tiny import WORDS


class Recorder(SilentDisplay):
    """A display that records its calls."""

    def __init__(self, after_step: Any = None) -> None:
        super().__init__()
        self.losses: list[dict[str, float]] = []
        self.tables: list[tuple[Any, Any]] = []
        self.notes: list[str] = []
        self.after_step = after_step

    def step(self, round: int, rounds: int, step: int, steps: int, losses: Any, states: Any) -> None:
        self.losses.append(losses)
        if self.after_step is not None:
            self.after_step(step)

    def round_done(self, row: Any, holders: Any, timing: Any) -> None:
        super().round_done(row, holders, timing)
        self.tables.append((holders, timing))

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self.notes.append(text)


class FixedClock:
    """A virtual clock with seconds that are easy to add up."""

    def steps_s(self, plan: Plan, clients: Sequence[str], start: int) -> list[float]:
        return [plan.makespan_s]

    def watched_s(self, plan: Plan, tokens: int, clients: Sequence[str]) -> float:
        return 0.0625

    def finished_s(self, plan: Plan, clients: Sequence[str], start: int) -> dict[str, float]:
        return {}

    def probe_s(self, plan: Plan, tokens: int, clients: Sequence[str]) -> float:
        return 0.125

    def aggregation_s(
        self,
        plan: Plan,
        policy: Policy,
        up: dict[str, int],
        down: dict[str, int],
        clients: Sequence[str],
        finished: dict[str, float],
    ) -> float:
        return 0.25

    def reconfiguration_s(self, before: Plan, after: Plan, down: dict[str, int]) -> float:
        return 2.0

    def validation_s(self, plan: Plan, batches: dict[str, int]) -> float:
        return 0.5


class FixedScheduler:
    """Scheduler with the test's plans: the first one, and later ones by completed rounds; probes in every round.

    Args:
        plan: the first plan.
        later: the plan from the end of a round on, by that round.
    """

    def __init__(self, plan: Plan, later: Mapping[int, Plan] | None = None) -> None:
        self._plan, self._later = plan, later or {}

    def first(self, fleet: Fleet, state: PlanningState) -> Review:
        return Review(self._plan, (), None, state)

    def review(self, round_: int, current: Plan, fleet: Fleet, state: PlanningState, *found: Any) -> Review:
        reasons = ("the test says so",) if round_ in self._later else ()
        return Review(self._later.get(round_), reasons, None, state)

    def probe_matters(self, *given: Any) -> bool:
        return True

    def clock(self, fleet: Fleet, state: PlanningState) -> Any:
        return FixedClock()


def planned_run(
    run: RunConfig, model: Path, directory: RunDirectory, shares: Mapping[str, list[Example]], recorder: Recorder
) -> Coordinator:
    """A coordinator over plain objects whose plans are the scheduler's own, ready to run."""
    return local_run(run, ModelSpec.read(model), directory, Inputs(shares, "model", "data"), recorder)


def rows_of(run: Coordinator) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.csv``."""
    return [asdict(row) for row in run.rows]


def holders_of(run: Coordinator) -> list[dict[str, Any]]:
    """Rows of a run's ``plan.csv``."""
    return [asdict(row) for row in read_rows(run.context.directory.plan, PlanRow)]


def reached_by(executor: Executor, made: Coordinator) -> Coordinator:
    """The run of ``made``, which has not begun, with ``executor`` in place of its own."""
    context = made.context
    return Coordinator(
        context.declared, executor, context.directory, context.inputs, context.display, context._clock_of
    )


def random_examples(count: int, seed: int, longest: int = 8) -> list[Example]:
    """Examples of the tiny tokenizer's words, of unequal lengths."""
    draw = random.Random(seed)

    def words(low: int) -> str:
        return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(draw.randint(low, longest)))

    return [Example(words(1), " " + words(1), None) for _ in range(count)]


def fixed_plan(
    model: Path,
    job: Job,
    splits: Sequence[int],
    ranks: Sequence[int],
    server_rank: int,
    servers: int = 1,
    stored: Sequence[Any] | None = None,
    working_copy: bool = False,
) -> Plan:
    """A plan with one rank for each holder: client ``c{i}`` holds ``[0, splits[i])``, dense or as ``stored`` says."""
    spec = ModelSpec.read(model)
    shapes = spec.targeted(job.targets)
    forms = stored or ["dense"] * len(splits)
    clients = tuple(
        HolderPlan(f"c{i}", "client", True, split, {s.name: rank for s in shapes if s.layer < split}, stored=form)
        for i, (split, rank, form) in enumerate(zip(splits, ranks, forms, strict=True))
    )
    first = min(splits)
    deep = {s.name: server_rank for s in shapes if s.layer >= first}
    server = HolderPlan("server", "server", True, first, deep, working_copy=working_copy)
    return Plan(spec.layers, server, clients, 1.0, 0.0, "none", servers)


def coordinator(
    model: Path,
    to: Path,
    plan: Plan,
    shares: Mapping[str, list[Example]],
    recorder: Recorder,
    policy: Policy | None = None,
    directory: RunDirectory | None = None,
    later: Mapping[int, Plan] | None = None,
    data_sha256: str = "data",
    **job: Any,
) -> Coordinator:
    """A coordinator over plain objects, ready to run; for ``later`` see :class:`FixedScheduler`.

    Without a ``policy`` nothing is probed.
    """
    settings = Job.model_validate({"dtype": "fp32", "wire": "fp32", "clip": None, "rounds": 1, **job})
    policy = policy or Policy(name="hsplitlora", init="shared", importance=Importance(metric="equal"))
    clients = tuple(ClientConfig(name=c.name, kind=c.name, memory_gb=1.0, tflops=1.0) for c in plan.clients)
    run = RunConfig(server=ServerConfig(replicas=plan.servers), clients=clients, job=settings, policy=policy)
    directory = directory or RunDirectory.create(to, None)
    inputs, scheduler = Inputs(shares, "model", data_sha256), FixedScheduler(plan, later)
    return local_run(run, ModelSpec.read(model), directory, inputs, recorder, scheduler=scheduler)
