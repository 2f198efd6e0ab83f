"""Calls of actors as the type checker sees them: each ``type: ignore`` here is an error that it has to find.

Nothing of this runs. The check is ``mypy``, which calls an ignore that is not needed an error.
"""

from __future__ import annotations

from hsplit.actors.client import Client
from hsplit.actors.executor import Executor
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.replica import Replica
from hsplit.actors.server import Server
from hsplit.config import SCHEDULER, SERVER
from hsplit.lora.holder import HeldAdapters
from hsplit.planning.plan import Plan
from hsplit.planning.planning_state import PlanningState
from hsplit.planning.scheduler import Scheduler


def right(executor: Executor) -> None:
    report, message = executor.call_pair("c0", Client.forward, 0, 0)
    _, gradients = executor.call_each(SERVER, Replica.train_step, 0, 0, [message])
    executor.call("c0", Client.backward, 0, 0, gradients[0])
    executor.call("c0", Client.backward, 0, 0, None)
    _, held = executor.call_pair("c0", HolderActor.collect)
    executor.call_each(SERVER, Server.aggregate, 2, [held])
    nbytes: int = executor.value(report).nbytes
    plan: Plan = executor.ask(SCHEDULER, Scheduler.plan)
    adapters: HeldAdapters = executor.value(held)
    print(nbytes, plan, adapters)


def wrong(executor: Executor) -> None:
    report, message = executor.call_pair("c0", Client.forward, 0, 0)
    executor.call("c0", "forward", 0, 0)  # type: ignore[call-overload]
    executor.call("c0", Client.backward, 0, 0)  # type: ignore[arg-type]
    executor.call("c0", Client.backward, 0, "0", None)  # type: ignore[arg-type]
    executor.call("c0", Client.backward, 0, 0, message)  # type: ignore[arg-type]
    executor.call_pair("c0", Client.backward, 0, 0, None)  # type: ignore[arg-type]
    executor.call_each(SERVER, Replica.train_step, 0, 0, [report])  # type: ignore[list-item]
    executor.ask(SCHEDULER, Scheduler.first)  # type: ignore[call-arg]
    executor.ask(SCHEDULER, Scheduler.first, "1", PlanningState())  # type: ignore[arg-type]
    executor.value(report).loss_sum  # type: ignore[attr-defined]  # noqa: B018
