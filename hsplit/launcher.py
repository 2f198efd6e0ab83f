"""Launching, planning and resuming from Python; the command line is a shell over these."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsplit.actors.executor import LOCALHOST, ActorFailure
from hsplit.actors.fork_server import ForkServer
from hsplit.actors.scheduler import Scheduler
from hsplit.checkpoint import latest_checkpoint, read_state
from hsplit.config import RunConfig, load_run_config
from hsplit.config.files import displayed, parse_yaml
from hsplit.config.overrides import Overrides
from hsplit.coordinator import Coordinator, Inputs
from hsplit.dependency_messages import quieten_bitsandbytes
from hsplit.errors import HsplitError, InputError, RunError, os_reason
from hsplit.exporting import ExportOptions, export_run
from hsplit.failure_text import asked_for
from hsplit.home import keep_ray_token
from hsplit.inbox import post_budget, post_join, post_leave
from hsplit.janitor import MARK, Janitor
from hsplit.models.source import ModelSource, find_model
from hsplit.observe.events import EventLog
from hsplit.observe.logs import check_logs, logs_of
from hsplit.observe.monitoring import announce, discovery_file
from hsplit.observe.observer import Observer, Observers
from hsplit.observe.progress_file import ProgressFile
from hsplit.observe.ray_metrics import RayMetrics, metrics_address
from hsplit.observe.runs import results_lines, run_state, way_on
from hsplit.observe.tables import read_metrics
from hsplit.observe.terminal import display_for
from hsplit.preparation import check_model, own_code, read_inputs, settled
from hsplit.report.report import write_report
from hsplit.run_directory import RunDirectory
from hsplit.run_state import RunState, Status
from hsplit.scheduling.importance import equal_importance
from hsplit.scheduling.insight import Insight, explained
from hsplit.scheduling.plan import Plan
from hsplit.shadowing import shadowing_file, why_refused
from hsplit.streams import is_terminal
from hsplit.tracebacks import unexpected
from hsplit.waiting import Waiting

if TYPE_CHECKING:
    import pandas

# A module in the working directory that has a name of Python's own, such as random.py, is not for Ray's processes.
OWN_MODULES_ONLY = {"PYTHONSAFEPATH": "1"}
# For clients that join a local run, however little the others ask for.
_LEAST_SPARE_CPUS = 4


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
        runs_dir: where the run's directory goes.
        name: the run's name, made up from the time by default.
        address: a running Ray cluster (``auto`` for the one on this machine); by default a local one is started.
        cpu: run a cluster file with GPUs on CPUs.
        dashboard_host: where a local Ray's dashboard listens; by default only this machine reaches it.
        display: what to show; the terminal by default.

    Raises:
        InputError: something given is wrong; nothing was started.
        RunError: the run failed; its last checkpoint is complete and the text says how to resume.
    """
    run = settled(load_run_config(cluster, policy, overrides, cpu=cpu))
    check_logs(run)
    with helpers_of(run, address) as helpers:
        with Waiting("looking for the model") as waiting:
            source = find_model(run.job.model, progress=is_terminal(sys.stderr))
            waiting.update("checking the model")
            check_model(run, source)
            waiting.update("reading model and data")
            inputs = read_inputs(run, source)
            waiting.update("making a plan")
            # Made again by the scheduler: that nobody fits is said before anything starts.
            Scheduler(run, source.directory).plan()
        directory = RunDirectory.create(Path(runs_dir), name)
        run.save(directory.config)
        with _left_out_if_refused(directory):
            return _drive(run, source, inputs, directory, address, dashboard_host, display, helpers)


