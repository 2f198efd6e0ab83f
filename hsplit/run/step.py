"""The local step, the validation and the importance probe, by placement, with deadlines for the clients' calls.

Tensors pass from actor to actor as handles; only losses, sizes and times arrive here. The others continue without a
client that fails in a step (lost) or does not answer in time (left out of the step).
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from hsplit.actors.client import Client
from hsplit.actors.executor import ActorFailure, Executor, NotFinite, R, Ref, refusal
from hsplit.actors.messages import Activations, ForwardReport, LossReport, ServerReport, WireTensor
from hsplit.actors.replica import Replica
from hsplit.actors.whole_client import WholeClient
from hsplit.config import SERVER, Job, RunConfig
from hsplit.errors import HsplitError
from hsplit.planning.cost.serving import cohorts, served_by
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import Plan


@dataclass(frozen=True)
class ProbeOutcome:
    """Result of a probe.

    Attributes:
        reports: two for each client: of its own layers, and of the server's layers over its tokens.
        bytes_up, bytes_down: activations (and the gradients of clients' tails) sent to the server; its replies.
    """

    reports: list[ImportanceReport]
    bytes_up: int
    bytes_down: int


def probe_importance(
    executor: Executor,
    served: Mapping[str, Sequence[str]],
    round_: int,
    tokens: int,
    labels: str,
    patience_s: float | None = None,
) -> ProbeOutcome:
    """Score every adapted weight on a probe batch of each client; nothing is trained and nothing else changes.

    Call it between two local steps. Tensors pass from actor to actor as handles; only scalars arrive here.

    Args:
        executor: reaches clients and servers, all of them configured.
        served: the clients that take part, by the server that serves them.
        round_: the examples are drawn by the run's seed, the client and this.
        tokens: supervised tokens to score on at each client, see :func:`hsplit.data.batches.probe_batch`.
        labels: ``privacy.labels``: ``server`` or ``client``.
        patience_s: seconds after which a client that has not answered has failed; ``None``: never.

    Raises:
        ActorFailure: an actor failed, or a weight did not report.
    """

    def get(calls: Sequence[Ref[R]]) -> list[R]:
        return executor.get(calls, None if patience_s is None else time.monotonic() + patience_s)

    fronts = {
        client: executor.call_pair(client, Client.probe_forward, round_, tokens)
        for clients in served.values()
        for client in clients
    }
    # The small reports come first: a client that failed is found before its tensors are passed on.
    bytes_up = sum(report.nbytes for report in get([report for report, _ in fronts.values()]))
    sent = {client: message for client, (_, message) in fronts.items()}
    bytes_down, scored = 0, []
    if labels == "client":
        # Calls to all servers begin before any client's tail is waited for.
        deep = {
            server: executor.call_each(server, Replica.probe_forward, [sent[client] for client in clients])
            for server, clients in served.items()
        }
        tails = {
            client: executor.call_pair(client, Client.probe_tail, output)
            for server, clients in served.items()
            for client, output in zip(clients, deep[server][1], strict=True)
        }
        bytes_up += sum(loss.nbytes for loss in get([report for report, _ in tails.values()]))
        bytes_down += sum(report.nbytes for report in executor.get([report for report, _ in deep.values()]))
        for server, clients in served.items():
            tail_gradients = [tails[client][1] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe_backward, tail_gradients)))
    else:
        for server, clients in served.items():
            messages = [sent[client] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe, messages)))
    own = [
        executor.call(client, Client.probe_backward, gradient)
        for clients, _, gradients in scored
        for client, gradient in zip(clients, gradients, strict=True)
    ]
    at_servers = executor.get([report for _, report, _ in scored])
    reports = get(own) + [report for server in at_servers for report in server.importance]
    return ProbeOutcome(reports, bytes_up, bytes_down + sum(server.nbytes for server in at_servers))


_REMEMBERED = 21
"""Number of last times that a median is taken over."""
_TRUSTED = 3
"""Number of times from which on a median gives a deadline."""
SLACK_S = 2.0
"""Part of every deadline: for messages and a busy machine, beside the client's own work."""


class Deadlines:
    """Measured times of each client's calls, and the deadlines that follow from them.

    Args:
        multiple: of the median (``job.faults.deadline``); ``None``: there are no deadlines.
    """

    def __init__(self, multiple: float | None) -> None:
        self._multiple = multiple
        self._measured: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def record(self, client: str, method: str, seconds: float) -> None:
        """Add the time of one call, by the client's own clock."""
        self._measured[client, method].append(seconds)

    def until(self, client: str, method: str, calls: int) -> float | None:
        """Deadline, by ``time.monotonic``, of ``calls`` calls that begin now; ``None``: there is none."""
        measured = self._measured[client, method]
        if self._multiple is None or len(measured) < _TRUSTED:
            return None
        return time.monotonic() + SLACK_S + self._multiple * calls * statistics.median(measured)


# Servers with handles to their reports, in the order of the calls; and by part each client's gradient.
_ServerSide = tuple[list[tuple[str, Ref[ServerReport]]], list[dict[str, Ref[WireTensor | None]]]]
_Front = tuple[Ref[ForwardReport], Ref[Activations]]


@dataclass
class StepOutcome:
    """Result of a step or a validation.

    Attributes:
        losses: of each client's rows; a client may have several.
        bytes_up, bytes_down: sent to the server; sent back.
        seconds: wall time by holder and phase (:data:`hsplit.observe.tables.PHASES`, without ``waiting``).
        overran: holders that took longer than declared, where the clock is emulated.
        failed: clients that are lost, with the failure.
        left_out: clients that were not in time for this step, and are still in the run.
    """

    losses: list[LossReport] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    overran: set[str] = field(default_factory=set)
    failed: dict[str, ActorFailure] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def add_seconds(self, holder: str, seconds: Mapping[str, float]) -> None:
        """Add the phases of one call of ``holder``."""
        for phase, spent in seconds.items():
            self.seconds[holder][phase] += spent
        if "paced" not in seconds:
            self.overran.add(holder)

    def add_server_report(self, server: str, report: ServerReport) -> None:
        """Add a server's call; clients that it refused have failed."""
        self.bytes_down += report.nbytes
        self.add_seconds(server, report.seconds)
        for loss in report.losses:
            self.add_loss(loss)
        for client, reason in report.refused.items():
            self.failed[client] = refusal(client, "a local step", f"it sent {reason}")

    def add_loss(self, loss: LossReport) -> None:
        """Add one client's loss.

        Raises:
            ActorFailure: it is not finite, though all that the client sent is.
        """
        if not math.isfinite(loss.loss_sum):
            raise ActorFailure(SERVER, "a local step", f"the loss of {loss.client} is not finite", "diverged")
        self.losses.append(loss)

    def takes_part(self, client: str) -> bool:
        """True if a client is neither lost nor left out of the step."""
        return client not in self.failed and client not in self.left_out


class Training(ABC):
    """Training by one placement. Every method may raise ``ActorFailure``.

    Args:
        job: the run's settings.
        executor: reaches clients and servers.
    """

    def __init__(self, job: Job, executor: Executor) -> None:
        self._job, self._executor = job, executor
        self._deadlines = Deadlines(job.faults.deadline)
        # The last call of each client that was not in time.
        self._busy: dict[str, Ref[Any]] = {}

    @abstractmethod
    def step(self, plan: Plan, step: int, clients: Sequence[str]) -> StepOutcome:
        """One local step of ``clients`` by ``plan``; ``step`` counts over the run (METHOD 2).

        Raises:
            ActorFailure: the server failed, or every client.
        """

    @abstractmethod
    def validation(self, plan: Plan, batches: Mapping[str, int]) -> StepOutcome:
        """Loss over the held-out batches of every client, whose numbers ``batches`` has by client name."""

    @abstractmethod
    def probe(self, plan: Plan, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        """Score every adapted weight on a probe batch of each client (METHOD 3); nothing else changes."""

    def forget(self, client: str | None = None) -> None:
        """Forget the calls under way of a client that is lost; ``None``: of all clients."""
        if client is None:
            self._busy.clear()
        else:
            self._busy.pop(client, None)

    def _get(self, calls: Sequence[Ref[R]]) -> list[R]:
        """Values of clients' calls outside of a step; a client without an answer after ``patience_s`` has failed."""
        return self._executor.get(calls, self._patience_ends())

    def _patience_ends(self) -> float:
        return time.monotonic() + self._job.faults.patience_s

    def _begin(self, clients: Sequence[str]) -> StepOutcome:
        """Begin a step; clients that have not finished an earlier one are left out of it."""
        outcome = StepOutcome()
        free = [client for client in clients if client not in self._busy]
        for client, call in list(self._busy.items()):
            # Without another client in the step, this one is waited for.
            (value,) = self._executor.wait([call], 0.0 if free else self._patience_ends())
            if free and _is_late(value):
                outcome.left_out.add(client)
                continue
            del self._busy[client]
            if isinstance(value, HsplitError):
                outcome.failed[client] = _failure(client, value)
            free.append(client)
        return outcome

    def _in_time(self, outcome: StepOutcome, calls: Mapping[str, Ref[R]], method: str, count: int = 1) -> dict[str, R]:
        """Wait for one call of each client; returns the values of the clients that answered in time.

        Clients that failed are added to ``outcome.failed``, late ones to ``outcome.left_out``; if all are late, they
        are waited for.

        Args:
            outcome: of the step.
            calls: by client, each the last of ``count`` calls of ``method``.
            method: for the deadline.
            count: of calls that have begun.
        """
        patience_ends = self._patience_ends()
        deadlines = {client: self._deadlines.until(client, method, count) for client in calls}
        values = {
            client: self._executor.wait([call], deadlines[client] or patience_ends)[0] for client, call in calls.items()
        }
        late = {client for client, value in values.items() if _is_late(value) and deadlines[client] is not None}
        if len(late) == len(values):
            # The cause is then not the clients themselves.
            values, late = {c: self._executor.wait([call], patience_ends)[0] for c, call in calls.items()}, set()
        outcome.left_out |= late
        in_time = {}
        for client, value in values.items():
            if not isinstance(value, HsplitError):
                in_time[client] = value
            elif client not in late:
                outcome.failed[client] = _failure(client, value)
        return {client: value for client, value in in_time.items() if outcome.takes_part(client)}

    def _add_time(self, outcome: StepOutcome, client: str, method: str, seconds: Mapping[str, float]) -> None:
        outcome.add_seconds(client, seconds)
        self._deadlines.record(client, method, sum(seconds.values()))

    def _raise_if_all_failed(self, outcome: StepOutcome) -> None:
        """Raise the first failure if no client trained."""
        if not outcome.losses and outcome.failed:
            first, *others = outcome.failed.values()
            if isinstance(first, NotFinite) and all(isinstance(other, NotFinite) for other in others):
                raise first.of_all()
            raise first


def _is_late(value: Any) -> bool:
    return isinstance(value, ActorFailure) and value.kind == "late"


def _failure(client: str, error: HsplitError) -> ActorFailure:
    return error if isinstance(error, ActorFailure) else ActorFailure(client, "a local step", str(error))


@dataclass
class _Early:
    """Calls of one step of a client that does not wait for the server, by part.

    Attributes:
        fronts: reports and activations.
        backwards: the calls that end the parts.
    """

    fronts: list[_Front] = field(default_factory=list)
    backwards: list[Ref[Mapping[str, float]]] = field(default_factory=list)


class SplitTraining(Training):
    """Training where clients hold the front layers and the servers all deeper ones (METHOD 2)."""

    def __init__(self, job: Job, executor: Executor) -> None:
        super().__init__(job, executor)
        self._labels_at_home = job.privacy.labels == "client"
        # Of the step under way: the clients that each server serves, and the servers that have had a part.
        self._served: dict[str, list[str]] = {}
        self._stepping: set[str] = set()
        # Calls of forward-only clients that have begun in advance, by client and step.
        self._early: dict[tuple[str, int], _Early] = {}

    def forget(self, client: str | None = None) -> None:
        super().forget(client)
        self._early = {of: calls for of, calls in self._early.items() if client is not None and of[0] != client}

    def step(self, plan: Plan, step: int, clients: Sequence[str]) -> StepOutcome:
        outcome = self._begin(clients)
        begun = [client for client in clients if outcome.takes_part(client)]
        self._served, self._stepping = _served_by(plan, begun), set()
        forward_only = plan.forward_only if self._job.runs_ahead else frozenset()
        for client in begun:
            if client in forward_only:
                self._begin_early(client, step)
        parts = self._job.pipeline.microbatches
        for first in range(0, self._job.batches_per_step, parts):
            present = [client for client in begun if outcome.takes_part(client)]
            if present or self._stepping:
                self._batch(outcome, step, range(first, first + parts), present)
        for client in begun:
            # Clients whose last backward alone was late are in _busy already: they took part in the step.
            if client in outcome.left_out and client not in self._busy:
                self._busy[client] = self._executor.call(client, Client.skip, step)
        for client, ahead in [key for key in self._early if key[1] <= step]:
            del self._early[client, ahead]
            if client not in begun and client not in outcome.failed:
                # It computed ahead for a step that it was left out of.
                self._busy[client] = self._executor.call(client, Client.skip, ahead)
        self._raise_if_all_failed(outcome)
        return outcome

    def _begin_early(self, client: str, step: int) -> None:
        """Begin all calls of ``step`` of a forward-only client, and the fronts of the round's next step.

        It waits for no gradient, and trains nothing that would change the next fronts. Its calls have the same order
        as those of other clients.
        """
        parts = range(self._job.batches_per_step)
        early = self._early.setdefault((client, step), _Early())
        early.fronts = early.fronts or self._fronts(client, step, parts)
        early.backwards = [self._executor.call(client, Client.backward, step, part, None) for part in parts]
        if (step + 1) % self._job.local_steps:
            self._early[client, step + 1] = _Early(self._fronts(client, step + 1, parts))

    def _fronts(self, client: str, step: int, parts: Iterable[int]) -> list[_Front]:
        return [self._executor.call_pair(client, Client.forward, step, part) for part in parts]

    def _batch(self, outcome: StepOutcome, step: int, parts: range, clients: Sequence[str]) -> None:
        """One batch of every client, in microbatches ``parts``.

        An actor does its calls in order. So all fronts begin first, and the server gets each part once it has been
        sent: meanwhile clients compute the next front, or the backward of the part before.
        """
        early = {client: self._early[client, step] for client in clients if (client, step) in self._early}
        begun = {
            client: early[client].fronts[parts.start : parts.stop]
            if client in early
            else self._fronts(client, step, parts)
            for client in clients
        }
        fronts = [{client: begun[client][index] for client in clients} for index in range(len(parts))]
        server_side = self._u_shaped if self._labels_at_home else self._at_server
        reports, gradients = server_side(outcome, step, parts, fronts)
        backwards: dict[str, list[Ref[Mapping[str, float]]]] = {
            client: early[client].backwards[parts.start : parts.stop]
            if client in early
            else [
                self._executor.call(client, Client.backward, step, part, of_part[client])
                for part, of_part in zip(parts, gradients, strict=True)
            ]
            for client in clients
            if outcome.takes_part(client)
        }
        for server, report in reports:
            outcome.add_server_report(server, self._executor.value(report))
        # The server has finished by now, so that only the clients' own time counts.
        last = {client: calls[-1] for client, calls in backwards.items() if outcome.takes_part(client)}
        finished = self._in_time(outcome, last, "backward", len(parts))
        for client, calls in backwards.items():
            if client in outcome.left_out and client in last and parts.stop == self._job.batches_per_step:
                self._busy[client] = calls[-1]
            elif client in finished:
                for seconds in self._executor.get(calls):
                    self._add_time(outcome, client, "backward", seconds)

    def _sent(self, outcome: StepOutcome, front: Mapping[str, _Front], count: int) -> dict[str, Ref[Activations]]:
        """Wait for one part's fronts and count them; returns the handles of the activations by client.

        Args:
            outcome: of the step.
            front: calls by client.
            count: of parts begun up to this one.
        """
        # The small reports come first: a client that failed is found before its tensors are passed on.
        reports = {client: report for client, (report, _) in front.items() if outcome.takes_part(client)}
        for client, report in self._in_time(outcome, reports, "forward", count).items():
            outcome.bytes_up += report.nbytes
            self._add_time(outcome, client, "forward", report.seconds)
        return {client: message for client, (_, message) in front.items() if outcome.takes_part(client)}

    def _at_server(
        self, outcome: StepOutcome, step: int, parts: range, fronts: Sequence[Mapping[str, _Front]]
    ) -> _ServerSide:
        """Labels on the server: one call does forward, loss and backward of the depth-joined batch."""
        reports, gradients = [], []
        for count, (part, front) in enumerate(zip(parts, fronts, strict=True), 1):
            sent = self._sent(outcome, front, count)
            back: dict[str, Ref[WireTensor | None]] = {}
            for server, served in self._served_in(part, sent).items():
                rows = [sent[client] for client in served]
                report, own = self._executor.call_each(server, Replica.train_step, step, part, rows)
                reports.append((server, report))
                back |= zip(served, own, strict=True)
            gradients.append(back)
        return reports, gradients

    def _served_in(self, part: int, clients: Collection[str]) -> dict[str, list[str]]:
        """Those of ``clients`` that each server serves in ``part`` of the step under way: the same in all its parts.

        A server whose last client failed on the way has its call of the last part all the same: it has a step to take.
        """
        served = {server: [c for c in own if c in clients] for server, own in self._served.items()}
        self._stepping |= {server for server, own in served.items() if own}
        last = part == self._job.batches_per_step - 1
        return {server: own for server, own in served.items() if own or (last and server in self._stepping)}

    def _u_shaped(
        self, outcome: StepOutcome, step: int, parts: range, fronts: Sequence[Mapping[str, _Front]]
    ) -> _ServerSide:
        """Labels at home: the last layer's output goes to the clients, their tails' gradients come back."""
        executor = self._executor
        forwards: list[tuple[int, dict[str, tuple[Ref[ServerReport], dict[str, Ref[WireTensor | None]]]]]] = []
        for count, (part, front) in enumerate(zip(parts, fronts, strict=True), 1):
            sent = self._sent(outcome, front, count)
            deep: dict[str, tuple[Any, dict[str, Any]]] = {}
            for server, served in self._served_in(part, sent).items():
                rows = [sent[client] for client in served]
                report, out = executor.call_each(server, Replica.forward, step, part, rows)
                deep[server] = report, dict(zip(served, out, strict=True))
            if deep:
                forwards.append((part, deep))
        tails: list[tuple[int, dict[str, list[str]], dict[str, tuple[Ref[LossReport], Ref[WireTensor]]]]] = []
        for part, deep in forwards:
            own_tails: dict[str, tuple[Ref[LossReport], Ref[WireTensor]]] = {}
            for server, (report, outputs) in deep.items():
                outcome.add_server_report(server, self._executor.value(report))
                present = {client: output for client, output in outputs.items() if outcome.takes_part(client)}
                for client, output in present.items():
                    # Only a refused client has none, and it has failed above.
                    deep_output = cast("Ref[WireTensor]", output)
                    own_tails[client] = executor.call_pair(client, Client.tail, step, part, deep_output)
            tails.append((part, {server: list(outputs) for server, (_, outputs) in deep.items()}, own_tails))
        reports, gradients = [], []
        # After every part's forward, so that the server computes one part while the clients' tails do another.
        for count, (part, served_in_part, own_tails) in enumerate(tails, 1):
            losses = {client: report for client, (report, _) in own_tails.items() if outcome.takes_part(client)}
            for client, loss in self._in_time(outcome, losses, "tail", count).items():
                outcome.bytes_up += loss.nbytes
                outcome.add_loss(loss)
                self._add_time(outcome, client, "tail", loss.seconds)
            arrived = {client: gradient for client, (_, gradient) in own_tails.items() if outcome.takes_part(client)}
            back: dict[str, Ref[WireTensor | None]] = {}
            for server, served in served_in_part.items():
                # Also without any client left: the server has a graph to free, and its step to take.
                own = [client for client in served if client in arrived]
                upstream = [arrived[client] for client in own]
                report, down = executor.call_each(server, Replica.backward, step, part, own, upstream)
                reports.append((server, report))
                back |= zip(own, down, strict=True)
            gradients.append(back)
        return reports, gradients

    def validation(self, plan: Plan, batches: Mapping[str, int]) -> StepOutcome:
        outcome = StepOutcome()
        # All calls begin at once, so that clients compute one batch while the server does another.
        fronts = [
            {c: self._executor.call_pair(c, Client.validation_forward, index) for c, n in batches.items() if index < n}
            for index in range(max(batches.values()))
        ]
        reports, tails = [], []
        for index, front in enumerate(fronts):
            outcome.bytes_up += sum(sent.nbytes for sent in self._get([sent for sent, _ in front.values()]))
            for part in cohorts(list(front), self._job.clients_per_round):
                for server, served in _served_by(plan, part).items():
                    activations = [front[client][1] for client in served]
                    if not self._labels_at_home:
                        reports.append(self._executor.call_all(server, Replica.evaluate, activations))
                        continue
                    report, deep = self._executor.call_each(server, Replica.evaluate_deep, activations)
                    reports.append(report)
                    tails += [
                        self._executor.call(client, Client.validation_tail, index, output)
                        for client, output in zip(served, deep, strict=True)
                    ]
        for served_report in self._executor.get(reports):
            outcome.bytes_down += served_report.nbytes
            outcome.losses += served_report.losses
        outcome.losses += self._get(tails)
        return outcome

    def probe(self, plan: Plan, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        job, served = self._job, _served_by(plan, clients)
        return probe_importance(self._executor, served, round_, tokens, job.privacy.labels, job.faults.patience_s)


def _served_by(plan: Plan, clients: Iterable[str]) -> dict[str, list[str]]:
    """``clients`` by the server that serves them."""
    return served_by(clients, {client.name: client.split or 0 for client in plan.available}, plan.server_names)


class WholeTraining(Training):
    """Training where every participant holds the full model, so that nothing of a step travels."""

    def step(self, plan: Plan, step: int, clients: Sequence[str]) -> StepOutcome:
        outcome = self._begin(clients)
        calls = {c: self._executor.call(c, WholeClient.train_step, step) for c in clients if outcome.takes_part(c)}
        for client, loss in self._in_time(outcome, calls, "train_step").items():
            if not math.isfinite(loss.loss_sum):
                outcome.failed[client] = NotFinite(client, "a local step", "its loss is not finite", "refused")
                continue
            outcome.losses.append(loss)
            self._add_time(outcome, client, "train_step", loss.seconds)
        self._busy |= {client: call for client, call in calls.items() if client in outcome.left_out}
        self._raise_if_all_failed(outcome)
        return outcome

    def validation(self, plan: Plan, batches: Mapping[str, int]) -> StepOutcome:
        every = [(client, index) for client, count in batches.items() for index in range(count)]
        calls = [self._executor.call(client, WholeClient.validate, index) for client, index in every]
        return StepOutcome(losses=self._get(calls))

    def probe(self, plan: Plan, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        calls = [self._executor.call(client, WholeClient.probe, round_, tokens) for client in clients]
        reports = [report for found in self._get(calls) for report in found]
        return ProbeOutcome(reports, 0, 0)


def training_of(run: RunConfig, executor: Executor) -> Training:
    """Make the training of a run's placement."""
    make = SplitTraining if run.policy.placement == "split" else WholeTraining
    return make(run.job, executor)
