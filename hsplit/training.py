"""The local step, the validation and the importance probe, by placement: who is asked for what, and in which order.

Tensors pass from actor to actor as handles; only losses, sizes and times arrive here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hsplit.actors.executor import SERVER, Executor
from hsplit.actors.messages import LossReport
from hsplit.config import Job, RunConfig
from hsplit.probe import ProbeOutcome, probe_importance
from hsplit.scheduling.importance import ImportanceReport

# Losses of a step's rows, and a handle to each client's gradient.
_Losses = tuple[list[LossReport], list[Any]]


@dataclass
class Done:
    """What a step or a validation came to.

    Attributes:
        losses: of each client's rows; a client may have several.
        bytes_up, bytes_down: sent to the server; sent back.
        time_s: seconds of the wall by holder.
        outside_s: seconds in which the phase under way was waited for beyond its slowest holder's own time: messages,
            serialization, scheduling.
    """

    losses: list[LossReport] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    time_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    outside_s: float = 0.0

    def server_took(self, report: Any) -> None:
        self.bytes_down += report.nbytes
        self.time_s[SERVER] += report.time_s


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
        begun, busy_s = time.perf_counter(), 0.0
        for micro in range(self._job.grad_accumulation):
            fronts = {c: self._executor.call_many(2, c, "forward", step, micro) for c in clients}
            # The small reports come first: a client that failed is found before its tensors are passed on.
            forwards = self._executor.get([report for report, _ in fronts.values()])
            activations = [message for _, message in fronts.values()]
            server_side = self._u_shaped_step if self._labels_at_home else self._server_step
            losses, gradients = server_side(done, step, micro, clients, activations)
            done.losses += losses
            calls = [
                self._executor.call(client, "backward", step, micro, gradient)
                for client, gradient in zip(clients, gradients, strict=True)
            ]
            backwards = self._executor.get(calls)
            for client, forward, backward_s in zip(clients, forwards, backwards, strict=True):
                done.bytes_up += forward.nbytes
                done.time_s[client] += forward.time_s + backward_s
            busy_s += max(forward.time_s for forward in forwards) + max(backwards)
        done.outside_s = time.perf_counter() - begun - busy_s - done.time_s[SERVER]
        return done

    def _server_step(
        self, done: Done, step: int, micro: int, clients: Sequence[str], activations: list[Any]
    ) -> _Losses:
        """Labels on the server: one call does forward, loss and backward of the depth-joined batch."""
        report, *gradients = self._executor.call_many(
            1 + len(activations), SERVER, "train_step", step, micro, *activations
        )
        (report,) = self._executor.get([report])
        done.server_took(report)
        return list(report.losses), gradients

    def _u_shaped_step(
        self, done: Done, step: int, micro: int, clients: Sequence[str], activations: list[Any]
    ) -> _Losses:
        """Labels at home: the last layer's output goes to the clients, their tails' gradients come back."""
        count = len(activations)
        up, *deep = self._executor.call_many(1 + count, SERVER, "forward", step, micro, *activations)
        tails = [
            self._executor.call_many(2, client, "tail", step, micro, output)
            for client, output in zip(clients, deep, strict=True)
        ]
        losses: list[LossReport] = self._executor.get([report for report, _ in tails])
        down, *gradients = self._executor.call_many(
            1 + count, SERVER, "backward", step, micro, count, *activations, *[gradient for _, gradient in tails]
        )
        for report in self._executor.get([up, down]):
            done.server_took(report)
        done.bytes_up += sum(loss.nbytes for loss in losses)
        return losses, gradients

    def validation(self, batches: Mapping[str, int]) -> Done:
        done = Done()
        for index in range(max(batches.values())):
            clients = [client for client, count in batches.items() if index < count]
            fronts = [self._executor.call_many(2, c, "validation_forward", index) for c in clients]
            activations = [message for _, message in fronts]
            done.bytes_up += sum(report.nbytes for report in self._executor.get([report for report, _ in fronts]))
            if not self._labels_at_home:
                (report,) = self._executor.get([self._executor.call(SERVER, "evaluate", *activations)])
                done.losses += report.losses
                continue
            report, *deep = self._executor.call_many(1 + len(clients), SERVER, "evaluate_deep", *activations)
            tails = [
                self._executor.call(client, "validation_tail", index, output)
                for client, output in zip(clients, deep, strict=True)
            ]
            done.losses += self._executor.get(tails)
            done.bytes_down += self._executor.get([report])[0].nbytes
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
        for client, (loss, seconds) in zip(clients, self._executor.get(calls), strict=True):
            done.losses.append(loss)
            done.time_s[client] += seconds
        return done

    def validation(self, batches: Mapping[str, int]) -> Done:
        calls = [self._executor.call(c, "validate", index) for c, count in batches.items() for index in range(count)]
        return Done(losses=self._executor.get(calls))

    def probe(self, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        calls = [self._executor.call(client, "probe", round_, tokens) for client in clients]
        reports: list[ImportanceReport] = [r for found in self._executor.get(calls) for r in found]
        return ProbeOutcome(reports, 0, 0)
