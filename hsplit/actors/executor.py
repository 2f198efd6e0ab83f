"""How the coordinator reaches clients, server and scheduler: one small protocol, and its in-process form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from hsplit.config import Client
from hsplit.errors import NO_NUMBERS, HsplitError

LOCALHOST = "127.0.0.1"
SERVER = "server"
SCHEDULER = "scheduler"

FailureKind = Literal["died", "memory", "node", "late", "refused", "diverged", "hopeless", "error"]


class ActorFailure(HsplitError):
    """A call to an actor failed.

    Attributes:
        actor: its name: a client's, ``server`` or ``scheduler``.
        method: what it was asked to do.
        reason: one line.
        kind: ``died``: its process is gone, and its state; ``memory``: it ran out of memory, or was ended because its
            node did; ``node``: its node is gone; ``late``: no answer in time; ``refused``: what it sent cannot be
            right, or Ray does not take what was asked for; ``diverged``: loss, gradients or weights are not finite, and
            would be again; ``hopeless``: the same would happen again; ``error``: else.
    """

    def __init__(self, actor: str, method: str, reason: str, kind: FailureKind = "error") -> None:
        super().__init__(f"{actor} failed in {method}: {reason}")
        self.actor, self.method, self.reason, self.kind = actor, method, reason, kind

    def __reduce__(self) -> tuple[Any, ...]:
        # An error is pickled with its text alone otherwise.
        return type(self), (self.actor, self.method, self.reason, self.kind)


class NotFinite(ActorFailure):
    """A failure of one client, whose values are not finite: the others continue, and it is begun again.

    Where it happens to all clients, training has diverged: :meth:`of_all`.
    """

    def of_all(self) -> ActorFailure:
        """Return the failure that ends the run."""
        return ActorFailure(self.actor, self.method, f"{self.actor}: {self.reason}", "diverged")


class Executor(Protocol):
    """Calls actors by name. A handle is what a call returns; it may be passed on as an argument of another call.

    An actor does what it is asked in the order in which it is asked.
    """

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        """Begin ``actor.method(*arguments)``; handles among ``arguments`` stand for their values."""

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        """The same for a method that returns a tuple: one handle for each of its ``returns`` members."""

    def settle(self, handles: Sequence[Any], until: float | None = None) -> list[Any]:
        """Wait for the values of ``handles``; a call that failed gives its :class:`HsplitError` as its value.

        Args:
            handles: of calls.
            until: by ``time.monotonic``: what has no value by then gives a failure of kind ``late``, and may be settled
                once more later; ``None``: wait for all.
        """

    def get(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for the values of ``handles``.

        Raises:
            InputError: an actor refused its input.
            ActorFailure: an actor failed or died.
        """

    def lost(self) -> list[ActorFailure]:
        """A failure of each actor whose process is known to be gone, which says why."""

    def away(self) -> list[str]:
        """The actors that have not been begun, since there was no place for them when it was looked last."""

    def add(self, client: Client) -> None:
        """Make a client known that was not among the run's; :meth:`restart` begins it."""

    def restart(self, actor: str) -> bool:
        """End ``actor``, if it is still there, and begin it anew, without data, layers or state.

        Returns:
            Whether there is a place for it; else it stays away, and may be restarted later.

        Raises:
            ActorFailure: actors cannot be replaced.
        """

    def end(self, actor: str) -> None:
        """End ``actor`` for good."""

    def close(self) -> None:
        """End every actor."""


class InProcess:
    """Runs every call at once, in this process: for the laws, for tests and for rivals in benchmarks.

    Args:
        actors: plain objects by name.
        make: makes an actor anew, by name; ``None``: none can be.
    """

    def __init__(self, actors: Mapping[str, Any], make: Callable[[str], Any] | None = None) -> None:
        self.actors = dict(actors)
        self._make = make

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, HsplitError):
                # As on Ray: who is given the value of a call that failed fails with it.
                return argument
        try:
            return getattr(self.actors[actor], method)(*arguments)
        except HsplitError as error:
            return error
        except Exception as error:
            return failure_of(actor, method, error)

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        value = self.call(actor, method, *arguments)
        if isinstance(value, HsplitError):
            return [value] * returns
        values = list(value)
        if len(values) != returns:
            raise ValueError(f"{actor}.{method} returned {len(values)} values, {returns} were expected")
        return values

    def settle(self, handles: Sequence[Any], until: float | None = None) -> list[Any]:
        return list(handles)

    def get(self, handles: Sequence[Any]) -> list[Any]:
        return values_of(self.settle(handles))

    def lost(self) -> list[ActorFailure]:
        return []

    def away(self) -> list[str]:
        return []

    def add(self, client: Client) -> None: ...

    def restart(self, actor: str) -> bool:
        if self._make is None:
            raise ActorFailure(actor, "restart", "it cannot be made anew", "hopeless")
        self.actors[actor] = self._make(actor)
        return True

    def end(self, actor: str) -> None:
        self.actors.pop(actor, None)

    def close(self) -> None:
        self.actors.clear()


def refusal(client: str, method: str, reason: str) -> ActorFailure:
    """Make the failure of a client whose message a holder has refused for ``reason``."""
    return (NotFinite if NO_NUMBERS in reason else ActorFailure)(client, method, reason, "refused")


def values_of(settled: Sequence[Any]) -> list[Any]:
    """What :meth:`Executor.settle` gave, where nothing failed.

    Raises:
        HsplitError: the first of the failures.
    """
    for value in settled:
        if isinstance(value, HsplitError):
            raise value
    return list(settled)


def failure_of(actor: str, method: str, error: BaseException) -> ActorFailure:
    """The failure that an error in ``actor.method`` is."""
    # torch's allocator for CPUs has no error of its own.
    if isinstance(error, FloatingPointError):
        return ActorFailure(actor, method, str(error), "diverged")
    short = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error)
    return ActorFailure(actor, method, one_line(error), "memory" if short else "error")


def one_line(error: BaseException) -> str:
    """``Type: first non-empty line`` of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
