"""Repeating a round from the last checkpoint, after a failure that the others cannot continue without."""

from __future__ import annotations

import time

from hsplit.actors.executor import ActorFailure, NotFinite
from hsplit.config import SCHEDULER, SERVER
from hsplit.run.checkpoint import SavePoint
from hsplit.run.context import RunContext
from hsplit.run.failure_text import describe
from hsplit.run.membership import Membership
from hsplit.run.state import Status


class Recovery:
    """Replaces actors, as often as ``job.faults`` has it.

    Args:
        context: of the run.
        membership: counts clients' failures.
        save_point: what a round is repeated from.
    """

    def __init__(self, context: RunContext, membership: Membership, save_point: SavePoint) -> None:
        self._context, self._membership, self._save_point = context, membership, save_point
        self._repeats = 0

    def repair(self, failure: ActorFailure) -> None:
        """Replace the actors that are gone, so that the round can be repeated from the last checkpoint.

        Raises:
            ActorFailure: ``failure``, where that would not help, or has been tried often enough.
        """
        context, state, executor = self._context, self._context.state, self._context.executor
        most, round_ = context.job.faults.max_failures, context.round
        self._repeats += 1
        if isinstance(failure, NotFinite) and self._repeats > most:
            raise failure.of_all()
        if failure.kind in ("hopeless", "diverged") or self._repeats > most:
            raise self._with_what_it_lacked(failure)
        waiting = state.to_return
        known = {failure.actor, *waiting, *state.with_status(Status.ASIDE)}
        others = {lost.actor: lost for lost in executor.lost() if lost.actor not in known}
        gone = {name: lost.kind for name, lost in others.items()}
        where = self._save_point.name
        text = f"round {round_}: {describe(failure)}; the round is repeated {where} (try {self._repeats} of {most})"
        text += f" (gone too: {', '.join(gone)})" if gone else ""
        context.note(
            "repeated", text, round=round_, actor=failure.actor, kind=failure.kind, reason=failure.reason, gone=gone
        )
        without_place = []
        failures = {failure.actor: failure, **others}
        for name in dict.fromkeys([*failures, *waiting]):
            if name in (*context.servers, SCHEDULER):
                if name != SCHEDULER and failures[name].kind == "memory":
                    # Whichever of several servers it was: all have the same part.
                    state.count_shortage(SERVER)
                self._replace(name)
                continue
            if name not in waiting:
                self._membership.count(failures[name], round_)
            if state.status(name) is Status.ASIDE:
                continue
            if executor.restart(name):
                self._save_point.mark_fresh(name)
            else:
                without_place.append(name)
        for name in without_place:
            self._membership.mark_away(name)
        self._save_point.mark_without_place(without_place)
        self._membership.forget_calls()
        context.training.forget()

    def round_is_done(self) -> None:
        """Allow the round that follows to be repeated as often as any."""
        self._repeats = 0

    def _with_what_it_lacked(self, failure: ActorFailure) -> ActorFailure:
        """``failure`` as the end of the run: where memory was short, with how much its part takes."""
        if failure.kind != "memory":
            return failure
        holder = SERVER if failure.actor in self._context.servers else failure.actor
        held_bytes = self._context.state.held_bytes(holder)
        part = f"its part of the plan takes {held_bytes / 1e6:.1f} MB, and its node lacks them" if held_bytes else ""
        reason = "; ".join(filter(None, [failure.reason, part, "free memory there, or give it less to do"]))
        return ActorFailure(failure.actor, failure.method, reason, failure.kind)

    def _replace(self, name: str) -> None:
        """Begin server or scheduler again, on whatever node has room for it or comes to have."""
        until = time.monotonic() + self._context.job.faults.patience_s
        while not self._context.executor.restart(name):
            if time.monotonic() > until:
                raise ActorFailure(name, "restart", "no node has room for it", "hopeless")
            time.sleep(1.0)
