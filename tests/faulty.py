"""Actors in this process that die, fail, hang or send what cannot be right at a moment that the test chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.actors.executor import ActorFailure, InProcess


@dataclass
class Fault:
    """What happens to ``actor`` in its ``nth`` call of ``method`` (counted from 1).

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


@dataclass
class _Late:
    """An answer that is not there when it is first looked for in time."""

    actor: str
    method: str
    value: Any
    looked: bool = False

    def seen(self, until: float | None) -> Any:
        if until is None or self.looked:
            return self.value
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

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        self.calls[actor, method] += 1
        if actor in self.dead:
            return ActorFailure(actor, method, "its process ended", "died")
        if self.before is not None:
            self.before(actor, method, self.actors[actor])
        settled = [a.value if isinstance(a, _Late) else a for a in arguments]
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
                value = super().call(actor, method, *settled)
                return _Late(actor, method, value)
            if fault.kind in ("died", "after"):
                if fault.kind == "after":
                    super().call(actor, method, *settled)
                self.dead.add(actor)
                return ActorFailure(actor, method, "its process ended", "died")
            return ActorFailure(actor, method, "the test says so", fault.kind)  # type: ignore[arg-type]
        return super().call(actor, method, *settled)

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        value = self.call(actor, method, *arguments)
        if isinstance(value, _Late):
            return [_Late(actor, method, part) for part in value.value]
        if isinstance(value, Exception):
            return [value] * returns
        return list(value)

    def settle(self, handles: Sequence[Any], until: float | None = None) -> list[Any]:
        return [handle.seen(until) if isinstance(handle, _Late) else handle for handle in handles]

    def lost(self) -> list[ActorFailure]:
        return [ActorFailure(name, "the round", "its process ended", "died") for name in sorted(self.dead)]

    def restart(self, actor: str) -> bool:
        self.dead.discard(actor)
        return super().restart(actor)