def resume(
    path: str | Path,
    overrides: Overrides = (),
    *,
    address: str | None = None,
    dashboard_host: str = LOCALHOST,
    display: Observer | None = None,
) -> Run:
    """Go on with a run from its last complete checkpoint, or from its start while it has none.

    Of a run that is complete already it is told where the results are, and nothing is started.

    Args:
        path: the run's directory.
        overrides: ``key=value`` strings or a mapping, of the keys that say how far a step goes (``job.lr``,
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
        with display or display_for(sys.stdout) as shown:
            shown.finished([f"{displayed(directory.path)}: is complete already", *results_lines(directory)])
        return Run(directory.path, True)
    with helpers_of(run, address) as helpers:
        with Waiting("reading model and data"):
            source = find_model(run.job.model, progress=is_terminal(sys.stderr))
            inputs = read_inputs(run, source)
            if found is None:
                Scheduler(run, source.directory).plan()
        return _drive(
            run, source, inputs, directory, address, dashboard_host, display, helpers, found, passed_over, changes
        )


def plan(
    cluster: str | Path, policy: str | Path | None = None, overrides: Overrides = (), *, cpu: bool = False
) -> Plan:
    """The plan that :func:`launch` would start with; reads the model's ``config.json`` only."""
    with Waiting("reading the model, making a plan"):
        _, scheduler = _planning(cluster, policy, overrides, cpu)
        return scheduler.plan()


def explained_plan(
    cluster: str | Path, policy: str | Path | None = None, overrides: Overrides = (), *, cpu: bool = False
) -> tuple[Plan, Insight]:
    """:func:`plan`, with whom it waits for most and what one more GB of memory would buy."""
    with Waiting("reading the model, making a plan"):
        run, scheduler = _planning(cluster, policy, overrides, cpu)
        made, cost = scheduler.plan(), scheduler.cost
        importance = equal_importance(cost.model.weights)
        return made, explained(made, run.participants, run.server, cost, importance, run.policy)


def _planning(
    cluster: str | Path, policy: str | Path | None, overrides: Overrides, cpu: bool
) -> tuple[RunConfig, Scheduler]:
    run = settled(load_run_config(cluster, policy, overrides, cpu=cpu))
    source = find_model(run.job.model, progress=is_terminal(sys.stderr), weights=False)
    check_model(run, source)
    for line in own_code(run.policy):
        print(line, file=sys.stderr)
    return run, Scheduler(run, source.directory)


