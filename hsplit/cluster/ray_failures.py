"""Conversion of every exception that Ray raises into an actor's failure of the right kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray import exceptions

from hsplit.actors.executor import NO_MEMORY, ActorFailure, FailureKind, failure_of
from hsplit.errors import HsplitError

RAY = "Ray"
"""Stands for the actor in failures of Ray itself."""
# Ray's own errors, and those of the connections below it.
RAY_ERRORS = (exceptions.RayError, ConnectionError, TimeoutError)

# In the text about workers that the memory monitor has killed: Ray's names and ids of the actors.
_ENDED_NAME = re.compile(r"Selected to kill: .*?task name=(\S+?):\w+\.__init__")
_ENDED_ID = re.compile(r"Selected to kill: \(Actor\(([0-9a-f]+)\)")
_USE = re.compile(r"Memory usage (\d+)B exceeded threshold of (\d+)B")
# Ray gives the cause of an actor's death only as text. (The list of common causes that Ray adds to every sudden end
# names the system's OOM killer too, which says nothing.)
_FOR_MEMORY = re.compile(rf"running low on memory|memory monitor|OutOfMemoryError|MemoryError|{NO_MEMORY.pattern}")
_NODE_GONE = re.compile(r"node (?:has )?died|node was (?:dead|terminated|preempted)|node is dead")

_MAX_REASON = 500
# By exception, the first match: the kind, and the reason (empty: Ray's own text).
_KINDS: tuple[tuple[type[Exception], FailureKind, str], ...] = (
    (exceptions.GetTimeoutError, "late", "it has not answered in time"),
    (exceptions.NodeDiedError, "node", "its node is gone"),
    (exceptions.LocalRayletDiedError, "node", "Ray has ended on its node"),
    (exceptions.ObjectLostError, "node", "what it was to be given is lost with the node that had it"),
    (exceptions.ObjectStoreFullError, "memory", "Ray's object store on its node is full"),
    (exceptions.ActorUnavailableError, "died", "its process cannot be reached"),
    (exceptions.WorkerCrashedError, "died", "its process ended"),
    (exceptions.TaskCancelledError, "died", "the call was cancelled"),
    (exceptions.AsyncioActorExit, "died", "its process ended"),
    (exceptions.RuntimeEnvSetupError, "refused", ""),
    (exceptions.ActorUnschedulableError, "refused", ""),
    (exceptions.TaskUnschedulableError, "refused", ""),
    (exceptions.ActorPlacementGroupRemoved, "refused", ""),
    (exceptions.TaskPlacementGroupRemoved, "refused", ""),
    (exceptions.AuthenticationError, "refused", ""),
    (exceptions.ActorAlreadyExistsError, "refused", ""),
    (exceptions.PendingCallsLimitExceeded, "refused", ""),
    (exceptions.UnserializableException, "refused", ""),
)


def failure_from(error: BaseException, actor: str, method: str, names: Mapping[str, str] | None = None) -> HsplitError:
    """Turn ``error``, raised by a call of ``actor``, into a failure.

    Args:
        error: raised by Ray; if it wraps an error of the call itself, that is used.
        actor: name of the called actor.
        method: name of the called method.
        names: the run's names of actors by Ray's ids and names. A call fails with the failure of its argument: it is
            then attributed to the actor that Ray names, not to the called one.

    Returns:
        An :class:`ActorFailure`, or the :class:`HsplitError` that the call itself raised.
    """
    names = names or {}
    if isinstance(error, exceptions.RayTaskError):
        # First: it is also of the class of its cause.
        cause = error.cause
        return failure_of(actor, method, error) if cause is None else failure_from(cause, actor, method, names)
    if isinstance(error, HsplitError):
        return error
    if isinstance(error, exceptions.OutOfMemoryError):
        return ActorFailure(_ended(str(error), actor, names), method, _short(str(error)), "memory")
    for kind_of_error, kind, reason in _KINDS:
        if isinstance(error, kind_of_error):
            return ActorFailure(_named(error, actor, names), method, reason or _whole(error), kind)
    if isinstance(error, exceptions.RayActorError):
        return _dead(error, _named(error, actor, names), method)
    return failure_of(actor, method, error)


@contextmanager
def failing_as(actor: str, method: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn Ray's errors inside into failures of ``actor``.

    Raises:
        HsplitError: see :func:`failure_from`.
    """
    try:
        yield
    except RAY_ERRORS as error:
        raise failure_from(error, actor, method, names) from error


def _named(error: BaseException, actor: str, names: Mapping[str, str]) -> str:
    return names.get(getattr(error, "actor_id", None) or "", actor)


def _ended(text: str, actor: str, names: Mapping[str, str]) -> str:
    """Attribute a failure to an actor that the memory monitor has killed: ``actor``, if it is among them."""
    ended = [names[found] for pattern in (_ENDED_NAME, _ENDED_ID) for found in pattern.findall(text) if found in names]
    return actor if actor in ended or not ended else ended[0]


def _whole(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_REASON]


def _short(text: str) -> str:
    use = _USE.search(text)
    figures = f": its node used {_gb(use[1])} GB, and more than {_gb(use[2])} GB end actors" if use else ""
    return f"Ray's memory monitor ended it{figures}"


def _gb(nbytes: str) -> str:
    return f"{int(nbytes) / 1e9:.2f}"


def _dead(error: exceptions.RayActorError, actor: str, method: str) -> ActorFailure:
    """Make the failure of a dead actor, whose cause Ray gives as text."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kind: FailureKind = "died"
    if _FOR_MEMORY.search(text):
        kind = "memory"
    elif error.preempted or _NODE_GONE.search(text):
        kind = "node"
    if error.actor_init_failed:
        return ActorFailure(actor, method, f"it could not start ({lines[-1]})", kind)
    reasons = {"memory": _short(text), "node": "its node is gone", "died": "its process ended"}
    return ActorFailure(actor, method, reasons[kind], kind)
