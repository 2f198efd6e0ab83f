"""Actors in this process that die, fail, hang or send invalid values at a moment that the test chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.actors.executor import ActorFailure, InProcess, R, Ready, Ref
from hsplit.errors import HsplitError


@dataclass
class Fault:
    """Fault of ``actor`` in its ``nth`` call of ``method`` (counted from 1).

    Attributes:
        kind: ``died``: it is gone with its state; ``after``: it did the call and is gone with the answer; ``hang``:
            no answer when it is first looked for with a limit; else the kind of failure.
        times: how often it happens, from the nth call on.
    """

    actor: str
    method: str
    nth: int = 1
    kind: str = "died"
    times: int = 1


class _Late(Ready[Any]):
    """An answer that is late when it is first waited for."""

    looked = False

    def seen(self, until: float | None) -> Any:
        if until is None or self.looked:
            return self.outcome
        self.looked = True
        return ActorFailure(self.actor, self.method, "it has not answered in time", "late")


class FaultyInProcess(InProcess):
    """Plain actors in this process, with faults.

    Args:
        inside: the executor whose actors these are.
        faults: what is to happen.
        before: called before each call with actor, method, and the actor.
    """

    def __init__(
        self, inside: InProcess, faults: Sequence[Fault] = (), before: Callable[[str, str, Any], None] | None = None
    ) -> None:
        super().__init__(inside.actors, inside._make)
        self.faults, self.before = list(faults), before
        self.calls: Counter[tuple[str, str]] = Counter()
        self.happened: list[Fault] = []
        self.dead: set[str] = set()
        self._hanging = False

    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        self._hanging = False
        refs = super().begin(actor, method, arguments, returns)
        return [_Late(actor, ref.method, ref.outcome) for ref in refs] if self._hanging else refs  # type: ignore[attr-defined]

    def perform(self, actor: str, method: str, *arguments: Any) -> Any:
        self.calls[actor, method] += 1
        if actor in self.dead:
            return ActorFailure(actor, method, "its process ended", "died")
        if self.before is not None:
            self.before(actor, method, self.actors[actor])
        for fault in self.faults:
            if (
                (fault.actor, fault.method) != (actor, method)
                or self.calls[actor, method] < fault.nth
                or not fault.times
            ):
                continue
            fault.times -= 1
            self.happened.append(fault)
            if fault.kind == "hang":
                self._hanging = True
                return super().perform(actor, method, *arguments)
            if fault.kind in ("died", "after"):
                if fault.kind == "after":
                    super().perform(actor, method, *arguments)
                self.dead.add(actor)
                return ActorFailure(actor, method, "its process ended", "died")
            return ActorFailure(actor, method, "the test says so", fault.kind)  # type: ignore[arg-type]
        return super().perform(actor, method, *arguments)

    def wait(self, refs: Sequence[Ref[R]], until: float | None = None) -> list[R | HsplitError]:
        return [ref.seen(until) if isinstance(ref, _Late) else ref.outcome for ref in refs]  # type: ignore[attr-defined]

    def lost(self) -> list[ActorFailure]:
        return [ActorFailure(name, "the round", "its process ended", "died") for name in sorted(self.dead)]

    def restart(self, actor: str) -> bool:
        self.dead.discard(actor)
        return super().restart(actor)
