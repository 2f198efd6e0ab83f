"""The context that the parts of a run share: its configuration and state, its actors, and its log and display."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, NoReturn

from hsplit.actors.executor import ActorFailure, Executor, P, R
from hsplit.actors.participant import Participant
from hsplit.actors.replica import Replica
from hsplit.config import SCHEDULER, ClientConfig, RunConfig
from hsplit.data import Example
from hsplit.observe.events import EventLog
from hsplit.observe.observer import Observer
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.plan import Plan
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.run.client_data import ClientData
from hsplit.run.state import RunState, Status
from hsplit.run.step import training_of
from hsplit.run_directory import RunDirectory

ClockOf = Callable[[Fleet, PlanningState], VirtualClock]
"""Makes the virtual clock by the budgets in force: :meth:`hsplit.planning.scheduler.Scheduler.clock`."""


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


class RunContext:
    """Shared by all that drives a run.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: what the user watches.
        clock_of: makes the virtual clock.

    Attributes:
        declared: the configuration that the run was begun with.
        state: plan, progress and membership.
        round: the round under way, counted from 1, or the one just ended until the next begins.
        data: what the clients have to train on.
        training: how a step, a validation and a probe go.
        servers: their names; the first of them aggregates.
        single: true if one node has everything, so that nothing travels.
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
        self.declared, self.job = run, run.job
        self.executor, self.directory, self.inputs, self.display = executor, directory, inputs, display
        self.events = EventLog(directory.events)
        self.state, self.round = self.new_state(), 0
        self.data = ClientData(executor, inputs.shares, run.job, self.events, self.note)
        self.training = training_of(run, executor)
        self.servers = run.server.names
        self.single = run.policy.placement == "single"
        self._clock_of = clock_of
        self._said_unavailable: set[str] = set()

    # -- what follows from the state --------------------------------------------------------------------------------

    @property
    def run(self) -> RunConfig:
        """The configuration with the clients that have joined."""
        return self.declared.model_copy(update={"clients": (*self.declared.clients, *self.state.joined)})

    @property
    def plan(self) -> Plan:
        """The plan in force; an error before the first."""
        if self.state.plan is None:
            raise RuntimeError("there is no plan yet")
        return self.state.plan

    @property
    def clients(self) -> list[str]:
        """The clients that take part now, in the plan's order."""
        return self.state.present

    @property
    def fleet(self) -> Fleet:
        """The fleet to plan for."""
        return self.state.fleet(self.run.clients)

    @property
    def clock(self) -> VirtualClock:
        """The virtual clock by the budgets in force."""
        return self._clock_of(self.fleet, self.state.planning)

    @property
    def unavailable(self) -> set[str]:
        """The clients that the plan has no part for."""
        return {client.name for client in self.plan.clients if not client.available}

    def named(self, names: Collection[str]) -> list[ClientConfig]:
        """The participants of these names, as the run has them."""
        return [client for client in self.run.participants if client.name in names]

    def cohort(self, round_: int) -> list[str]:
        """The clients that train in round ``round_``."""
        return self.state.cohort(self.job.seed, round_, self.job.clients_per_round)

    # -- log, display, scheduler ------------------------------------------------------------------------------------

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

    # -- changes ----------------------------------------------------------------------------------------------------

    def new_state(self) -> RunState:
        """The state of a run that has not begun."""
        return RunState(model_fingerprint=self.inputs.model_fingerprint, data_sha256=self.inputs.data_sha256)

    def go_back_to(self, state: RunState) -> None:
        """Take ``state`` for the run's; failures since then are not forgotten."""
        state.remember(self.state)
        self.state, self.round = state, state.round

    def adopt(self, plan: Plan) -> None:
        """Put ``plan`` in force and say which clients cannot take part any more."""
        self.state.plan = plan
        for name in self.state.with_status(Status.JOINING):
            self.state.member(name).status = Status.ACTIVE
        self.training.adopt(plan)
        self.events.write("planned", f"plan by {plan.importance}", round=self.state.round, plan=plan.to_json())
        self.display.plan(plan)
        for client in plan.clients:
            if not client.available and client.name not in self._said_unavailable:
                text = (
                    f"{client.name} is unavailable: it lacks {client.lacking_bytes / 1e6:.1f} MB of memory "
                    "for the smallest part of the model"
                )
                self.note("unavailable", text, client=client.name, lacking_bytes=client.lacking_bytes)
        self._said_unavailable = self.unavailable

    def configure(self) -> None:
        """Have everybody read the layers that the plan gives them.

        Raises:
            ActorFailure: an actor failed, or no client is there.
        """
        if not self.clients:
            waiting = self.state.to_return
            self.fail_without_clients(waiting[0] if waiting else self.plan.clients[0].name)
        calls = [self.executor.call(name, Replica.configure, self.plan) for name in self.servers]
        for client in map(self.plan.client, self.clients):
            calls.append(self.executor.call(client.name, Participant.configure, client.held_layers, client.ranks))
        self.executor.get(calls)

    def fail_without_clients(self, last: str) -> NoReturn:
        """Say by the failure of ``last`` that the run cannot go on."""
        reason = self.state.member(last).reason
        why = f" ({last} failed last: {reason})" if reason else ""
        raise ActorFailure(last, "the round", f"no client is left to train with{why}")
