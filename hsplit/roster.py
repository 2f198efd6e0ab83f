"""Who takes part in a run: who is there, who was lost and comes back, who is set aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hsplit.actors.executor import SCHEDULER, ActorFailure, Executor, NotFinite, Ref
from hsplit.actors.scheduler import Scheduler
from hsplit.config.job import Faults
from hsplit.errors import HsplitError
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.serving import drawn_cohort

# What an actor was asked for, in the words of an event.
_ASKED_FOR = {
    "load_data": "reading its data",
    "configure": "reading its layers",
    "restart": "beginning the round",
    "rejoin": "beginning the round",
    "load_state": "taking up its state",
    "forward": "its forward",
    "tail": "its loss",
    "backward": "its backward",
    "train_step": "a local step",
    "hand_in": "handing in its adapters",
    "aggregate": "the aggregation",
    "validation_forward": "validation",
    "validation_tail": "validation",
    "validate": "validation",
    "evaluate": "validation",
    "evaluate_deep": "validation",
    "state": "a checkpoint",
    "probe": "the importance probe",
    "probe_forward": "the importance probe",
    "probe_tail": "the importance probe",
    "probe_backward": "the importance probe",
    "give_up": "a change of plan",
    "reconfigure": "a change of plan",
    "plan": "planning",
    "review": "planning",
    "set_aside": "planning",
    "ran_out_of_memory": "planning",
    "take_up": "taking up its state",
}


def asked_for(failure: ActorFailure) -> str:
    """What an actor was asked for when it failed, in a user's words: ``its forward``."""
    return _ASKED_FOR.get(failure.method, failure.method)


def told(failure: ActorFailure) -> str:
    """A failure in a user's words: ``phone-0 failed in its forward (its process ended)``."""
    return f"{failure.actor} failed in {asked_for(failure)} ({failure.reason})"


