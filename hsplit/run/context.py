"""Context that the parts of a run share: configuration and state, actors, log and display."""

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
from hsplit.run.split_step import SplitTraining
from hsplit.run.state import RunState, Status
from hsplit.run.step import Training, WholeTraining
from hsplit.run_directory import RunDirectory

ClockOf = Callable[[Fleet, PlanningState], VirtualClock]
"""Makes the virtual clock by the budgets in force: :meth:`hsplit.planning.scheduler.Scheduler.clock`."""


@dataclass(frozen=True)
class Inputs:
    """Data shares and fingerprints, read before anything starts.

    Attributes:
        shares: each client's part of the shared data, ``None`` for a client with its own.
        model_fingerprint, data_sha256: to recognise model and data when a run is resumed.
        reading: how the shared data were read, in a line.
    """

    shares: Mapping[str, list[Example] | None]
    model_fingerprint: str
    data_sha256: str
    reading: str = ""


class RunContext:
    """Configuration, state, actors, log and display of one run.

    Args:
        run: resolved configuration.
        executor: reaches the actors.
        directory: the run's directory.
        inputs: data shares and fingerprints.
        display: shows the run to the user.
        clock_of: makes the virtual clock.

    Attributes:
        declared: the configuration that the run began with.
        state: plan, progress and membership.
        round: the round under way, counted from 1, or the one just ended until the next begins.
        data: of the clients.
        training: steps, validation and probe.
        servers: their names; the first of them aggregates.
        single: true if one node holds everything, so that nothing travels.
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
        self.data = ClientData(executor, inputs.shares, run.job, self.events, self.note, lambda: self.state)
        self.training: Training = (
            SplitTraining(run.job, run.policy.pace, executor)
            if run.policy.placement == "split"
            else WholeTraining(run.job, executor)
        )
        self.servers = run.server.names
        self.single = run.policy.placement == "single"
        self._clock_of = clock_of
        self._noted_unavailable: set[str] = set()

    # -- derived from the state -------------------------------------------------------------------------------------

    @property
    def run(self) -> RunConfig:
        """The configuration with the clients that have joined."""
        return self.declared.model_copy(update={"clients": (*self.declared.clients, *self.state.joined)})

    @property
    def plan(self) -> Plan:
        """The plan in force.

        Raises:
            RuntimeError: there is none yet.
        """
        if self.state.plan is None:
            raise RuntimeError("there is no plan yet")
        return self.state.plan

    @property
    def clients(self) -> list[str]:
        """The clients that take part now, in the plan's order."""
        return self.state.present

    @property
    def validation_batches(self) -> dict[str, int]:
        """Number of held-out batches of the clients that take part now, by name."""
        together = len(self.inputs.shares) if self.single else 1
        rows = {part.name: (part.rows or self.job.batch_size) * together for part in self.plan.available}
        return {name: -(-self.data.held_out[name] // rows[name]) for name in self.clients}

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
        """Configuration of the participants of these names."""
        return [client for client in self.run.participants if client.name in names]

    def cohort(self, round_: int) -> list[str]:
        """The clients that train in round ``round_``."""
        return self.state.cohort(self.job.seed, round_, self.job.clients_per_round)

    # -- log, display, scheduler ------------------------------------------------------------------------------------

    def note(self, event: str, text: str, **fields: Any) -> None:
        """Write an event to the log and show it to the user."""
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
        """Replace the run's state by an earlier one; failures since then are kept."""
        state.remember(self.state)
        self.state, self.round = state, state.round

    def adopt(self, plan: Plan) -> None:
        """Put ``plan`` in force, and report the clients that it newly has no part for."""
        self.state.plan = plan
        for name in self.state.with_status(Status.JOINING):
            self.state.member(name).status = Status.ACTIVE
        self.events.write("planned", f"plan by {plan.importance}", round=self.state.round, plan=plan.to_json())
        self.display.plan(plan)
        for client in plan.clients:
            if not client.available and client.name not in self._noted_unavailable:
                text = (
                    f"{client.name} is unavailable: it lacks {client.lacking_bytes / 1e6:.1f} MB of memory "
                    "for the smallest part of the model"
                )
                self.note("unavailable", text, client=client.name, lacking_bytes=client.lacking_bytes)
        self._noted_unavailable = self.unavailable

    def configure(self) -> None:
        """Have servers and clients read the layers that the plan gives them.

        Raises:
            ActorFailure: an actor failed, or no client takes part.
        """
        if not self.clients:
            waiting = self.state.to_return
            self.fail_without_clients(waiting[0] if waiting else self.plan.clients[0].name)
        calls = [self.executor.call(name, Replica.configure, self.plan) for name in self.servers]
        for client in map(self.plan.client, self.clients):
            calls.append(self.executor.call(client.name, Participant.configure, client))
        self.executor.get(calls)

    def fail_without_clients(self, last: str) -> NoReturn:
        """End the run for want of clients, as a failure of ``last``."""
        reason = self.state.member(last).reason
        why = f" ({last} failed last: {reason})" if reason else ""
        raise ActorFailure(last, "the round", f"no client is left to train with{why}")
