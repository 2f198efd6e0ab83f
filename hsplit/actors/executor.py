"""Typed calls of actors: the interface through which a run reaches them, and its in-process form."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

from hsplit.config import ClientConfig
from hsplit.errors import NO_NUMBERS, HsplitError

LOCALHOST = "127.0.0.1"
# What errors without a class of their own say: torch's allocator for CPUs; CUDA where not even a context fits; cuBLAS.
NO_MEMORY = re.compile(r"allocate memory|(?:CUDA|HIP)(?: error:)? out of memory|BLAS_STATUS_ALLOC_FAILED")

# Of a call: its result (R, or a report R and values V), its arguments, and M the items of a call_each.
R = TypeVar("R")
V = TypeVar("V")
M = TypeVar("M")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
P = ParamSpec("P")
Value_co = TypeVar("Value_co", covariant=True)

FailureKind = Literal["died", "memory", "node", "late", "refused", "diverged", "hopeless", "error"]


class ActorFailure(HsplitError):
    """A call to an actor failed.

    Attributes:
        actor: its name: a client's, ``server`` or ``scheduler``.
        method: the name of the called method.
        reason: one line.
        kind: ``died``: its process is gone, and its state; ``memory``: it ran out of memory, or was ended because its
            node did; ``node``: its node is gone; ``late``: no answer in time; ``refused``: its message is invalid, or
            Ray rejects the request; ``diverged``: loss, gradients or weights are not finite, and would be again;
            ``hopeless``: the same would happen again; ``error``: anything else.
    """

    def __init__(self, actor: str, method: str, reason: str, kind: FailureKind = "error") -> None:
        super().__init__(f"{actor} failed in {method}: {reason}")
        self.actor, self.method, self.reason, self.kind = actor, method, reason, kind

    def __reduce__(self) -> tuple[Any, ...]:
        # By default an error is pickled with its text alone.
        return type(self), (self.actor, self.method, self.reason, self.kind)


class NotFinite(ActorFailure):
    """One client's values are not finite: the others continue, and it is started again.

    Where it happens to all clients, training has diverged: see :meth:`of_all`.
    """

    def of_all(self) -> ActorFailure:
        """Return the failure that ends the run."""
        return ActorFailure(self.actor, self.method, f"{self.actor}: {self.reason}", "diverged")


class Ref(Generic[Value_co]):
    """Reference to the value of a call, which may still be running; it may be an argument of another call.

    Args:
        actor, method: of the call, so that its failure can be named.
    """

    def __init__(self, actor: str, method: str) -> None:
        self.actor, self.method = actor, method


class Executor(ABC):
    """Calls actors by name, with the method itself: ``call("phone-0", Client.forward, step, part)``.

    An actor executes its calls in the order in which they were begun. Arguments are positional; any of them may be the
    :class:`Ref` of another call, whose value then goes from actor to actor without passing here. Type checkers compare
    arguments and results with the method's signature.
    """

    # -- calls ----------------------------------------------------------------------------------------------------

    @overload
    def call(self, actor: str, method: Callable[[Any], R], /) -> Ref[R]: ...
    @overload
    def call(self, actor: str, method: Callable[[Any, A], R], a: A | Ref[A], /) -> Ref[R]: ...
    @overload
    def call(self, actor: str, method: Callable[[Any, A, B], R], a: A | Ref[A], b: B | Ref[B], /) -> Ref[R]: ...
    @overload
    def call(
        self, actor: str, method: Callable[[Any, A, B, C], R], a: A | Ref[A], b: B | Ref[B], c: C | Ref[C], /
    ) -> Ref[R]: ...
    @overload
    def call(
        self,
        actor: str,
        method: Callable[[Any, A, B, C, D], R],
        a: A | Ref[A],
        b: B | Ref[B],
        c: C | Ref[C],
        d: D | Ref[D],
        /,
    ) -> Ref[R]: ...
    @overload
    def call(
        self,
        actor: str,
        method: Callable[[Any, A, B, C, D, E], R],
        a: A | Ref[A],
        b: B | Ref[B],
        c: C | Ref[C],
        d: D | Ref[D],
        e: E | Ref[E],
        /,
    ) -> Ref[R]: ...
    def call(self, actor: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Begin ``method`` of ``actor``; a tuple that it returns counts as one value."""
        (ref,) = self.begin(actor, method, arguments)
        return ref

    @overload
    def call_pair(self, actor: str, method: Callable[[Any], tuple[R, V]], /) -> tuple[Ref[R], Ref[V]]: ...
    @overload
    def call_pair(
        self, actor: str, method: Callable[[Any, A], tuple[R, V]], a: A | Ref[A], /
    ) -> tuple[Ref[R], Ref[V]]: ...
    @overload
    def call_pair(
        self, actor: str, method: Callable[[Any, A, B], tuple[R, V]], a: A | Ref[A], b: B | Ref[B], /
    ) -> tuple[Ref[R], Ref[V]]: ...
    @overload
    def call_pair(
        self,
        actor: str,
        method: Callable[[Any, A, B, C], tuple[R, V]],
        a: A | Ref[A],
        b: B | Ref[B],
        c: C | Ref[C],
        /,
    ) -> tuple[Ref[R], Ref[V]]: ...
    def call_pair(self, actor: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Begin a method that returns a pair, such as a small report and a tensor: one reference for each."""
        report, value = self.begin(actor, method, arguments, 2)
        return report, value

    @overload
    def call_each(
        self, actor: str, method: Callable[[Any, M], tuple[R, *tuple[V, ...]]], items: Sequence[M | Ref[M]], /
    ) -> tuple[Ref[R], list[Ref[V]]]: ...
    @overload
    def call_each(
        self,
        actor: str,
        method: Callable[[Any, A, M], tuple[R, *tuple[V, ...]]],
        a: A | Ref[A],
        items: Sequence[M | Ref[M]],
        /,
    ) -> tuple[Ref[R], list[Ref[V]]]: ...
    @overload
    def call_each(
        self,
        actor: str,
        method: Callable[[Any, A, B, M], tuple[R, *tuple[V, ...]]],
        a: A | Ref[A],
        b: B | Ref[B],
        items: Sequence[M | Ref[M]],
        /,
    ) -> tuple[Ref[R], list[Ref[V]]]: ...
    @overload
    def call_each(
        self,
        actor: str,
        method: Callable[[Any, A, B, C, M], tuple[R, *tuple[V, ...]]],
        a: A | Ref[A],
        b: B | Ref[B],
        c: C | Ref[C],
        items: Sequence[M | Ref[M]],
        /,
    ) -> tuple[Ref[R], list[Ref[V]]]: ...
    def call_each(self, actor: str, method: Callable[..., Any], *arguments: Any) -> Any:
        """Begin ``method(*arguments, *items)``, which returns a report and then one value for each item."""
        *first, items = arguments
        report, *values = self.begin(actor, method, [*first, *items], 1 + len(items))
        return report, values

    def ask(self, actor: str, method: Callable[Concatenate[Any, P], R], *arguments: P.args, **named: P.kwargs) -> R:
        """Call with plain arguments and wait for the value; errors as :meth:`get`."""
        assert not named, "arguments are given by position"
        (ref,) = self.begin(actor, method, arguments)
        return self.value(ref)

    def call_all(self, actor: str, method: Callable[[Any, M], R], items: Sequence[M | Ref[M]], /) -> Ref[R]:
        """Begin ``method(*items)``, with one reference to its value."""
        (ref,) = self.begin(actor, method, items)
        return ref

    @abstractmethod
    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        """Begin a call; the typed forms above use this one.

        Args:
            actor: its name.
            method: function of the actor's class.
            arguments: values and references.
            returns: number of values that the method returns, with a reference for each; ``None``: one reference.
        """

    @abstractmethod
    def wait(self, refs: Sequence[Ref[R]], until: float | None = None) -> list[R | HsplitError]:
        """Wait for the values of ``refs``; a call that failed gives its :class:`HsplitError` as its value.

        Args:
            refs: of calls.
            until: by ``time.monotonic``: a call without a value by then gives a failure of kind ``late``, and may be
                waited for once more later; ``None``: wait for all.
        """

    def get(self, refs: Sequence[Ref[R]], until: float | None = None) -> list[R]:
        """Wait for the values of ``refs``, as :meth:`wait`.

        Raises:
            InputError: an actor rejected its input.
            ActorFailure: an actor failed, died or is late.
        """
        values: list[R] = []
        for value in self.wait(refs, until):
            if isinstance(value, HsplitError):
                raise value
            values.append(value)
        return values

    def value(self, ref: Ref[R]) -> R:
        """Wait for one value; errors as :meth:`get`."""
        return self.get([ref])[0]

    # -- actors ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def lost(self) -> list[ActorFailure]:
        """Return a failure, with the reason, for each actor whose process is known to be gone."""

    @abstractmethod
    def away(self) -> list[str]:
        """Return the actors that have not been started for lack of a node with room at the last attempt."""

    @abstractmethod
    def add(self, client: ClientConfig) -> None:
        """Register a client that was not among the run's; :meth:`restart` starts it."""

    @abstractmethod
    def restart(self, actor: str) -> bool:
        """End ``actor`` if it still runs, and start it from scratch, without data, layers or state.

        Returns:
            Whether a node has room for it; if not, it stays away and may be restarted later.

        Raises:
            ActorFailure: actors cannot be replaced.
        """

    @abstractmethod
    def end(self, actor: str) -> None:
        """End ``actor`` for good."""

    @abstractmethod
    def close(self) -> None:
        """End every actor."""


class Ready(Ref[Value_co]):
    """The value, or the failure, of a finished call."""

    def __init__(self, actor: str, method: str, value: Value_co | HsplitError) -> None:
        super().__init__(actor, method)
        self.outcome = value


class InProcess(Executor):
    """Executes every call immediately, in this process: for the laws, tests and benchmarks' baselines.

    Args:
        actors: plain objects by name.
        make: makes an actor from scratch, by name; ``None``: actors cannot be restarted.
    """

    def __init__(self, actors: Mapping[str, Any], make: Callable[[str], Any] | None = None) -> None:
        self.actors = dict(actors)
        self._make = make

    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        name = method.__name__
        value = self.perform(actor, name, *(_outcome(argument) for argument in arguments))
        if returns is None:
            return [Ready(actor, name, value)]
        values = [value] * returns if isinstance(value, HsplitError) else list(value)
        if len(values) != returns:
            raise ValueError(f"{actor}.{name} returned {len(values)} values, {returns} were expected")
        return [Ready(actor, name, one) for one in values]

    def perform(self, actor: str, method: str, *arguments: Any) -> Any:
        """Execute one call; an error that it raises is its value."""
        for argument in arguments:
            if isinstance(argument, HsplitError):
                # As on Ray: a call fails with the failure of its argument.
                return argument
        try:
            return getattr(self.actors[actor], method)(*arguments)
        except HsplitError as error:
            return error
        except Exception as error:
            return failure_of(actor, method, error)

    def wait(self, refs: Sequence[Ref[R]], until: float | None = None) -> list[R | HsplitError]:
        return [_outcome(ref) for ref in refs]

    def lost(self) -> list[ActorFailure]:
        return []

    def away(self) -> list[str]:
        return []

    def add(self, client: ClientConfig) -> None: ...

    def restart(self, actor: str) -> bool:
        if self._make is None:
            raise ActorFailure(actor, "restart", "it cannot be made again", "hopeless")
        self.actors[actor] = self._make(actor)
        return True

    def end(self, actor: str) -> None:
        self.actors.pop(actor, None)

    def close(self) -> None:
        self.actors.clear()


def _outcome(argument: Any) -> Any:
    return argument.outcome if isinstance(argument, Ready) else argument


def refusal(client: str, method: str, reason: str) -> ActorFailure:
    """Make the failure of a client whose message was refused for ``reason``."""
    return (NotFinite if NO_NUMBERS in reason else ActorFailure)(client, method, reason, "refused")


def failure_of(actor: str, method: str, error: BaseException) -> ActorFailure:
    """Turn an error in ``actor.method`` into a failure of the right kind."""
    if isinstance(error, FloatingPointError):
        return ActorFailure(actor, method, str(error), "diverged")
    short = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or NO_MEMORY.search(str(error))
    return ActorFailure(actor, method, one_line(error), "memory" if short else "error")


def one_line(error: BaseException) -> str:
    """Format an error as ``Type: first non-empty line``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
