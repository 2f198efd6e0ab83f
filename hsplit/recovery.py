"""What is done about actors that fail: the others go on and the lost one comes back, or the round is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from hsplit.actors.executor import SCHEDULER, SERVER, ActorFailure, NotFinite, Ref
from hsplit.actors.participant import Participant
from hsplit.actors.server import Server
from hsplit.errors import HsplitError
from hsplit.roster import told
from hsplit.save_point import SavePoint
from hsplit.standing import Standing

_Value = TypeVar("_Value")


class Recovery:
    """Goes on after failures, as ``job.faults`` has it.

    Args:
        standing: where the run stands.
        save_point: what a round is repeated from.
    """

    def __init__(self, standing: Standing, save_point: SavePoint) -> None:
        self._standing, self._save_point = standing, save_point
        self._repeats = 0

    # -- going on without a client ----------------------------------------------------------------------------------

    def lose(self, failure: ActorFailure) -> None:
        """Go on without a client.

        Raises:
            ActorFailure: ``failure``, where the round is to be repeated instead.
        """
        standing, actor = self._standing, failure.actor
        # A single node has all that was learned in the round: without it there is nobody to go on.
        if standing.job.faults.recovery == "repeat" or standing.single or actor not in standing.clients:
            raise failure
        standing.training.forget(actor)
        standing.roster.lose(failure, standing.round)
        if isinstance(failure, NotFinite) and not standing.clients:
            raise failure.of_all()

    def settled(self, calls: Mapping[str, Ref[_Value]]) -> dict[str, _Value]:
        """Values of calls by client, of those that did not fail; the others are lost.

        Raises:
            ActorFailure: nobody is left, or the round is to be repeated.
        """
        executor, patience_s = self._standing.executor, self._standing.job.faults.patience_s
        until = time.monotonic() + patience_s
        values = {}
        for name, call in calls.items():
            (value,) = executor.settle([call], until)
            if isinstance(value, ActorFailure):
                self.lose(value)
            elif isinstance(value, HsplitError):
                raise value
            else:
                values[name] = value
        if calls and not values:
            self._standing.nobody_is_left(next(iter(calls)))
        return values

    def steadily(self, what: Callable[[], _Value]) -> _Value:
        """Do something between two rounds. Who fails meanwhile is brought back first, and it is done again."""
        not_finite: set[str] = set()
        while True:
            try:
                return what()
            except ActorFailure as failure:
                if isinstance(failure, NotFinite) and failure.actor in not_finite:
                    # It had begun again with what all have learned, so that it is that.
                    raise failure.of_all() from failure
                if isinstance(failure, NotFinite):
                    not_finite.add(failure.actor)
                self.lose(failure)
                # Those short of memory are back when the next plan has given them less.
                if failure.kind != "memory":
                    self.bring_back()
                if not self._standing.clients:
                    self._standing.nobody_is_left(failure.actor)

    def bring_back(self) -> None:
        """Whoever was lost begins the round that follows like everybody else.

        Raises:
            ActorFailure: nobody is there then.
        """
        standing, roster = self._standing, self._standing.roster
        if not roster.lost:
            return
        round_ = standing.progress.step // standing.job.local_steps + 1
        roster.bring_back(round_, lambda names: self._rejoin(names, round_))
        roster.adopt(standing.plan)
        if not standing.clients:
            standing.nobody_is_left(roster.lost[0] if roster.lost else roster.aside[-1])

    def _rejoin(self, names: list[str], round_: int) -> list[Ref[None]]:
        """Ask clients that have their data and layers to begin round ``round_``; returns the calls."""
        executor = self._standing.executor
        sent, updates = executor.call_each(SERVER, Server.welcome, round_, names)
        rejoining = [(name, self._save_point.kept(name), update) for name, update in zip(names, updates, strict=True)]
        calls = [executor.call(name, Participant.rejoin, kept, update) for name, kept, update in rejoining]
        self._standing.progress.bytes_down += executor.value(sent)
        return calls

    # -- repeating a round ------------------------------------------------------------------------------------------

    def repair(self, failure: ActorFailure) -> None:
        """Replace whoever is gone, so that the round can be repeated from the last checkpoint.

        Raises:
            ActorFailure: ``failure``, where that would not help, or has been tried often enough.
        """
        standing, executor, roster = self._standing, self._standing.executor, self._standing.roster
        most, round_ = standing.job.faults.max_failures, standing.round
        self._repeats += 1
        if isinstance(failure, NotFinite) and self._repeats > most:
            raise failure.of_all()
        if failure.kind in ("hopeless", "diverged") or self._repeats > most:
            raise self._with_what_it_lacked(failure)
        known = {failure.actor, *roster.aside, *roster.lost}
        others = {lost.actor: lost for lost in executor.lost() if lost.actor not in known}
        gone = {name: lost.kind for name, lost in others.items()}
        where = self._save_point.name
        text = f"round {round_}: {told(failure)}; the round is repeated {where} (try {self._repeats} of {most})"
        text += f" (gone too: {', '.join(gone)})" if gone else ""
        standing.note(
            "repeated", text, round=round_, actor=failure.actor, kind=failure.kind, reason=failure.reason, gone=gone
        )
        away = []
        failures = {failure.actor: failure, **others}
        for name in dict.fromkeys([*failures, *roster.lost]):
            if name in (*standing.servers, SCHEDULER):
                if name != SCHEDULER and failures[name].kind == "memory":
                    # Whichever of several servers it was: all have the same part.
                    roster.ran_short(SERVER)
                self._replace(name)
                continue
            if name not in roster.lost:
                roster.count(failures[name], round_)
            if name in roster.aside:
                continue
            if executor.restart(name):
                self._save_point.knows_nothing(name)
            else:
                away.append(name)
        for name in away:
            roster.away(name)
        self._save_point.have_no_place(away)
        standing.training.forget()

    def round_is_done(self) -> None:
        """The round that follows may be repeated as often as any."""
        self._repeats = 0

    def _with_what_it_lacked(self, failure: ActorFailure) -> ActorFailure:
        """``failure`` as the end of the run: where memory was short, with how much its part takes."""
        if failure.kind != "memory":
            return failure
        held_bytes = self._standing.roster.held_bytes(
            SERVER if failure.actor in self._standing.servers else failure.actor
        )
        part = f"its part of the plan takes {held_bytes / 1e6:.1f} MB, and its node lacks them" if held_bytes else ""
        reason = "; ".join(filter(None, [failure.reason, part, "free memory there, or give it less to do"]))
        return ActorFailure(failure.actor, failure.method, reason, failure.kind)

    def _replace(self, name: str) -> None:
        """Begin server or scheduler anew, on whatever node has room for it or comes to have."""
        until = time.monotonic() + self._standing.job.faults.patience_s
        while not self._standing.executor.restart(name):
            if time.monotonic() > until:
                raise ActorFailure(name, "restart", "no node has room for it", "hopeless")
            time.sleep(1.0)