class Roster:
    """Keeps count of the clients' failures, and begins lost clients anew while the others go on.

    Args:
        faults: what to do about failures.
        executor: reaches the actors.
        prepare: asks a client that was begun anew to read its data and layers; returns the calls.
        learn: is given what those calls returned.
        note: tells of an event: kind, text, fields.

    Attributes:
        present: the clients that take part, in the plan's order.
        failures: by client how often it failed.
        aside: the clients that take no part any more.
        left: the clients that have left of their own will.
        shortages: by client, or ``server``, how often it ran out of memory.
        reasons: by client why it failed last.
    """

    def __init__(
        self,
        faults: Faults,
        executor: Executor,
        prepare: Callable[[str], Sequence[Ref[Any]]],
        learn: Callable[[Sequence[Any]], None],
        note: Callable[..., None],
    ) -> None:
        self._faults, self._executor = faults, executor
        self._prepare, self._learn, self._note = prepare, learn, note
        self._plan: Plan | None = None
        self.present: list[str] = []
        self.failures: dict[str, int] = {}
        self.aside: list[str] = []
        self.left: list[str] = []
        # By lost client the calls that prepare its return; None: it has no place to return to yet.
        self._lost: dict[str, Sequence[Ref[Any]] | None] = {}
        self._away: set[str] = set()
        self.shortages: dict[str, int] = {}
        # By the same what they held by the plan that was in force then, in bytes.
        self._held_then: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    @property
    def lost(self) -> list[str]:
        """The clients that are to come back."""
        return list(self._lost)

    def cohort(self, seed: int, round_: int, count: int | None) -> list[str]:
        """The clients that train in round ``round_``: ``count`` of those present, drawn anew each round.

        Each client's place in a round's draw depends on seed, round and name alone. So a run that is resumed draws the
        same, and for a client that is lost the next in the draw steps in.
        """
        return drawn_cohort(self.present, seed, round_, count)

    def join(self, name: str) -> None:
        """A client comes to a run that is under way, for the first time or again; what it did before is forgiven."""
        self.aside = [other for other in self.aside if other != name]
        self.left = [other for other in self.left if other != name]
        self.failures.pop(name, None)

    def leave(self, name: str) -> None:
        """A client goes of its own will; it is in no later plan."""
        self.left.append(name)
        self.present = [other for other in self.present if other != name]
        self._lost.pop(name, None)
        self._away.discard(name)

    def adopt(self, plan: Plan) -> None:
        """Take over who has a part in ``plan``; the lost are not there yet."""
        named = [client.name for client in plan.available]
        # Who was prepared for another part is prepared anew.
        same = {n for n in named if self._plan is not None and _part(self._plan, n) == _part(plan, n)}
        self._plan = plan
        # Who is away is not forgotten by a plan without it: nothing of it has been begun.
        self._lost = {
            name: calls if name in same else None
            for name, calls in self._lost.items()
            if name in named or name in self._away
        }
        self.present = [name for name in named if name not in self._lost and name not in self.aside]

    def recall(
        self,
        failures: Mapping[str, int],
        aside: Iterable[str],
        lost: Iterable[str],
        shortages: Mapping[str, int] | None = None,
        left: Iterable[str] = (),
        away: Iterable[str] = (),
    ) -> None:
        """Go back to a checkpoint's ``lost``; failures since then are not forgotten.

        Args:
            failures, aside, shortages, left: as attributes.
            away: clients that have no place to begin, lost or not.
        """
        for name, count in (shortages or {}).items():
            self.shortages[name] = max(count, self.shortages.get(name, 0))
        for name, count in failures.items():
            self.failures[name] = max(count, self.failures.get(name, 0))
        self.aside = list(dict.fromkeys([*self.aside, *aside]))
        self.left = list(left)
        gone = {*self.aside, *self.left}
        self._lost = {name: None for name in lost if name not in gone}
        for name in away:
            # Who is lost has not been begun either way: whether there is a place is seen when it is to come back.
            if name not in gone and name not in self._lost:
                self.away(name)
        self._tell_scheduler()

    def count(self, failure: ActorFailure, round_: int) -> None:
        """Count a client's failure; one too many sets it aside."""
        name = failure.actor
        self.failures[name] = failed = self.failures.get(name, 0) + 1
        self.reasons[name] = failure.reason
        if failure.kind == "memory":
            self.ran_short(name)
        if failed > self._faults.max_failures:
            self.aside.append(name)
            self._executor.end(name)
            text = f"{name} has failed {failed} times and is set aside: its layers and its data take no part any more"
            if isinstance(failure, NotFinite):
                text += "; its values were not finite: job.lr may be too large for its data"
            self._note("set_aside", text, client=name, round=round_, failures=failed)

    def ran_short(self, name: str) -> None:
        """Count that a client or ``server`` ran out of memory: by the next plan it holds less."""
        self.shortages[name] = self.shortages.get(name, 0) + 1
        self._held_then[name] = self.held_bytes(name)

    def held_bytes(self, name: str) -> int:
        """Bytes that the plan in force says a client or ``server`` takes; 0 where there is no plan, or no part."""
        parts = () if self._plan is None else (self._plan.server, *self._plan.clients)
        return next((part.predicted_bytes for part in parts if part.name == name), 0)

    def _tell_scheduler(self) -> None:
        """Say what the next plan must heed; to say it again changes nothing."""
        calls = [self._executor.call(SCHEDULER, Scheduler.set_aside, name) for name in self.aside]
        for name, times in self.shortages.items():
            held_bytes = self._held_then.get(name, 0)
            calls.append(self._executor.call(SCHEDULER, Scheduler.ran_out_of_memory, name, times, held_bytes))
        self._executor.get(calls)

    def lose(self, failure: ActorFailure, round_: int) -> None:
        """Go on without a client that failed in round ``round_``, and begin it anew meanwhile."""
        name, most = failure.actor, self._faults.max_failures
        if name in self.present:
            self.present.remove(name)
        failed = self.failures.get(name, 0) + 1
        anew = ", and it is begun anew" if failed <= most else ""
        borne = f"failure {failed}; more than {most} set a client aside"
        text = f"round {round_}: {told(failure)}; the others go on{anew} ({borne})"
        self._note("lost", text, client=name, round=round_, kind=failure.kind, reason=failure.reason, failures=failed)
        self._lost.pop(name, None)
        self.count(failure, round_)
        self._tell_scheduler()
        if name not in self.aside:
            self._lost[name] = None
            self._begin_return(name)

    def bring_back(self, round_: int, rejoin: Callable[[list[str]], Sequence[Ref[Any]]]) -> list[str]:
        """Wait for the lost clients that have a place, and have them begin round ``round_`` with the others.

        Each is tried once; who fails again may be there a round later.

        Args:
            rejoin: asks these clients, who have their data and layers, to begin the round; returns the calls.

        Returns:
            Who has come back.
        """
        planned = {client.name for client in self._plan.available} if self._plan is not None else set()
        names = [name for name in self._lost if name in planned and self._begin_return(name)]
        until = time.monotonic() + self._faults.patience_s
        ready = [name for name in names if self._succeeds(name, self._lost[name] or (), until, round_)]
        for name in ready:
            self._lost[name] = ()
        until = time.monotonic() + self._faults.patience_s
        calls = rejoin(ready) if ready else ()
        back = [n for n, call in zip(ready, calls, strict=True) if self._succeeds(n, [call], until, round_)]
        for name in back:
            del self._lost[name]
            how = "is back" if self.failures.get(name) else "is there"
            self._note("returned", f"round {round_}: {name} {how}", client=name, round=round_)
        return back

    def _succeeds(self, name: str, calls: Sequence[Ref[Any]], until: float, round_: int) -> bool:
        """Whether the calls of a client that returns come to their end; else it is lost once more.

        Raises:
            ActorFailure: of somebody else, whom the calls wait for.
        """
        values = self._executor.settle(calls, until)
        for value in values:
            if isinstance(value, HsplitError):
                own = value if isinstance(value, ActorFailure) else ActorFailure(name, "load_data", str(value))
                if own.actor != name:
                    # What it waits for has failed: that is another's failure.
                    raise own
                self.lose(own, round_)
                return False
        self._learn(values)
        return True

    def _begin_return(self, name: str) -> bool:
        """Begin a lost client anew, unless that is done.

        Returns:
            Whether there is a place for it.
        """
        if self._lost[name] is not None:
            return True
        if not self._executor.restart(name):
            self.away(name)
            return False
        self._lost[name] = self._prepare(name)
        self._away.discard(name)
        return True

    def away(self, name: str) -> None:
        """A client has no place to return to yet."""
        self._lost[name] = None
        if name not in self._away:
            text = f"{name} is away: no node that is there has room for it; it takes part when one has"
            self._note("away", text, client=name)
        self._away.add(name)


def _part(plan: Plan, name: str) -> tuple[int | None, dict[str, int]] | None:
    """What a client holds by ``plan``: split point and ranks."""
    return next(((c.split, c.ranks) for c in plan.clients if c.name == name), None)
