"""The local step, the validation and the importance probe, by placement: who is asked for what, and in which order.

Tensors pass from actor to actor as handles; only losses, sizes and times arrive here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hsplit.actors.executor import SERVER, Executor
from hsplit.actors.messages import LossReport, ServerReport
from hsplit.config import Job, RunConfig
from hsplit.probe import ProbeOutcome, probe_importance
from hsplit.scheduling.importance import ImportanceReport

# Handles to the reports of server and tails, in the order of events; and by part to each client's gradient.
_ServerSide = tuple[list[Any], list[list[Any]]]


@dataclass
class Done:
    """What a step or a validation came to.

    Attributes:
        losses: of each client's rows; a client may have several.
        bytes_up, bytes_down: sent to the server; sent back.
        seconds: of the wall, by holder and phase (:data:`hsplit.observe.timing.PHASES`, without ``waiting``).
        late: holders that took longer than declared where the clock is emulated.
    """

    losses: list[LossReport] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    late: set[str] = field(default_factory=set)

    def took(self, holder: str, seconds: Mapping[str, float]) -> None:
        """Count one call's phases towards ``holder``."""
        for phase, spent in seconds.items():
            self.seconds[holder][phase] += spent
        if "paced" not in seconds:
            self.late.add(holder)

    def server_took(self, report: ServerReport) -> None:
        self.bytes_down += report.nbytes
        self.took(SERVER, report.seconds)


class Training(Protocol):
    """How a placement trains. Every method may raise ``ActorFailure``."""

    def step(self, step: int, clients: Sequence[str]) -> Done:
        """One local step of ``clients``; ``step`` counts over the run (METHOD 2)."""

    def validation(self, batches: Mapping[str, int]) -> Done:
        """Loss over every client's held-out batches, whose numbers are given by client name."""

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        """Score every adapted weight on a probe batch of each client (METHOD 3); nothing else changes."""


def training_of(run: RunConfig, executor: Executor) -> Training:
    """How a run's policy trains."""
    return SplitTraining(run.job, executor) if run.policy.placement == "split" else WholeTraining(executor)


