"""Membership of a run: clients that are lost and return, are set aside, join or leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from torch import Tensor

from hsplit.actors.executor import ActorFailure, NotFinite, Ref
from hsplit.actors.participant import Participant
from hsplit.actors.server import Server
from hsplit.actors.training_data import DataReport
from hsplit.config import SERVER, ClientConfig
from hsplit.errors import HsplitError, InputError
from hsplit.planning.budgets import BudgetRequest
from hsplit.planning.scheduler import Scheduler
from hsplit.run.context import RunContext
from hsplit.run.failure_text import describe
from hsplit.run.inbox import JoinRequest, refuse_request, take_requests
from hsplit.run.state import Status

_Value = TypeVar("_Value")


class Membership:
    """Changes the status of clients in the run's state, and starts and ends their processes.

    Args:
        context: of the run.
        kept: gives a client's tensors in the last checkpoint, if they are of the part that it has now.
    """

    def __init__(self, context: RunContext, kept: Callable[[str], dict[str, Tensor] | None]) -> None:
        self._context, self._kept = context, kept
        # Of clients that are to return, by name: their part, and the calls by which they read it and their data.
        self._preparing: dict[str, tuple[tuple[Any, ...], list[Ref[Any]]]] = {}
        # Calls of clients that the run has begun without, by name: they are still reading their data.
        self._reading: dict[str, Ref[DataReport]] = {}

    # -- clients that fail ------------------------------------------------------------------------------------------

    def lose(self, failure: ActorFailure) -> None:
        """Continue without a client that failed, and restart it meanwhile.

        Raises:
            ActorFailure: ``failure``, if the round is to be repeated instead.
        """
        context, name = self._context, failure.actor
        # A single node holds all that was learned in the round: the run cannot continue without it.
        if context.job.faults.recovery == "repeat" or context.single or name not in context.clients:
            raise failure
        context.training.forget(name)
        self._lose(failure, context.round)
        if isinstance(failure, NotFinite) and not context.clients:
            raise failure.of_all()

    def _lose(self, failure: ActorFailure, round_: int) -> None:
        context, name, most = self._context, failure.actor, self._context.job.faults.max_failures
        member = context.state.member(name)
        failed = member.failures + 1
        again = ", and it is begun anew" if failed <= most else ""
        limit = f"failure {failed}; more than {most} set a client aside"
        text = f"round {round_}: {describe(failure)}; the others go on{again} ({limit})"
        context.note("lost", text, client=name, round=round_, kind=failure.kind, reason=failure.reason, failures=failed)
        self._forget_call(name)
        self.count_failure(failure, round_)
        if member.status is not Status.ASIDE:
            member.status = Status.LOST
            self._begin_return(name)

    def begin_without(self, failure: ActorFailure, reading: Ref[DataReport]) -> None:
        """Begin the run without a client that has not read its data in time; it takes part once it has.

        Args:
            failure: that it is late.
            reading: the call.

        Raises:
            ActorFailure: ``failure``, if the start is to be repeated instead.
        """
        context, name = self._context, failure.actor
        if context.job.faults.recovery == "repeat" or context.single:
            raise failure
        context.state.member(name).status = Status.LOST
        self._reading[name] = reading
        text = f"start: {name} is still reading its data; the others begin, and it takes part once it has read them"
        context.note("lost", text, client=name, round=0, kind=failure.kind, reason=failure.reason, failures=0)

    def prepare_those_reading(self) -> None:
        """Have the clients that are still reading their data read their layers next."""
        planned = {part.name for part in self._context.plan.available}
        for name in self._reading:
            if name in planned:
                self._begin_return(name)

    def _is_reading(self, name: str) -> bool:
        """True if the run has begun without a client that is not ready yet."""
        if name not in self._reading:
            return False
        found = self._context.executor.wait(self._preparing[name][1], time.monotonic())
        if any(isinstance(value, ActorFailure) and value.kind == "late" for value in found):
            return True
        del self._reading[name]
        return False

    def count_failure(self, failure: ActorFailure, round_: int) -> None:
        """Count a failure of a client; more than ``max_failures`` set it aside."""
        context, name = self._context, failure.actor
        member = context.state.member(name)
        member.failures += 1
        member.reason = failure.reason
        if failure.kind == "memory":
            context.state.count_shortage(name)
        if member.failures > context.job.faults.max_failures:
            member.status = Status.ASIDE
            context.executor.end(name)
            failed = member.failures
            text = f"{name} has failed {failed} times and is set aside: its layers and its data take no part any more"
            if isinstance(failure, NotFinite):
                text += "; its values were not finite: job.lr may be too large for its data"
            context.note("set_aside", text, client=name, round=round_, failures=failed)

    def await_calls(self, calls: Mapping[str, Ref[_Value]]) -> dict[str, _Value]:
        """Wait for one call of each client; those that fail are lost.

        Returns:
            The values of the others, by client.

        Raises:
            ActorFailure: no client is left, or the round is to be repeated.
        """
        context = self._context
        until = time.monotonic() + context.job.faults.patience_s
        values = {}
        for name, call in calls.items():
            (value,) = context.executor.wait([call], until)
            if isinstance(value, ActorFailure):
                self.lose(value)
            elif isinstance(value, HsplitError):
                raise value
            else:
                values[name] = value
        if calls and not values:
            context.fail_without_clients(next(iter(calls)))
        return values

    def retry(self, what: Callable[[], _Value]) -> _Value:
        """Call ``what`` between two rounds; each time that a client fails, bring it back and call ``what`` again."""
        not_finite: set[str] = set()
        while True:
            try:
                return what()
            except ActorFailure as failure:
                if isinstance(failure, NotFinite) and failure.actor in not_finite:
                    # It had restarted from the common state, so the cause is that state and not the client.
                    raise failure.of_all() from failure
                if isinstance(failure, NotFinite):
                    not_finite.add(failure.actor)
                self.lose(failure)
                # Clients short of memory return when the next plan has given them less.
                if failure.kind != "memory":
                    self.bring_back()
                if not self._context.clients:
                    self._context.fail_without_clients(failure.actor)

    # -- clients that return ----------------------------------------------------------------------------------------

    def bring_back(self) -> None:
        """Have clients that are lost or away start the next round with the others, if they have a node and a part.

        Each is tried once; one that fails again may return a round later.

        Raises:
            ActorFailure: no client takes part, or an actor failed that the clients wait for.
        """
        context, state = self._context, self._context.state
        waiting = state.to_return
        if not waiting:
            return
        round_ = state.step // context.job.local_steps + 1
        planned = {part.name for part in context.plan.available}
        begun = [name for name in waiting if name in planned and self._begin_return(name)]
        names = [name for name in begun if not self._is_reading(name)]
        patience_s = context.job.faults.patience_s
        until = time.monotonic() + patience_s
        ready = [name for name in names if self._succeeds(name, self._preparing[name][1], until, round_)]
        for name in ready:
            self._preparing[name] = (self._part(name), [])
        calls = self._rejoin(ready, round_) if ready else []
        until = time.monotonic() + patience_s
        for name, call in zip(ready, calls, strict=True):
            if self._succeeds(name, [call], until, round_):
                del self._preparing[name]
                member = state.member(name)
                member.status = Status.ACTIVE
                how = "is back" if member.failures else "is there"
                context.note("returned", f"round {round_}: {name} {how}", client=name, round=round_)
        if not context.clients:
            still = state.to_return
            context.fail_without_clients(still[0] if still else state.with_status(Status.ASIDE)[-1])

    def _begin_return(self, name: str) -> bool:
        """Restart a client that is lost or away, unless that is done; false if no node has room for it."""
        context = self._context
        part = self._part(name)
        if name in self._preparing and self._preparing[name][0] == part:
            return True
        calls: list[Ref[Any]] = [self._reading[name]] if name in self._reading else []
        if not calls:
            if not context.executor.restart(name):
                self.mark_away(name)
                return False
            context.state.member(name).status = Status.LOST
            calls = list(context.data.begin(context.named([name])).values())
        held = context.plan.client(name)
        calls.append(context.executor.call(name, Participant.configure, held))
        self._preparing[name] = (part, calls)
        return True

    def _rejoin(self, names: list[str], round_: int) -> list[Ref[None]]:
        """Have clients that hold their data and layers begin round ``round_``; returns the calls."""
        context = self._context
        sent, updates = context.executor.call_each(SERVER, Server.full_updates, round_, names)
        calls = [
            context.executor.call(name, Participant.rejoin, self._kept(name), update)
            for name, update in zip(names, updates, strict=True)
        ]
        context.state.bytes_down += context.executor.value(sent)
        return calls

    def _succeeds(self, name: str, calls: Sequence[Ref[Any]], until: float, round_: int) -> bool:
        """Wait for the calls of a client that returns; false if one failed, so that the client is lost once more.

        Raises:
            ActorFailure: another actor failed, which the calls depend on.
        """
        values = self._context.executor.wait(calls, until)
        for value in values:
            if isinstance(value, HsplitError):
                own = value if isinstance(value, ActorFailure) else ActorFailure(name, "load_data", str(value))
                if own.actor != name:
                    raise own
                self._lose(own, round_)
                return False
        for value in values:
            if isinstance(value, DataReport):
                self._context.data.record(value)
        return True

    def mark_away(self, name: str) -> None:
        """Set a client to ``AWAY``: no node has room for it yet."""
        member = self._context.state.member(name)
        self._forget_call(name)
        if member.status is not Status.AWAY:
            member.status = Status.AWAY
            text = f"{name} is away: no node that is there has room for it; it takes part when one has"
            self._context.note("away", text, client=name)

    def _forget_call(self, name: str) -> None:
        self._preparing.pop(name, None)
        self._reading.pop(name, None)

    def forget_calls(self) -> None:
        """Forget the calls of clients that are to return: they are restarted, since the round is repeated."""
        self._preparing.clear()
        self._reading.clear()

    def _part(self, name: str) -> tuple[Any, ...]:
        """All that the plan in force decides for a client."""
        return self._context.plan.client(name).given

    # -- clients that join and leave --------------------------------------------------------------------------------

    def requests(self) -> list[BudgetRequest]:
        """Carry out the joins and leaves in the inbox; those that cannot be are refused with an event.

        Returns:
            The changes of budgets that the cluster file schedules for the round that begins, then the inbox's.

        Raises:
            ActorFailure: an actor failed that was not about to join.
        """
        context, done, inbox = self._context, self._context.state.round, self._context.directory.inbox
        requests = [
            BudgetRequest(name, change.values())
            for name, holder in [(SERVER, context.run.server), *((c.name, c) for c in context.run.participants)]
            for change in holder.schedule
            if change.round == done + 1
        ]
        taken, refused = take_requests(inbox, done)
        for text in refused:
            context.note("refused", text, round=done)
        for request in taken:
            if isinstance(request, BudgetRequest):
                values = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
                text = f"{request.holder}: {values} asked for"
                context.events.write("budget", text, round=done, **asdict(request))
                requests.append(request)
        for request in taken:
            if isinstance(request, BudgetRequest):
                continue
            try:
                if isinstance(request, JoinRequest):
                    self._join(request.client, requests)
                else:
                    self._leave(request.client, requests)
            except InputError as error:
                # Nothing has changed: the run continues.
                refuse_request(inbox, request.file)
                context.note("refused", f"inbox: {error}", round=done)
        return [request for request in requests if context.state.status(request.holder) is not Status.LEFT]

    def _join(self, client: ClientConfig, requests: Sequence[BudgetRequest]) -> None:
        """Start a client and have it read its data; the next plan gives it a part.

        Raises:
            InputError: it takes part already, has no usable data, or no plan with it exists.
        """
        context, state, executor = self._context, self._context.state, self._context.executor
        name, known = client.name, [c.name for c in context.run.clients]
        if name in known and state.status(name) not in (Status.LEFT, Status.ASIDE):
            raise InputError(f"{name} is asked to join, and is there already")
        executor.add(client)
        begun = executor.restart(name)
        try:
            if begun:
                until = time.monotonic() + context.job.faults.patience_s
                (report,) = executor.get(list(context.data.begin([client]).values()), until)
                context.data.record(report)
            fleet = context.fleet
            clients = fleet.clients if name in known else (*fleet.clients, client)
            with_it = replace(fleet, clients=clients, aside=fleet.aside - {name}, left=fleet.left - {name})
            context.ask(Scheduler.check, with_it, state.planning, requests)
        except (InputError, ActorFailure) as error:
            if isinstance(error, ActorFailure) and error.actor != name:
                raise
            executor.end(name)
            raise InputError(f"{name} cannot join: {error}") from error
        # Its earlier failures count no more.
        member = state.member(name)
        member.status, member.failures = Status.JOINING, 0
        if not begun:
            self.mark_away(name)
        if name not in known:
            state.joined.append(client)
        text, declared = f"{name} joins after round {state.round}", client.model_dump(mode="json")
        context.note("joined", text, client=name, round=state.round, declared=declared)

    def _leave(self, name: str, requests: Sequence[BudgetRequest]) -> None:
        """Continue without a client that leaves; all that it has learned is aggregated already.

        Raises:
            InputError: it does not take part, or the others could not continue without it.
        """
        context, state = self._context, self._context.state
        if all(name != client.name for client in context.run.clients) or state.status(name) is Status.LEFT:
            raise InputError(f"{name} is asked to leave, and is not there")
        if context.clients == [name]:
            raise InputError(f"{name} cannot leave: no other client is there")
        fleet = context.fleet
        try:
            context.ask(Scheduler.check, replace(fleet, left=fleet.left | {name}), state.planning, requests)
        except InputError as error:
            raise InputError(f"{name} cannot leave: {error}") from error
        if name in context.clients:
            # Its process ends with the next checkpoint: until then the round may be repeated with it.
            context.executor.call(name, Participant.release)
        state.member(name).status = Status.LEFT
        self._forget_call(name)
        context.note("left", f"{name} leaves after round {state.round}", client=name, round=state.round)