def change_budget(path: str | Path, holder: str, values: Overrides) -> None:
    """Change a budget of a run that is under way, from its next round's end on.

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
    """Let clients join a run that is under way, from its next round's end on.

    Args:
        path: the run's directory.
        client: as a cluster file has it, a mapping or YAML text (``{name: tablet, memory_gb: 0.2, data: /srv/a.csv}``);
            or the name of a client that has left or was set aside, which comes back.

    Returns:
        The names of who is to join.

    Raises:
        InputError: there is no such run, or the client cannot join it.
    """
    directory = RunDirectory.open(Path(path))
    document = parse_yaml(client, "--client") if isinstance(client, str) else client
    if not isinstance(document, str | Mapping):
        raise InputError("--client: must be a mapping such as {name: tablet, memory_gb: 0.2, data: FILE}, or a name")
    return post_join(directory, document)


def leave(path: str | Path, client: str) -> None:
    """Have a run that is under way go on without ``client`` from its next round's end on.

    Args:
        path: the run's directory.
        client: its name.

    Raises:
        InputError: there is no such run or client.
    """
    post_leave(RunDirectory.open(Path(path)), client)


@dataclass(frozen=True)
class Helpers:
    """Processes beside the driver.

    Attributes:
        janitor: tidies up when the driver is gone.
        fork_server: forks a local Ray's workers, or ``None``.
    """

    janitor: Janitor
    fork_server: ForkServer | None


@contextmanager
def helpers_of(run: RunConfig, address: str | None) -> Iterator[Helpers]:
    """Start what works beside the driver, while everything is checked.

    Workers of a local cluster are forked from a process that imports meanwhile; not where a holder has a GPU, which a
    forked process may be unable to use, and not on systems whose own libraries do not bear a fork.
    """
    quieten_bitsandbytes()
    # Read when Ray is imported. What the coordinator tells of a lost actor is enough.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
    # A local one whose dashboard is not there by then is no Ray; its own 60 s are short on a machine with much to do.
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")
    if address is None:
        if (file := shadowing_file()) is not None:
            raise InputError(why_refused(file))
        # Under `uv run` Ray would upload the whole working directory for workers that are on this machine anyway.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            keep_ray_token()
        except OSError as error:
            raise InputError(
                f"HOME: Ray's token cannot be written there nor elsewhere ({os_reason(error)}); set HOME or TMPDIR to a"
                " directory that can be written"
            ) from error
    with Waiting("importing Ray"):
        import ray

    holders = (run.server, *run.participants)
    local = address is None and not ray.is_initialized()
    forking = local and sys.platform == "linux" and not any(holder.num_gpus for holder in holders)
    environment = OWN_MODULES_ONLY if local else {}
    with (
        Janitor() as janitor,
        _environment({MARK: str(janitor.root), "TMPDIR": str(janitor.root), **environment}),
    ):
        if not forking:
            yield Helpers(janitor, None)
            return
        with ForkServer(within=janitor.root) as fork_server:
            yield Helpers(janitor, fork_server)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Give ``values`` to the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# -- the run ------------------------------------------------------------------------------------------------------


def _drive(
    run: RunConfig,
    source: ModelSource,
    inputs: Inputs,
    directory: RunDirectory,
    address: str | None,
    dashboard_host: str,
    display: Observer | None,
    helpers: Helpers,
    checkpoint: Path | None = None,
    passed_over: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> Run:
    """Start Ray and the actors, run the coordinator, leave everything tidy."""
    from hsplit.actors.placement import place
    from hsplit.actors.preflight import preflight
    from hsplit.actors.ray_executor import RayExecutor
    from hsplit.actors.ray_failures import RAY, failing_as

    own = own_code(run.policy)
    with directory.driven(), _failing_well(directory, address) as course:
        begun_before = checkpoint is None and directory.events.exists()
        state = RunState() if checkpoint is None else read_state(checkpoint)
        others: list[Observer] = [
            ProgressFile(directory.progress),
            RayMetrics(),
            *logs_of(run, directory, state.step),
        ]
        shown = Observers(display or display_for(sys.stdout), *others)
        announced = helpers.janitor.root.name
        helpers.janitor.removes(*directory.half_written, glob.escape(str(discovery_file(announced))))
        with ray_of(run, address, helpers, dashboard_host=dashboard_host) as dashboard:
            # Who takes no part any more, or is lost, need not be there for the others to go on.
            with Waiting("checking the nodes and their base model"):
                gone = state.with_status(Status.LEFT, Status.ASIDE)
                placement = place(run, without=gone, lost=state.to_return)
                notes = preflight(run, placement, source.directory, inputs.model_fingerprint)
            name, fingerprint = directory.path.name, inputs.model_fingerprint
            with failing_as(RAY, "naming its metrics endpoint"):
                metrics = metrics_address()
            announce(announced, metrics)
            with Waiting("starting the actors"):
                executor = RayExecutor(name, run, source.directory, placement, fingerprint)
            with shown, closing(executor):
                headlines = _headlines(run, source, directory, dashboard, metrics)
                shown.started(name, [*headlines, *(f"code     {line}" for line in own), *notes])
                clock_of = Scheduler(run, source.directory).clock
                coordinator = Coordinator(run, executor, directory, inputs, shown, clock_of)
                course.coordinator = coordinator
                coordinator.loaded(own)
                if changes:
                    run.save(directory.config)
                    coordinator.changed(changes)
                if begun_before:
                    coordinator.begins_again()
                with _stop_on_signal(coordinator, shown):
                    complete = coordinator.run(checkpoint, passed_over)
                    if complete:
                        for line in export_run(directory.path, None, ExportOptions()).lines:
                            shown.note(line)
                    write_report([directory.path], directory.report)
                if complete:
                    coordinator.finish()
                shown.finished(results_lines(directory) if complete else [f"stopped; {way_on(directory, address)}"])
    return Run(directory.path, complete)


@contextmanager
def ray_of(
    run: RunConfig,
    address: str | None,
    helpers: Helpers,
    *,
    dashboard: bool = True,
    dashboard_host: str = LOCALHOST,
) -> Iterator[str | None]:
    """Ray for ``run``'s actors, unless this process is connected already; yields the dashboard's address, if any."""
    import ray

    from hsplit.actors.ray_connection import connect

    if ray.is_initialized():
        yield None
        return
    cpus = local_cpus(run)
    root, fork_server = helpers.janitor.root, helpers.fork_server
    with Waiting("starting Ray" if address is None else f"connecting to the Ray cluster at {address}"):
        found = connect(address, cpus, dashboard, root=root, fork_server=fork_server, dashboard_host=dashboard_host)
    try:
        yield found
    finally:
        ray.shutdown()


def local_cpus(run: RunConfig) -> float:
    """How many logical CPUs a local Ray needs at least: with room for as many clients again, which may join.

    Ray only keeps account of them. Workers that it starts beforehand, where it does, are no more than there are cores.
    """
    clients = sum(client.num_cpus for client in run.participants)
    return run.server.num_cpus * run.server.replicas + clients + max(clients, _LEAST_SPARE_CPUS)


@contextmanager
def _left_out_if_refused(directory: RunDirectory) -> Iterator[None]:
    """Leave no directory of a run that was refused, or of which nothing was begun: its name is free again."""
    try:
        yield
    except Exception as error:
        # Input that only a client can read, or only the model itself shows to be wrong, is refused before round 0 ends.
        refused = isinstance(error, InputError) and not directory.has_checkpoints
        if refused or not directory.events.exists():
            shutil.rmtree(directory.path)
        raise


@dataclass
class _Course:
    """What is under way, for who has to say where it ended.

    Attributes:
        coordinator: drives the run, as soon as there is one.
    """

    coordinator: Coordinator | None = None


@contextmanager
def _failing_well(directory: RunDirectory, address: str | None = None) -> Iterator[_Course]:
    """Turn what ends a run into one line that says where, why and how to go on, on the terminal and in the log.

    The traceback of what nothing foresaw is kept in the run's directory. Of a run of which nothing was begun nothing is
    said in its log, since it has none, nor of input that was refused before anything of this process was.
    """
    course = _Course()
    try:
        yield course
    except KeyboardInterrupt:
        raise KeyboardInterrupt(way_on(directory, address)) from None
    except InputError as error:
        if course.coordinator is not None:
            _log_failure(directory, course, str(error))
        raise
    except Exception as error:
        if not directory.events.exists():
            raise
        what = _told(error, course, directory)
        _log_failure(directory, course, what)
        if isinstance(error, ActorFailure) and error.kind == "diverged" and course.coordinator is not None:
            raise RunError(f"{what}; {_way_on_with_smaller_steps(directory, address, course.coordinator)}") from error
        raise RunError(f"{what}; {way_on(directory, address)}") from error


def _told(error: Exception, course: _Course, directory: RunDirectory) -> str:
    """What ended a run, in one line."""
    if course.coordinator is None:
        return str(error if isinstance(error, HsplitError) else unexpected(error, directory.path))
    round_ = course.coordinator.round
    if isinstance(error, ActorFailure) and error.kind == "diverged":
        lr = course.coordinator.context.job.lr
        return f"training diverged in round {round_}: {error.reason}; job.lr = {lr:g} is too large"
    if isinstance(error, ActorFailure):
        told = f"{error.actor} failed in {asked_for(error)} in round {round_}: {error.reason}"
        # Else a run that has begun could only fail again of it.
        waited = f" (waited for: job.faults.patience_s = {course.coordinator.context.job.faults.patience_s:g}, which"
        return told + (f"{waited} `hsplit resume` changes with --set)" if error.kind == "late" else "")
    if isinstance(error, HsplitError):
        return f"round {round_}: {error}"
    if isinstance(error, ConnectionError):
        return f"round {round_}: a connection broke: {os_reason(error)}"
    if isinstance(error, OSError):
        return f"round {round_}: a file could not be written: {os_reason(error)}"
    return f"round {round_}: {unexpected(error, directory.path)}"


def _way_on_with_smaller_steps(directory: RunDirectory, address: str | None, coordinator: Coordinator) -> str:
    """Advise how to continue a run that would diverge again at its present rate."""
    job = coordinator.context.job
    smaller = f"job.lr={min(job.lr / 10, type(job)().lr):.3g}"
    checkpoint = coordinator.last_checkpoint
    if checkpoint is None:
        return f"begin again with a smaller one, such as: {directory.resume_command(address, '--set', smaller)}"
    way = f"go on from the last finite checkpoint, {checkpoint.name}, with a smaller one, such as: "
    way += directory.resume_command(address, "--set", smaller)
    rows = coordinator.rows
    if rows and rows[-1].val_loss > rows[0].val_loss:
        way += f" (its validation loss is above that of round 0 already: better launch a new run with --set {smaller})"
    return way


def _log_failure(directory: RunDirectory, course: _Course, what: str) -> None:
    # The log's own disk may be the full one.
    with suppress(OSError):
        if course.coordinator is not None:
            course.coordinator.fail(what)
        else:
            with EventLog(directory.events) as events:
                events.write("failed", what)


@contextmanager
def _stop_on_signal(coordinator: Coordinator, display: Observer) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for an end after the current step; a second SIGINT ends at once."""

    def stop(number: int, frame: Any) -> None:
        if coordinator.stopping:
            raise KeyboardInterrupt
        coordinator.stopping = True
        display.note("stopping after the current step; once more to stop at once")

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        # Not in the main thread: the caller handles signals itself.
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _headlines(
    run: RunConfig, source: ModelSource, directory: RunDirectory, dashboard: str | None, metrics: str
) -> list[str]:
    job = run.job
    lines = [
        f"model    {job.model} from {source.origin}",
        f"policy   {run.policy.name}, base {job.base}, computed in {job.dtype}, labels at the {job.privacy.labels}",
        f"run      {directory.path}",
    ]
    if dashboard:
        # Ray has set it by now, where nobody else had.
        token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        kept = os.environ.get("RAY_AUTH_TOKEN_PATH")
        where = f"the token in {kept}" if kept else "the output of: ray get-auth-token"
        sign_in = f" (sign in with {where})" if token else ""
        lines.append(f"ray      http://{dashboard}{sign_in}")
        if not token:
            lines.append("warning  Ray asks for no token here: whoever reaches its ports can run code on this machine")
    lines.append(f"metrics  http://{metrics}/metrics (to watch them in Grafana: hsplit monitoring --to DIR)")
    return lines


def plan_summary(made: Plan, insight: Insight) -> dict[str, Any]:
    """The plan as ``hsplit plan --json`` prints it."""

    def holder(part: Any) -> dict[str, Any]:
        return {
            "name": part.name,
            "available": part.available,
            "split": part.split,
            "ranks": part.ranks,
            "memory_bytes": {"declared": part.declared_bytes, "predicted": part.predicted_bytes},
            "step_time_s": part.step_time_s,
            "captured_share": part.captured_share,
        }

    return {
        "makespan_s": made.makespan_s,
        "captured_importance": made.captured_importance,
        "importance": made.importance,
        "bottleneck": asdict(insight.bottleneck),
        "one_more_gb": [asdict(gain) for gain in insight.one_more_gb],
        "server": holder(made.server),
        "clients": [holder(client) | {"lacking_bytes": client.lacking_bytes} for client in made.clients],
    }