class SplitTraining:
    """Clients hold the front, the server everything deeper (METHOD 2).

    Args:
        job: the run's settings.
        executor: reaches clients and server.
    """

    def __init__(self, job: Job, executor: Executor) -> None:
        self._job, self._executor = job, executor
        self._labels_at_home = job.privacy.labels == "client"

    def step(self, step: int, clients: Sequence[str]) -> Done:
        done = Done()
        parts = self._job.pipeline.microbatches
        for first in range(0, self._job.batches_per_step, parts):
            self._batch(done, step, range(first, first + parts), clients)
        return done

    def _batch(self, done: Done, step: int, parts: range, clients: Sequence[str]) -> None:
        """One batch of every client, in microbatches ``parts``.

        An actor does what it is asked in the order in which it is asked. So all fronts are asked for first, and the
        server is given each part once it has been sent: meanwhile clients compute the next, or go back over the last.
        """
        fronts = [[self._executor.call_many(2, c, "forward", step, part) for c in clients] for part in parts]
        server_side = self._u_shaped if self._labels_at_home else self._at_server
        reports, gradients = server_side(done, step, parts, clients, fronts)
        backwards = [
            (client, self._executor.call(client, "backward", step, part, gradient))
            for part, sent in zip(parts, gradients, strict=True)
            for client, gradient in zip(clients, sent, strict=True)
        ]
        for report in self._executor.get(reports):
            if isinstance(report, ServerReport):
                done.server_took(report)
                done.losses += report.losses
            else:
                done.bytes_up += report.nbytes
                done.took(report.client, report.seconds)
                done.losses.append(report)
        seconds = self._executor.get([call for _, call in backwards])
        for (client, _), spent in zip(backwards, seconds, strict=True):
            done.took(client, spent)

    def _sent(self, done: Done, front: list[list[Any]]) -> list[Any]:
        """Wait for one part's fronts and count them; returns the handles of their activations."""
        # The small reports come first: a client that failed is found before its tensors are passed on.
        for report in self._executor.get([report for report, _ in front]):
            done.bytes_up += report.nbytes
            done.took(report.client, report.seconds)
        return [message for _, message in front]

    def _at_server(
        self, done: Done, step: int, parts: range, clients: Sequence[str], fronts: list[list[list[Any]]]
    ) -> _ServerSide:
        """Labels on the server: one call does forward, loss and backward of the depth-joined batch."""
        count = 1 + len(clients)
        calls = [
            self._executor.call_many(count, SERVER, "train_step", step, part, *self._sent(done, front))
            for part, front in zip(parts, fronts, strict=True)
        ]
        return [report for report, *_ in calls], [gradients for _, *gradients in calls]

    def _u_shaped(
        self, done: Done, step: int, parts: range, clients: Sequence[str], fronts: list[list[list[Any]]]
    ) -> _ServerSide:
        """Labels at home: the last layer's output goes to the clients, their tails' gradients come back."""
        count, call_many = len(clients), self._executor.call_many
        reports: list[Any] = []
        sent: list[list[Any]] = []
        for part, front in zip(parts, fronts, strict=True):
            activations = self._sent(done, front)
            report, *deep = call_many(1 + count, SERVER, "forward", step, part, *activations)
            tails = [call_many(2, c, "tail", step, part, output) for c, output in zip(clients, deep, strict=True)]
            reports += [report, *[loss for loss, _ in tails]]
            sent.append([*activations, *[gradient for _, gradient in tails]])
        gradients = []
        # After every part's forward, so that the server computes one part while the clients' tails do another.
        for part, tensors in zip(parts, sent, strict=True):
            report, *returned = call_many(1 + count, SERVER, "backward", step, part, count, *tensors)
            reports.append(report)
            gradients.append(returned)
        return reports, gradients

    def validation(self, batches: Mapping[str, int]) -> Done:
        done = Done()
        # All are asked for at once, so that clients compute one batch while the server does another.
        fronts = [
            {c: self._executor.call_many(2, c, "validation_forward", index) for c, n in batches.items() if index < n}
            for index in range(max(batches.values()))
        ]
        reports, tails = [], []
        for index, front in enumerate(fronts):
            activations = [message for _, message in front.values()]
            done.bytes_up += sum(sent.nbytes for sent in self._executor.get([sent for sent, _ in front.values()]))
            if not self._labels_at_home:
                reports.append(self._executor.call(SERVER, "evaluate", *activations))
                continue
            report, *deep = self._executor.call_many(1 + len(front), SERVER, "evaluate_deep", *activations)
            reports.append(report)
            tails += [
                self._executor.call(client, "validation_tail", index, output)
                for client, output in zip(front, deep, strict=True)
            ]
        for report in self._executor.get(reports):
            done.bytes_down += report.nbytes
            done.losses += report.losses
        done.losses += self._executor.get(tails)
        return done

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        return probe_importance(self._executor, clients, round_, tokens, self._job.privacy.labels)


class WholeTraining:
    """Every participant holds the full model, so that nothing of a step travels.

    Args:
        executor: reaches the participants.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def step(self, step: int, clients: Sequence[str]) -> Done:
        done = Done()
        calls = [self._executor.call(client, "train_step", step) for client in clients]
        for loss in self._executor.get(calls):
            done.losses.append(loss)
            done.took(loss.client, loss.seconds)
        return done

    def validation(self, batches: Mapping[str, int]) -> Done:
        calls = [self._executor.call(c, "validate", index) for c, count in batches.items() for index in range(count)]
        return Done(losses=self._executor.get(calls))

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        calls = [self._executor.call(client, "probe", round_, tokens) for client in clients]
        reports: list[ImportanceReport] = [r for found in self._executor.get(calls) for r in found]
        return ProbeOutcome(reports, 0, 0)
