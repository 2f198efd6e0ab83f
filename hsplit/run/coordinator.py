"""The round loop, the one place that has the order of events. It reads top to bottom.

prepare → validate → [review the plan → local steps → aggregate → validate → checkpoint] per round → export

Rounds that ``job.validation.every`` leaves out are not validated.

A client that fails is lost, and returns for the next round (:mod:`hsplit.run.membership`). After any other failure the
round is repeated from the last checkpoint (:mod:`hsplit.run.recovery`, :mod:`hsplit.run.checkpoint`). Counts and
tables are in :mod:`hsplit.run.records`. All of them share :mod:`hsplit.run.context`, and the run's state in it.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from hsplit.actors.executor import ActorFailure, Executor, NotFinite, Ref, refusal
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.participant import Participant
from hsplit.actors.replica import Replica
from hsplit.actors.server import Server
from hsplit.config import SCHEDULER, SERVER, RunConfig
from hsplit.config.reading import displayed
from hsplit.errors import HsplitError, InputError
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.observe.observer import Observer
from hsplit.observe.tables import MetricsRow
from hsplit.planning.importance import ImportanceReport, mean_report, size_of
from hsplit.planning.plan import Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import SavePoint
from hsplit.run.context import ClockOf, Inputs, RunContext
from hsplit.run.records import Records
from hsplit.run.recovery import Recovery
from hsplit.run.split_step import SplitTraining
from hsplit.run.state import RunState, Status
from hsplit.run.step import StepOutcome, Validation
from hsplit.run_directory import RunDirectory


class Coordinator:
    """Drives a run through an executor, in-process or Ray.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: shows the run to the user.
        clock_of: makes the virtual clock by the budgets in force.

    Attributes:
        context: shared by the parts of the run.
        step_times_s: virtual times of the round's local steps; ``[0.0]`` before the first round.
        stopping: set it to have the run end after the local step under way.
    """

    def __init__(
        self,
        run: RunConfig,
        executor: Executor,
        directory: RunDirectory,
        inputs: Inputs,
        display: Observer,
        clock_of: ClockOf,
    ) -> None:
        self._job, self._executor = run.job, executor
        self.context = context = RunContext(run, executor, directory, inputs, display, clock_of)
        self._records = Records(context)
        self._save_point = SavePoint(context, self._records)
        self._membership = self._save_point.membership
        self._recovery = Recovery(context, self._membership, self._save_point)
        # All servers but the first, which aggregates.
        _, *self._replicas = run.server.names
        self.step_times_s = [0.0]
        self.stopping = False

    @property
    def state(self) -> RunState:
        """Plan, progress and membership."""
        return self.context.state

    @property
    def rows(self) -> tuple[MetricsRow, ...]:
        """The rows of ``metrics.csv`` so far."""
        return self._records.rows

    @property
    def round(self) -> int:
        """The round under way, counted from 1, or the one just ended until the next begins."""
        return self.context.round

    # -- a run ----------------------------------------------------------------------------------------------------

    def run(self, resume_from: Path | None = None, passed_over: Sequence[str] = ()) -> bool:
        """Train from the start or from a checkpoint.

        Args:
            resume_from: the checkpoint.
            passed_over: a sentence about each newer one that is damaged.

        Returns:
            True if the run is complete; false if it was asked to stop and has left a checkpoint.

        Raises:
            ActorFailure: it cannot continue; the last checkpoint is complete.
            OSError: a file cannot be written; the last checkpoint is complete.
        """
        self._save_point.path = resume_from
        self._save_point.report_damage(passed_over)
        while True:
            try:
                if self._save_point.path is None:
                    self.start()
                else:
                    self._save_point.go_back()
                return self._rounds()
            except ActorFailure as failure:
                self._recovery.repair(failure)

    @property
    def last_checkpoint(self) -> Path | None:
        """The last checkpoint; ``None``: there is none yet."""
        return self._save_point.path

    def start(self) -> None:
        """Bring all actors to the run's start: data, the first plan, layers, and a validation before any training."""
        context, data = self.context, self.context.data
        self._save_point.go_back_to_the_start()
        # Also those read that the plan will have no part for: their examples are counted.
        present = [one for one in context.run.participants if self.state.status(one.name) is Status.ACTIVE]
        calls = data.begin(present)
        unreadable, late = data.receive(calls, time.monotonic() + self._job.faults.patience_s)
        if late and len(late) == len(calls):
            raise late[0]
        for failure in late:
            self._membership.begin_without(failure, calls[failure.actor])
        review = context.ask(Scheduler.first, context.fleet, self.state.planning)
        self.state.planning = review.state
        if review.reasons:
            context.note("replanned", f"planned again: {'; '.join(review.reasons)}", round=0, reasons=review.reasons)
        context.adopt(review.made)
        read = [name for name in calls if name not in {failure.actor for failure in late}]
        data.check(read, unreadable, context.unavailable)
        data.note_unavailable(context.plan)
        if not context.clients:
            names = ", ".join(self.state.to_return)
            raise InputError(f"clients: none that fits is there to begin with (away: {names}); start their nodes first")
        context.configure()
        self._membership.prepare_those_reading()
        first = RoundUpdate(1, {}, {})
        holders = [*context.clients, *context.servers]
        self._executor.get([self._executor.call(name, HolderActor.restart, first) for name in holders])
        try:
            validation = self.validate()
        except ActorFailure as failure:
            if failure.kind == "diverged" or isinstance(failure, NotFinite):
                job = self._job
                raise InputError(
                    f"job.model: the loss of {job.model} is not finite before any training ({failure.reason}), with"
                    f" job.base {job.base} and job.dtype {job.dtype}: set both to fp32; where they are, its files are"
                    " damaged"
                ) from failure
            raise
        self._records.close_round(validation)
        self._checkpoint()

    def _rounds(self) -> bool:
        """Train the rounds that are left; returns as :meth:`run`."""
        job, state, context = self._job, self.state, self.context
        context.events.write("training", f"training begins with step {state.step + 1}", step=state.step + 1)
        while state.round < job.rounds:
            at_its_start = state.step == state.round * job.local_steps
            if at_its_start and (state.round > 0 or context.state.has_shortages):
                self._review()
            self.begin_round()
            while state.step < (state.round + 1) * job.local_steps:
                self.local_step(state.step)
                if self.stopping:
                    for failure in context.training.settle().failed.values():
                        self._membership.lose(failure)
                    self._checkpoint()
                    context.note("stopped", f"stopped on request in round {state.round + 1}")
                    return False
            self.aggregate()
            state.count_examples(job)
            state.round += 1
            validated = job.validates(state.round)
            self._records.close_round(self._membership.retry(self.validate) if validated else None)
            self._checkpoint()
            self._recovery.round_is_done()
        return True

    def _checkpoint(self) -> None:
        self._save_point.make(self._membership.retry(self._save_point.states))

    # -- between two rounds (METHOD 3 and 5) ------------------------------------------------------------------------

    def _review(self) -> None:
        """Have the scheduler replan if budgets or importance have changed enough, and bring back lost clients."""
        context, done = self.context, self.state.round
        requests = self._membership.requests()
        due = context.run.policy.probes and self.state.planning.probe_due(done)
        if due and not context.ask(
            Scheduler.probe_matters,
            context.plan,
            context.fleet,
            self.state.planning,
            self.state.measured_bytes,
            requests,
        ):
            text = f"no probe after round {done}: by any scores everybody would have the same layers and ranks"
            context.events.write("unprobed", text, round=done)
            due = False
        found, self.state.probe = self.state.probe, None
        reports: list[ImportanceReport] = []
        if due:
            reports = [found] if found is not None else self._membership.retry(self._probe)
        measured = self._records.peaks_with_probe()
        try:
            review = context.ask(
                Scheduler.review, done, context.plan, context.fleet, self.state.planning, reports, measured, requests
            )
        except InputError as error:
            # The budgets were valid when the run began, so this is a failure of the run and not of its input.
            reason = str(error)
            if "memory_gb" in reason:
                where = shlex.quote(displayed(context.directory.path))
                reason += (
                    f" (by now only budgets can change, before it goes on: hsplit budget {where} NAME memory_gb=GB)"
                )
            raise ActorFailure(SCHEDULER, "review", reason, "hopeless") from error
        self.state.planning = review.state
        if review.importance is not None:
            text = f"importance of {len(review.importance)} weights after round {done}"
            context.events.write("importance", text, round=done, scores=review.importance)
        if review.plan is not None:
            text = f"planned anew after round {done}: {'; '.join(review.reasons)}"
            context.note("replanned", text, round=done, reasons=review.reasons)
            self.reconfigure(review.plan)
        self._membership.bring_back()

    def _probe(self) -> list[ImportanceReport]:
        context, begun = self.context, time.monotonic()
        cohort = context.cohort(self.state.round + 1)
        tokens = context.run.policy.importance.tokens
        probe = context.training.probe(context.plan, cohort, self.state.round, tokens)
        self.state.bytes_up += probe.bytes_up
        self.state.bytes_down += probe.bytes_down
        self._count(context.clock.probe_s(context.plan, tokens, cohort), begun)
        # The few examples drawn may have no supervised token, or be known by heart: the probe then shows nothing new.
        has_scores = any(report.tokens and any(map(size_of, report.scores.values())) for report in probe.reports)
        return probe.reports if has_scores else []

    def reconfigure(self, plan: Plan) -> None:
        """Put another plan in force without changing what the model computes (law E4)."""
        context, executor, begun = self.context, self._executor, time.monotonic()
        before, had = context.plan, list(context.clients)
        context.adopt(plan)
        for name in had:
            if name not in context.clients:
                executor.call(name, Participant.release)
        if {client.name for client in before.available} != set(context.clients):
            context.data.note_unavailable(plan)
        names = [*context.clients, *self._replicas]
        reported, sent = executor.call_each(SERVER, Server.reconfigure, self.state.round + 1, plan, had, names)
        report, updates = executor.value(reported), dict(zip(names, sent, strict=True))
        executor.get([executor.call(name, Replica.follow, plan, updates[name]) for name in self._replicas])
        down = report.nbytes_down
        moving = {name: plan.client(name) for name in context.clients if name in down}
        shrunk = self._membership.await_calls(
            {n: executor.call(n, Participant.shrink, part) for n, part in moving.items()}
        )
        self._records.forget_peaks(list(shrunk))
        self._membership.await_calls(
            {n: executor.call(n, Participant.reconfigure, moving[n], updates[n]) for n in shrunk}
        )
        if context.single:
            down = {}
        self.state.bytes_down += sum(down.values())
        self._count(context.clock.reconfiguration_s(before, plan, down), begun)
        self._records.cut(report.residual_cut)

    # -- a round ----------------------------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Draw the clients that train in the round that begins, and set pace and learning rates."""
        context = self.context
        context.round = self.state.round + 1
        cohort = context.cohort(self.round)
        self.step_times_s = context.clock.steps_s(context.plan, cohort, self.state.round * self._job.local_steps)
        if cohort != context.clients:
            text = f"round {self.round}: {len(cohort)} of {len(context.clients)} clients train: {', '.join(cohort)}"
            context.events.write("cohort", text, round=self.round, clients=cohort)
        for name in context.clients:
            # Not waited for: a failure is found by the next call that is.
            at, passed = self.state.round * self._job.local_steps, self.state.examples.get(name, 0)
            self._executor.call(name, Participant.begin_round, at, passed)
        self._set_pace(cohort)
        self._set_lr_scales(cohort)
        training = context.training
        if self._watches and isinstance(training, SplitTraining):
            end = self.round * self._job.local_steps
            for part in (part for part in context.plan.available if part.name in cohort):
                steps = [step for step in range(end - self._job.local_steps, end) if part.takes_part_in(step)]
                if steps:
                    training.watch(part.name, steps[-1], context.run.policy.importance.tokens)

    @property
    def _watches(self) -> bool:
        """True if importance is scored in the last step of the round under way, for a probe that is due after it."""
        run, round_ = self.context.run, self.round
        due = run.policy.probes and round_ < self._job.rounds and self.state.planning.probe_due(round_)
        return due and isinstance(self.context.training, SplitTraining)

    def _take_scores(self) -> None:
        """Keep the scores of the step just made; without those of every weight the review probes."""
        context, executor = self.context, self._executor
        cohort = context.cohort(self.round)
        calls = [executor.call(name, HolderActor.take_scores) for name in [*cohort, *context.servers]]
        until = time.monotonic() + self._job.faults.patience_s
        # A failure is found again by the next call that matters.
        found = [own for own in executor.wait(calls, until) if not isinstance(own, HsplitError)]
        self.state.probe = mean_report([report for own in found for report in own], context.plan.weights)
        tokens = context.run.policy.importance.tokens
        self.state.virtual_time_s += context.clock.watched_s(context.plan, tokens, cohort)

    def local_step(self, step: int) -> StepOutcome:
        """One local step of the round's clients, the run's ``step``-th from 0 (METHOD 2)."""
        context, begun = self.context, time.monotonic()
        outcome = context.training.step(context.plan, step, context.cohort(step // self._job.local_steps + 1))
        for failure in outcome.failed.values():
            self._membership.lose(failure)
        if not context.clients:
            context.fail_without_clients(next(iter(outcome.failed)))
        self._records.step(outcome, time.monotonic() - begun, self.step_times_s[step % len(self.step_times_s)])
        if self.state.step == self.round * self._job.local_steps and self._watches:
            self._take_scores()
        return outcome

    def aggregate(self) -> None:
        """Aggregate what was learned, have every holder restart from it, and bring back lost clients (METHOD 6)."""
        context, executor, begun, replicas = self.context, self._executor, time.monotonic(), self._replicas
        cohort = context.cohort(self.state.round + 1)
        collected = {name: executor.call_pair(name, HolderActor.collect) for name in [*cohort, *replicas]}
        # The small reports come first: a client that failed is found before its adapters are passed on.
        names = list(self._membership.await_calls({client: collected[client][0] for client in cohort}))
        executor.get([collected[server][0] for server in replicas])
        not_drawn = [name for name in context.clients if name not in cohort]
        held: list[Ref[HeldAdapters] | HeldAdapters] = [collected[name][1] for name in [*names, *replicas]]
        held += [HeldAdapters(name, {}, {}, {}) for name in not_drawn]
        reported, updates = executor.call_each(SERVER, Server.aggregate, self.state.round + 2, held)
        report = executor.value(reported)
        for name, reason in report.refused.items():
            self._membership.lose(refusal(name, "collect", f"it handed in {reason}"))
        up, down = {name: report.nbytes_up[name] for name in names}, report.nbytes_down
        if context.single:
            up, down = {}, {}
        self.state.bytes_up += sum(up.values())
        self.state.bytes_down += sum(down.values())
        self._records.cut(report.residual_cut)
        self.state.residual_lag = max(self.state.residual_lag, report.residual_lag)
        restarts = {
            name: executor.call(name, HolderActor.restart, update)
            for name, update in zip([*names, *replicas, *not_drawn], updates, strict=True)
            if name not in report.refused
        }
        executor.get([restarts.pop(server) for server in replicas])
        self._membership.await_calls(restarts)
        self._membership.bring_back()
        start = self.state.round * self._job.local_steps
        finished = context.clock.finished_s(context.plan, cohort, start)
        aggregation_s = context.clock.aggregation_s(context.plan, context.run.policy, up, down, names, finished)
        self._count(aggregation_s, begun)

    def validate(self) -> Validation:
        """Compute the loss over every client's held-out share."""
        context, begun = self.context, time.monotonic()
        batches = context.validation_batches
        with self._records.validating():
            outcome = context.training.validation(context.plan, batches)
            self.state.bytes_up += outcome.bytes_up
            self.state.bytes_down += outcome.bytes_down
            virtual_s = context.clock.validation_s(context.plan, batches)
            self.state.validation_virtual_s += virtual_s
            self._count(virtual_s, begun)
        found = Validation.of(outcome.losses)
        if not math.isfinite(found.loss_sum):
            raise ActorFailure(SERVER, "validation", "the validation loss is not finite", "diverged")
        return found

    # -- the virtual clock, and the emulated one (METHOD 8) -----------------------------------------------------------

    def _count(self, virtual_s: float, begun: float) -> None:
        """Add ``virtual_s`` to the virtual clock; where the clock is emulated, wait until they have passed.

        Local steps are not counted here: in them each holder keeps its own pace.

        Args:
            virtual_s: declared seconds.
            begun: their begin, by ``time.monotonic``.
        """
        self.state.virtual_time_s += virtual_s
        if self._job.clock == "emulated":
            time.sleep(max(0.0, begun + virtual_s / self._job.clock_speedup - time.monotonic()))

    def _set_lr_scales(self, cohort: Sequence[str]) -> None:
        """Scale each layer's learning rate by the number of its holders that a round's mean is over."""
        context = self.context
        if not context.run.scales_lr:
            return
        holders = context.plan.holders_by_layer(cohort, len(context.servers))
        scales = {layer: math.sqrt(count) for layer, count in enumerate(holders)}
        for name in (*cohort, *context.servers):
            # Not waited for: a failure is found by the next call that is.
            self._executor.call(name, HolderActor.set_lr_scales, scales)

    def _set_pace(self, cohort: list[str]) -> None:
        """Set how long each call of a step is to take, where the clock is emulated."""
        if self._job.clock != "emulated":
            return
        context, speedup = self.context, self._job.clock_speedup
        calls = context.clock.call_s(context.plan)
        calls |= {name: calls[SERVER] for name in context.servers if SERVER in calls}
        for name, own in calls.items():
            if name in context.clients or name in context.servers:
                # Not waited for: a failure is found by the next call that is.
                pace = {what: seconds / speedup for what, seconds in own.items()}
                self._executor.call(name, HolderActor.set_pace, pace)
