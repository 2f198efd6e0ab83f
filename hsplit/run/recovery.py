"""Repeating a round from the last checkpoint, after a failure that the run cannot continue from."""

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
    """Replaces failed actors, as often as ``job.faults`` allows.

    Args:
        context: of the run.
        membership: counts clients' failures.
        save_point: the last checkpoint.
    """

    def __init__(self, context: RunContext, membership: Membership, save_point: SavePoint) -> None:
        self._context, self._membership, self._save_point = context, membership, save_point
        self._repeats = 0

    def repair(self, failure: ActorFailure) -> None:
        """Replace the actors that have failed, so that the round can be repeated from the last checkpoint.

        Raises:
            ActorFailure: ``failure``, where a repetition would not help, or too many have failed.
        """
        context, state, executor = self._context, self._context.state, self._context.executor
        most, round_ = context.job.faults.max_failures, context.round
        self._repeats += 1
        if isinstance(failure, NotFinite) and self._repeats > most:
            raise failure.of_all()
        if failure.kind in ("hopeless", "diverged") or self._repeats > most:
            raise self._with_memory_needed(failure)
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
        failures = {failure.actor: failure, **others}
        for name in dict.fromkeys([*failures, *waiting]):
            if name in (*context.servers, SCHEDULER):
                if name != SCHEDULER and failures[name].kind == "memory":
                    # All servers have the same part.
                    state.count_shortage(SERVER)
                self._replace(name)
                continue
            if name not in waiting:
                self._membership.count_failure(failures[name], round_)
            if state.status(name) is Status.ASIDE:
                continue
            if executor.restart(name):
                self._save_point.mark_fresh(name)
        self._membership.forget_calls()
        context.training.forget()

    def round_is_done(self) -> None:
        """Count the repetitions of the next round from 0."""
        self._repeats = 0

    def _with_memory_needed(self, failure: ActorFailure) -> ActorFailure:
        """``failure`` as the run's last word; where memory was short, with the bytes that the actor's part takes."""
        if failure.kind != "memory":
            return failure
        holder = SERVER if failure.actor in self._context.servers else failure.actor
        held_bytes = self._context.state.held_bytes(holder)
        part = f"its part of the plan takes {held_bytes / 1e6:.1f} MB, and its node lacks them" if held_bytes else ""
        reason = "; ".join(filter(None, [failure.reason, part, "free memory there, or give it less to do"]))
        return ActorFailure(failure.actor, failure.method, reason, failure.kind)

    def _replace(self, name: str) -> None:
        """Restart a server or the scheduler, on any node that has room for it within ``patience_s``."""
        until = time.monotonic() + self._context.job.faults.patience_s
        while not self._context.executor.restart(name):
            if time.monotonic() > until:
                raise ActorFailure(name, "restart", "no node has room for it", "hopeless")
            time.sleep(1.0)
