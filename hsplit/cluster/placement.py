"""Placement of holders on the nodes of a Ray cluster, by the resources that they ask for."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from hsplit.cluster.ray_failures import RAY, failing_as
from hsplit.config import ClientConfig, HolderConfig, RunConfig
from hsplit.errors import InputError

# Resources of a run that has just ended are free a moment later.
_FREE_S = 8.0
_LOOK_S = 0.1
_NODES_SHOWN = 8
# Resources that Ray itself counts on every node, and its labels.
_RAYS_OWN = ("node:", "accelerator_type:", "memory", "object_store_memory")
_RAYS_LABELS = "ray.io/"
# Ray counts in ten-thousandths; sums of them are not exact.
_ROUNDING = 1e-6

Request = tuple[str, HolderConfig]
"""A holder's name in the run, and the resources that it asks for."""


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster.

    Attributes:
        id: Ray's, in hexadecimal.
        host, address: its host name and IP address.
        name: as given to ``ray start --node-name``; the address where none was.
        labels: by key.
        total, free: amounts of each resource, and how much of it is not reserved now.
    """

    id: str
    host: str
    address: str
    name: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.host if self.name == self.address else self.name} ({self.address})"

    @classmethod
    def of(cls, description: Mapping[str, Any], free: Mapping[str, float]) -> Node:
        """Make a node from one entry of ``ray.nodes()``."""
        host, address = description["NodeManagerHostname"], description["NodeManagerAddress"]
        name = description["NodeName"] or address
        labels = description["Labels"]
        return cls(description["NodeID"], host, address, name, labels, description["Resources"], free)


@dataclass(frozen=True)
class Placement:
    """The nodes of a run's holders.

    Attributes:
        nodes: the node of each holder that has one, by name.
        away: clients that are started later: ``late`` ones without room on any node now, and lost ones.
    """

    nodes: Mapping[str, Node]
    away: tuple[str, ...]


class InUse(InputError):
    """The requested resources exist but are reserved by others now."""


def server_request(run: RunConfig) -> HolderConfig:
    """Return the server's request: nothing beside a single node, which has the server's resources."""
    if run.policy.placement != "single":
        return run.server
    return run.server.model_copy(update={"num_cpus": 0.0, "num_gpus": 0.0, "resources": {}})


def requests_of(run: RunConfig) -> list[Request]:
    """Return the requests of all servers and clients; the scheduler needs no resources."""
    servers = [(name, server_request(run)) for name in run.server.names]
    return [*servers, *((client.name, client) for client in run.participants)]


def find_placement(run: RunConfig, without: Collection[str] = (), lost: Collection[str] = ()) -> Placement:
    """Find a node for each holder on the connected Ray.

    Waits a few seconds for resources that others are about to free.

    Args:
        run: resolved configuration.
        without: clients that take no part, and need no node.
        lost: clients that are to return; see :func:`placement_of`.

    Raises:
        InputError: a holder that must run has no node; see :func:`placement_of`.
    """
    requests = [(name, holder) for name, holder in requests_of(run) if name not in without]
    until = time.monotonic() + _FREE_S
    while True:
        try:
            return placement_of(alive_nodes(), requests, lost)
        except InUse:
            if time.monotonic() > until:
                raise
        time.sleep(_LOOK_S)


def alive_nodes() -> list[Node]:
    """List the nodes that are alive, by address.

    Raises:
        ActorFailure: Ray does not answer.
    """
    with failing_as(RAY, "naming its nodes"):
        free = ray._private.state.available_resources_per_node()
        nodes = [Node.of(node, free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def placement_of(nodes: Sequence[Node], requests: Sequence[Request], lost: Collection[str] = ()) -> Placement:
    """Assign a node to each request: first to those that fit few nodes, then to large ones, by the most CPUs left.

    ``late`` clients come last, and stay away where no node has room.

    Args:
        nodes: the nodes that are alive.
        requests: of all holders.
        lost: names of clients that are started later; room is left for them as for ``late`` ones, and they are away.

    Raises:
        InputError: another holder fits on no node; names it, its request, and the nodes' resources.
        InUse: it would fit if the cluster had no other users.
    """
    late = [(name, holder) for name, holder in requests if _is_late(holder) or name in lost]
    required = [(name, holder) for name, holder in requests if not _is_late(holder) and name not in lost]
    for name, holder in required:
        _check_alone(nodes, name, holder)
    everything = _Assignment(nodes, {node.id: node.total for node in nodes})
    left_out = everything.add_all(required)
    if left_out is not None:
        name, holder = left_out
        together = _amounts(_sum(_resources(other) for _, other in required))
        raise InputError(
            f"{name}: asks for {_amounts(_resources(holder))}, which no node that it fits has left beside the others of"
            f" this run ({together} in all); the nodes: {described(nodes)}"
        )
    now = _Assignment(nodes, {node.id: node.free for node in nodes})
    left_out = now.add_all(required)
    if left_out is not None:
        name, holder = left_out
        raise InUse(
            f"{name}: asks for {_amounts(_resources(holder))}, which others on the Ray cluster are using; the nodes:"
            f" {described(nodes)}"
        )
    away = {name: None for name, holder in late if not now.add(name, holder) or name in lost}
    return Placement({name: now.node_of[name] for name, _ in requests if name not in away}, tuple(away))


def remaining(nodes: Sequence[Node], taken: Iterable[tuple[str, HolderConfig]]) -> list[Node]:
    """Return ``nodes`` with at most the resources free that ``taken`` leaves.

    Ray may not have reserved the resources of an actor that was started a moment ago.

    Args:
        nodes: as Ray describes them.
        taken: each actor's node id and request.
    """
    on: dict[str, list[Mapping[str, float]]] = {}
    for node_id, holder in taken:
        on.setdefault(node_id, []).append(_resources(holder))
    sums = {node.id: _sum(on.get(node.id, ())) for node in nodes}
    return [
        replace(
            node,
            free={
                resource: min(amount, node.total.get(resource, 0.0) - sums[node.id].get(resource, 0.0))
                for resource, amount in node.free.items()
            },
        )
        for node in nodes
    ]


def room_for(nodes: Sequence[Node], holder: HolderConfig, before: Node | None) -> Node | None:
    """Find a node for a holder that is restarted: the one ``before``, else that with the most CPUs free."""
    fitting = [node for node in nodes if _matches(node, holder) and _suffices(node.free, _resources(holder))]
    stay = [node for node in fitting if before is not None and node.id == before.id]
    return max(stay or fitting, key=lambda node: node.free.get("CPU", 0.0), default=None)


def described(nodes: Sequence[Node]) -> str:
    """Describe the nodes' resources in one line."""
    shown = [f"{node} has {_contents(node)}" for node in nodes[:_NODES_SHOWN]]
    more = len(nodes) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _contents(node: Node) -> str:
    words = []
    for resource, amount in sorted(node.total.items()):
        if not resource.startswith(_RAYS_OWN):
            free = node.free.get(resource, 0.0)
            words.append(f"{amount:g} {resource}" if free >= amount else f"{free:g} of {amount:g} {resource} free")
    words += [f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith(_RAYS_LABELS)]
    return ", ".join(words) or "nothing"


