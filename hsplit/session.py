"""A session: one process that drives one run, from starting Ray to tidying up, with signals and failures."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsplit.actors.executor import ActorFailure
from hsplit.cluster.ray_session import Helpers, ray_of
from hsplit.config import RunConfig
from hsplit.data.description import ClientShare
from hsplit.errors import HsplitError, InputError, RunError, os_reason
from hsplit.exporting.export import ExportOptions, export_run
from hsplit.models.lookup import ModelSource
from hsplit.observe.displays import display_for
from hsplit.observe.events import EventLog
from hsplit.observe.logs import logs_of
from hsplit.observe.monitoring import announce, discovery_file
from hsplit.observe.observer import Observer, Observers
from hsplit.observe.progress_file import ProgressFile
from hsplit.observe.ray_metrics import RayMetrics, metrics_address
from hsplit.observe.run_list import results_lines, way_on
from hsplit.planning.scheduler import Scheduler
from hsplit.report.report import write_report
from hsplit.run.checkpoint import read_state
from hsplit.run.coordinator import Coordinator, Inputs
from hsplit.run.failure_text import method_words
from hsplit.run.inputs import own_code, unadapted_text
from hsplit.run.state import RunState, Status
from hsplit.run_directory import RunDirectory
from hsplit.tracebacks import unexpected
from hsplit.waiting import Waiting


def drive(
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
) -> bool:
    """Start Ray and the actors, run the coordinator, and tidy up.

    Args:
        run: resolved configuration.
        source: the model.
        inputs: data shares and fingerprints.
        directory: the run's directory.
        address: of a running Ray cluster; ``None``: start a local one.
        dashboard_host: address that a local Ray's dashboard listens at.
        display: shows the run; ``None``: the terminal.
        helpers: processes beside Ray.
        checkpoint: to resume from; ``None``: start the run.
        passed_over: a sentence about each newer checkpoint that is damaged.
        changes: a sentence about each setting that a resume changes.

    Returns:
        True if the run is complete; false if it was stopped.

    Raises:
        InputError, RunError: see :func:`report_failures`.
    """
    from hsplit.cluster.placement import find_placement
    from hsplit.cluster.preflight import preflight
    from hsplit.cluster.ray_executor import RayExecutor
    from hsplit.cluster.ray_failures import RAY, failing_as

    own = own_code(run.policy)
    with directory.driven(), report_failures(directory, address) as progress:
        begun_before = checkpoint is None and directory.events.exists()
        state = RunState() if checkpoint is None else read_state(checkpoint)
        others: list[Observer] = [
            ProgressFile(directory.progress),
            RayMetrics(),
            *logs_of(run, directory, state.step),
        ]
        observers = Observers(display or display_for(sys.stdout), *others)
        announced = helpers.cleanup.root.name
        helpers.cleanup.remove_at_end(*directory.half_written, glob.escape(str(discovery_file(announced))))
        with ray_of(run, address, helpers, dashboard_host=dashboard_host) as dashboard:
            with Waiting("checking the nodes and their base model"):
                # The run can start without the clients that are lost or away.
                without = state.with_status(Status.LEFT, Status.ASIDE)
                placement = find_placement(run, without=without, lost=state.to_return)
                notes = preflight(run, placement, source.directory, inputs.model_fingerprint)
                notes += [f"data     {inputs.reading}"] if inputs.reading else []
                notes += [f"frozen   {text}"] if (text := unadapted_text(source.spec)) else []
            name, fingerprint = directory.path.name, inputs.model_fingerprint
            with failing_as(RAY, "naming its metrics endpoint"):
                metrics = metrics_address()
            announce(announced, metrics)
            with Waiting("starting the actors"):
                executor = RayExecutor(name, run, source.directory, placement, fingerprint)
            with observers, closing(executor):
                headlines = _headlines(run, source, directory, dashboard, metrics)
                observers.started(name, [*headlines, *(f"code     {line}" for line in own), *notes])
                clock_of = Scheduler(run, source.spec).clock
                coordinator = Coordinator(run, executor, directory, inputs, observers, clock_of)
                progress.coordinator, context = coordinator, coordinator.context
                for text in own:
                    context.events.write("code", text)
                if inputs.reading and checkpoint is None:
                    shares = {name: asdict(ClientShare.of(own)) for name, own in inputs.shares.items() if own}
                    context.events.write("shares", inputs.reading, clients=shares)
                if changes:
                    run.save(directory.config)
                for text in changes:
                    context.note("changed", text)
                if begun_before:
                    context.note("resumed", "there is no checkpoint yet: the run begins again from round 0")
                with _stop_on_signal(coordinator, observers):
                    complete = coordinator.run(checkpoint, passed_over)
                    if complete:
                        for line in export_run(directory.path, None, ExportOptions()).lines:
                            observers.note(line)
                    write_report([directory.path], directory.report)
                if complete:
                    context.events.write("finished", f"all {run.job.rounds} rounds are done")
                observers.finished(results_lines(directory) if complete else [f"stopped; {way_on(directory, address)}"])
    return complete


@contextmanager
def remove_if_refused(directory: RunDirectory) -> Iterator[None]:
    """Remove the directory of a run that was refused or has not begun, so that its name is free again."""
    try:
        yield
    except Exception as error:
        # Before round 0 ends, input may be refused that only a client can read or only the model shows to be wrong.
        refused = isinstance(error, InputError) and not directory.has_checkpoints
        if refused or not directory.events.exists():
            shutil.rmtree(directory.path)
        raise


@dataclass
class _Progress:
    """Progress of a session, for the report of a failure.

    Attributes:
        coordinator: drives the run; ``None`` before there is one.
    """

    coordinator: Coordinator | None = None


@contextmanager
def report_failures(directory: RunDirectory, address: str | None = None) -> Iterator[_Progress]:
    """Turn a failure into one line that says where, why and how to continue, on the terminal and in the log.

    The traceback of an unexpected error is kept in the run's directory. The log has no line of a run that has not
    begun, nor of input that was refused before the coordinator was made.

    Raises:
        InputError: input was refused.
        RunError: the run failed.
        KeyboardInterrupt: it was interrupted; with the way to continue.
    """
    progress = _Progress()
    try:
        yield progress
    except KeyboardInterrupt:
        raise KeyboardInterrupt(way_on(directory, address)) from None
    except InputError as error:
        if progress.coordinator is not None:
            _log_failure(directory, progress, str(error))
        raise
    except Exception as error:
        if not directory.events.exists():
            raise
        what = _describe(error, progress, directory)
        _log_failure(directory, progress, what)
        if isinstance(error, ActorFailure) and error.kind == "diverged" and progress.coordinator is not None:
            raise RunError(f"{what}; {_way_on_with_smaller_steps(directory, address, progress.coordinator)}") from error
        raise RunError(f"{what}; {way_on(directory, address)}") from error


def _describe(error: Exception, progress: _Progress, directory: RunDirectory) -> str:
    """Cause of a run's end, in one line."""
    if progress.coordinator is None:
        return str(error if isinstance(error, HsplitError) else unexpected(error, directory.path))
    round_ = progress.coordinator.round
    if isinstance(error, ActorFailure) and error.kind == "diverged":
        lr = progress.coordinator.context.job.lr
        return f"training diverged in round {round_}: {error.reason}; job.lr = {lr:g} is too large"
    if isinstance(error, ActorFailure):
        text = f"{error.actor} failed in {method_words(error)} in round {round_}: {error.reason}"
        waited = f" (waited for: job.faults.patience_s = {progress.coordinator.context.job.faults.patience_s:g}, which"
        return text + (f"{waited} `hsplit resume` changes with --set)" if error.kind == "late" else "")
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
    losses = [row.val_loss for row in coordinator.rows if row.val_loss is not None]
    if losses and losses[-1] > losses[0]:
        way += f" (its validation loss is above that of round 0 already: better launch a new run with --set {smaller})"
    return way


def _log_failure(directory: RunDirectory, progress: _Progress, what: str) -> None:
    # The log's own disk may be the full one.
    with suppress(OSError):
        if progress.coordinator is not None:
            progress.coordinator.context.events.write("failed", what, round=progress.coordinator.round)
        else:
            with EventLog(directory.events) as events:
                events.write("failed", what)


@contextmanager
def _stop_on_signal(coordinator: Coordinator, display: Observer) -> Iterator[None]:
    """Stop after the current step on the first SIGINT or SIGTERM, at once on a second SIGINT."""

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
        # Ray has set it by now, unless it was set before.
        token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        kept = os.environ.get("RAY_AUTH_TOKEN_PATH")
        where = f"the token in {kept}" if kept else "the output of: ray get-auth-token"
        sign_in = f" (sign in with {where})" if token else ""
        lines.append(f"ray      http://{dashboard}{sign_in}")
        if not token:
            lines.append("warning  Ray asks for no token here: whoever reaches its ports can run code on this machine")
    lines.append(f"metrics  http://{metrics}/metrics (to watch them in Grafana: hsplit monitoring --to DIR)")
    return lines
