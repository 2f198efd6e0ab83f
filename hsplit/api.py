"""The Python interface: launch, plan and resume runs, change them while they run. The command line calls it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit.actors.executor import LOCALHOST
from hsplit.cluster.ray_session import helpers_of
from hsplit.config import Job, RunConfig, load_run_config
from hsplit.config.overrides import Overrides, parse_overrides
from hsplit.config.reading import displayed, parse_yaml
from hsplit.data.description import DataDescription, describe
from hsplit.errors import InputError
from hsplit.machine import Level, Machine
from hsplit.models.lookup import find_model
from hsplit.models.tokenizer import load_tokenizer
from hsplit.observe.displays import display_for
from hsplit.observe.logs import check_logs
from hsplit.observe.observer import Observer
from hsplit.observe.run_list import results_lines, run_state
from hsplit.observe.tables import read_metrics
from hsplit.planning.importance import equal_importance
from hsplit.planning.insight import Insight, explained
from hsplit.planning.plan import Plan
from hsplit.planning.planning_state import Fleet
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import latest_checkpoint, read_state
from hsplit.run.inbox import post_budget, post_join, post_leave
from hsplit.run.inputs import check_model, own_code, read_fleet, read_inputs, resolved_config, unadapted_text
from hsplit.run_directory import RunDirectory
from hsplit.session import drive, remove_if_refused
from hsplit.streams import is_terminal
from hsplit.waiting import Waiting

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Attributes:
        path: its directory.
        complete: all rounds are done; otherwise it was stopped and can be resumed.
    """

    path: Path
    complete: bool

    @property
    def metrics(self) -> pandas.DataFrame:
        """One row a round; round 0 is before any training."""
        return read_metrics(self.path / "metrics.csv")

    @property
    def adapter(self) -> Path:
        """The PEFT adapter, once the run is complete; a run that trained every weight leaves :attr:`model` instead."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The merged model of a run that trained every weight, once it is complete."""
        return self.path / "model"


def launch(
    cluster: str | Path,
    policy: str | Path | None = None,
    overrides: Overrides = (),
    *,
    runs_dir: str | Path = "runs",
    name: str | None = None,
    address: str | None = None,
    cpu: bool = False,
    dashboard_host: str = LOCALHOST,
    display: Observer | None = None,
) -> Run:
    """Fine-tune as a cluster file says.

    Args:
        cluster: path or name of a cluster file.
        policy: path or name of a policy file; ``hsplitlora`` by default.
        overrides: ``key=value`` strings, or a mapping of dotted keys.
        runs_dir: folder of the run's directory.
        name: the run's name, made from the time by default.
        address: a running Ray cluster (``auto`` for the one on this machine); by default a local one is started.
        cpu: run a cluster file with GPUs on CPUs.
        dashboard_host: address that a local Ray's dashboard listens at; by default only this machine reaches it.
        display: shows the run; the terminal by default.

    Raises:
        InputError: an argument or a file is wrong; nothing was started.
        RunError: the run failed; its last checkpoint is complete and the text says how to resume.
    """
    run = resolved_config(load_run_config(cluster, policy, overrides, cpu=cpu))
    check_logs(run)
    shortages = _shortages(run, address)
    with helpers_of(run, address) as helpers:
        with Waiting("looking for the model") as waiting:
            source = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence)
            waiting.update("checking the model")
            check_model(run, source)
            waiting.update("reading model and data")
            inputs = read_inputs(run, source)
            waiting.update("making a plan")
            # The scheduler makes it again; here a fleet that does not fit is refused before anything starts.
            Scheduler(run, source.spec).check_start()
        directory = RunDirectory.create(Path(runs_dir), name)
        run.save(directory.config)
        _tell(shortages)
        with remove_if_refused(directory):
            complete = drive(run, source, inputs, directory, address, dashboard_host, display, helpers)
            return Run(directory.path, complete)


