"""The round loop: the one place that tells the order of events. It reads top to bottom.

prepare → validate → [review the plan → local steps → aggregate → validate → checkpoint] per round → export
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsplit.actors.executor import SCHEDULER, SERVER, ActorFailure, Executor
from hsplit.actors.messages import LossReport
from hsplit.actors.participant import DataReport
from hsplit.actors.scheduler import Review
from hsplit.checkpoint import Progress, checkpoint_name, read_checkpoint, save_checkpoint
from hsplit.config import RunConfig
from hsplit.config.cluster import CENTRAL
from hsplit.data import Example
from hsplit.errors import InputError
from hsplit.inbox import take_requests
from hsplit.lora.holder import RoundUpdate
from hsplit.observe.events import EventLog
from hsplit.observe.metrics import MetricsRow, MetricsTable, PlanRow, plan_rows
from hsplit.observe.terminal import Display
from hsplit.observe.timing import TimingRow, timing_rows
from hsplit.run_directory import RunDirectory
from hsplit.scheduling.budgets import BudgetRequest
from hsplit.scheduling.importance import ImportanceReport
from hsplit.scheduling.plan import Plan
from hsplit.training import Done, training_of


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
    """

    def __init__(
        self, run: RunConfig, executor: Executor, directory: RunDirectory, inputs: Inputs, display: Display
    ) -> None:
        self._run, self._job = run, run.job
        self._executor, self._directory, self._inputs, self._display = executor, directory, inputs, display
        self._training = training_of(run, executor)
        self._events = EventLog(directory.events)
        self._metrics = MetricsTable(directory.metrics, MetricsRow)
        self._plans = MetricsTable(directory.plan, PlanRow)
        self._timing = MetricsTable(directory.timing, TimingRow)
        self.progress = Progress(model_fingerprint=inputs.model_fingerprint, data_sha256=inputs.data_sha256)
        # The one node is the server's: nothing travels.
        self._single = run.policy.placement == "single"
        self._clients: list[str] = []
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
        self._begun = time.monotonic()
        self.stopping = False

    # -- a run ----------------------------------------------------------------------------------------------------

    def run(self, resume_from: Path | None = None) -> bool:
        """Train from the start or from a checkpoint.

        Returns:
            Whether the run is complete; ``False`` when it was asked to stop and has left a checkpoint.
        """
        job = self._job
        if resume_from is None:
            self.start()
        else:
            self._resume(resume_from)
        progress = self.progress
        self._events.write("training", f"training begins with step {progress.step + 1}", step=progress.step + 1)
        while progress.round < job.rounds:
            if progress.round > 0 and progress.step == progress.round * job.local_steps:
                self._review()
            while progress.step < (progress.round + 1) * job.local_steps:
                self.local_step(progress.step)
                if self.stopping:
                    self._checkpoint()
                    self._note("stopped", f"stopped on request in round {progress.round + 1}")
                    return False
            self.aggregate()
            progress.round += 1
            self._close_round(self._validate())
            self._checkpoint()
        return True

    # -- set-up ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        planned = self._executor.call(SCHEDULER, "plan")
        # Those without a place too: what is lost with them is counted where it lies. They read while it is planned.
        reading = self._begin_loading_data([client.name for client in self._run.participants])
        self._adopt(*self._executor.get([planned]))
        self._finish_loading_data(reading)
        self._say_what_is_lost()
        self._configure()
        first = RoundUpdate(1, {}, {})
        self._wait([self._executor.call(name, "restart", first) for name in [*self._clients, SERVER]])
        self._close_round(self._validate())
        self._checkpoint()

    def _resume(self, checkpoint: Path) -> None:
        self.progress, tensors = read_checkpoint(checkpoint)
        for what, then, now in (
            ("model", self.progress.model_fingerprint, self._inputs.model_fingerprint),
            ("data", self.progress.data_sha256, self._inputs.data_sha256),
        ):
            if then != now:
                raise InputError(f"{self._directory.path}: the {what} is not the one that this run was started with")
        self._metrics.restore(self.progress.metrics)
        self._plans.restore(self.progress.plans)
        self._timing.restore(self.progress.timing)
        assert self.progress.plan is not None and self.progress.scheduler is not None
        self._one(SCHEDULER, "load_state", self.progress.scheduler)
        self._adopt(Plan.from_json(self.progress.plan))
        self._finish_loading_data(self._begin_loading_data([client.name for client in self._plan.clients]))
        self._configure()
        _, *updates = self._executor.call_many(
            1 + len(self._clients), SERVER, "load_state", tensors[SERVER], *self._clients
        )
        self._wait(
            [
                self._executor.call(name, "load_state", tensors[name], update)
                for name, update in zip(self._clients, updates, strict=True)
            ]
        )
        self._begun = time.monotonic() - self.progress.wall_time_s
        self._saved = checkpoint
        self._note("resumed", f"resumed from {checkpoint.name}")

    def _adopt(self, plan: Plan) -> None:
        """Put ``plan`` in force and say who cannot take part any more."""
        self._plan = plan
        self._clients = [client.name for client in plan.available]
        self.progress.plan = plan.to_json()
        self._step_time_s = self._one(SCHEDULER, "step_time_s", plan)
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

    def _begin_loading_data(self, names: list[str]) -> dict[str, Any]:
        own = {client.name: client.data for client in self._run.clients}
        # A single node has everybody's data.
        every = self._inputs.shares
        shares = {name: every if name == CENTRAL else {name: every.get(name)} for name in names}
        return {name: self._executor.call(name, "load_data", shares[name], own.get(name)) for name in names}

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
            self._examples[report.client] = report.train + report.validation
            self._validation_batches[report.client] = report.validation_batches
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
        examples, total = sum(self._examples[name] for name in lost), sum(self._examples.values())
        text = (
            f"{len(lost)} of {len(self._plan.clients)} clients are unavailable, and with them {examples} of {total}"
            f" examples ({examples / total:.1%}) are not trained on"
        )
        self._note("data_lost", text, clients=lost, examples=examples, of_examples=total)

    def _configure(self) -> None:
        calls = [self._executor.call(SERVER, "configure", self._plan)]
        for client in self._plan.available:
            calls.append(self._executor.call(client.name, "configure", client.split, client.ranks))
        self._wait(calls)
        self._set_pace()

    # -- the emulated clock (METHOD 8) ----------------------------------------------------------------------------

    def _set_pace(self) -> None:
        """Tell everybody how long each call of a step is to take, where the clock is emulated."""
        if self._job.clock != "emulated":
            return
        calls: dict[str, dict[str, float]] = self._one(SCHEDULER, "call_times_s", self._plan)
        speedup = self._job.clock_speedup
        self._wait(
            [
                self._executor.call(name, "set_pace", {what: seconds / speedup for what, seconds in own.items()})
                for name, own in calls.items()
            ]
        )

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
        requests = self._budget_requests()
        reports = self._probe() if self._run.policy.probes else []
        # The probe ran under the plan that is being looked at, so it counts with the round before.
        self._probe_peaks = self._peaks([*self._clients, SERVER])
        measured = _larger(progress.measured_bytes, self._probe_peaks)
        try:
            review: Review = self._one(SCHEDULER, "review", progress.round, self._plan, reports, measured, requests)
        except InputError as error:
            # The budgets were right when the run began, so this is a failure of the run and not of its input.
            raise ActorFailure(SCHEDULER, "review", str(error)) from error
        if review.importance is not None:
            text = f"importance of {len(review.importance)} weights after round {progress.round}"
            self._events.write("importance", text, round=progress.round, scores=review.importance)
        if review.plan is not None:
            text = f"planned anew after round {progress.round}: {'; '.join(review.reasons)}"
            self._note("replanned", text, round=progress.round, reasons=review.reasons)
            self._reconfigure(review.plan)
        # Budgets may have changed without another plan.
        self._step_time_s = self._one(SCHEDULER, "step_time_s", self._plan)
        self._set_pace()

    def _budget_requests(self) -> list[BudgetRequest]:
        """What the cluster file foresees for the round that begins, then what the inbox holds."""
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
            asked_for = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
            self._events.write("budget", f"{request.holder}: {asked_for} asked for", round=done, **asdict(request))
        return [*requests, *asked]

    def _probe(self) -> list[ImportanceReport]:
        begun = time.monotonic()
        probe = self._training.probe(self._clients, self.progress.round, self._run.policy.importance.tokens)
        self.progress.bytes_up += probe.bytes_up
        self.progress.bytes_down += probe.bytes_down
        self._count(self._one(SCHEDULER, "probe_time_s", self._plan), begun)
        return probe.reports

    def _reconfigure(self, plan: Plan) -> None:
        """Put another plan in force without changing what the model computes (law E4)."""
        begun, before, had = time.monotonic(), self._plan, self._clients
        self._adopt(plan)
        self._wait([self._executor.call(name, "release") for name in had if name not in self._clients])
        if {client.name for client in before.available} != set(self._clients):
            self._say_what_is_lost()
        report, *updates = self._executor.call_many(
            1 + len(self._clients), SERVER, "reconfigure", self.progress.round + 1, plan, *self._clients
        )
        (report,) = self._executor.get([report])
        down = report.nbytes_down
        moving = [client for client in plan.available if client.name in down]
        self._wait([self._executor.call(client.name, "give_up", client.split) for client in moving])
        # What the old plan took is over; from here on the new one is measured.
        for name in self._peaks([client.name for client in moving]):
            self._probe_peaks.pop(name, None)
        self._wait(
            [
                self._executor.call(client.name, "reconfigure", client.split, client.ranks, update)
                for client, update in zip(plan.available, updates, strict=True)
                if client in moving
            ]
        )
        if self._single:
            down = {}
        self.progress.bytes_down += sum(down.values())
        self._count(self._one(SCHEDULER, "reconfiguration_time_s", before, plan, down), begun)
        self._record_cut(report.residual_cut)

    # -- one local step (METHOD 2) --------------------------------------------------------------------------------

    def local_step(self, step: int) -> Done:
        begun = time.monotonic()
        done = self._training.step(step, self._clients)
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

    def _record_step(self, losses: list[LossReport]) -> None:
        progress, job = self.progress, self._job
        for client in self._clients:
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
            dict.fromkeys(self._clients, "training"),
        )

    # -- the end of a round (METHOD 6) ----------------------------------------------------------------------------

    def aggregate(self) -> None:
        begun = time.monotonic()
        held = [self._executor.call(client, "held") for client in self._clients]
        report, *updates = self._executor.call_many(1 + len(held), SERVER, "aggregate", self.progress.round + 2, *held)
        (report,) = self._executor.get([report])
        up, down = report.nbytes_up, report.nbytes_down
        if self._single:
            up, down = {}, {}
        self.progress.bytes_up += sum(up.values())
        self.progress.bytes_down += sum(down.values())
        self._record_cut(report.residual_cut)
        self._wait(
            [
                self._executor.call(client, "restart", update)
                for client, update in zip(self._clients, updates, strict=True)
            ]
        )
        self._count(self._one(SCHEDULER, "aggregation_time_s", self._plan, up, down), begun)

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
        progress.measured_bytes = _larger(self._peaks([*self._clients, SERVER]), self._probe_peaks)
        self._probe_peaks = {}
        self._plans.append(*plan_rows(progress.round, self._plan, progress.measured_bytes, measured_s))
        self._timing.append(*timing_rows(progress.round, self._spent_s, self._steps_s))
        progress.metrics, progress.plans = self._metrics.to_json(), self._plans.to_json()
        progress.timing = self._timing.to_json()
        self._say_who_is_late()
        progress.bytes_up = progress.bytes_down = progress.round_tokens = 0
        progress.round_loss_sum = 0.0
        self._spent_s.clear()
        self._steps_s = 0.0
        self._events.write("round", f"round {row.round}: validation perplexity {row.val_ppl:.3f}", **asdict(row))
        self._display.round_done(row)

    def _say_who_is_late(self) -> None:
        if self._late and self._job.clock == "emulated":
            text = (
                f"round {self.progress.round}: {', '.join(sorted(self._late))} computed longer than declared, so the"
                " emulated clock is late; a smaller job.clock_speedup gives more time"
            )
            self._note("late", text, holders=sorted(self._late))
        self._late.clear()

    def _checkpoint(self) -> None:
        names = [*self._clients, SERVER]
        states = self._executor.get([self._executor.call(name, "state") for name in names])
        self.progress.scheduler = self._one(SCHEDULER, "state")
        self.progress.wall_time_s = time.monotonic() - self._begun
        name = checkpoint_name(self.progress, self._job.local_steps)
        tensors = dict(zip(names, states, strict=True))
        self._saved = save_checkpoint(
            self._directory.checkpoints, name, self.progress, tensors, self._job.keep_checkpoints
        )
        self._events.write("checkpoint", f"checkpoint {name} written")

    # -- small things ---------------------------------------------------------------------------------------------

    def _one(self, actor: str, method: str, *arguments: Any) -> Any:
        (value,) = self._executor.get([self._executor.call(actor, method, *arguments)])
        return value

    def _peaks(self, holders: list[str]) -> dict[str, int]:
        """Most memory that each of ``holders`` took since the last call, by name, where it was measured."""
        peaks = self._executor.get([self._executor.call(name, "peak_bytes") for name in holders])
        return {name: peak for name, peak in zip(holders, peaks, strict=True) if peak}

    def _wait(self, handles: list[Any]) -> None:
        self._executor.get(handles)

    def _note(self, event: str, text: str, **fields: Any) -> None:
        self._events.write(event, text, **fields)
        self._display.note(text)


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """By name the larger of two numbers."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}
