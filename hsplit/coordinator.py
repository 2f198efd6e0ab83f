"""The round loop: the one place that tells the order of events. It reads top to bottom.

prepare → validate → [review the plan → local steps → aggregate → validate → checkpoint] per round → export

A client that fails is left out, and is back for the next round. Whatever else fails, the round is repeated from the
last checkpoint. What is done then is in :mod:`hsplit.recovery` and :mod:`hsplit.save_point`; who comes and goes in
:mod:`hsplit.membership`; what is counted and written down in :mod:`hsplit.records`. All of them share
:mod:`hsplit.standing`.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from hsplit.actors.executor import SCHEDULER, SERVER, ActorFailure, Executor, NotFinite, Ref, refusal
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.participant import Participant
from hsplit.actors.replica import Replica
from hsplit.actors.scheduler import Scheduler
from hsplit.actors.server import Server
from hsplit.checkpoint import Progress
from hsplit.config import RunConfig
from hsplit.config.files import displayed
from hsplit.errors import InputError
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.membership import Membership
from hsplit.observe.observer import Observer
from hsplit.records import Records
from hsplit.recovery import Recovery
from hsplit.run_directory import RunDirectory
from hsplit.save_point import SavePoint
from hsplit.scheduling.importance import ImportanceReport
from hsplit.scheduling.plan import Plan
from hsplit.standing import Inputs, Standing
from hsplit.training import Done


class Coordinator:
    """Drives a run through an executor, in-process or Ray.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what the user watches.

    Attributes:
        standing: where the run stands.
        stopping: set it to have the run end after the local step under way.
    """

    def __init__(
        self, run: RunConfig, executor: Executor, directory: RunDirectory, inputs: Inputs, display: Observer
    ) -> None:
        self._job, self._executor = run.job, executor
        self.standing = standing = Standing(run, executor, directory, inputs, display)
        self._records = Records(standing)
        self._save_point = SavePoint(standing, self._records)
        self._recovery = Recovery(standing, self._save_point)
        self._membership = Membership(standing)
        # The first server aggregates; these take part.
        _, *self._replicas = run.server.names
        # Virtual, of each local step of the round; nothing until one has begun.
        self._step_times_s = [0.0]
        self.stopping = False

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.standing.progress

    @property
    def round(self) -> int:
        """The round under way, counted from 1, or the one just ended until the next begins."""
        return self.standing.round

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
        self._save_point.tell_damage(passed_over)
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
            self.standing.events.write("code", text)

    def changed(self, settings: Sequence[str]) -> None:
        """Say in the log which settings are others than those that the run was begun with."""
        for text in settings:
            self.standing.note("changed", text)

    def begins_again(self) -> None:
        """Say that the run was begun before and has left no checkpoint."""
        self.standing.note("resumed", "there is no checkpoint yet: the run begins again from round 0")

    @property
    def last_checkpoint(self) -> Path | None:
        """What a round is repeated from; ``None``: there is none yet."""
        return self._save_point.path

    def finish(self) -> None:
        """Say in the log that the run has left all that it was to leave."""
        self.standing.events.write("finished", f"all {self._job.rounds} rounds are done")

    def fail(self, why: str) -> None:
        """Say in the log why the run ends."""
        self.standing.events.write("failed", why, round=self.round)

    def start(self) -> None:
        """Bring everybody to the run's start: the first plan, data, layers, and a validation before any training."""
        standing, data = self.standing, self.standing.data
        self._save_point.go_back_to_the_start()
        planned = self._executor.call(SCHEDULER, Scheduler.plan)
        # Those without a place too: what is lost with them is counted where it lies. They read while it is planned.
        gone = {*standing.roster.aside, *standing.roster.lost}
        reading = data.begin([client for client in standing.run.participants if client.name not in gone])
        standing.adopt(self._executor.value(planned))
        data.finish(reading, standing.unavailable)
        data.say_what_is_lost(standing.plan)
        if not standing.clients:
            names = ", ".join(standing.roster.lost)
            raise InputError(f"clients: none that fits is there to begin with (away: {names}); start their nodes first")
        standing.configure()
        first = RoundUpdate(1, {}, {})
        holders = [*standing.clients, *standing.servers]
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
        job, progress, standing = self._job, self.progress, self.standing
        standing.events.write("training", f"training begins with step {progress.step + 1}", step=progress.step + 1)
        while progress.round < job.rounds:
            at_its_start = progress.step == progress.round * job.local_steps
            if at_its_start and (progress.round > 0 or standing.roster.shortages):
                self._review()
            self.begin_round()
            while progress.step < (progress.round + 1) * job.local_steps:
                self.local_step(progress.step)
                if self.stopping:
                    self._checkpoint()
                    standing.note("stopped", f"stopped on request in round {progress.round + 1}")
                    return False
            self.aggregate()
            progress.round += 1
            self._records.close_round(*self._recovery.steadily(self.validate))
            self._checkpoint()
            self._recovery.round_is_done()
        return True

    def _checkpoint(self) -> None:
        self._save_point.make(self._recovery.steadily(self._save_point.states))

    # -- between two rounds (METHOD 3 and 5) ------------------------------------------------------------------------

    def _review(self) -> None:
        """Ask the scheduler whether budgets or importance have changed so much that another plan is due."""
        standing, done = self.standing, self.progress.round
        requests = self._membership.requests()
        due = standing.run.policy.probes and standing.ask(Scheduler.probe_due, done)
        reports = self._recovery.steadily(self._probe) if due else []
        measured = self._records.peaks_with_probe()
        try:
            review = standing.ask(Scheduler.review, done, standing.plan, reports, measured, requests)
        except InputError as error:
            # The budgets were right when the run began, so this is a failure of the run and not of its input.
            reason = str(error)
            if "memory_gb" in reason:
                where = shlex.quote(displayed(standing.directory.path))
                reason += (
                    f" (by now only budgets can change, before it goes on: hsplit budget {where} NAME memory_gb=GB)"
                )
            raise ActorFailure(SCHEDULER, "review", reason, "hopeless") from error
        if review.importance is not None:
            text = f"importance of {len(review.importance)} weights after round {done}"
            standing.events.write("importance", text, round=done, scores=review.importance)
        if review.plan is not None:
            text = f"planned anew after round {done}: {'; '.join(review.reasons)}"
            standing.note("replanned", text, round=done, reasons=review.reasons)
            self._reconfigure(review.plan)
        self._recovery.bring_back()

    def _probe(self) -> list[ImportanceReport]:
        standing, begun = self.standing, time.monotonic()
        cohort = standing.cohort(self.progress.round + 1)
        probe = standing.training.probe(cohort, self.progress.round, standing.run.policy.importance.tokens)
        self.progress.bytes_up += probe.bytes_up
        self.progress.bytes_down += probe.bytes_down
        self._count(standing.ask(Scheduler.probe_time_s, standing.plan, cohort), begun)
        # The few examples drawn may have no supervised token, or be known by heart: then nothing new is known.
        telling = any(report.tokens and any(report.scores.values()) for report in probe.reports)
        return probe.reports if telling else []

    def _reconfigure(self, plan: Plan) -> None:
        """Put another plan in force without changing what the model computes (law E4)."""
        standing, executor, begun = self.standing, self._executor, time.monotonic()
        before, had = standing.plan, list(standing.clients)
        standing.adopt(plan)
        for name in had:
            if name not in standing.clients:
                executor.call(name, Participant.release)
        if {client.name for client in before.available} != set(standing.clients):
            standing.data.say_what_is_lost(plan)
        names = [*standing.clients, *self._replicas]
        reported, sent = executor.call_each(SERVER, Server.reconfigure, self.progress.round + 1, plan, had, names)
        report, updates = executor.value(reported), dict(zip(names, sent, strict=True))
        executor.get([executor.call(name, Replica.follow, plan, updates[name]) for name in self._replicas])
        down = report.nbytes_down
        moving = {name: plan.client(name) for name in standing.clients if name in down}
        given_up = self._recovery.settled(
            {n: executor.call(n, Participant.give_up, part.held_layers, part.ranks) for n, part in moving.items()}
        )
        self._records.forget_peaks(list(given_up))
        self._recovery.settled(
            {
                n: executor.call(n, Participant.reconfigure, moving[n].held_layers, moving[n].ranks, updates[n])
                for n in given_up
            }
        )
        if standing.single:
            down = {}
        self.progress.bytes_down += sum(down.values())
        self._count(standing.ask(Scheduler.reconfiguration_time_s, before, plan, down), begun)
        self._records.cut(report.residual_cut)

    # -- a round ----------------------------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Settle who trains in the round that begins, and how long that is to take."""
        standing = self.standing
        standing.round = self.progress.round + 1
        cohort = standing.cohort(self.round)
        self._step_times_s = standing.ask(Scheduler.step_times_s, standing.plan, cohort)
        if cohort != standing.clients:
            text = f"round {self.round}: {len(cohort)} of {len(standing.clients)} clients train: {', '.join(cohort)}"
            standing.events.write("cohort", text, round=self.round, clients=cohort)
        self._set_pace(cohort)
        self._set_lr_scales(cohort)

    def local_step(self, step: int) -> Done:
        """One local step of those who train in its round, the run's ``step``-th from 0 (METHOD 2)."""
        begun = time.monotonic()
        done = self.standing.training.step(step, self.standing.cohort(step // self._job.local_steps + 1))
        for failure in done.failed.values():
            self._recovery.lose(failure)
        if not self.standing.clients:
            self.standing.nobody_is_left(next(iter(done.failed)))
        self._records.step(done, time.monotonic() - begun, self._step_times_s[step % len(self._step_times_s)])
        return done

    def aggregate(self) -> None:
        """Sum up what all have learned, have everybody begin anew with it, and bring back the lost (METHOD 6)."""
        standing, executor, begun, others = self.standing, self._executor, time.monotonic(), self._replicas
        cohort = standing.cohort(self.progress.round + 1)
        asked = {name: executor.call_pair(name, HolderActor.hand_in) for name in [*cohort, *others]}
        # The small reports come first: a client that failed is found before its adapters are passed on.
        names = list(self._recovery.settled({client: asked[client][0] for client in cohort}))
        executor.get([asked[server][0] for server in others])
        idle = [name for name in standing.clients if name not in cohort]
        held: list[Ref[HeldAdapters] | HeldAdapters] = [asked[name][1] for name in [*names, *others]]
        held += [HeldAdapters(name, {}, {}, {}) for name in idle]
        reported, updates = executor.call_each(SERVER, Server.aggregate, self.progress.round + 2, held)
        report = executor.value(reported)
        for name, reason in report.refused.items():
            self._recovery.lose(refusal(name, "hand_in", f"it handed in {reason}"))
        up, down = {name: report.nbytes_up[name] for name in names}, report.nbytes_down
        if standing.single:
            up, down = {}, {}
        self.progress.bytes_up += sum(up.values())
        self.progress.bytes_down += sum(down.values())
        self._records.cut(report.residual_cut)
        restarts = {
            name: executor.call(name, HolderActor.restart, update)
            for name, update in zip([*names, *others, *idle], updates, strict=True)
            if name not in report.refused
        }
        executor.get([restarts.pop(server) for server in others])
        self._recovery.settled(restarts)
        self._recovery.bring_back()
        self._count(standing.ask(Scheduler.aggregation_time_s, standing.plan, names, up, down), begun)

    def validate(self) -> tuple[float, int]:
        """Pooled validation loss over every client's held-out share: sum of cross-entropy, supervised tokens."""
        standing, begun = self.standing, time.monotonic()
        batches = {client: standing.data.validation_batches[client] for client in standing.clients}
        done = standing.training.validation(batches)
        self.progress.bytes_up += done.bytes_up
        self.progress.bytes_down += done.bytes_down
        self._count(standing.ask(Scheduler.validation_time_s, standing.plan, batches), begun)
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
        self.progress.virtual_time_s += virtual_s
        if self._job.clock == "emulated":
            time.sleep(max(0.0, begun + virtual_s / self._job.clock_speedup - time.monotonic()))

    def _set_lr_scales(self, cohort: Sequence[str]) -> None:
        """Tell everybody how many holders, each with data of its own, a round's mean is taken over."""
        standing = self.standing
        if not standing.run.scales_lr:
            return
        training = [name for name in cohort if name not in standing.plan.forward_only]
        for names in (training, standing.servers):
            for name in names:
                # As for the pace: whoever is gone is found later.
                self._executor.call(name, HolderActor.set_lr_scale, math.sqrt(len(names)))

    def _set_pace(self, cohort: list[str]) -> None:
        """Tell everybody how long each call of a step is to take, where the clock is emulated."""
        if self._job.clock != "emulated":
            return
        standing, speedup = self.standing, self._job.clock_speedup
        calls = standing.ask(Scheduler.call_times_s, standing.plan, cohort)
        calls |= {name: calls[SERVER] for name in standing.servers if SERVER in calls}
        for name, own in calls.items():
            if name in standing.clients or name in standing.servers:
                # Whoever is gone is found by the next call that matters.
                pace = {what: seconds / speedup for what, seconds in own.items()}
                self._executor.call(name, HolderActor.set_pace, pace)