def resume(
    path: str | Path,
    overrides: Overrides = (),
    *,
    address: str | None = None,
    dashboard_host: str = LOCALHOST,
    display: Observer | None = None,
) -> Run:
    """Continue a run from its last complete checkpoint, or from its start while it has none.

    For a run that is complete, only its results are shown.

    Args:
        path: the run's directory.
        overrides: ``key=value`` strings or a mapping, of the keys that set the size of a step (``job.lr``,
            ``job.schedule``, ``job.warmup``, ``job.clip``, ``job.weight_decay``) and of ``job.faults``. They hold from
            here on.
        address, dashboard_host, display: see :func:`launch`.

    Raises:
        InputError, RunError: see :func:`launch`.
    """
    directory = RunDirectory.open(Path(path))
    run, changes = RunConfig.load(directory.config).resumed_with(overrides)
    check_logs(run)
    found, passed_over = latest_checkpoint(directory.checkpoints) if directory.has_checkpoints else (None, [])
    done = found is None or read_state(found).round >= run.job.rounds
    if done and run_state(directory).state == "complete":
        with display or display_for(sys.stdout) as observer:
            observer.finished([f"{displayed(directory.path)}: is complete already", *results_lines(directory)])
        return Run(directory.path, True)
    shortages = _shortages(run, address)
    with helpers_of(run, address) as helpers:
        with Waiting("reading model and data"):
            source = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence)
            inputs = read_inputs(run, source)
            if found is None:
                Scheduler(run, source.spec).check_start()
        _tell(shortages)
        complete = drive(
            run, source, inputs, directory, address, dashboard_host, display, helpers, found, passed_over, changes
        )
        return Run(directory.path, complete)


def _shortages(run: RunConfig, address: str | None) -> list[str]:
    """Describe what a run on this machine would lack; the nodes of a cluster are examined once it is reached.

    Raises:
        InputError: it would not start.
    """
    if address is not None:
        return []
    found = Machine.here().findings(run.declared_bytes())
    if bad := [finding for finding in found if finding.level is Level.BAD]:
        raise InputError(f"this machine: {'; '.join(map(str, bad))}")
    return [f"machine: {finding}" for finding in found if finding.level is Level.NOTE]


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def plan(
    cluster: str | Path, policy: str | Path | None = None, overrides: Overrides = (), *, cpu: bool = False
) -> Plan:
    """The plan that :func:`launch` would start with; reads no weights, and the shared data where plans depend on it."""
    with Waiting("reading the model, making a plan"):
        _, scheduler, fleet = _planning(cluster, policy, overrides, cpu)
        return scheduler.plan(fleet)


def explained_plan(
    cluster: str | Path, policy: str | Path | None = None, overrides: Overrides = (), *, cpu: bool = False
) -> tuple[Plan, Insight, Job]:
    """:func:`plan` with its bottleneck, the gain of one more GB of memory at each holder, and the job planned for."""
    with Waiting("reading the model, making a plan"):
        run, scheduler, fleet = _planning(cluster, policy, overrides, cpu)
        made, cost = scheduler.plan(fleet), scheduler.cost
        importance = equal_importance(cost.model.weights)
        return made, explained(made, run.participants, run.server, cost, importance, run.policy, fleet), run.job


def _planning(
    cluster: str | Path, policy: str | Path | None, overrides: Overrides, cpu: bool
) -> tuple[RunConfig, Scheduler, Fleet]:
    run = resolved_config(load_run_config(cluster, policy, overrides, cpu=cpu))
    source = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence, weights=False)
    check_model(run, source)
    for line in (*own_code(run.policy), unadapted_text(source.spec)):
        if line:
            print(line, file=sys.stderr)
    fleet, unread = read_fleet(run, source)
    if unread:
        print(f"data not read, so plans hold the whole embedding at every client: {unread}", file=sys.stderr)
    return run, Scheduler(run, source.spec), fleet


