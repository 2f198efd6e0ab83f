"""The local step, the validation and the importance probe, by placement, with the deadline of a client's part.

Tensors pass from actor to actor as handles; only losses, sizes and times arrive here. A client that fails in a step, or
is too late, is left out of it; the others continue.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

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
    """What a probe found.

    Attributes:
        reports: for each client that of its own layers and that of the server's layers over its tokens.
        bytes_up, bytes_down: activations (and the gradients of clients' tails) sent to the server; what it sent back.
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
        served: who takes part, by the server that serves them.
        round_: decides, with the run's seed and the client, which examples are drawn.
        tokens: supervised tokens wanted of each client, see :func:`hsplit.data.batches.probe_batch`.
        labels: ``privacy.labels``: ``server`` or ``client``.
        patience_s: how long a client may take for a call before it has failed; ``None``: any time.

    Raises:
        ActorFailure: an actor failed, or a weight did not report.
    """

    def patiently(calls: Sequence[Ref[R]]) -> list[R]:
        return executor.get(calls, None if patience_s is None else time.monotonic() + patience_s)

    everybody = [client for clients in served.values() for client in clients]
    fronts = {client: executor.call_pair(client, Client.probe_forward, round_, tokens) for client in everybody}
    # The small reports come first: a client that failed is found before its tensors are passed on.
    bytes_up = sum(report.nbytes for report in patiently([report for report, _ in fronts.values()]))
    sent = {client: message for client, (_, message) in fronts.items()}
    bytes_down, scored = 0, []
    if labels == "client":
        # All servers are asked before anybody's tail is waited for.
        deep = {
            server: executor.call_each(server, Replica.probe_forward, [sent[client] for client in clients])
            for server, clients in served.items()
        }
        tails = {
            client: executor.call_pair(client, Client.probe_tail, output)
            for server, clients in served.items()
            for client, output in zip(clients, deep[server][1], strict=True)
        }
        bytes_up += sum(loss.nbytes for loss in patiently([report for report, _ in tails.values()]))
        bytes_down += sum(report.nbytes for report in executor.get([report for report, _ in deep.values()]))
        for server, clients in served.items():
            slopes = [tails[client][1] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe_backward, slopes)))
    else:
        for server, clients in served.items():
            messages = [sent[client] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe, messages)))
    own = [
        executor.call(client, Client.probe_backward, slope)
        for clients, _, gradients in scored
        for client, slope in zip(clients, gradients, strict=True)
    ]
    at_servers = executor.get([report for _, report, _ in scored])
    reports = patiently(own) + [report for server in at_servers for report in server.importance]
    return ProbeOutcome(reports, bytes_up, bytes_down + sum(server.nbytes for server in at_servers))


# Medians are of the last so many times, and are trusted from so many on.
_REMEMBERED = 21
_TRUSTED = 3
# Added to every deadline: what messages and a busy machine may take beside the client's own work.
SLACK_S = 2.0


class Deadlines:
    """Measured times of each client's calls, and the deadlines that follow from them.

    Args:
        multiple: of the median (``job.faults.deadline``); ``None``: nobody has a deadline.
    """

    def __init__(self, multiple: float | None) -> None:
        self._multiple = multiple
        self._measured: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def took(self, client: str, method: str, seconds: float) -> None:
        """Remember that one call took ``seconds`` by the client's own clock."""
        self._measured[client, method].append(seconds)

    def until(self, client: str, method: str, calls: int) -> float | None:
        """When ``calls`` calls that are asked for now must have been answered, by ``time.monotonic``."""
        measured = self._measured[client, method]
        if self._multiple is None or len(measured) < _TRUSTED:
            return None
        return time.monotonic() + SLACK_S + self._multiple * calls * statistics.median(measured)


# Servers and handles to their reports, in the order of events; and by part each client's gradient.
_ServerSide = tuple[list[tuple[str, Ref[ServerReport]]], list[dict[str, Ref[WireTensor | None]]]]
_Front = tuple[Ref[ForwardReport], Ref[Activations]]


@dataclass
class Done:
    """What a step or a validation came to.

    Attributes:
        losses: of each client's rows; a client may have several.
        bytes_up, bytes_down: sent to the server; sent back.
        seconds: of the wall, by holder and phase (:data:`hsplit.observe.tables.PHASES`, without ``waiting``).
        late: holders that took longer than declared where the clock is emulated.
        failed: clients that are lost, with why.
        left_out: clients that were not in time for this step, and go on.
    """

    losses: list[LossReport] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    late: set[str] = field(default_factory=set)
    failed: dict[str, ActorFailure] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def took(self, holder: str, seconds: Mapping[str, float]) -> None:
        """Count one call's phases towards ``holder``."""
        for phase, spent in seconds.items():
            self.seconds[holder][phase] += spent
        if "paced" not in seconds:
            self.late.add(holder)

    def server_took(self, server: str, report: ServerReport) -> None:
        """Count a server's call, and who was refused in it."""
        self.bytes_down += report.nbytes
        self.took(server, report.seconds)
        for loss in report.losses:
            self.add_loss(loss)
        for client, reason in report.refused.items():
            self.failed[client] = refusal(client, "a local step", f"it sent {reason}")

    def add_loss(self, loss: LossReport) -> None:
        """Count one client's loss.

        Raises:
            ActorFailure: it is not finite, though all that was sent is.
        """
        if not math.isfinite(loss.loss_sum):
            raise ActorFailure(SERVER, "a local step", f"the loss of {loss.client} is not finite", "diverged")
        self.losses.append(loss)

    def takes_part(self, client: str) -> bool:
        """Whether a client is neither lost nor left out of the step."""
        return client not in self.failed and client not in self.left_out


class Training(Protocol):
    """How a placement trains. Every method may raise ``ActorFailure``."""

    def adopt(self, plan: Plan) -> None:
        """Take note of where everybody's split point is from now on."""

    def step(self, step: int, clients: Sequence[str]) -> Done:
        """One local step of ``clients``; ``step`` counts over the run (METHOD 2).

        Raises:
            ActorFailure: the server failed, or every client.
        """

    def forget(self, client: str | None = None) -> None:
        """Forget the calls under way of a client that is gone; ``None``: of everybody."""

    def validation(self, batches: Mapping[str, int]) -> Done:
        """Loss over every client's held-out batches, whose numbers are given by client name."""

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        """Score every adapted weight on a probe batch of each client (METHOD 3); nothing else changes."""


def training_of(run: RunConfig, executor: Executor) -> Training:
    """How a run's policy trains."""
    make = SplitTraining if run.policy.placement == "split" else WholeTraining
    return make(run.job, executor)


class _Steps:
    """What steps of either placement share: who is still busy with an earlier one, and who is in time."""

    def __init__(self, job: Job, executor: Executor) -> None:
        self._job, self._executor = job, executor
        self._deadlines = Deadlines(job.faults.deadline)
        # The last calls of those who were not in time, by client.
        self._busy: dict[str, Ref[Any]] = {}
        self._splits: dict[str, int] = {}
        self._servers: tuple[str, ...] = (SERVER,)

    def adopt(self, plan: Plan) -> None:
        """Take note of where everybody's split point is from now on."""
        self._splits = {client.name: client.split or 0 for client in plan.available}
        self._servers = plan.server_names

    def forget(self, client: str | None = None) -> None:
        """Forget the calls under way of a client that is gone; ``None``: of everybody."""
        if client is None:
            self._busy.clear()
        else:
            self._busy.pop(client, None)

    def _patient(self, calls: Sequence[Ref[R]]) -> list[R]:
        """Values of clients' calls outside of a step; whoever has not answered after ``patience_s`` has failed."""
        return self._executor.get(calls, self._patience_ends())

    def _patience_ends(self) -> float:
        return time.monotonic() + self._job.faults.patience_s

    def _begin(self, clients: Sequence[str]) -> Done:
        """A step's record: who has not finished with an earlier one is left out of it."""
        done = Done()
        free = [client for client in clients if client not in self._busy]
        for client, call in list(self._busy.items()):
            # With nobody else there, the step is this client's or nobody's.
            (value,) = self._executor.settle([call], 0.0 if free else self._patience_ends())
            if free and _is_late(value):
                done.left_out.add(client)
                continue
            del self._busy[client]
            if isinstance(value, HsplitError):
                done.failed[client] = _failure(client, value)
            free.append(client)
        return done

    def _in_time(self, done: Done, calls: Mapping[str, Ref[R]], method: str, count: int = 1) -> dict[str, R]:
        """Values of ``calls`` by client, each the last of ``count`` calls of ``method``, of those in time.

        Who has failed joins ``done.failed``, who is late ``done.left_out``; if all are late, they are waited for.
        """
        patience_ends = self._patience_ends()
        deadlines = {client: self._deadlines.until(client, method, count) for client in calls}
        settled = {
            client: self._executor.settle([call], deadlines[client] or patience_ends)[0]
            for client, call in calls.items()
        }
        late = {client for client, value in settled.items() if _is_late(value) and deadlines[client] is not None}
        if len(late) == len(settled):
            # Then it is not they who are slow.
            settled, late = {c: self._executor.settle([call], patience_ends)[0] for c, call in calls.items()}, set()
        done.left_out |= late
        found = {}
        for client, value in settled.items():
            if not isinstance(value, HsplitError):
                found[client] = value
            elif client not in late:
                done.failed[client] = _failure(client, value)
        return {client: value for client, value in found.items() if done.takes_part(client)}

    def _measure(self, client: str, method: str, seconds: Mapping[str, float]) -> None:
        self._deadlines.took(client, method, sum(seconds.values()))

    def _raise_if_all_failed(self, done: Done) -> None:
        """A step that nobody took part in trained nothing."""
        if not done.losses and done.failed:
            first, *others = done.failed.values()
            if isinstance(first, NotFinite) and all(isinstance(other, NotFinite) for other in others):
                raise first.of_all()
            raise first


def _is_late(value: Any) -> bool:
    return isinstance(value, ActorFailure) and value.kind == "late"


def _failure(client: str, error: HsplitError) -> ActorFailure:
    return error if isinstance(error, ActorFailure) else ActorFailure(client, "a local step", str(error))


@dataclass
class _Early:
    """Calls of one step of a client that does not wait for the server: a list a part.

    Attributes:
        fronts: its reports and activations.
        backwards: what ends each part.
    """

    fronts: list[_Front] = field(default_factory=list)
    backwards: list[Ref[Mapping[str, float]]] = field(default_factory=list)


class SplitTraining(_Steps):
    """Clients hold the front, the server everything deeper (METHOD 2).

    Args:
        job: the run's settings.
        executor: reaches clients and server.
    """

    def __init__(self, job: Job, executor: Executor) -> None:
        super().__init__(job, executor)
        self._labels_at_home = job.privacy.labels == "client"
        self._dealt: dict[str, list[str]] = {}
        # The servers that have had a part of the step under way.
        self._stepping: set[str] = set()
        # Clients that only compute forward, and what they have been asked for in advance, by client and step.
        self._forward_only: frozenset[str] = frozenset()
        self._early: dict[tuple[str, int], _Early] = {}

    def adopt(self, plan: Plan) -> None:
        super().adopt(plan)
        self._forward_only = plan.forward_only if self._job.runs_ahead else frozenset()

    def forget(self, client: str | None = None) -> None:
        super().forget(client)
        self._early = {of: calls for of, calls in self._early.items() if client is not None and of[0] != client}

    def step(self, step: int, clients: Sequence[str]) -> Done:
        done = self._begin(clients)
        begun = [client for client in clients if done.takes_part(client)]
        self._dealt, self._stepping = self._served_by(begun), set()
        for client in begun:
            if client in self._forward_only:
                self._ask_early(client, step)
        parts = self._job.pipeline.microbatches
        for first in range(0, self._job.batches_per_step, parts):
            present = [client for client in begun if done.takes_part(client)]
            if present or self._stepping:
                self._batch(done, step, range(first, first + parts), present)
        for client in begun:
            # Those whose last backward alone was late have their part in the step, and finish it.
            if client in done.left_out and client not in self._busy:
                self._busy[client] = self._executor.call(client, Client.skip, step)
        for client, of in [key for key in self._early if key[1] <= step]:
            del self._early[client, of]
            if client not in begun and client not in done.failed:
                # It was not there to take the part that it had computed.
                self._busy[client] = self._executor.call(client, Client.skip, of)
        self._raise_if_all_failed(done)
        return done

    def _ask_early(self, client: str, step: int) -> None:
        """Ask a client that only computes forward for all of ``step``, and for the fronts of the next one.

        No gradient comes back to it, so it need not wait for one; what it sends in the next step of a round is settled
        as well. The order of its calls is that of everybody else's.
        """
        parts = range(self._job.batches_per_step)
        early = self._early.setdefault((client, step), _Early())
        early.fronts = early.fronts or self._fronts(client, step, parts)
        early.backwards = [self._executor.call(client, Client.backward, step, part, None) for part in parts]
        if (step + 1) % self._job.local_steps:
            self._early[client, step + 1] = _Early(self._fronts(client, step + 1, parts))

    def _fronts(self, client: str, step: int, parts: Iterable[int]) -> list[_Front]:
        return [self._executor.call_pair(client, Client.forward, step, part) for part in parts]

    def _batch(self, done: Done, step: int, parts: range, clients: Sequence[str]) -> None:
        """One batch of every client, in microbatches ``parts``.

        An actor does what it is asked in the order in which it is asked. So all fronts are asked for first, and the
        server is given each part once it has been sent: meanwhile clients compute the next, or go back over the last.
        """
        early = {client: self._early[client, step] for client in clients if (client, step) in self._early}
        asked = {
            client: early[client].fronts[parts.start : parts.stop]
            if client in early
            else self._fronts(client, step, parts)
            for client in clients
        }
        fronts = [{client: asked[client][index] for client in clients} for index in range(len(parts))]
        server_side = self._u_shaped if self._labels_at_home else self._at_server
        reports, gradients = server_side(done, step, parts, fronts)
        backwards: dict[str, list[Ref[Mapping[str, float]]]] = {
            client: early[client].backwards[parts.start : parts.stop]
            if client in early
            else [
                self._executor.call(client, Client.backward, step, part, of_part[client])
                for part, of_part in zip(parts, gradients, strict=True)
            ]
            for client in clients
            if done.takes_part(client)
        }
        for server, report in reports:
            done.server_took(server, self._executor.value(report))
        # The server has done its part by now, so that what is waited for is the clients' own.
        last = {client: calls[-1] for client, calls in backwards.items() if done.takes_part(client)}
        finished = self._in_time(done, last, "backward", len(parts))
        for client, calls in backwards.items():
            if client in done.left_out and client in last and parts.stop == self._job.batches_per_step:
                self._busy[client] = calls[-1]
            elif client in finished:
                for seconds in self._executor.get(calls):
                    done.took(client, seconds)
                    self._measure(client, "backward", seconds)

    def _sent(self, done: Done, front: Mapping[str, _Front], count: int) -> dict[str, Ref[Activations]]:
        """Wait for one part's fronts and count them; returns the handles of the activations by client.

        Args:
            count: of the parts that were asked for up to this one.
        """
        # The small reports come first: a client that failed is found before its tensors are passed on.
        asked = {client: report for client, (report, _) in front.items() if done.takes_part(client)}
        for client, report in self._in_time(done, asked, "forward", count).items():
            done.bytes_up += report.nbytes
            done.took(client, report.seconds)
            self._measure(client, "forward", report.seconds)
        return {client: message for client, (_, message) in front.items() if done.takes_part(client)}

    def _at_server(self, done: Done, step: int, parts: range, fronts: Sequence[Mapping[str, _Front]]) -> _ServerSide:
        """Labels on the server: one call does forward, loss and backward of the depth-joined batch."""
        reports, gradients = [], []
        for count, (part, front) in enumerate(zip(parts, fronts, strict=True), 1):
            sent = self._sent(done, front, count)
            back: dict[str, Ref[WireTensor | None]] = {}
            for server, served in self._dealt_among(sent, part).items():
                asked = [sent[client] for client in served]
                report, own = self._executor.call_each(server, Replica.train_step, step, part, asked)
                reports.append((server, report))
                back |= zip(served, own, strict=True)
            gradients.append(back)
        return reports, gradients

    def _served_by(self, clients: Iterable[str]) -> dict[str, list[str]]:
        return served_by(clients, self._splits, self._servers)

    def _dealt_among(self, clients: Collection[str], part: int) -> dict[str, list[str]]:
        """Who of ``clients`` is served by whom in ``part`` of the step under way: in all its parts alike.

        A server that has lost its last client on the way is asked in the last part all the same: it has a step to take.
        """
        there = {server: [c for c in served if c in clients] for server, served in self._dealt.items()}
        self._stepping |= {server for server, served in there.items() if served}
        last = part == self._job.batches_per_step - 1
        return {s: served for s, served in there.items() if served or (last and s in self._stepping)}

    def _u_shaped(self, done: Done, step: int, parts: range, fronts: Sequence[Mapping[str, _Front]]) -> _ServerSide:
        """Labels at home: the last layer's output goes to the clients, their tails' gradients come back."""
        executor = self._executor
        forwards: list[tuple[int, dict[str, tuple[Ref[ServerReport], dict[str, Ref[WireTensor | None]]]]]] = []
        for count, (part, front) in enumerate(zip(parts, fronts, strict=True), 1):
            sent = self._sent(done, front, count)
            deep: dict[str, tuple[Any, dict[str, Any]]] = {}
            for server, served in self._dealt_among(sent, part).items():
                rows = [sent[client] for client in served]
                report, out = executor.call_each(server, Replica.forward, step, part, rows)
                deep[server] = report, dict(zip(served, out, strict=True))
            if deep:
                forwards.append((part, deep))
        tails: list[tuple[int, dict[str, list[str]], dict[str, tuple[Ref[LossReport], Ref[WireTensor]]]]] = []
        for part, deep in forwards:
            asked: dict[str, tuple[Ref[LossReport], Ref[WireTensor]]] = {}
            for server, (report, outputs) in deep.items():
                done.server_took(server, self._executor.value(report))
                present = {client: output for client, output in outputs.items() if done.takes_part(client)}
                for client, output in present.items():
                    # Only what was refused has none, and that takes no part any more.
                    deep_output = cast("Ref[WireTensor]", output)
                    asked[client] = executor.call_pair(client, Client.tail, step, part, deep_output)
            tails.append((part, {server: list(outputs) for server, (_, outputs) in deep.items()}, asked))
        reports, gradients = [], []
        # After every part's forward, so that the server computes one part while the clients' tails do another.
        for count, (part, dealt, asked) in enumerate(tails, 1):
            open_ = {client: report for client, (report, _) in asked.items() if done.takes_part(client)}
            for client, loss in self._in_time(done, open_, "tail", count).items():
                done.bytes_up += loss.nbytes
                done.took(client, loss.seconds)
                done.add_loss(loss)
                self._measure(client, "tail", loss.seconds)
            slopes = {client: slope for client, (_, slope) in asked.items() if done.takes_part(client)}
            back: dict[str, Ref[WireTensor | None]] = {}
            for server, served in dealt.items():
                # Also where nobody is left: the server has the graph to let go of, and its step to take.
                own = [client for client in served if client in slopes]
                arrived = [slopes[client] for client in own]
                report, down = executor.call_each(server, Replica.backward, step, part, own, arrived)
                reports.append((server, report))
                back |= zip(own, down, strict=True)
            gradients.append(back)
        return reports, gradients

    def validation(self, batches: Mapping[str, int]) -> Done:
        done = Done()
        # All are asked for at once, so that clients compute one batch while the server does another.
        fronts = [
            {c: self._executor.call_pair(c, Client.validation_forward, index) for c, n in batches.items() if index < n}
            for index in range(max(batches.values()))
        ]
        reports, tails = [], []
        for index, front in enumerate(fronts):
            done.bytes_up += sum(sent.nbytes for sent in self._patient([sent for sent, _ in front.values()]))
            for part in cohorts(list(front), self._job.clients_per_round):
                for server, served in self._served_by(part).items():
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
            done.bytes_down += served_report.nbytes
            done.losses += served_report.losses
        done.losses += self._patient(tails)
        return done

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        job, served = self._job, self._served_by(clients)
        return probe_importance(self._executor, served, round_, tokens, job.privacy.labels, job.faults.patience_s)


class WholeTraining(_Steps):
    """Every participant holds the full model, so that nothing of a step travels.

    Args:
        job: the run's settings.
        executor: reaches the participants.
    """

    def step(self, step: int, clients: Sequence[str]) -> Done:
        done = self._begin(clients)
        calls = {c: self._executor.call(c, WholeClient.train_step, step) for c in clients if done.takes_part(c)}
        for client, loss in self._in_time(done, calls, "train_step").items():
            if not math.isfinite(loss.loss_sum):
                done.failed[client] = NotFinite(client, "a local step", "its loss is not finite", "refused")
                continue
            done.losses.append(loss)
            done.took(client, loss.seconds)
            self._measure(client, "train_step", loss.seconds)
        self._busy |= {client: call for client, call in calls.items() if client in done.left_out}
        self._raise_if_all_failed(done)
        return done

    def validation(self, batches: Mapping[str, int]) -> Done:
        every = [(client, index) for client, count in batches.items() for index in range(count)]
        calls = [self._executor.call(client, WholeClient.validate, index) for client, index in every]
        return Done(losses=self._patient(calls))

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        calls = [self._executor.call(client, WholeClient.probe, round_, tokens) for client in clients]
        reports = [report for found in self._patient(calls) for report in found]
        return ProbeOutcome(reports, 0, 0)
