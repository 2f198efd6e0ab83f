"""Where a run stands, for everything that drives it: who takes part, by which plan, how far it is, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, NoReturn

from hsplit.actors.executor import SCHEDULER, ActorFailure, Executor, P, R, Ref
from hsplit.actors.participant import DataReport, Participant
from hsplit.actors.replica import Replica
from hsplit.checkpoint import Progress
from hsplit.client_data import ClientData
from hsplit.config import Client, RunConfig
from hsplit.data import Example
from hsplit.observe.events import EventLog
from hsplit.observe.observer import Observer
from hsplit.roster import Roster
from hsplit.run_directory import RunDirectory
from hsplit.scheduling.plan import Plan
from hsplit.training import training_of


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


class Standing:
    """Where a run stands.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what the user watches.

    Attributes:
        declared: the configuration that the run was begun with.
        run: the same with the clients that have joined since.
        progress: all that a checkpoint keeps of it.
        round: the round under way, counted from 1, or the one just ended until the next begins.
        plan: the plan in force; there is none before the first.
        roster: who is there, who is lost and comes back.
        data: what the clients have to train on.
        training: how a step, a validation and a probe go.
        servers: their names; the first of them aggregates.
        single: whether one node has everything, so that nothing travels.
        unavailable: the clients that the plan has no part for.
    """

    plan: Plan

    def __init__(
        self, run: RunConfig, executor: Executor, directory: RunDirectory, inputs: Inputs, display: Observer
    ) -> None:
        self.declared, self.run, self.job = run, run, run.job
        self.executor, self.directory, self.inputs, self.display = executor, directory, inputs, display
        self.events = EventLog(directory.events)
        self.progress, self.round = self.nothing_done(), 0
        self.data = ClientData(executor, inputs.shares, run.job, self.events, self.note)
        self.roster = Roster(run.job.faults, executor, self._prepare_return, self._learn, self.note)
        self.training = training_of(run, executor)
        self.servers = run.server.names
        self.single = run.policy.placement == "single"
        self.unavailable: set[str] = set()

    @property
    def clients(self) -> list[str]:
        """The clients that take part now."""
        return self.roster.present

    @property
    def joined(self) -> tuple[Client, ...]:
        """The clients that have come while the run was under way, in the order in which they came."""
        return self.run.clients[len(self.declared.clients) :]

    def named(self, names: Collection[str]) -> list[Client]:
        """The participants of these names, as the run has them."""
        return [client for client in self.run.participants if client.name in names]

    def cohort(self, round_: int) -> list[str]:
        """The clients that train in round ``round_``."""
        return self.roster.cohort(self.job.seed, round_, self.job.clients_per_round)

    # -- what is told, and asked ------------------------------------------------------------------------------------

    def note(self, event: str, text: str, **fields: Any) -> None:
        """Tell log and user."""
        self.events.write(event, text, **fields)
        self.display.note(text, event, **fields)

    def ask(self, method: Callable[Concatenate[Any, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """Call the scheduler and wait for what it returns.

        Raises:
            InputError, ActorFailure: as :meth:`~hsplit.actors.executor.Executor.get`.
        """
        return self.executor.ask(SCHEDULER, method, *arguments, **named)

    # -- what changes -----------------------------------------------------------------------------------------------

    def nothing_done(self) -> Progress:
        """The progress of a run that has not begun."""
        return Progress(model_fingerprint=self.inputs.model_fingerprint, data_sha256=self.inputs.data_sha256)

    def go_back_to(self, progress: Progress) -> None:
        """Make ``progress`` all that is known of the rounds, and of who has joined."""
        self.progress, self.round = progress, progress.round
        self._have(tuple(Client.model_validate(client) for client in progress.joined))

    def join(self, client: Client) -> None:
        """Count a client that has come among the run's."""
        self._have((*self.joined, client))

    def _have(self, joined: Sequence[Client]) -> None:
        self.run = self.run.model_copy(update={"clients": (*self.declared.clients, *joined)})

    def adopt(self, plan: Plan) -> None:
        """Put ``plan`` in force and say who cannot take part any more."""
        self.plan = plan
        self.roster.adopt(plan)
        self.training.adopt(plan)
        self.progress.plan = plan.to_json()
        self.events.write("planned", f"plan by {plan.importance}", round=self.progress.round, plan=self.progress.plan)
        self.display.plan(plan)
        for client in plan.clients:
            if not client.available and client.name not in self.unavailable:
                text = (
                    f"{client.name} is unavailable: it lacks {client.lacking_bytes / 1e6:.1f} MB of memory "
                    "for the smallest part of the model"
                )
                self.note("unavailable", text, client=client.name, lacking_bytes=client.lacking_bytes)
        self.unavailable = {client.name for client in plan.clients if not client.available}

    def configure(self) -> None:
        """Have everybody read the layers that the plan gives them.

        Raises:
            ActorFailure: somebody failed, or no client is there.
        """
        if not self.clients:
            self.nobody_is_left(self.roster.lost[0] if self.roster.lost else self.plan.clients[0].name)
        calls = [self.executor.call(name, Replica.configure, self.plan) for name in self.servers]
        for client in map(self.plan.client, self.clients):
            calls.append(self.executor.call(client.name, Participant.configure, client.held_layers, client.ranks))
        self.executor.get(calls)

    def nobody_is_left(self, last: str) -> NoReturn:
        """Say by the failure of ``last`` that the run cannot go on."""
        reason = self.roster.reasons.get(last)
        why = f" ({last} failed last: {reason})" if reason else ""
        raise ActorFailure(last, "the round", f"no client is left to train with{why}")

    def _prepare_return(self, name: str) -> list[Ref[Any]]:
        """Have a client that was begun anew read its data and its layers."""
        part = self.plan.client(name)
        calls = list(self.data.begin(self.named([name])).values())
        return [*calls, self.executor.call(name, Participant.configure, part.held_layers, part.ranks)]

    def _learn(self, values: Sequence[Any]) -> None:
        """Take note of the data that a client has found anew."""
        for report in values:
            if isinstance(report, DataReport):
                self.data.count(report)
