"""The local step and the validation, by placement, with deadlines for the clients' calls.

Tensors pass from actor to actor as handles; only losses, sizes and times arrive here. The others continue without a
client that fails in a step (lost) or does not answer in time (left out of the step).
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hsplit.actors.executor import ActorFailure, Executor, NotFinite, R, Ref, refusal
from hsplit.actors.messages import LossReport, ServerReport
from hsplit.actors.whole_client import WholeClient
from hsplit.config import SERVER, Job
from hsplit.errors import HsplitError
from hsplit.planning.plan import Plan
from hsplit.run.probe import ProbeOutcome

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

    def until(self, client: str, calls: Mapping[str, int], since: float) -> float | None:
        """Deadline, by ``time.monotonic``, of calls that begin at ``since``; ``None``: there is none.

        Args:
            client: its name.
            calls: their number by method.
            since: by ``time.monotonic``.
        """
        if self._multiple is None:
            return None
        expected_s = 0.0
        for method, count in calls.items():
            measured = self._measured[client, method]
            if count and len(measured) < _TRUSTED:
                return None
            expected_s += count * statistics.median(measured) if count else 0.0
        return since + SLACK_S + self._multiple * expected_s


@dataclass(frozen=True)
class Validation:
    """Loss over the clients' held-out shares.

    Attributes:
        losses: cross-entropy summed over supervised tokens, nats, and their number, by client.
    """

    losses: Mapping[str, tuple[float, int]]

    @staticmethod
    def of(reports: Iterable[LossReport]) -> Validation:
        """Sum the reports of each client's batches."""
        losses: dict[str, tuple[float, int]] = {}
        for report in reports:
            loss_sum, tokens = losses.get(report.client, (0.0, 0))
            losses[report.client] = (loss_sum + report.loss_sum, tokens + report.tokens)
        return Validation(losses)

    @property
    def loss_sum(self) -> float:
        """Cross-entropy summed over all tokens, nats."""
        return sum(loss_sum for loss_sum, _ in self.losses.values())

    @property
    def tokens(self) -> int:
        """Number of supervised tokens."""
        return sum(tokens for _, tokens in self.losses.values())

    @property
    def loss(self) -> float:
        """Mean over all tokens, nats; 0 where nothing is held out."""
        return self.loss_sum / max(self.tokens, 1)

    def perplexities(self) -> dict[str, float]:
        """Perplexity of each client's own held-out tokens, of those that have any."""
        return {client: perplexity(loss / tokens) for client, (loss, tokens) in self.losses.items() if tokens}


