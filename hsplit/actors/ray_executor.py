"""The Ray executor: every client, the server and the scheduler is a named Ray actor around its plain class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hsplit.actors.client import Client
from hsplit.actors.executor import SCHEDULER, SERVER, ActorFailure, values_of
from hsplit.actors.participants import participant_class
from hsplit.actors.placement import Node, Placement, alive_nodes, left_by, place, requests_of, room_for
from hsplit.actors.ray_failures import RAY, RAY_ERRORS, failing_as, failure_from
from hsplit.actors.shells import ClientActor, ReplicaActor, SchedulerActor, ServerActor, WholeClientActor
from hsplit.config import Client as ClientConfig
from hsplit.config import Holder, RunConfig
from hsplit.config.cluster import CENTRAL
from hsplit.models.source import ModelReference

NAMESPACE = "hsplit"

# What is called in a step or a probe and returns activations or gradients behind its report.
STEP_METHODS = frozenset(
    {"forward", "train_step", "tail", "backward", "validation_forward", "evaluate_deep"}
    | {"probe", "probe_forward", "probe_tail", "probe_backward"}
)
# How long a look for dead actors waits for those that are busy.
_LOOK_S = 1.0
_NAME_FREE_S = 30.0
_PLACE_FREE_S = 5.0


@dataclass(frozen=True)
class _Handle:
    """A reference and where it came from, so that a failure can be named."""

    ref: Any
    actor: str
    method: str


def _refs(arguments: Sequence[Any]) -> list[Any]:
    return [a.ref if isinstance(a, _Handle) else a for a in arguments]


class RayExecutor:
    """Named actors on a connected Ray.

    Args:
        run_name: actors are named ``hsplit:RUN:client:NAME``, ``hsplit:RUN:server``, ``hsplit:RUN:scheduler``.
        run: resolved configuration.
        model: where the driver found ``job.model``.
        placement: where everybody runs; who has no place there is not begun before :meth:`restart`; ``None``: places
            are found here.
        fingerprint: the base's; who is begun where ``placement`` has nobody checks the base there against it.

    Raises:
        InputError: not everybody has a place; no actor was started.
        ActorFailure: Ray did not begin an actor; those begun before it have ended.
    """

    _server_class: type = ServerActor
    _replica_class: type = ReplicaActor
    # Everybody but clients and server.
    _helpers: tuple[str, ...] = (SCHEDULER,)

    def __init__(
        self,
        run_name: str,
        run: RunConfig,
        model: Path,
        placement: Placement | None = None,
        fingerprint: str | None = None,
    ) -> None:
        placement = placement or place(run)
        self._run_name, self._run = run_name, run
        self._requests, self._nodes = dict(requests_of(run)), dict(placement.nodes)
        self._model, self._fingerprint = model, fingerprint
        # On which nodes a base was found before the run started, and by which path of a client's own, if any.
        self._looked_at = {(node.id, _own_model(self._requests[name])) for name, node in placement.nodes.items()}
        self._transport = run.job.transport
        self._tickets = count()
        self._handles: dict[str, Any] = {}
        # Who had no place when it was looked for last.
        self._away = set(placement.away)
        # First, so that it plans while the others start.
        try:
            for name in [*self._helpers, *(client.name for client in run.participants), *run.server.names]:
                if name in self._helpers or name in placement.nodes:
                    self._handles[name] = self._begun(name)
            if self._collective:
                self._join_directly()
        except ActorFailure:
            self.close()
            raise

    @property
    def _collective(self) -> bool:
        return self._transport in ("gloo", "nccl")

    def _join_directly(self) -> None:
        """Let everybody that moves tensors do so without the object store."""
        from ray.experimental.collective import create_collective_group

        moving = [handle for name, handle in self._handles.items() if name != SCHEDULER]
        with failing_as(SERVER, "start", self._names):
            create_collective_group(moving, backend=f"torch_{self._transport}".replace("torch_nccl", "nccl"))

    def _begun(self, name: str) -> Any:
        """As :meth:`_begin`, as soon as Ray gives the name free, which it does a moment after an earlier actor's end.

        Raises:
            ActorFailure: Ray does not begin it.
        """
        until = time.monotonic() + _NAME_FREE_S
        while True:
            try:
                with failing_as(name, "start"):
                    return self._begin(name)
            except ValueError as error:
                if time.monotonic() > until:
                    raise failure_from(error, name, "start") from error
                time.sleep(0.05)

    def _begin(self, name: str) -> Any:
        """Ask Ray for actor ``name``; the call returns before the actor is there."""
        run, full_name = self._run, self._rays_name(name)
        if name == SCHEDULER:
            # It reads the model's configuration, which the driver's node has.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"name": full_name, "namespace": NAMESPACE, "num_cpus": 0}
            scheduler = ray.remote(SchedulerActor).options(scheduling_strategy=here, **options)
            return scheduler.remote(run, ModelReference(run.job.model, self._model))
        holder, node, base = self._requests[name], self._nodes[name], self._base_of(name)
        if name == SERVER:
            server = _remote(self._server_class, full_name, holder, node, run.job.transport)
            return server.remote(run.job, run.policy, base, _device(holder), self._servers_at(node))
        if name in run.server.names:
            replica = _remote(self._replica_class, full_name, holder, node, run.job.transport)
            return replica.remote(name, run.job, run.policy, base, _device(holder), self._servers_at(node))
        client = cast(ClientConfig, holder)
        actor = _remote(self._client_class, full_name, client, node, run.job.transport)
        # A single node computes alone, on every core of its machine.
        threads = None if name == CENTRAL else max(1, int(client.num_cpus))
        return actor.remote(name, run.job, run.policy, base, _device(client), threads)

    @property
    def _client_class(self) -> type:
        return ClientActor if participant_class(self._run.policy) is Client else WholeClientActor

    def _servers_at(self, node: Node) -> int:
        """How many servers ``node`` has, which share its cores."""
        return sum(self._nodes[name].id == node.id for name in self._run.server.names if name in self._nodes)

    def _base_of(self, name: str) -> ModelReference:
        """Where ``name`` finds the base, to be checked there unless that was done before the run started."""
        own = _own_model(self._requests[name])
        fingerprint = None if (self._nodes[name].id, own) in self._looked_at else self._fingerprint
        if own is not None:
            return ModelReference(own, None, fingerprint)
        return ModelReference(self._run.job.model, self._model, fingerprint)

    def call(self, actor: str, method: str, *arguments: Any) -> Any:
        with failing_as(actor, method):
            ref = getattr(self._handles[actor], method).remote(*_refs(arguments))
        return _Handle(ref, actor, method)

    def call_many(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        if self._transport != "store" and method in STEP_METHODS:
            return self._directly(returns, actor, method, *arguments)
        bound = getattr(self._handles[actor], method).options(num_returns=returns)
        with failing_as(actor, method):
            refs = bound.remote(*_refs(arguments))
        return [_Handle(ref, actor, method) for ref in refs]

    def _directly(self, returns: int, actor: str, method: str, *arguments: Any) -> list[Any]:
        """As :meth:`call_many`, all values but the report by Ray Direct Transport."""
        handle, ticket = self._handles[actor], next(self._tickets)
        with failing_as(actor, method):
            refs = [handle.begin.remote(ticket, method, *_refs(arguments))]
            rest = handle.rest.options(tensor_transport=self._transport)
            refs += [rest.remote(ticket, index) for index in range(returns - 1)]
        return [_Handle(ref, actor, method) for ref in refs]

    def settle(self, handles: Sequence[Any], until: float | None = None) -> list[Any]:
        return [self._settled(handle, until) for handle in handles]

    def _settled(self, handle: _Handle, until: float | None) -> Any:
        try:
            return ray.get(handle.ref, timeout=None if until is None else max(0.0, until - time.monotonic()))
        except Exception as error:  # also what cannot be unpickled here
            return failure_from(error, handle.actor, handle.method, self._names)

    @property
    def _names(self) -> dict[str, str]:
        """The actors' names by Ray's ids and by Ray's names of them."""
        by_id = {handle._actor_id.hex(): name for name, handle in self._handles.items()}
        return by_id | {self._rays_name(name): name for name in self._handles}

    def _rays_name(self, name: str) -> str:
        """Ray's name of an actor, by which its dashboard shows it."""
        alone = name in (*self._helpers, *self._run.server.names)
        return f"hsplit:{self._run_name}:{'' if alone else 'client:'}{name}"

    def get(self, handles: Sequence[Any]) -> list[Any]:
        return values_of(self.settle(handles))

    def lost(self) -> list[ActorFailure]:
        # Answers at once where an actor is gone; one that is busy does not answer, but is there.
        ready = [_Handle(actor.__ray_ready__.remote(), name, "the round") for name, actor in self._handles.items()]
        with failing_as(RAY, "looking for its actors"):
            ray.wait([handle.ref for handle in ready], num_returns=len(ready), timeout=_LOOK_S, fetch_local=False)
        found = self.settle(ready, time.monotonic())
        return [value for value in found if isinstance(value, ActorFailure) and value.kind != "late"]

    def away(self) -> list[str]:
        return sorted(self._away)

    def add(self, client: ClientConfig) -> None:
        if self._requests.get(client.name) != client:
            # One that was refused may have had this name.
            self._requests[client.name] = client
            self._nodes.pop(client.name, None)

    def restart(self, actor: str) -> bool:
        if self._collective:
            reason = f"with job.transport {self._transport} an actor cannot be replaced while others go on"
            raise ActorFailure(actor, "restart", reason, "hopeless")
        # Else its name would not be free.
        self._kill(actor)
        # What it had reserved is free a moment after its end.
        free_by = time.monotonic() + (0.0 if actor in self._away else _PLACE_FREE_S)
        while not self._find_place(actor):
            if time.monotonic() > free_by:
                self._away.add(actor)
                return False
            time.sleep(0.1)
        self._away.discard(actor)
        self._handles[actor] = self._begun(actor)
        return True

    def end(self, actor: str) -> None:
        self._kill(actor)
        self._handles.pop(actor, None)

    def _kill(self, actor: str) -> None:
        if actor in self._handles:
            # Where Ray does not answer, it has no process left to end.
            with suppress(*RAY_ERRORS):
                ray.kill(self._handles[actor])

    def _find_place(self, actor: str) -> bool:
        """Whether a node that is there has room for ``actor`` now."""
        if actor == SCHEDULER:
            return True
        there = [name for name in self._nodes if name in self._handles and name not in (actor, *self._away)]
        nodes = left_by(alive_nodes(), [(self._nodes[name].id, self._requests[name]) for name in there])
        node = room_for(nodes, self._requests[actor], self._nodes.get(actor))
        if node is not None:
            self._nodes[actor] = node
        return node is not None

    def close(self) -> None:
        for name in self._handles:
            self._kill(name)
        self._handles.clear()


def _remote(cls: type, name: str, holder: Holder, node: Node, transport: str) -> Any:
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": holder.num_cpus,
        "num_gpus": holder.num_gpus,
        "resources": holder.resources,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        "max_restarts": 0,
    }
    transported = ray.remote(enable_tensor_transport=transport != "store")(cls)
    return transported.options(**options)


def _own_model(holder: Holder) -> str | None:
    return holder.model if isinstance(holder, ClientConfig) else None


def _device(holder: Holder) -> str:
    return "cuda" if holder.num_gpus > 0 else "cpu"
