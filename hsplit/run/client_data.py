"""Data of the clients: reading it, its sizes, and the part of it that is not trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict

from hsplit.actors.executor import ActorFailure, Executor, Ref
from hsplit.actors.participant import Participant
from hsplit.actors.training_data import DataReport
from hsplit.config import ClientConfig, Job
from hsplit.config.cluster import CENTRAL
from hsplit.data import Example
from hsplit.data.local_data import nothing_supervised
from hsplit.errors import HsplitError, InputError
from hsplit.observe.events import EventLog
from hsplit.planning.plan import Plan
from hsplit.run.state import RunState


class ClientData:
    """Has clients read their data, and keeps its sizes.

    Args:
        executor: reaches the clients.
        shares: each client's part of the shared data, ``None`` for a client with its own.
        job: the run's.
        events: the run's log.
        note: writes an event to the log and shows it to the user: kind, text, fields.
        state: gives the run's state, which keeps the sizes that plans depend on.

    Attributes:
        held_out: number of held-out examples by client.
    """

    def __init__(
        self,
        executor: Executor,
        shares: Mapping[str, list[Example] | None],
        job: Job,
        events: EventLog,
        note: Callable[..., None],
        state: Callable[[], RunState],
    ) -> None:
        self._executor, self._shares, self._job = executor, shares, job
        self._events, self._note, self._state = events, note, state
        self._examples: dict[str, int] = {}
        # Supervised tokens for training and validation, by client.
        self._supervised: dict[str, tuple[int, int]] = {}
        self._sources: dict[str, str] = {}
        self.held_out: dict[str, int] = {}

    def begin(self, clients: Sequence[ClientConfig]) -> dict[str, Ref[DataReport]]:
        """Have ``clients`` begin to read their data; returns the calls by client."""
        every: Mapping[str, list[Example] | None] = self._shares
        calls = {}
        for client in clients:
            # A single node has all clients' data.
            own = client.data
            self._sources[client.name] = f"job.data.{self._job.data.origin}" if own is None else f"data {own}"
            shares = every if client.name == CENTRAL else {client.name: every.get(client.name)}
            calls[client.name] = self._executor.call(client.name, Participant.load_data, shares, client.data)
        return calls

    def receive(
        self, calls: Mapping[str, Ref[DataReport]], until: float | None = None
    ) -> tuple[dict[str, InputError], list[ActorFailure]]:
        """Wait for the calls of :meth:`begin`, and report the sizes.

        Args:
            calls: by client.
            until: by ``time.monotonic``; ``None``: wait for all.

        Returns:
            Why the data of some cannot be read, by client, and the failures of those that have not answered by then.

        Raises:
            ActorFailure: a client failed in another way.
        """
        unreadable, late = {}, list[ActorFailure]()
        for name, call in calls.items():
            (report,) = self._executor.wait([call], until)
            if isinstance(report, InputError):
                unreadable[name] = report
                continue
            if isinstance(report, ActorFailure) and report.kind == "late":
                late.append(report)
                continue
            if isinstance(report, HsplitError):
                raise report
            self.record(report)
            text = f"{report.client}: {report.train} examples to train on, {report.validation} held out"
            self._events.write("data", text, **asdict(report))
            if report.skipped:
                self._note("skipped", f"{report.client}: its data are {report.reading}", client=report.client)
            if report.too_long:
                text = f"{report.client}: {report.too_long} examples over {self._job.max_length} tokens are left out"
                self._note("too_long", text, client=report.client, count=report.too_long)
        return unreadable, late

    def check(
        self, clients: Collection[str], unreadable: Mapping[str, InputError], unavailable: Collection[str]
    ) -> None:
        """Check that there is something to learn.

        Args:
            clients: whose data :meth:`receive` has waited for.
            unreadable: its result.
            unavailable: the clients that the plan has no part for, whose data cannot fail the run.

        Raises:
            InputError: an available client cannot read its data, or none has a supervised token.
        """
        for name, error in unreadable.items():
            if name not in unavailable:
                raise error
            self._examples[name] = 0
            self._note("data", f"{name}, which is unavailable: {error}", client=name)
        self._refuse_without_supervised(unavailable)
        for name in clients:
            train, _ = self._supervised.get(name, (1, 1))
            if not train and name not in unavailable:
                text = (
                    f"{name}: no training example has a token to predict, so it learns nothing: {self._sources[name]}"
                )
                self._note("unsupervised", text, client=name)

    def _refuse_without_supervised(self, unavailable: Collection[str]) -> None:
        """Refuse data without a token to train on, or without one to validate on."""
        known = {name: tokens for name, tokens in self._supervised.items() if name not in unavailable}
        where = ", ".join(dict.fromkeys(self._sources[name] for name in known))
        for what, tokens in (("training", 0), ("validation", 1)):
            if known and not any(counts[tokens] for counts in known.values()):
                raise nothing_supervised(where, what, self._job.model, self._job.max_length)

    def record(self, report: DataReport) -> None:
        """Keep the sizes that a client has reported."""
        self._examples[report.client] = report.train + report.validation
        self._supervised[report.client] = (report.supervised, report.validation_supervised)
        self.held_out[report.client] = report.validation
        self._state().train_examples[report.client] = report.train
        self._state().vocabulary[report.client] = report.vocabulary

    def note_unavailable(self, plan: Plan) -> None:
        """Report how many clients, and how much of the data, ``plan`` has no part for, if any."""
        unavailable = [client.name for client in plan.clients if not client.available]
        if not unavailable:
            return
        examples, total = sum(self._examples.get(name, 0) for name in unavailable), sum(self._examples.values())
        text = (
            f"{len(unavailable)} of {len(plan.clients)} clients are unavailable, and with them {examples} of {total}"
            f" examples ({examples / total:.1%}) are not trained on"
        )
        self._note("data_lost", text, clients=unavailable, examples=examples, of_examples=total)
