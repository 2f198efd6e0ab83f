"""The Ray executor: every client, server and scheduler is a named Ray actor around a plain object.

All actors are of one class, a shell around the object, which sets the process's threads first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hsplit.actors.client import Client
from hsplit.actors.executor import ActorFailure, Executor, R, Ref
from hsplit.actors.factory import holder_class, make_holder, make_scheduler
from hsplit.actors.replica import Replica
from hsplit.cluster.fork_server import NO_GPU
from hsplit.cluster.placement import Node, Placement, alive_nodes, find_placement, remaining, requests_of, room_for
from hsplit.cluster.ray_failures import RAY, RAY_ERRORS, failing_as, failure_from
from hsplit.config import SCHEDULER, SERVER, HolderConfig, RunConfig
from hsplit.config import ClientConfig as ClientConfig
from hsplit.config.cluster import CENTRAL
from hsplit.errors import HsplitError
from hsplit.models.lookup import ModelReference
from hsplit.streams import quieten_bitsandbytes


def settle_process(threads: int | None, sharing: int = 1, *, gpu: bool = False) -> None:
    """Set the number of threads and the GPUs that are seen, and silence libraries.

    Processes with idle thread pools compete for cores. A client therefore has as many threads as it reserved CPUs, by
    default one, which needs no pool. A server, for which clients wait, uses every core of its node, shared equally
    among the servers there.

    A process without a share of a GPU sees none: Ray leaves all of them visible there, and each process that finds one
    keeps some hundred megabytes of it. This comes before bitsandbytes, which looks for GPUs when it is imported.
    """
    if not gpu:
        os.environ.update(NO_GPU)
    import torch
    import transformers

    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // sharing))
    transformers.logging.set_verbosity_error()
    quieten_bitsandbytes()


class ActorShell:
    """Holds an actor's plain object and calls its methods.

    Args:
        name: the actor's in the run.
        make: makes the object, in the actor's process.
        threads: number of threads; ``None``: every core of its node, shared by ``sharing`` servers.
        sharing: number of servers on the node.
        gpu: it has a share of a GPU.
    """

    def __init__(
        self, name: str, make: Callable[[], Any], threads: int | None, sharing: int = 1, gpu: bool = False
    ) -> None:
        # First: Ray calls __repr__ even if the actor could not be made.
        self._name = name
        self.actor: Any = None
        settle_process(threads, sharing, gpu=gpu)
        self.actor = make()
        self._returned: dict[tuple[int, int], Any] = {}

    def __repr__(self) -> str:
        # Shown in Ray's dashboard, and before each line that the process prints.
        return f"{type(self.actor).__name__}({self._name})"

    def call(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` of the object."""
        return getattr(self.actor, method)(*arguments)

    # -- Ray Direct Transport, with one value for each call ---------------------------------------------------------

    def begin(self, ticket: int, method: str, *arguments: Any) -> Any:
        """Call ``method`` and return the first of its values; :meth:`rest` returns the others.

        Their tensors stay here until a receiver takes them.
        """
        report, *rest = self.call(method, *arguments)
        self._returned |= {(ticket, index): value for index, value in enumerate(rest)}
        return report

    def rest(self, ticket: int, index: int) -> Any:
        """Return and drop value ``index`` of those that :meth:`begin` has kept for ``ticket``."""
        return self._returned.pop((ticket, index))


NAMESPACE = "hsplit"

# Methods of a step or a probe that return activations or gradients after their report.
_CLIENTS_STEPS = (Client.forward, Client.tail, Client.validation_forward, Client.probe_forward, Client.probe_tail)
_SERVERS_STEPS = (Replica.train_step, Replica.forward, Replica.backward, Replica.evaluate_deep)
_SERVERS_PROBES = (Replica.probe, Replica.probe_forward, Replica.probe_backward)
STEP_METHODS = frozenset(method.__name__ for method in (*_CLIENTS_STEPS, *_SERVERS_STEPS, *_SERVERS_PROBES))
# Longest wait for busy actors when dead ones are looked for.
_LOOK_S = 1.0
_NAME_FREE_S = 30.0
_NODE_FREE_S = 5.0


class _RayRef(Ref[Any]):
    """The value of a call as Ray refers to it."""

    def __init__(self, actor: str, method: str, ref: Any) -> None:
        super().__init__(actor, method)
        self.ref = ref


