"""Clients that come and go while a run is under way, and budgets that change: what is asked for between two rounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from hsplit.actors.executor import SERVER, ActorFailure
from hsplit.actors.participant import Participant
from hsplit.actors.scheduler import Scheduler
from hsplit.config import Client
from hsplit.errors import HsplitError, InputError
from hsplit.inbox import JoinRequest, refuse, take_requests
from hsplit.scheduling.budgets import BudgetRequest
from hsplit.standing import Standing


class Membership:
    """Takes what the inbox holds: lets clients come and go, and collects the new budgets.

    Args:
        standing: where the run stands.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing

    def requests(self) -> list[BudgetRequest]:
        """Let clients come and go as the inbox asks; what cannot be is refused, and said.

        Returns:
            The changes of budgets that the cluster file foresees for the round that begins, then the inbox's.

        Raises:
            ActorFailure: another than a client that was to join failed.
        """
        standing, done, inbox = self._standing, self._standing.progress.round, self._standing.directory.inbox
        requests = [
            BudgetRequest(name, change.values())
            for name, holder in [(SERVER, standing.run.server), *((c.name, c) for c in standing.run.participants)]
            for change in holder.schedule
            if change.round == done + 1
        ]
        asked, refused = take_requests(inbox, done)
        for text in refused:
            standing.note("refused", text, round=done)
        for request in asked:
            if isinstance(request, BudgetRequest):
                asked_for = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
                text = f"{request.holder}: {asked_for} asked for"
                standing.events.write("budget", text, round=done, **asdict(request))
                requests.append(request)
        for change in asked:
            if isinstance(change, BudgetRequest):
                continue
            try:
                if isinstance(change, JoinRequest):
                    self._join(change.client, requests)
                else:
                    self._leave(change.client, requests)
            except InputError as error:
                # Nothing has changed, and the run goes on as it is.
                refuse(inbox, change.file)
                standing.note("refused", f"inbox: {error}", round=done)
        return [request for request in requests if request.holder not in standing.roster.left]

    def _join(self, client: Client, requests: Sequence[BudgetRequest]) -> None:
        """Have a client begin and read its data; the plan that follows gives it a part.

        Raises:
            InputError: it is there already, has no usable data, or there is no plan with it.
        """
        standing, executor, roster = self._standing, self._standing.executor, self._standing.roster
        name, known = client.name, [c.name for c in standing.run.clients]
        if name in known and name not in [*roster.left, *roster.aside]:
            raise InputError(f"{name} is asked to join, and is there already")
        executor.add(client)
        begun = executor.restart(name)
        try:
            if begun:
                until = time.monotonic() + standing.job.faults.patience_s
                (report,) = executor.settle(list(standing.data.begin([client]).values()), until)
                if isinstance(report, HsplitError):
                    raise report
                standing.data.count(report)
            standing.ask(Scheduler.join, client, requests)
        except (InputError, ActorFailure) as error:
            if isinstance(error, ActorFailure) and error.actor != name:
                raise
            executor.end(name)
            raise InputError(f"{name} cannot join: {error}") from error
        roster.join(name)
        if not begun:
            roster.away(name)
        if name not in known:
            standing.join(client)
        text, declared = f"{name} joins after round {standing.progress.round}", client.model_dump(mode="json")
        standing.note("joined", text, client=name, round=standing.progress.round, declared=declared)

    def _leave(self, name: str, requests: Sequence[BudgetRequest]) -> None:
        """Go on without a client that leaves: all that it has learned is aggregated.

        Raises:
            InputError: it is not there, or nobody could go on without it.
        """
        standing, roster, done = self._standing, self._standing.roster, self._standing.progress.round
        if all(name != client.name for client in standing.run.clients) or name in roster.left:
            raise InputError(f"{name} is asked to leave, and is not there")
        if standing.clients == [name]:
            raise InputError(f"{name} cannot leave: no other client is there")
        try:
            standing.ask(Scheduler.leave, name, requests)
        except InputError as error:
            raise InputError(f"{name} cannot leave: {error}") from error
        if name in standing.clients:
            # Its process ends when the round can no longer be repeated with it.
            standing.executor.call(name, Participant.release)
        roster.leave(name)
        standing.note("left", f"{name} leaves after round {done}", client=name, round=done)
