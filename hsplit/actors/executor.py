"""How the coordinator reaches clients, server and scheduler: one small protocol, and its in-process form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hsplit.errors import HsplitError

SERVER = "server"
SCHEDULER = "scheduler"


class ActorFailure(HsplitError):
    """A call to an actor failed.

    Attributes:
        actor: its name: a client's, ``server`` or ``scheduler``.
        method: what it was asked to do.
        reason: one line.
    """

    def __init__(self, actor: str, method: str, reason: str) -> None:
        super().__init__(f"{actor} failed in {method}: {reason}")
        self.actor, self.method, self.reason = actor, method, reason


class Executor(Protocol):
    """Calls actors by name. A handle is what a call returns; it may be passed on as an argument of another call."""

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        """Begin ``actor.method(*arguments)``; handles among ``arguments`` stand for their values."""

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        """The same for a method that returns a tuple: one handle for each of its ``returns`` members."""

    def get(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for the values of ``handles``.

        Raises:
            InputError: an actor refused its input.
            ActorFailure: an actor failed or died.
        """

    def close(self) -> None:
        """End every actor."""


class InProcess:
    """Runs every call at once, in this process: for the laws, for tests and for rivals in benchmarks.

    Args:
        actors: plain objects by name.
    """

    def __init__(self, actors: Mapping[str, Any]) -> None:
        self.actors = dict(actors)

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.actors[actor], method)(*arguments)
        except HsplitError:
            raise
        except Exception as error:
            raise ActorFailure(actor, method, one_line(error)) from error

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        values = list(self.call(actor, method, *arguments))
        if len(values) != returns:
            raise ValueError(f"{actor}.{method} returned {len(values)} values, {returns} were expected")
        return values

    def get(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)

    def close(self) -> None:
        self.actors.clear()


def one_line(error: BaseException) -> str:
    """``Type: first non-empty line`` of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