def perplexity(loss: float) -> float:
    """Exponential of a mean loss in nats, kept finite."""
    return math.exp(min(loss, 700.0))


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
        # Of each client that was not in time, the calls that end before it takes part again.
        self._busy: dict[str, list[Ref[Any]]] = {}

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

    def settle(self) -> StepOutcome:
        """Bring all clients to the end of the last step, wherever some have begun the next one."""
        return StepOutcome()

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

    def _begin(self, clients: Sequence[str], cohort: Sequence[str]) -> StepOutcome:
        """Begin a step of ``clients``; those that have not finished an earlier one are left out of it.

        Args:
            clients: those with a turn in the step.
            cohort: all clients of the round.
        """
        outcome = StepOutcome()
        others = any(client not in self._busy for client in cohort)
        for client in [client for client in self._busy if client in clients]:
            # Without another client in the round, this one is waited for.
            values = self._executor.wait(self._busy[client], 0.0 if others else self._patience_ends())
            if others and any(map(is_late, values)):
                outcome.left_out.add(client)
                continue
            del self._busy[client]
            failures = [value for value in values if isinstance(value, HsplitError)]
            if failures:
                outcome.failed[client] = failure_in_step(client, failures[0])
            others = True
        return outcome

    def _in_time(
        self,
        outcome: StepOutcome,
        calls: Mapping[str, Ref[R]],
        counts: Mapping[str, Mapping[str, int]],
        others: Callable[[], Sequence[Ref[Any]]] = tuple,
        since: float | None = None,
    ) -> dict[str, R]:
        """Wait for one call of each client; returns the values of the clients that answered in time.

        Clients that failed are added to ``outcome.failed``, late ones to ``outcome.left_out``; if all are late, and
        the run's other clients have not answered either, they are waited for.

        Args:
            outcome: of the step.
            calls: by client, each the last of those begun.
            counts: by client, for its deadline: the number of calls that have begun, by method.
            others: calls of other clients.
            since: when the calls could begin, by ``time.monotonic``; by default now.
        """
        patience_ends = self._patience_ends()
        begun = time.monotonic() if since is None else since
        deadlines = {client: self._deadlines.until(client, counts[client], begun) for client in calls}
        values = {
            client: self._executor.wait([call], deadlines[client] or patience_ends)[0] for client, call in calls.items()
        }
        late = {client for client, value in values.items() if is_late(value) and deadlines[client] is not None}
        if late and len(late) == len(values) and all(map(is_late, self._executor.wait(others(), 0.0))):
            # The cause is then not the clients themselves.
            values, late = {c: self._executor.wait([call], patience_ends)[0] for c, call in calls.items()}, set()
        outcome.left_out |= late
        in_time = {}
        for client, value in values.items():
            if not isinstance(value, HsplitError):
                in_time[client] = value
            elif client not in late:
                outcome.failed[client] = failure_in_step(client, value)
        return {client: value for client, value in in_time.items() if outcome.takes_part(client)}

    def _add_time(self, outcome: StepOutcome, client: str, method: str, seconds: Mapping[str, float]) -> None:
        outcome.add_seconds(client, seconds)
        self._deadlines.record(client, method, sum(seconds.values()))

    def _raise_if_all_failed(self, outcome: StepOutcome, cohort: Sequence[str]) -> None:
        """Raise the first failure if no client of the round trained or is left to."""
        if not outcome.losses and outcome.failed and outcome.failed.keys() >= set(cohort):
            first, *others = outcome.failed.values()
            if isinstance(first, NotFinite) and all(isinstance(other, NotFinite) for other in others):
                raise first.of_all()
            raise first


def is_late(value: Any) -> bool:
    """True if the value of a call is that it was late."""
    return isinstance(value, ActorFailure) and value.kind == "late"


def failure_in_step(client: str, error: HsplitError) -> ActorFailure:
    """The failure of ``client`` that ``error`` is, in a local step."""
    return error if isinstance(error, ActorFailure) else ActorFailure(client, "a local step", str(error))


class WholeTraining(Training):
    """Training where every participant holds the full model, so that nothing of a step travels."""

    def step(self, plan: Plan, step: int, clients: Sequence[str]) -> StepOutcome:
        outcome = self._begin(clients, clients)
        calls = {c: self._executor.call(c, WholeClient.train_step, step) for c in clients if outcome.takes_part(c)}
        for client, loss in self._in_time(outcome, calls, {client: {"train_step": 1} for client in calls}).items():
            if not math.isfinite(loss.loss_sum):
                outcome.failed[client] = NotFinite(client, "a local step", "its loss is not finite", "refused")
                continue
            outcome.losses.append(loss)
            self._add_time(outcome, client, "train_step", loss.seconds)
        self._busy |= {client: [call] for client, call in calls.items() if client in outcome.left_out}
        self._raise_if_all_failed(outcome, clients)
        return outcome

    def validation(self, plan: Plan, batches: Mapping[str, int]) -> StepOutcome:
        every = [(client, index) for client, count in batches.items() for index in range(count)]
        calls = [self._executor.call(client, WholeClient.validate, index) for client, index in every]
        return StepOutcome(losses=self._get(calls))

    def probe(self, plan: Plan, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        calls = [self._executor.call(client, WholeClient.probe, round_, tokens) for client in clients]
        reports = [report for found in self._get(calls) for report in found]
        return ProbeOutcome(reports, 0, 0)