def _is_late(holder: HolderConfig) -> bool:
    return isinstance(holder, ClientConfig) and holder.late


def _resources(holder: HolderConfig) -> dict[str, float]:
    amounts = {"CPU": holder.num_cpus, "GPU": holder.num_gpus, **holder.resources}
    return {resource: amount for resource, amount in amounts.items() if amount > 0}


def _amounts(request: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {resource}" for resource, amount in request.items()) or "nothing"


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for resource, amount in part.items():
            total[resource] = total.get(resource, 0.0) + amount
    return total


def _suffices(room: Mapping[str, float], request: Mapping[str, float]) -> bool:
    return all(room.get(resource, 0.0) >= amount - _ROUNDING for resource, amount in request.items())


def _is_named(node: Node, holder: HolderConfig) -> bool:
    return holder.node is None or holder.node in (node.host, node.address, node.name)


def _matches(node: Node, holder: HolderConfig) -> bool:
    return _is_named(node, holder) and holder.labels.items() <= node.labels.items()


def _check_alone(nodes: Sequence[Node], name: str, holder: HolderConfig) -> None:
    """Refuse a request that no node could satisfy even if it were alone on the cluster."""
    named = [node for node in nodes if _is_named(node, holder)]
    if not named:
        there = ", ".join(str(node) for node in nodes[:_NODES_SHOWN])
        raise InputError(f"{name}: node: {holder.node} is not in the Ray cluster; it has {there}")
    fitting = [node for node in named if _matches(node, holder)]
    if not fitting:
        wanted = ", ".join(f"{key}={value}" for key, value in holder.labels.items())
        raise InputError(f"{name}: labels: no node {_pinned(holder)}has {wanted}; {described(named)}")
    for resource, amount in _resources(holder).items():
        most = max(node.total.get(resource, 0.0) for node in fitting)
        if not _suffices({resource: most}, {resource: amount}):
            key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(resource, f"resources.{resource}")
            hint = "; run on CPUs with --cpu" if resource == "GPU" else ""
            raise InputError(
                f"{name}: {key}: {amount:g} asked, no node {_pinned(holder)}has more than {most:g}{hint};"
                f" {described(fitting)}"
            )
    if not any(_suffices(node.total, _resources(holder)) for node in fitting):
        raise InputError(
            f"{name}: asks for {_amounts(_resources(holder))}, and no node {_pinned(holder)}has all of it;"
            f" {described(fitting)}"
        )


def _pinned(holder: HolderConfig) -> str:
    return f"of the name {holder.node} " if holder.node is not None else ""


class _Assignment:
    """Assigns holders to nodes, one after another.

    Args:
        nodes: to assign.
        room: available resources by node id.

    Attributes:
        node_of: the assigned node by holder.
    """

    def __init__(self, nodes: Sequence[Node], room: Mapping[str, Mapping[str, float]]) -> None:
        self._nodes = nodes
        self._room = {node: dict(amounts) for node, amounts in room.items()}
        self._requests: dict[str, dict[str, float]] = {}
        self._fitting: dict[str, list[Node]] = {}
        self._on: dict[str, list[str]] = {node.id: [] for node in nodes}
        self.node_of: dict[str, Node] = {}

    def add_all(self, requests: Sequence[Request]) -> Request | None:
        """Assign all of ``requests``; returns the first that fits nowhere."""

        def order(request: Request) -> tuple[float, ...]:
            _, holder = request
            fitting = sum(_matches(node, holder) and _suffices(node.total, _resources(holder)) for node in self._nodes)
            return fitting, -holder.num_gpus, -holder.num_cpus, -sum(holder.resources.values())

        return next((request for request in sorted(requests, key=order) if not self.add(*request)), None)

    def add(self, name: str, holder: HolderConfig) -> bool:
        """Assign a node to ``holder``, moving others if needed; returns whether there is one."""
        self._requests[name] = _resources(holder)
        self._fitting[name] = [node for node in self._nodes if _matches(node, holder)]
        return self._assign(name, set())

    def _assign(self, name: str, emptied: set[str]) -> bool:
        """Search augmenting paths, as in matching: a holder moves to make room, and may move another."""
        fitting = self._fitting[name]
        free = [node for node in fitting if self._has_room(node, name)]
        if free:
            self._put(name, min(free, key=lambda n: (-self._room[n.id].get("CPU", 0.0), len(self._on[n.id]))))
            return True
        for node in fitting:
            if node.id in emptied:
                continue
            emptied.add(node.id)
            for other in [one for one in self._on[node.id] if len(self._fitting[one]) > 1]:
                self._remove(other)
                if self._has_room(node, name):
                    self._put(name, node)
                    if self._assign(other, emptied):
                        return True
                    self._remove(name)
                self._put(other, node)
        return False

    def _has_room(self, node: Node, name: str) -> bool:
        return _suffices(self._room[node.id], self._requests[name])

    def _put(self, name: str, node: Node) -> None:
        self.node_of[name] = node
        self._on[node.id].append(name)
        self._change(node, name, -1)

    def _remove(self, name: str) -> None:
        node = self.node_of.pop(name)
        self._on[node.id].remove(name)
        self._change(node, name, 1)

    def _change(self, node: Node, name: str, sign: int) -> None:
        room = self._room[node.id]
        for resource, amount in self._requests[name].items():
            room[resource] = room.get(resource, 0.0) + sign * amount
