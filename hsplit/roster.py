"""Who takes part in a run: who is there, who was lost and comes back, who is set aside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hsplit.actors.executor import SCHEDULER, ActorFailure, Executor
from hsplit.config.job import Faults
from hsplit.errors import HsplitError
from hsplit.scheduling.plan import Plan

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
}


def told(failure: ActorFailure) -> str:
    """A failure in a user's words: ``phone-0 failed in its forward (its process ended)``."""
    return f"{failure.actor} failed in {_ASKED_FOR.get(failure.method, failure.method)} ({failure.reason})"


class Roster:
    """Keeps count of the clients' failures, and begins lost clients anew while the others go on.

    Args:
        faults: what to do about failures.
        executor: reaches the actors.
        prepare: asks a client that was begun anew to read its data and layers; returns the calls.
        note: tells of an event: kind, text, fields.

    Attributes:
        present: the clients that take part, in the plan's order.
        failures: by client how often it failed.
        aside: the clients that take no part any more.
    """

    def __init__(
        self,
        faults: Faults,
        executor: Executor,
        prepare: Callable[[str], Sequence[Any]],
        note: Callable[..., None],
    ) -> None:
        self._faults, self._executor, self._prepare, self._note = faults, executor, prepare, note
        self.present: list[str] = []
        self.failures: dict[str, int] = {}
        self.aside: list[str] = []
        # By lost client the calls that prepare its return; None: it has no place to return to yet.
        self._lost: dict[str, Sequence[Any] | None] = {}
        self._away: set[str] = set()
        self._shortages: dict[str, int] = {}

    @property
    def lost(self) -> list[str]:
        """The clients that are to come back."""
        return list(self._lost)

    def adopt(self, plan: Plan) -> None:
        """Take over who has a part in ``plan``; the lost are not there yet."""
        named = [client.name for client in plan.available]
        self._lost = {name: calls for name, calls in self._lost.items() if name in named}
        self.present = [name for name in named if name not in self._lost and name not in self.aside]

    def recall(self, failures: Mapping[str, int], aside: Iterable[str], lost: Iterable[str]) -> None:
        """Go back to a checkpoint's ``lost``; failures since then are not forgotten."""
        for name, count in failures.items():
            self.failures[name] = max(count, self.failures.get(name, 0))
        self.aside = list(dict.fromkeys([*self.aside, *aside]))
        self._lost = {name: None for name in lost if name not in self.aside}
        self._tell_scheduler()

    def count(self, failure: ActorFailure, round_: int) -> None:
        """Count a client's failure; one too many sets it aside."""
        name = failure.actor
        self.failures[name] = failed = self.failures.get(name, 0) + 1
        if failure.kind == "memory":
            self._shortages[name] = self._shortages.get(name, 0) + 1
        if failed > self._faults.max_failures:
            self.aside.append(name)
            self._executor.end(name)
            text = f"{name} has failed {failed} times and is set aside: its layers and its data take no part any more"
            self._note("set_aside", text, client=name, round=round_, failures=failed)

    def _tell_scheduler(self) -> None:
        """Say what the next plan must heed; to say it again changes nothing."""
        calls = [self._executor.call(SCHEDULER, "set_aside", name) for name in self.aside]
        short = self._shortages.items()
        calls += [self._executor.call(SCHEDULER, "ran_out_of_memory", name, times) for name, times in short]
        self._executor.get(calls)

    def lose(self, failure: ActorFailure, round_: int) -> None:
        """Go on without a client that failed in round ``round_``, and begin it anew meanwhile."""
        name, most = failure.actor, self._faults.max_failures
        if name in self.present:
            self.present.remove(name)
        failed = self.failures.get(name, 0) + 1
        text = f"round {round_}: {told(failure)}; the others go on (failure {failed}, {most} are borne)"
        self._note("lost", text, client=name, round=round_, kind=failure.kind, reason=failure.reason, failures=failed)
        self._lost.pop(name, None)
        self.count(failure, round_)
        self._tell_scheduler()
        if name not in self.aside:
            self._lost[name] = None
            self._begin_return(name)

    def bring_back(self, round_: int, rejoin: Callable[[list[str]], Sequence[Any]]) -> list[str]:
        """Wait for the lost clients that have a place, and have them begin round ``round_`` with the others.

        Args:
            rejoin: asks these clients, who have their data and layers, to begin the round; returns the calls.

        Returns:
            Who has come back.
        """
        back: list[str] = []
        while names := [name for name in self._lost if self._begin_return(name)]:
            until = time.monotonic() + self._faults.patience_s
            ready = []
            for name in names:
                failed = self._first_failure(name, self._lost[name] or (), until)
                self._lost[name] = ()
                if failed is None:
                    ready.append(name)
                else:
                    self.lose(failed, round_)
            until = time.monotonic() + self._faults.patience_s
            for name, call in zip(ready, rejoin(ready) if ready else (), strict=True):
                failed = self._first_failure(name, [call], until)
                if failed is not None:
                    self.lose(failed, round_)
                    continue
                del self._lost[name]
                back.append(name)
                self._note("returned", f"round {round_}: {name} is back", client=name, round=round_)
        return back

    def _first_failure(self, name: str, calls: Sequence[Any], until: float) -> ActorFailure | None:
        for value in self._executor.settle(calls, until):
            if isinstance(value, ActorFailure):
                return value
            if isinstance(value, HsplitError):
                return ActorFailure(name, "load_data", str(value))
        return None

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
            text = f"{name} is away: no node that is there has room for it; it comes back when one has"
            self._note("away", text, client=name)
        self._away.add(name)
