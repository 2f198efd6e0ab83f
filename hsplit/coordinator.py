"""The round loop: the one place that tells the order of events. It reads top to bottom.

prepare → validate → [review the plan → local steps → aggregate → validate → checkpoint] per round → export

A client that fails is left out, and is back for the next round. Whatever else fails, the round is repeated from the
last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from hsplit.actors.executor import SCHEDULER, SERVER, ActorFailure, Executor, values_of
from hsplit.actors.messages import LossReport
from hsplit.actors.participant import DataReport
from hsplit.actors.scheduler import Review
from hsplit.checkpoint import (
    Progress,
    checkpoint_name,
    holder_state,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from hsplit.config import Client as ClientConfig
from hsplit.config import RunConfig
from hsplit.config.cluster import CENTRAL
from hsplit.data import Example
from hsplit.errors import HsplitError, InputError
from hsplit.inbox import JoinRequest, refuse, take_requests
from hsplit.lora.holder import RoundUpdate
from hsplit.observe.events import EventLog
from hsplit.observe.metrics import MetricsRow, MetricsTable, PlanRow, plan_rows
from hsplit.observe.terminal import Display
from hsplit.observe.timing import TimingRow, timing_rows
from hsplit.roster import Roster, told
from hsplit.run_directory import RunDirectory
from hsplit.scheduling.budgets import BudgetRequest
from hsplit.scheduling.importance import ImportanceReport
from hsplit.scheduling.plan import Plan
from hsplit.training import Done, training_of

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Inputs:
    """What the driver found before anything started.

    Attributes:
        shares: each client's part of the shared data, ``None`` for a client with its own.
        model_fingerprint, data_sha256: to recognise model and data when a run is resumed.
    """

    shares: Mapping[str, list[Example] | None]
    model_fingerprint: str
    data_sha256: str


class Coordinator:
    """Drives a run through an executor, in-process or Ray.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what the user watches.

    Attributes:
        progress: where the run stands.
        round: the round under way, counted from 1, or the one just ended until the next begins.
        stopping: set it to have the run end after the local step under way.
    """

    def __init__(
        self, run: RunConfig, executor: Executor, directory: RunDirectory, inputs: Inputs, display: Display
    ) -> None:
        self._declared, self._run, self._job = run, run, run.job
        # The first of them aggregates.
        self._servers = run.server.names
        self._executor, self._directory, self._inputs, self._display = executor, directory, inputs, display
        self._training = training_of(run, executor)
        self._events = EventLog(directory.events)
        self._metrics = MetricsTable(directory.metrics, MetricsRow)
        self._plans = MetricsTable(directory.plan, PlanRow)
        self._timing = MetricsTable(directory.timing, TimingRow)
        self.progress = Progress(model_fingerprint=inputs.model_fingerprint, data_sha256=inputs.data_sha256)
        # The one node is the server's: nothing travels.
        self._single = run.policy.placement == "single"
        self.round = 0
        self._roster = Roster(self._job.faults, executor, self._prepare_return, self._learn, self._note)
        self._repeats = 0
        self._slow: set[str] = set()
        self._unavailable: set[str] = set()
        self._probe_peaks: dict[str, int] = {}
        self._examples: dict[str, int] = {}
        self._validation_batches: dict[str, int] = {}
        self._step_time_s = 0.0
        # Of the round under way: seconds by holder and phase, of the whole steps, and who was late (clock: emulated).
        self._spent_s: dict[str, dict[str, float]] = {}
        self._steps_s = 0.0
        self._late: set[str] = set()
        self._losses: dict[str, float] = {}
        self._saved: Path | None = None
        self._saved_plan: Plan | None = None
        # Who has no place to be begun, or to be begun anew when a round is repeated.
        self._away: list[str] = executor.away()
        # Who has no data yet, when a round is repeated; None: this process has just begun.
        self._fresh: set[str] | None = None
        self._begun = time.monotonic()
        self.stopping = False

    # -- a run ----------------------------------------------------------------------------------------------------

    def run(self, resume_from: Path | None = None, passed_over: Sequence[str] = ()) -> bool:
        """Train from the start or from a checkpoint.

        Args:
            resume_from: the checkpoint.
            passed_over: a sentence about each newer one that is damaged.

        Returns:
            Whether the run is complete; ``False`` when it was asked to stop and has left a checkpoint.

        Raises:
            ActorFailure: it cannot go on; the last checkpoint is complete.
            OSError: a file cannot be written; the last checkpoint is complete.
        """
        self._saved = resume_from
        for text in passed_over:
            self._note("damaged", text)
        while True:
            try:
                self._begin()
                return self._rounds()
            except ActorFailure as failure:
                self._repair(failure)

    def loaded(self, own_code: Sequence[str]) -> None:
        """Say in the log which code of the user's own takes part."""
        for text in own_code:
            self._events.write("code", text)

    def finish(self) -> None:
        """Say in the log that the run has left all that it was to leave."""
        self._events.write("finished", f"all {self._job.rounds} rounds are done")

    def fail(self, why: str) -> None:
        """Say in the log why the run ends."""
        self._events.write("failed", why, round=self.round)

    def _rounds(self) -> bool:
        """The rounds that are left; returns as :meth:`run`."""
        job, progress = self._job, self.progress
        self._events.write("training", f"training begins with step {progress.step + 1}", step=progress.step + 1)
        while progress.round < job.rounds:
            at_its_start = progress.step == progress.round * job.local_steps
            if at_its_start and (progress.round > 0 or self._roster.shortages):
                self._review()
            self.begin_round()
            while progress.step < (progress.round + 1) * job.local_steps:
                self.local_step(progress.step)
                if self.stopping:
                    self._checkpoint()
                    self._note("stopped", f"stopped on request in round {progress.round + 1}")
                    return False
            self.aggregate()
            progress.round += 1
            self._close_round(self._steadily(self._validate))
            self._checkpoint()
            self._repeats = 0
        return True

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Bring everybody to where the last checkpoint was made, or to the run's start."""
        if self._saved is None:
            self.start()
        elif self._fresh is None:
            self._resume()
        else:
            self._repeat()

    def start(self) -> None:
        self._go_back_to(
            Progress(model_fingerprint=self._inputs.model_fingerprint, data_sha256=self._inputs.data_sha256)
        )
        # After failures so early this is not the first try.
        self._roster.recall({}, (), (), away=self._away)
        planned = self._executor.call(SCHEDULER, "plan")
        # Those without a place too: what is lost with them is counted where it lies. They read while it is planned.
        gone = {*self._roster.aside, *self._roster.lost}
        reading = self._begin_loading_data([c for c in self._run.participants if c.name not in gone])
        self._adopt(*self._executor.get([planned]))
        self._finish_loading_data(reading)
        self._say_what_is_lost()
        self._configure()
        first = RoundUpdate(1, {}, {})
        self._wait([self._executor.call(name, "restart", first) for name in [*self._clients, *self._servers]])
        self._close_round(self._validate())
        self._checkpoint()

    def _resume(self) -> None:
        """From a checkpoint, with actors that know nothing."""
        assert self._saved is not None
        progress, tensors = read_checkpoint(self._saved)
        if progress.plan is None or progress.scheduler is None:
            raise InputError(f"{self._saved}: is no checkpoint to resume from: it has no plan")
        for what, then, now in (
            ("model", progress.model_fingerprint, self._inputs.model_fingerprint),
            ("data", progress.data_sha256, self._inputs.data_sha256),
        ):
            if then != now:
                raise InputError(f"{self._directory.path}: the {what} is not the one that this run was started with")
        self._begun = time.monotonic() - progress.wall_time_s
        self._restore(progress, tensors, None)
        self._note("resumed", f"resumed from {self._saved.name}")

    def _repeat(self) -> None:
        """From the last checkpoint, with the actors that are there; those in ``_fresh`` know nothing."""
        checkpoint, passed_over = latest_checkpoint(self._directory.checkpoints)
        for text in passed_over:
            self._note("damaged", text)
        self._saved = checkpoint
        self._restore(*read_checkpoint(checkpoint), self._fresh)

    def _restore(
        self, progress: Progress, tensors: Mapping[str, dict[str, Any]], fresh: Collection[str] | None
    ) -> None:
        """Put everybody where ``progress`` and ``tensors`` are; ``fresh`` have no data yet (``None``: nobody has)."""
        self._go_back_to(progress)
        assert progress.plan is not None and progress.scheduler is not None
        self._one(SCHEDULER, "load_state", progress.scheduler)
        if fresh is None:
            self._begin_as_in(progress)
        self._roster.recall(
            progress.failures, progress.aside, progress.lost, progress.shortages, progress.left, self._away
        )
        self._adopt(Plan.from_json(progress.plan))
        named = [client.name for client in self._plan.clients if client.name not in self._roster.aside]
        reading = [name for name in named if name not in self._roster.lost and (fresh is None or name in fresh)]
        self._finish_loading_data(self._begin_loading_data(self._named(reading)))
        self._configure()
        holders = [*self._clients, *self._servers[1:]]
        for name in (SERVER, *holders):
            if name not in tensors:
                raise InputError(f"{self._saved}: is no checkpoint to resume from: it has nothing of {name}")
        _, *updates = self._executor.call_many(1 + len(holders), SERVER, "load_state", tensors[SERVER], *holders)
        self._wait(
            [
                self._executor.call(name, "take_up", tensors[name], update)
                for name, update in zip(holders, updates, strict=True)
            ]
        )
        self._fresh, self._away, self._saved_plan = set(), [], self._plan

    def _begin_as_in(self, progress: Progress) -> None:
        """Begin the clients that had joined by then beside those of the cluster file, and end those that had left."""
        # First, so that there is room for those who came.
        for name in progress.left:
            self._executor.end(name)
        for client in self._run.clients[len(self._declared.clients) :]:
            self._executor.add(client)
            if client.name in [*progress.left, *progress.aside]:
                continue
            if not self._executor.restart(client.name):
                self._away.append(client.name)

    def _go_back_to(self, progress: Progress) -> None:
        """Make ``progress`` all that is known of the rounds."""
        self.progress, self.round = progress, progress.round
        joined = tuple(ClientConfig.model_validate(client) for client in progress.joined)
        self._run = self._declared.model_copy(update={"clients": (*self._declared.clients, *joined)})
        self._metrics.restore(progress.metrics)
        self._plans.restore(progress.plans)
        self._timing.restore(progress.timing)
        self._clear_round()

    # -- failures -------------------------------------------------------------------------------------------------

    @property
    def _clients(self) -> list[str]:
        return self._roster.present

    def _repair(self, failure: ActorFailure) -> None:
        """Replace whoever is gone, so that the round can be repeated from the last checkpoint.

        Raises:
            ActorFailure: ``failure``, where that would not help, or has been tried often enough.
        """
        most, round_ = self._job.faults.max_failures, self.round
        self._repeats += 1
        if failure.kind == "hopeless" or self._repeats > most:
            raise failure
        where = "from the start" if self._saved is None else f"from checkpoint {self._saved.name}"
        known = {failure.actor, *self._roster.aside, *self._roster.lost}
        gone = [name for name in self._executor.lost() if name not in known]
        text = f"round {round_}: {told(failure)}; the round is repeated {where} (try {self._repeats} of {most})"
        text += f" (gone too: {', '.join(gone)})" if gone else ""
        self._note(
            "repeated", text, round=round_, actor=failure.actor, kind=failure.kind, reason=failure.reason, gone=gone
        )
        roster, away = self._roster, []
        for name in dict.fromkeys([failure.actor, *gone, *roster.lost]):
            if name in (*self._servers, SCHEDULER):
                self._replace(name)
                continue
            if name not in roster.lost:
                own = failure if name == failure.actor else ActorFailure(name, "the round", "its process ended", "died")
                roster.count(own, round_)
            if name in roster.aside:
                continue
            if not self._executor.restart(name):
                away.append(name)
            elif self._fresh is not None:
                self._fresh.add(name)
        for name in away:
            roster.away(name)
        self._away = away
        self._training.forget()

    def _replace(self, name: str) -> None:
        """Begin server or scheduler anew, on whatever node has room for it or comes to have."""
        until = time.monotonic() + self._job.faults.patience_s
        while not self._executor.restart(name):
            if time.monotonic() > until:
                raise ActorFailure(name, "restart", "no node has room for it", "hopeless")
            time.sleep(1.0)

    def _lose(self, failure: ActorFailure) -> None:
        """Go on without a client; where the round is to be repeated instead, say so by its failure."""
        # A single node has all that was learned in the round: without it there is nobody to go on.
        if self._job.faults.recovery == "repeat" or self._single or failure.actor not in self._clients:
            raise failure
        self._training.forget(failure.actor)
        self._roster.lose(failure, self.round)

    def _settled(self, calls: Mapping[str, Any]) -> dict[str, Any]:
        """Values of calls by client, of those that did not fail; the others are lost."""
        until = time.monotonic() + self._job.faults.patience_s
        values = {}
        for name, call in calls.items():
            (value,) = self._executor.settle([call], until)
            if isinstance(value, ActorFailure):
                self._lose(value)
            elif isinstance(value, HsplitError):
                raise value
            else:
                values[name] = value
        if calls and not values:
            self._nobody_is_left(next(iter(calls)))
        return values

    def _nobody_is_left(self, last: str) -> None:
        raise ActorFailure(last, "the round", "no client is left to train with")

    def _steadily(self, what: Callable[[], _Value]) -> _Value:
        """Do something between two rounds. Who fails meanwhile is brought back first, and it is done again."""
        while True:
            try:
                return what()
            except ActorFailure as failure:
                self._lose(failure)
                if failure.kind != "memory":
                    self._bring_back()
                elif not self._clients:
                    # Those short of memory are back when the next plan has given them less.
                    self._nobody_is_left(failure.actor)

    def _bring_back(self) -> None:
        """Whoever was lost begins the round that follows like everybody else."""
        if not self._roster.lost:
            return
        round_ = self.progress.step // self._job.local_steps + 1

        def rejoin(names: list[str]) -> list[Any]:
            sent, *updates = self._executor.call_many(1 + len(names), SERVER, "welcome", round_, *names)
            kept = {name: self._kept_state(name) for name in names}
            calls = [
                self._executor.call(name, "rejoin", kept[name], update)
                for name, update in zip(names, updates, strict=True)
            ]
            self.progress.bytes_down += self._executor.get([sent])[0]
            return calls

        self._roster.bring_back(round_, rejoin)
        self._roster.adopt(self._plan)
        if not self._clients:
            self._nobody_is_left(self._roster.lost[0] if self._roster.lost else self._roster.aside[-1])

    def _kept_state(self, client: str) -> dict[str, Any] | None:
        """A client's tensors by the last checkpoint, where they are of the part that it has now."""
        saved, now = self._saved_plan, self._plan.client(client)
        then = [] if saved is None else [(c.split, c.ranks) for c in saved.clients if c.name == client]
        same = then == [(now.split, now.ranks)]
        return holder_state(self._saved, client) if same and self._saved is not None else None

    def _prepare_return(self, name: str) -> list[Any]:
        """Have a client that was begun anew read its data and its layers."""
        part = self._plan.client(name)
        calls = list(self._begin_loading_data(self._named([name])).values())
        return [*calls, self._executor.call(name, "configure", part.split, part.ranks)]

    def _learn(self, values: Sequence[Any]) -> None:
        """Take note of the data that a client has found anew."""
        for report in values:
            if isinstance(report, DataReport):
                self._count_data(report)

    def _count_data(self, report: DataReport) -> None:
        self._examples[report.client] = report.train + report.validation
        self._validation_batches[report.client] = report.validation_batches

    def _adopt(self, plan: Plan) -> None:
        """Put ``plan`` in force and say who cannot take part any more."""
        self._plan = plan
        self._roster.adopt(plan)
        self._training.adopt(plan)
        self.progress.plan = plan.to_json()
        self._events.write("planned", f"plan by {plan.importance}", round=self.progress.round, plan=self.progress.plan)
        self._display.plan(plan)
        for client in plan.clients:
            if not client.available and client.name not in self._unavailable:
                text = (
                    f"{client.name} is unavailable: it lacks {client.lacking_bytes / 1e6:.1f} MB of memory "
                    "for the smallest part of the model"
                )
                self._note("unavailable", text, client=client.name, lacking_bytes=client.lacking_bytes)
        self._unavailable = {client.name for client in plan.clients if not client.available}

    def _begin_loading_data(self, clients: Sequence[ClientConfig]) -> dict[str, Any]:
        every, calls = self._inputs.shares, {}
        for client in clients:
            # A single node has everybody's data.
            shares = every if client.name == CENTRAL else {client.name: every.get(client.name)}
            calls[client.name] = self._executor.call(client.name, "load_data", shares, client.data)
        return calls

    def _named(self, names: Collection[str]) -> list[ClientConfig]:
        return [client for client in self._run.participants if client.name in names]

    def _finish_loading_data(self, calls: dict[str, Any]) -> None:
        for name, call in calls.items():
            try:
                report: DataReport
                (report,) = self._executor.get([call])
            except InputError as error:
                if name not in self._unavailable:
                    raise
                # Who has no part cannot fail the run.
                self._examples[name] = 0
                self._note("data", f"{name}, which is unavailable: {error}", client=name)
                continue
            self._count_data(report)
            text = f"{report.client}: {report.train} examples to train on, {report.validation} held out"
            self._events.write("data", text, **asdict(report))
            if report.too_long:
                text = f"{report.client}: {report.too_long} examples over {self._job.max_length} tokens are left out"
                self._note("too_long", text, client=report.client, count=report.too_long)

    def _say_what_is_lost(self) -> None:
        """How many clients, and how much of the data, the plan has no place for."""
        lost = [client.name for client in self._plan.clients if not client.available]
        if not lost:
            return
        examples, total = sum(self._examples.get(name, 0) for name in lost), sum(self._examples.values())
        text = (
            f"{len(lost)} of {len(self._plan.clients)} clients are unavailable, and with them {examples} of {total}"
            f" examples ({examples / total:.1%}) are not trained on"
        )
        self._note("data_lost", text, clients=lost, examples=examples, of_examples=total)

    def _configure(self) -> None:
        if not self._clients and self._saved is None:
            names = ", ".join(self._roster.lost)
            raise InputError(f"clients: none that fits is there to begin with (away: {names}); start their nodes first")
        if not self._clients:
            self._nobody_is_left(self._roster.lost[0] if self._roster.lost else self._plan.clients[0].name)
        calls = [self._executor.call(name, "configure", self._plan) for name in self._servers]
        for client in map(self._plan.client, self._clients):
            calls.append(self._executor.call(client.name, "configure", client.split, client.ranks))
        self._wait(calls)

    # -- a round's beginning --------------------------------------------------------------------------------------

    def _cohort(self, round_: int) -> list[str]:
        """The clients that train in round ``round_``."""
        return self._roster.cohort(self._job.seed, round_, self._job.clients_per_round)

    def begin_round(self) -> None:
        """Settle who trains in the round that begins, and how long that is to take."""
        self.round = self.progress.round + 1
        cohort = self._cohort(self.round)
        self._step_time_s = self._one(SCHEDULER, "step_time_s", self._plan, cohort)
        if cohort != self._clients:
            text = f"round {self.round}: {len(cohort)} of {len(self._clients)} clients train: {', '.join(cohort)}"
            self._events.write("cohort", text, round=self.round, clients=cohort)
        self._set_pace(cohort)

    # -- the emulated clock (METHOD 8) ----------------------------------------------------------------------------

    def _set_pace(self, cohort: list[str]) -> None:
        """Tell everybody how long each call of a step is to take, where the clock is emulated."""
        if self._job.clock != "emulated":
            return
        calls: dict[str, dict[str, float]] = self._one(SCHEDULER, "call_times_s", self._plan, cohort)
        speedup = self._job.clock_speedup
        calls |= {name: calls[SERVER] for name in self._servers if SERVER in calls}
        for name, own in calls.items():
            if name in self._clients or name in self._servers:
                # Whoever is gone is found by the next call that matters.
                self._executor.call(name, "set_pace", {what: seconds / speedup for what, seconds in own.items()})

    def _count(self, virtual_s: float, begun: float) -> None:
        """Add what something took by the virtual clock; where the clock is emulated, wait until that has passed.

        Local steps are not counted here: there everybody waits for itself.

        Args:
            virtual_s: declared seconds.
            begun: when it began, by ``time.monotonic``.
        """
        self.progress.virtual_time_s += virtual_s
        if self._job.clock == "emulated":
            time.sleep(max(0.0, begun + virtual_s / self._job.clock_speedup - time.monotonic()))

    # -- between two rounds (METHOD 3 and 5) ------------------------------------------------------------------------

    def _review(self) -> None:
        """Ask the scheduler whether budgets or importance have changed so much that another plan is due."""
        progress = self.progress
        requests = self._requests()
        due = self._run.policy.probes and self._one(SCHEDULER, "probe_due", progress.round)
        reports = self._steadily(self._probe) if due else []
        # The probe ran under the plan that is being looked at, so it counts with the round before.
        self._probe_peaks = self._peaks([*self._clients, *self._servers])
        measured = _larger(progress.measured_bytes, self._probe_peaks)
        try:
            review: Review = self._one(SCHEDULER, "review", progress.round, self._plan, reports, measured, requests)
        except InputError as error:
            # The budgets were right when the run began, so this is a failure of the run and not of its input.
            raise ActorFailure(SCHEDULER, "review", str(error), "hopeless") from error
        if review.importance is not None:
            text = f"importance of {len(review.importance)} weights after round {progress.round}"
            self._events.write("importance", text, round=progress.round, scores=review.importance)
        if review.plan is not None:
            text = f"planned anew after round {progress.round}: {'; '.join(review.reasons)}"
            self._note("replanned", text, round=progress.round, reasons=review.reasons)
            self._reconfigure(review.plan)
        self._bring_back()

    def _requests(self) -> list[BudgetRequest]:
        """Let clients come and go as the inbox asks.

        Returns:
            The changes of budgets that the cluster file foresees for the round that begins, then the inbox's.
        """
        done = self.progress.round
        requests = [
            BudgetRequest(name, change.values())
            for name, holder in [(SERVER, self._run.server), *((c.name, c) for c in self._run.participants)]
            for change in holder.schedule
            if change.round == done + 1
        ]
        asked, refused = take_requests(self._directory.inbox, done)
        for text in refused:
            self._note("refused", text, round=done)
        for request in asked:
            if isinstance(request, BudgetRequest):
                asked_for = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
                self._events.write("budget", f"{request.holder}: {asked_for} asked for", round=done, **asdict(request))
                requests.append(request)
        for change in asked:
            if isinstance(change, BudgetRequest):
                continue
            try:
                if isinstance(change, JoinRequest):
                    self._join(change.client, requests)
                else:
                    self._leave(change.client, requests)
            except InputError as error:
                # Nothing has changed, and the run goes on as it is.
                refuse(self._directory.inbox, change.file)
                self._note("refused", f"inbox: {error}", round=done)
        return [request for request in requests if request.holder not in self._roster.left]

    def _join(self, client: ClientConfig, requests: Sequence[BudgetRequest]) -> None:
        """Have a client begin and read its data; the plan that follows gives it a part.

        Raises:
            InputError: it is there already, has no usable data, or there is no plan with it.
        """
        name, known = client.name, [c.name for c in self._run.clients]
        if name in known and name not in [*self._roster.left, *self._roster.aside]:
            raise InputError(f"{name} is asked to join, and is there already")
        self._executor.add(client)
        begun = self._executor.restart(name)
        try:
            if begun:
                until = time.monotonic() + self._job.faults.patience_s
                (report,) = self._executor.settle(list(self._begin_loading_data([client]).values()), until)
                if isinstance(report, HsplitError):
                    raise report
                self._count_data(report)
            self._one(SCHEDULER, "join", client, requests)
        except (InputError, ActorFailure) as error:
            if isinstance(error, ActorFailure) and error.actor != name:
                raise
            self._executor.end(name)
            raise InputError(f"{name} cannot join: {error}") from error
        self._roster.join(name)
        if not begun:
            self._roster.away(name)
        if name not in known:
            self._run = self._run.model_copy(update={"clients": (*self._run.clients, client)})
        text, declared = f"{name} joins after round {self.progress.round}", client.model_dump(mode="json")
        self._note("joined", text, client=name, round=self.progress.round, declared=declared)

    def _leave(self, name: str, requests: Sequence[BudgetRequest]) -> None:
        """Go on without a client that leaves: all that it has learned is aggregated.

        Raises:
            InputError: it is not there, or nobody could go on without it.
        """
        if all(name != client.name for client in self._run.clients) or name in self._roster.left:
            raise InputError(f"{name} is asked to leave, and is not there")
        if self._clients == [name]:
            raise InputError(f"{name} cannot leave: no other client is there")
        try:
            self._one(SCHEDULER, "leave", name, requests)
        except InputError as error:
            raise InputError(f"{name} cannot leave: {error}") from error
        if name in self._clients:
            # Its process ends when the round can no longer be repeated with it.
            self._executor.call(name, "release")
        self._roster.leave(name)
        self._note("left", f"{name} leaves after round {self.progress.round}", client=name, round=self.progress.round)

    def _probe(self) -> list[ImportanceReport]:
        begun = time.monotonic()
        cohort = self._cohort(self.progress.round + 1)
        probe = self._training.probe(cohort, self.progress.round, self._run.policy.importance.tokens)
        self.progress.bytes_up += probe.bytes_up
        self.progress.bytes_down += probe.bytes_down
        self._count(self._one(SCHEDULER, "probe_time_s", self._plan, cohort), begun)
        return probe.reports

    def _reconfigure(self, plan: Plan) -> None:
        """Put another plan in force without changing what the model computes (law E4)."""
        begun, before = time.monotonic(), self._plan
        had = list(self._clients)
        self._adopt(plan)
        for name in had:
            if name not in self._clients:
                self._executor.call(name, "release")
        if {client.name for client in before.available} != set(self._clients):
            self._say_what_is_lost()
        names, others = list(self._clients), self._servers[1:]
        report, *sent = self._executor.call_many(
            1 + len(names) + len(others), SERVER, "reconfigure", self.progress.round + 1, plan, had, *names
        )
        (report,) = self._executor.get([report])
        sent, own = sent[: len(names)], sent[len(names) :]
        self._wait([self._executor.call(n, "follow", plan, update) for n, update in zip(others, own, strict=True)])
        down, updates = report.nbytes_down, dict(zip(names, sent, strict=True))
        moving = {name: plan.client(name) for name in names if name in down}
        given_up = self._settled({n: self._executor.call(n, "give_up", part.split) for n, part in moving.items()})
        # What the old plan took is over; from here on the new one is measured.
        for name in self._peaks(list(given_up)):
            self._probe_peaks.pop(name, None)
        self._settled(
            {
                name: self._executor.call(name, "reconfigure", moving[name].split, moving[name].ranks, updates[name])
                for name in given_up
            }
        )
        if self._single:
            down = {}
        self.progress.bytes_down += sum(down.values())
        self._count(self._one(SCHEDULER, "reconfiguration_time_s", before, plan, down), begun)
        self._record_cut(report.residual_cut)

    # -- one local step (METHOD 2) --------------------------------------------------------------------------------

    def local_step(self, step: int) -> Done:
        begun = time.monotonic()
        done = self._training.step(step, self._cohort(step // self._job.local_steps + 1))
        for failure in done.failed.values():
            self._lose(failure)
        if not self._clients:
            self._nobody_is_left(next(iter(done.failed)))
        self._say_who_is_left_out(done.left_out)
        self._steps_s += time.monotonic() - begun
        self.progress.bytes_up += done.bytes_up
        self.progress.bytes_down += done.bytes_down
        for name, phases in done.seconds.items():
            spent = self._spent_s.setdefault(name, {})
            for phase, seconds in phases.items():
                spent[phase] = spent.get(phase, 0.0) + seconds
        self._late |= done.late
        self._record_step(done.losses)
        return done

    def _say_who_is_left_out(self, clients: Collection[str]) -> None:
        """Every step's in the log; on the terminal once a round."""
        for name in sorted(clients):
            text = f"step {self.progress.step + 1}: {name} is not in time, and the others go on without it in this step"
            self._events.write("left_out", text, client=name, step=self.progress.step + 1)
            if name not in self._slow:
                self._display.note(text)
        self._slow |= set(clients)

    def _record_step(self, losses: list[LossReport]) -> None:
        progress, job = self.progress, self._job
        training = [client for client in self._clients if any(loss.client == client for loss in losses)]
        for client in training:
            own = [loss for loss in losses if loss.client == client]
            loss_sum, tokens = sum(loss.loss_sum for loss in own), sum(loss.tokens for loss in own)
            self._losses[client] = loss_sum / max(tokens, 1)
            progress.round_loss_sum += loss_sum
            progress.round_tokens += tokens
        progress.tokens += sum(loss.tokens for loss in losses)
        progress.step += 1
        progress.virtual_time_s += self._step_time_s
        self._display.step(
            progress.round + 1,
            job.rounds,
            progress.step,
            job.rounds * job.local_steps,
            dict(self._losses),
            {client: "training" if client in training else "waiting" for client in self._clients},
        )

    # -- the end of a round (METHOD 6) ----------------------------------------------------------------------------

    def aggregate(self) -> None:
        begun, others = time.monotonic(), self._servers[1:]
        cohort = self._cohort(self.progress.round + 1)
        asked = {name: self._executor.call_many(2, name, "hand_in") for name in [*cohort, *others]}
        # The small reports come first: a client that failed is found before its adapters are passed on.
        names = list(self._settled({client: asked[client][0] for client in cohort}))
        self._wait([asked[server][0] for server in others])
        idle = [name for name in self._clients if name not in cohort]
        held = [asked[name][1] for name in [*names, *others]]
        report, *updates = self._executor.call_many(
            1 + len(held) + len(idle), SERVER, "aggregate", self.progress.round + 2, idle, *held
        )
        (report,) = self._executor.get([report])
        for name, reason in report.refused.items():
            self._lose(ActorFailure(name, "hand_in", f"it handed in {reason}", "refused"))
        up, down = report.nbytes_up, report.nbytes_down
        if self._single:
            up, down = {}, {}
        self.progress.bytes_up += sum(up.values())
        self.progress.bytes_down += sum(down.values())
        self._record_cut(report.residual_cut)
        restarts = {
            name: self._executor.call(name, "restart", update)
            for name, update in zip([*names, *others, *idle], updates, strict=True)
            if name not in report.refused
        }
        self._wait([restarts.pop(server) for server in others])
        self._settled(restarts)
        self._bring_back()
        self._count(self._one(SCHEDULER, "aggregation_time_s", self._plan, names, up, down), begun)

    def _record_cut(self, cut: float) -> None:
        if cut:
            text = (
                f"round {self.progress.round + 1}: the residual reached residual.max_rank; at most "
                f"{cut:.2e} of a weight's residual (relative Frobenius norm) was cut"
            )
            self._note("residual_cut", text, relative_norm=cut)

    def _validate(self) -> tuple[float, int]:
        """Pooled validation loss over every client's held-out share: sum of cross-entropy, supervised tokens."""
        begun = time.monotonic()
        batches = {client: self._validation_batches[client] for client in self._clients}
        done = self._training.validation(batches)
        self.progress.bytes_up += done.bytes_up
        self.progress.bytes_down += done.bytes_down
        self._count(self._one(SCHEDULER, "validation_time_s", self._plan, batches), begun)
        return sum(loss.loss_sum for loss in done.losses), sum(loss.tokens for loss in done.losses)

    def _close_round(self, validation: tuple[float, int]) -> None:
        """Write the round's rows and begin counting anew."""
        progress = self.progress
        progress.wall_time_s = time.monotonic() - self._begun
        val_loss = validation[0] / max(validation[1], 1)
        trained = progress.round_tokens > 0
        row = MetricsRow(
            round=progress.round,
            step=progress.step,
            train_loss=progress.round_loss_sum / progress.round_tokens if trained else None,
            val_loss=val_loss,
            val_ppl=math.exp(min(val_loss, 700.0)),
            tokens=progress.tokens,
            wall_time_s=progress.wall_time_s,
            virtual_time_s=progress.virtual_time_s,
            bytes_up=progress.bytes_up,
            bytes_down=progress.bytes_down,
            captured_importance=self._plan.captured_importance,
            available_clients=len(self._clients),
        )
        self._metrics.append(row)
        measured_s = {name: sum(own.values()) / self._job.local_steps for name, own in self._spent_s.items()}
        progress.measured_bytes = _larger(self._peaks([*self._clients, *self._servers]), self._probe_peaks)
        self._probe_peaks = {}
        holders = plan_rows(progress.round, self._plan, progress.measured_bytes, measured_s)
        timing = timing_rows(progress.round, self._spent_s, self._steps_s)
        self._plans.append(*holders)
        self._timing.append(*timing)
        progress.metrics, progress.plans = self._metrics.to_json(), self._plans.to_json()
        progress.timing = self._timing.to_json()
        self._say_who_is_late()
        progress.bytes_up = progress.bytes_down = progress.round_tokens = 0
        progress.round_loss_sum = 0.0
        self._clear_round()
        self._events.write("round", f"round {row.round}: validation perplexity {row.val_ppl:.3f}", **asdict(row))
        self._display.round_done(row, holders, timing)

    def _clear_round(self) -> None:
        """Forget what is kept of a round beside its progress."""
        self._spent_s.clear()
        self._steps_s = 0.0
        self._late.clear()
        self._slow.clear()

    def _say_who_is_late(self) -> None:
        if self._late and self._job.clock == "emulated":
            text = (
                f"round {self.progress.round}: {', '.join(sorted(self._late))} computed longer than declared, so the"
                " emulated clock is late; a smaller job.clock_speedup gives more time"
            )
            self._note("late", text, holders=sorted(self._late))

    def _checkpoint(self) -> None:
        tensors = self._steadily(self._states)
        roster = self._roster
        self.progress.failures, self.progress.aside = dict(roster.failures), list(roster.aside)
        self.progress.lost, self.progress.shortages = roster.lost, dict(roster.shortages)
        joined = self._run.clients[len(self._declared.clients) :]
        self.progress.joined, self.progress.left = [client.model_dump() for client in joined], list(roster.left)
        self.progress.scheduler = self._one(SCHEDULER, "state")
        self.progress.wall_time_s = time.monotonic() - self._begun
        name = checkpoint_name(self.progress, self._job.local_steps)
        self._saved = save_checkpoint(
            self._directory.checkpoints, name, self.progress, tensors, self._job.keep_checkpoints
        )
        self._fresh, self._saved_plan = set(), self._plan
        for gone in roster.left:
            # No round can be repeated any more that it had a part in.
            self._executor.end(gone)
        self._events.write("checkpoint", f"checkpoint {name} written")

    def _states(self) -> dict[str, dict[str, Any]]:
        """Tensors of everybody, as a checkpoint keeps them; of those who are lost, as it kept them last."""
        calls = {name: self._executor.call(name, "state") for name in [*self._clients, *self._servers]}
        until = time.monotonic() + self._job.faults.patience_s
        values = values_of(self._executor.settle(list(calls.values()), until))
        states: dict[str, dict[str, Any]] = dict(zip(calls, values, strict=True))
        if self._saved is not None:
            for name in self._roster.lost:
                kept = self._kept_state(name)
                states |= {} if kept is None else {name: kept}
        return states

    # -- small things ---------------------------------------------------------------------------------------------

    def _one(self, actor: str, method: str, *arguments: Any) -> Any:
        (value,) = self._executor.get([self._executor.call(actor, method, *arguments)])
        return value

    def _peaks(self, holders: list[str]) -> dict[str, int]:
        """Most memory that each of ``holders`` took since the last call, by name, where it was measured."""
        until = time.monotonic() + self._job.faults.patience_s
        peaks = self._executor.settle([self._executor.call(name, "peak_bytes") for name in holders], until)
        # Whoever is gone is found by the next call that matters.
        found = zip(holders, peaks, strict=True)
        return {name: peak for name, peak in found if peak and not isinstance(peak, HsplitError)}

    def _wait(self, handles: list[Any]) -> None:
        self._executor.get(handles)

    def _note(self, event: str, text: str, **fields: Any) -> None:
        self._events.write(event, text, **fields)
        self._display.note(text, event, **fields)


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """By name the larger of two numbers."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}