def describe_data(
    source: str | Path | None = None,
    model: str | None = None,
    cluster: str | Path | None = None,
    overrides: Overrides = (),
) -> tuple[DataDescription, Job]:
    """How a run would read its shared data, and who would get what of it.

    Args:
        source: as ``job.data.source``; by default the cluster's data.
        model: as ``job.model``, for its tokenizer and chat template; by default the cluster's.
        cluster: whose job it is for; where it is given, also who of its clients would get what.
        overrides: as for :func:`launch`.

    Returns:
        What was found, and the job.

    Raises:
        InputError: nothing of the source can be learned from.
    """
    given = {own.key: own.value for own in parse_overrides(overrides)}
    given |= {"job.data.source": str(source), "job.data.mixture": []} if source is not None else {}
    given |= {"job.model": model} if model else {}
    run = resolved_config(load_run_config(cluster or "hetero", None, given))
    sharing = [client.name for client in run.clients if client.data is None] if cluster else []
    with Waiting("reading the data"):
        found = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence, weights=False)
        tokenizer = load_tokenizer(found.directory)
        return describe(run.job, tokenizer, sharing), run.job


def change_budget(path: str | Path, holder: str, values: Overrides) -> None:
    """Change a budget of a run under way, from its next round's end on.

    Args:
        path: the run's directory.
        holder: client name or ``server``.
        values: ``field=value`` strings, or a mapping: memory_gb, tflops, bandwidth_mbps, latency_ms.

    Raises:
        InputError: there is no such run, holder or field, or a value is out of range.
    """
    directory = RunDirectory.open(Path(path))
    if not isinstance(values, Mapping):
        pairs = [text.partition("=") for text in values]
        for field, equals, _ in pairs:
            if not equals:
                raise InputError(f"{field}: must be FIELD=VALUE, such as memory_gb=0.1")
        values = {field: parse_yaml(value, field) for field, _, value in pairs}
    post_budget(directory, holder, values)


def join(path: str | Path, client: str | Mapping[str, Any]) -> tuple[str, ...]:
    """Let clients join a run under way at its next round's end.

    Args:
        path: the run's directory.
        client: an entry of a cluster file, a mapping or YAML text
            (``{name: tablet, memory_gb: 0.2, data: /srv/a.csv}``); or the name of a client that has left or was set
            aside, which comes back.

    Returns:
        The names of the clients that are to join.

    Raises:
        InputError: there is no such run, or the client cannot join it.
    """
    directory = RunDirectory.open(Path(path))
    document = parse_yaml(client, "--client") if isinstance(client, str) else client
    if not isinstance(document, str | Mapping):
        raise InputError("--client: must be a mapping such as {name: tablet, memory_gb: 0.2, data: FILE}, or a name")
    return post_join(directory, document)


def leave(path: str | Path, client: str) -> None:
    """Let ``client`` leave a run under way at its next round's end.

    Args:
        path: the run's directory.
        client: its name.

    Raises:
        InputError: there is no such run or client.
    """
    post_leave(RunDirectory.open(Path(path)), client)


def plan_summary(made: Plan, insight: Insight, job: Job) -> dict[str, Any]:
    """The plan as ``hsplit plan --json`` prints it."""

    def holder(part: Any) -> dict[str, Any]:
        return {
            "name": part.name,
            "available": part.available,
            "split": part.split,
            "rows": part.rows or job.batch_size,
            "period": made.groups * part.every,
            "phase": part.group + made.groups * part.offset,
            "stored": part.stored,
            "working_copy": part.working_copy,
            "wire": part.wire or job.wire,
            "ranks": part.ranks,
            "memory_bytes": {"declared": part.declared_bytes, "predicted": part.predicted_bytes},
            "step_time_s": part.step_time_s,
            "busy_share": part.step_time_s / made.makespan_s if part.available and made.makespan_s else 0.0,
            "captured_share": part.captured_share,
        }

    return {
        "makespan_s": made.makespan_s,
        "speed": None if made.speed is None else asdict(made.speed),
        "captured_importance": made.captured_importance,
        "importance": made.importance,
        "bottleneck": asdict(insight.bottleneck),
        "one_more_gb": [asdict(gain) for gain in insight.one_more_gb],
        "server": holder(made.server),
        "clients": [holder(client) | {"lacking_bytes": client.lacking_bytes} for client in made.clients],
    }
