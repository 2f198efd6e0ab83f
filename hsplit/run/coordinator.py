"""The round loop: the one place that tells the order of events. It reads top to bottom.

prepare → validate → [review the plan → local steps → aggregate → validate → checkpoint] per round → export

A client that fails is left out, and is back for the next round (:mod:`hsplit.run.membership`). Whatever else fails, the
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
from hsplit.config.files import displayed
from hsplit.errors import InputError
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.observe.observer import Observer
from hsplit.observe.tables import MetricsRow
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import SavePoint
from hsplit.run.context import ClockOf, Inputs, RunContext
from hsplit.run.records import Records
from hsplit.run.recovery import Recovery
from hsplit.run.state import RunState, Status
from hsplit.run.step import Done
from hsplit.run_directory import RunDirectory


class Coordinator:
    """Drives a run through an executor, in-process or Ray.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what the user watches.
        clock_of: makes the virtual clock by the budgets in force.

    Attributes:
        context: shared by the parts of the run.
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
        # The first server aggregates; these take part.
        _, *self._replicas = run.server.names
        # Virtual, of each local step of the round; nothing until one has begun.
        self._step_times_s = [0.0]
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
            Whether the run is complete; ``False`` when it was asked to stop and has left a checkpoint.

        Raises:
            ActorFailure: it cannot go on; the last checkpoint is complete.
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

    def loaded(self, own_code: Sequence[str]) -> None:
        """Say in the log which code of the user's own takes part."""
        for text in own_code:
            self.context.events.write("code", text)

    def changed(self, settings: Sequence[str]) -> None:
        """Say in the log which settings are others than those that the run was begun with."""
        for text in settings:
            self.context.note("changed", text)

    def begins_again(self) -> None:
        """Say that the run was begun before and has left no checkpoint."""
        self.context.note("resumed", "there is no checkpoint yet: the run begins again from round 0")

    @property
    def last_checkpoint(self) -> Path | None:
        """What a round is repeated from; ``None``: there is none yet."""
        return self._save_point.path

    def finish(self) -> None:
        """Say in the log that the run has left all that it was to leave."""
        self.context.events.write("finished", f"all {self._job.rounds} rounds are done")

    def fail(self, why: str) -> None:
        """Say in the log why the run ends."""
        self.context.events.write("failed", why, round=self.round)

    def start(self) -> None:
        """Bring everybody to the run's start: the first plan, data, layers, and a validation before any training."""
        context, data = self.context, self.context.data
        self._save_point.go_back_to_the_start()
        planned = self._executor.call(SCHEDULER, Scheduler.first, context.fleet, self.state.planning)
        # Those without a place too: what is lost with them is counted where it lies. They read while it is planned.
        gone = self.state.with_status(Status.ASIDE, Status.LOST, Status.AWAY)
        reading = data.begin([client for client in context.run.participants if client.name not in gone])
        review = self._executor.value(planned)
        self.state.planning = review.state
        if review.reasons:
            context.note("replanned", f"planned again: {'; '.join(review.reasons)}", round=0, reasons=review.reasons)
        context.adopt(review.made)
        data.finish(reading, context.unavailable)
        data.say_what_is_lost(context.plan)
        if not context.clients:
            names = ", ".join(self.state.to_return)
            raise InputError(f"clients: none that fits is there to begin with (away: {names}); start their nodes first")
        context.configure()
        first = RoundUpdate(1, {}, {})
        holders = [*context.clients, *context.servers]
        self._executor.get([self._executor.call(name, HolderActor.restart, first) for name in holders])
        try:
            found = self.validate()
        except ActorFailure as failure:
            if failure.kind == "diverged" or isinstance(failure, NotFinite):
                job = self._job
                raise InputError(
                    f"job.model: the loss of {job.model} is not finite before any training ({failure.reason}), with"
                    f" job.base {job.base} and job.dtype {job.dtype}: set both to fp32; where they are, its files are"
                    " damaged"
                ) from failure
            raise
        self._records.close_round(*found)
        self._checkpoint()

    def _rounds(self) -> bool:
        """The rounds that are left; returns as :meth:`run`."""
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
                    self._checkpoint()
                    context.note("stopped", f"stopped on request in round {state.round + 1}")
                    return False
            self.aggregate()
            state.round += 1
            self._records.close_round(*self._membership.retry(self.validate))
            self._checkpoint()
            self._recovery.round_is_done()
        return True

    def _checkpoint(self) -> None:
        self._save_point.make(self._membership.retry(self._save_point.states))

    # -- between two rounds (METHOD 3 and 5) ------------------------------------------------------------------------

    def _review(self) -> None:
        """Ask the scheduler whether budgets or importance have changed so much that another plan is due."""
        context, done = self.context, self.state.round
        requests = self._membership.requests()
        due = context.run.policy.probes and self.state.planning.probe_due(done)
        reports = self._membership.retry(self._probe) if due else []
        measured = self._records.peaks_with_probe()
        try:
            given = done, context.plan, context.fleet, self.state.planning
            review = context.ask(Scheduler.review, *given, reports, measured, requests)
        except InputError as error:
            # The budgets were right when the run began, so this is a failure of the run and not of its input.
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
            self._reconfigure(review.plan)
        self._membership.bring_back()

    def _probe(self) -> list[ImportanceReport]:
        context, begun = self.context, time.monotonic()
        cohort = context.cohort(self.state.round + 1)
        probe = context.training.probe(cohort, self.state.round, context.run.policy.importance.tokens)
        self.state.bytes_up += probe.bytes_up
        self.state.bytes_down += probe.bytes_down
        self._count(context.clock.probe_s(context.plan, context.run.policy.importance.tokens, cohort), begun)
        # The few examples drawn may have no supervised token, or be known by heart: then nothing new is known.
        telling = any(report.tokens and any(report.scores.values()) for report in probe.reports)
        return probe.reports if telling else []

    def _reconfigure(self, plan: Plan) -> None:
        """Put another plan in force without changing what the model computes (law E4)."""
        context, executor, begun = self.context, self._executor, time.monotonic()
        before, had = context.plan, list(context.clients)
        context.adopt(plan)
        for name in had:
            if name not in context.clients:
                executor.call(name, Participant.release)
        if {client.name for client in before.available} != set(context.clients):
            context.data.say_what_is_lost(plan)
        names = [*context.clients, *self._replicas]
        reported, sent = executor.call_each(SERVER, Server.reconfigure, self.state.round + 1, plan, had, names)
        report, updates = executor.value(reported), dict(zip(names, sent, strict=True))
        executor.get([executor.call(name, Replica.follow, plan, updates[name]) for name in self._replicas])
        down = report.nbytes_down
        moving = {name: plan.client(name) for name in context.clients if name in down}
        given_up = self._membership.await_calls(
            {n: executor.call(n, Participant.shrink, part.held_layers, part.ranks) for n, part in moving.items()}
        )
        self._records.forget_peaks(list(given_up))
        self._membership.await_calls(
            {
                n: executor.call(n, Participant.reconfigure, moving[n].held_layers, moving[n].ranks, updates[n])
                for n in given_up
            }
        )
        if context.single:
            down = {}
        self.state.bytes_down += sum(down.values())
        self._count(context.clock.reconfiguration_s(before, plan, down), begun)
        self._records.cut(report.residual_cut)

    # -- a round ----------------------------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Settle who trains in the round that begins, and how long that is to take."""
        context = self.context
        context.round = self.state.round + 1
        cohort = context.cohort(self.round)
        self._step_times_s = context.clock.steps_s(context.plan, cohort)
        if cohort != context.clients:
            text = f"round {self.round}: {len(cohort)} of {len(context.clients)} clients train: {', '.join(cohort)}"
            context.events.write("cohort", text, round=self.round, clients=cohort)
        self._set_pace(cohort)
        self._set_lr_scales(cohort)

    def local_step(self, step: int) -> Done:
        """One local step of those who train in its round, the run's ``step``-th from 0 (METHOD 2)."""
        begun = time.monotonic()
        done = self.context.training.step(step, self.context.cohort(step // self._job.local_steps + 1))
        for failure in done.failed.values():
            self._membership.lose(failure)
        if not self.context.clients:
            self.context.fail_without_clients(next(iter(done.failed)))
        self._records.step(done, time.monotonic() - begun, self._step_times_s[step % len(self._step_times_s)])
        return done

    def aggregate(self) -> None:
        """Sum up what all have learned, have everybody begin anew with it, and bring back the lost (METHOD 6)."""
        context, executor, begun, others = self.context, self._executor, time.monotonic(), self._replicas
        cohort = context.cohort(self.state.round + 1)
        asked = {name: executor.call_pair(name, HolderActor.collect) for name in [*cohort, *others]}
        # The small reports come first: a client that failed is found before its adapters are passed on.
        names = list(self._membership.await_calls({client: asked[client][0] for client in cohort}))
        executor.get([asked[server][0] for server in others])
        idle = [name for name in context.clients if name not in cohort]
        held: list[Ref[HeldAdapters] | HeldAdapters] = [asked[name][1] for name in [*names, *others]]
        held += [HeldAdapters(name, {}, {}, {}) for name in idle]
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
        restarts = {
            name: executor.call(name, HolderActor.restart, update)
            for name, update in zip([*names, *others, *idle], updates, strict=True)
            if name not in report.refused
        }
        executor.get([restarts.pop(server) for server in others])
        self._membership.await_calls(restarts)
        self._membership.bring_back()
        aggregation_s = context.clock.aggregation_s(context.plan, context.run.policy, up, down, names)
        self._count(aggregation_s, begun)

    def validate(self) -> tuple[float, int]:
        """Pooled validation loss over every client's held-out share: sum of cross-entropy, supervised tokens."""
        context, begun = self.context, time.monotonic()
        batches = {client: context.data.validation_batches[client] for client in context.clients}
        done = context.training.validation(batches)
        self.state.bytes_up += done.bytes_up
        self.state.bytes_down += done.bytes_down
        self._count(context.clock.validation_s(context.plan, batches), begun)
        loss_sum = sum(loss.loss_sum for loss in done.losses)
        if not math.isfinite(loss_sum):
            raise ActorFailure(SERVER, "validation", "the validation loss is not finite", "diverged")
        return loss_sum, sum(loss.tokens for loss in done.losses)

    # -- the virtual clock, and the emulated one (METHOD 8) -----------------------------------------------------------

    def _count(self, virtual_s: float, begun: float) -> None:
        """Add what something took by the virtual clock; where the clock is emulated, wait until that has passed.

        Local steps are not counted here: there everybody waits for itself.

        Args:
            virtual_s: declared seconds.
            begun: when it began, by ``time.monotonic``.
        """
        self.state.virtual_time_s += virtual_s
        if self._job.clock == "emulated":
            time.sleep(max(0.0, begun + virtual_s / self._job.clock_speedup - time.monotonic()))

    def _set_lr_scales(self, cohort: Sequence[str]) -> None:
        """Tell everybody how many holders, each with data of its own, a round's mean is taken over."""
        context = self.context
        if not context.run.scales_lr:
            return
        training = [name for name in cohort if name not in context.plan.forward_only]
        for names in (training, context.servers):
            for name in names:
                # As for the pace: whoever is gone is found later.
                self._executor.call(name, HolderActor.set_lr_scale, math.sqrt(len(names)))

    def _set_pace(self, cohort: list[str]) -> None:
        """Tell everybody how long each call of a step is to take, where the clock is emulated."""
        if self._job.clock != "emulated":
            return
        context, speedup = self.context, self._job.clock_speedup
        calls = context.clock.call_s(context.plan, cohort)
        calls |= {name: calls[SERVER] for name in context.servers if SERVER in calls}
        for name, own in calls.items():
            if name in context.clients or name in context.servers:
                # Whoever is gone is found by the next call that matters.
                pace = {what: seconds / speedup for what, seconds in own.items()}
                self._executor.call(name, HolderActor.set_pace, pace)