class RayExecutor(Executor):
    """Named actors on a connected Ray.

    Args:
        run_name: actors are named ``hsplit:RUN:client:NAME``, ``hsplit:RUN:server``, ``hsplit:RUN:scheduler``.
        run: resolved configuration.
        model: directory of the driver's ``job.model``.
        placement: the holders' nodes; holders without one are started by :meth:`restart` alone. ``None``: it is found
            here.
        fingerprint: the base's; actors on nodes that are not in ``placement`` compare their base with it.

    Raises:
        InputError: a holder has no node; no actor was started.
        ActorFailure: Ray did not start an actor; those started before it have ended.
    """

    # Actors without resources of their own, beside clients and servers.
    _unplaced: tuple[str, ...] = (SCHEDULER,)

    def __init__(
        self,
        run_name: str,
        run: RunConfig,
        model: Path,
        placement: Placement | None = None,
        fingerprint: str | None = None,
    ) -> None:
        placement = placement or find_placement(run)
        self._run_name, self._run = run_name, run
        self._requests, self._nodes = dict(requests_of(run)), dict(placement.nodes)
        self._model, self._fingerprint = model, fingerprint
        # Nodes whose base was checked before the run started, each with a client's own path to it, if any.
        self._checked = {(node.id, _own_model(self._requests[name])) for name, node in placement.nodes.items()}
        self._transport = run.job.transport
        self._tickets = count()
        self._handles: dict[str, Any] = {}
        # Actors without a node at the last attempt.
        self._away = set(placement.away)
        try:
            # The scheduler first, so that it plans while the others start.
            for name in [*self._unplaced, *(client.name for client in run.participants), *run.server.names]:
                if name in self._unplaced or name in placement.nodes:
                    self._handles[name] = self._started(name)
            if self._collective:
                self._join_directly()
        except ActorFailure:
            self.close()
            raise

    @property
    def _collective(self) -> bool:
        return self._transport == "gloo"

    def _join_directly(self) -> None:
        """Form the group in which actors exchange tensors without the object store."""
        from ray.experimental.collective import create_collective_group

        moving = [handle for name, handle in self._handles.items() if name != SCHEDULER]
        with failing_as(SERVER, "start", self._names):
            create_collective_group(moving, backend="torch_gloo")

    def _started(self, name: str) -> Any:
        """Start an actor as :meth:`_start`, waiting until Ray frees its name, a moment after an earlier actor's end.

        Raises:
            ActorFailure: Ray does not start it.
        """
        until = time.monotonic() + _NAME_FREE_S
        while True:
            try:
                with failing_as(name, "start"):
                    return self._start(name)
            except ValueError as error:
                if time.monotonic() > until:
                    raise failure_from(error, name, "start") from error
                time.sleep(0.05)

    def _start(self, name: str) -> Any:
        """Have Ray start actor ``name``; returns before it runs."""
        run, full_name = self._run, self._rays_name(name)
        if name == SCHEDULER:
            # It reads the model's configuration, which the driver's node has.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"name": full_name, "namespace": NAMESPACE, "num_cpus": 0}
            make = partial(make_scheduler, run, ModelReference(run.job.model, self._model))
            return ray.remote(ActorShell).options(scheduling_strategy=here, **options).remote(name, make, 1)
        holder, node = self._requests[name], self._nodes[name]
        # A server and a single node use every core of their machine, a client those that it reserved.
        threads = None if name in (*run.server.names, CENTRAL) else max(1, int(holder.num_cpus))
        sharing = sum(self._nodes[server].id == node.id for server in run.server.names if server in self._nodes)
        shell = _remote(full_name, holder, node, run.job.transport)
        gpu = holder.num_gpus > 0
        make_object = self._maker(name, "cuda" if gpu else "cpu")
        return shell.remote(name, make_object, threads, sharing, gpu)

    def _maker(self, name: str, device: str) -> Callable[[], Any]:
        """Return the function that makes the object of a client or server, in its process."""
        run = self._run
        return partial(make_holder, holder_class(run, name), name, run.job, run.policy, self._base_of(name), device)

    def _base_of(self, name: str) -> ModelReference:
        """Return the base of ``name``, to be checked on its node unless that was done before the run started."""
        own = _own_model(self._requests[name])
        fingerprint = None if (self._nodes[name].id, own) in self._checked else self._fingerprint
        job = self._run.job
        if own is not None:
            return ModelReference(own, None, fingerprint, job.accept_licence)
        return ModelReference(job.model, self._model, fingerprint, job.accept_licence)

    def begin(
        self, actor: str, method: Callable[..., Any], arguments: Sequence[Any], returns: int | None = None
    ) -> list[Ref[Any]]:
        name, shell = method.__name__, self._handles[actor]
        values = [argument.ref if isinstance(argument, _RayRef) else argument for argument in arguments]
        with failing_as(actor, name):
            if returns is not None and self._collective and name in STEP_METHODS:
                refs = self._begin_directly(shell, name, values, returns)
            else:
                unplaced = actor in self._unplaced
                kind = SCHEDULER.title() if unplaced else holder_class(self._run, actor).__name__
                # By this name Ray's dashboard and metrics show the call.
                options = {"name": f"{kind}.{name}", "num_returns": 1 if returns is None else returns}
                refs = shell.call.options(**options).remote(name, *values)
        return [_RayRef(actor, name, ref) for ref in (refs if isinstance(refs, list) else [refs])]

    def _begin_directly(self, shell: Any, method: str, values: Sequence[Any], returns: int) -> list[Any]:
        """Begin a call whose values, except the report, travel by Ray Direct Transport."""
        ticket = next(self._tickets)
        report = shell.begin.remote(ticket, method, *values)
        rest = shell.rest.options(tensor_transport=self._transport)
        return [report, *(rest.remote(ticket, index) for index in range(returns - 1))]

    def wait(self, refs: Sequence[Ref[R]], until: float | None = None) -> list[R | HsplitError]:
        return [self._outcome(ref, until) for ref in refs]

    def _outcome(self, ref: Ref[R], until: float | None) -> R | HsplitError:
        assert isinstance(ref, _RayRef)
        try:
            value: R = ray.get(ref.ref, timeout=None if until is None else max(0.0, until - time.monotonic()))
            return value
        except Exception as error:  # an error of unpickling may be of any class
            return failure_from(error, ref.actor, ref.method, self._names)

    @property
    def _names(self) -> dict[str, str]:
        """The actors' names in the run, by Ray's ids and by Ray's names."""
        by_id = {handle._actor_id.hex(): name for name, handle in self._handles.items()}
        return by_id | {self._rays_name(name): name for name in self._handles}

    def _rays_name(self, name: str) -> str:
        """Return Ray's name of an actor, which its dashboard shows."""
        prefix = "" if name in (*self._unplaced, *self._run.server.names) else "client:"
        return f"hsplit:{self._run_name}:{prefix}{name}"

    def lost(self) -> list[ActorFailure]:
        # Fails at once for an actor that is gone; a busy one does not answer in time.
        ready = [_RayRef(name, "the round", actor.__ray_ready__.remote()) for name, actor in self._handles.items()]
        with failing_as(RAY, "looking for its actors"):
            ray.wait([one.ref for one in ready], num_returns=len(ready), timeout=_LOOK_S, fetch_local=False)
        found = self.wait(ready, time.monotonic())
        return [value for value in found if isinstance(value, ActorFailure) and value.kind != "late"]

    def away(self) -> list[str]:
        return sorted(self._away)

    def add(self, client: ClientConfig) -> None:
        if self._requests.get(client.name) != client:
            # A refused client may have had this name.
            self._requests[client.name] = client
            self._nodes.pop(client.name, None)

    def restart(self, actor: str) -> bool:
        if self._collective:
            reason = f"with job.transport {self._transport} an actor cannot be replaced while others go on"
            raise ActorFailure(actor, "restart", reason, "hopeless")
        # To free its name.
        self._kill(actor)
        # Its resources are free a moment after its end.
        free_by = time.monotonic() + (0.0 if actor in self._away else _NODE_FREE_S)
        while not self._find_node(actor):
            if time.monotonic() > free_by:
                self._away.add(actor)
                return False
            time.sleep(0.1)
        self._away.discard(actor)
        self._handles[actor] = self._started(actor)
        return True

    def end(self, actor: str) -> None:
        self._kill(actor)
        self._handles.pop(actor, None)
        self._away.discard(actor)

    def _kill(self, actor: str) -> None:
        if actor in self._handles:
            # Where Ray does not answer, no process is left.
            with suppress(*RAY_ERRORS):
                ray.kill(self._handles[actor])

    def _find_node(self, actor: str) -> bool:
        """Find a node with room for ``actor`` now; returns whether there is one."""
        if actor == SCHEDULER:
            return True
        there = [name for name in self._nodes if name in self._handles and name not in (actor, *self._away)]
        nodes = remaining(alive_nodes(), [(self._nodes[name].id, self._requests[name]) for name in there])
        node = room_for(nodes, self._requests[actor], self._nodes.get(actor))
        if node is not None:
            self._nodes[actor] = node
        return node is not None

    def close(self) -> None:
        for name in self._handles:
            self._kill(name)
        self._handles.clear()


def _remote(name: str, holder: HolderConfig, node: Node, transport: str) -> Any:
    options: dict[str, Any] = {
        "name": name,
        "namespace": NAMESPACE,
        "num_cpus": holder.num_cpus,
        "num_gpus": holder.num_gpus,
        "resources": holder.resources,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        "max_restarts": 0,
    }
    transported = ray.remote(enable_tensor_transport=transport != "store")(ActorShell)
    return transported.options(**options)


def _own_model(holder: HolderConfig) -> str | None:
    return holder.model if isinstance(holder, ClientConfig) else None
