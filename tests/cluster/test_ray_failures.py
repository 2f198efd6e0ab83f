"""Every exception that the installed Ray has becomes a failure of the right kind, of the right actor."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo

from hsplit.actors.executor import ActorFailure, FailureKind
from hsplit.cluster.ray_failures import failing_as, failure_from
from hsplit.errors import InputError

CLIENT, OTHER = "a" * 32, "b" * 32
NAMES = {CLIENT: "phone", OTHER: "server", "hsplit:run:client:phone": "phone", "hsplit:run:server": "server"}
ENDED = """1 worker(s) were killed due to the node running low on memory. Memory on the node was 2.18GB used
OOM kill reason: Memory usage 2334461952B exceeded threshold of 2313686784B (9.2% of 25276063744B limit)
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
{selected}
]"""
# What Ray adds to every sudden end of a process.
SUDDEN = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common root causes include: (1) the process "
    "was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)


def every_error() -> list[type[exceptions.RayError]]:
    found, left = [], [exceptions.RayError]
    while left:
        kind = left.pop()
        found.append(kind)
        left += kind.__subclasses__()
    return list(dict.fromkeys(kind for kind in found if kind.__module__ == exceptions.__name__))


def made(kind: type[exceptions.RayError]) -> exceptions.RayError:
    """An error of this class, made of whatever its class asks for."""
    if kind is exceptions.RayTaskError:
        return exceptions.RayTaskError("forward", "Traceback ...", ValueError("shapes"))
    if kind is exceptions.CrossLanguageError:
        return kind(SimpleNamespace(language=0, formatted_exception_string=CLIENT))
    if not inspect.isfunction(kind.__init__):
        return kind()
    given = {"actor_id": bytes.fromhex(CLIENT)} if kind is exceptions.ActorUnavailableError else {}
    asked = inspect.signature(kind).parameters.values()
    return kind(**{p.name: given.get(p.name, CLIENT) for p in asked if p.default is p.empty})


def died(message: str = SUDDEN, actor: str = CLIENT, **fields: Any) -> exceptions.ActorDiedError:
    context = ActorDiedErrorContext(error_message=message, actor_id=bytes.fromhex(actor), **fields)
    # As it arrives from another process, without what it was made of.
    error = exceptions.ActorDiedError()
    vars(error).update(vars(exceptions.ActorDiedError(context)))
    return error


def ended(*names: str, actor: str = "") -> exceptions.OutOfMemoryError:
    who = f"(Actor({actor})" if actor else "(Task"
    lines = [f"Selected to kill: {who}: job ID=01, task name={name}:Actor.__init__, pid=1)" for name in names]
    return exceptions.OutOfMemoryError(ENDED.format(selected="\n".join(lines)))


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_exception_of_ray_is_a_failure_in_one_line(kind: type[exceptions.RayError]) -> None:
    failure = failure_from(made(kind), "phone", "forward", NAMES)
    assert isinstance(failure, ActorFailure) and failure.kind in get_args(FailureKind)
    assert failure.actor == "phone" and failure.reason and "\n" not in failure.reason


def test_there_are_exceptions_to_look_at() -> None:
    assert {exceptions.OutOfMemoryError, exceptions.ActorDiedError, exceptions.NodeDiedError} <= set(every_error())


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (exceptions.GetTimeoutError("late"), "late", "it has not answered in time"),
        (died(), "died", "its process ended"),
        (died("Task was killed due to the node running low on memory."), "memory", "Ray's memory monitor ended it"),
        (died("The actor died because its node has died. Node Id: 1"), "node", "its node is gone"),
        (died("gone", node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)), "node", "node"),
        (exceptions.NodeDiedError("node"), "node", "its node is gone"),
        (exceptions.ActorUnavailableError("rpc", bytes.fromhex(CLIENT)), "died", "cannot be reached"),
        (exceptions.RuntimeEnvSetupError("no pip"), "refused", "no pip"),
        (exceptions.ActorUnschedulableError("no CPU"), "refused", "no CPU"),
        (exceptions.ObjectStoreFullError("full"), "memory", "object store"),
        (ended("hsplit:run:client:phone"), "memory", "its node used 2.33 GB, and more than 2.31 GB end actors"),
        (MemoryError("12 GB"), "memory", "12 GB"),
        (ConnectionResetError("reset"), "error", "reset"),
    ],
)
def test_the_kind_and_the_reason_of_a_failure(error: Exception, kind: str, reason: str) -> None:
    failure = failure_from(error, "phone", "forward", NAMES)
    assert isinstance(failure, ActorFailure) and failure.kind == kind and reason in failure.reason
    assert failure.actor == "phone"


def caused(cause: Exception) -> exceptions.RayTaskError:
    """As of a call, of whatever actor, that was to be given the value of a call that failed with ``cause``."""
    return exceptions.RayTaskError("train_step", "Traceback ...", cause, actor_id=OTHER).as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        died(),
        caused(died()),
        ended("hsplit:run:client:phone"),
        caused(ended("hsplit:run:client:phone")),
        caused(ended("", actor=CLIENT)),
    ],
)
def test_who_waits_for_a_call_that_failed_is_not_the_one_who_failed(error: Exception) -> None:
    failure = failure_from(error, "server", "train_step", NAMES)
    assert isinstance(failure, ActorFailure) and (failure.actor, failure.method) == ("phone", "train_step")


@pytest.mark.parametrize("asked", ["phone", "server"])
def test_of_several_that_were_ended_each_has_its_own_failure(asked: str) -> None:
    error = ended("hsplit:run:client:phone", "hsplit:run:server", "hsplit:other:server")
    failure = failure_from(error, asked, "forward", NAMES)
    assert isinstance(failure, ActorFailure) and failure.actor == asked


def test_those_of_another_run_are_nobody_here() -> None:
    failure = failure_from(ended("hsplit:other:client:phone"), "server", "forward", NAMES)
    assert isinstance(failure, ActorFailure) and failure.actor == "server"


def test_an_error_of_the_call_itself_is_what_it_is() -> None:
    refused = InputError("phone: data: no file")
    assert failure_from(caused(refused), "phone", "load_data") is refused
    failure = failure_from(caused(ValueError("shapes\nmore")), "phone", "forward", NAMES)
    assert isinstance(failure, ActorFailure) and (failure.kind, failure.reason) == ("error", "ValueError: shapes")


def test_what_ray_raises_while_it_is_asked_is_a_failure_of_who_was_asked() -> None:
    message = r"Ray failed in naming its nodes: RaySystemError: "
    with pytest.raises(ActorFailure, match=message) as error, failing_as("Ray", "naming its nodes"):
        raise exceptions.RaySystemError("the GCS does not answer")
    assert isinstance(error.value.__cause__, exceptions.RaySystemError)
    with pytest.raises(KeyError), failing_as("Ray", "naming its nodes"):
        raise KeyError("a fault of the caller's own")
