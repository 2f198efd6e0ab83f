"""Which node of a Ray cluster each holder runs on, and whether what everybody asks for is there."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from hsplit.cluster.ray_failures import RAY, failing_as
from hsplit.config import ClientConfig, HolderConfig, RunConfig
from hsplit.errors import InputError

# What a run that has just ended had reserved is free a moment later.
_FREE_S = 8.0
_LOOK_S = 0.1
_NODES_SHOWN = 8
# What Ray counts on every node by itself, and its labels.
_RAYS_OWN = ("node:", "accelerator_type:", "memory", "object_store_memory")
_RAYS_LABELS = "ray.io/"
# Ray counts in steps of a ten-thousandth; sums of them are not exact.
_ROUNDING = 1e-6

Request = tuple[str, HolderConfig]
"""A holder's name in the run, and what it asks for."""


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster.

    Attributes:
        id: Ray's, in hexadecimal.
        host, address: its host name and IP address.
        name: as given to ``ray start --node-name``; the address where none was.
        labels: by key.
        total, free: by resource how much it has, and how much of that nobody has reserved now.
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
        """A node from one entry of ``ray.nodes()``."""
        host, address = description["NodeManagerHostname"], description["NodeManagerAddress"]
        name = description["NodeName"] or address
        labels = description["Labels"]
        return cls(description["NodeID"], host, address, name, labels, description["Resources"], free)


@dataclass(frozen=True)
class Placement:
    """Where everybody runs.

    Attributes:
        nodes: the node of each holder that has one, by name.
        away: the clients that are begun later: the ``late`` ones that no node has room for now, and the lost.
    """

    nodes: Mapping[str, Node]
    away: tuple[str, ...]


class InUse(InputError):
    """What is asked for is there, but reserved by others for now."""


def server_request(run: RunConfig) -> HolderConfig:
    """What Ray must reserve for the server: nothing beside a single node, which has the server's resources."""
    if run.policy.placement != "single":
        return run.server
    return run.server.model_copy(update={"num_cpus": 0.0, "num_gpus": 0.0, "resources": {}})


def requests_of(run: RunConfig) -> list[Request]:
    """Everybody that Ray reserves something for; the scheduler is none of them."""
    servers = [(name, server_request(run)) for name in run.server.names]
    return [*servers, *((client.name, client) for client in run.participants)]


def find_placement(run: RunConfig, without: Collection[str] = (), lost: Collection[str] = ()) -> Placement:
    """The node of each holder on the Ray that is connected.

    Waits a few seconds for what others are about to free.

    Args:
        run: resolved configuration.
        without: clients that take no part, and need no place.
        lost: clients that are to come back; see :func:`placement_of`.

    Raises:
        InputError: not everybody that must be there can be; see :func:`placement_of`.
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
    """Every node that is there, by address.

    Raises:
        ActorFailure: Ray does not say.
    """
    with failing_as(RAY, "naming its nodes"):
        free = ray._private.state.available_resources_per_node()
        nodes = [Node.of(node, free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def placement_of(nodes: Sequence[Node], requests: Sequence[Request], lost: Collection[str] = ()) -> Placement:
    """Give each of ``requests`` one of ``nodes``: first those that fit few of them, then the large ones, each on the
    node with the most CPUs left. ``late`` clients come last, and stay away where no node has room.

    Args:
        nodes: that are there.
        requests: of everybody.
        lost: the names of clients that are begun later; room is left for them as for ``late`` ones, and they are away.

    Raises:
        InputError: one of the others has no place; names it, what it asks for, and what the nodes have.
        InUse: it would have one if nobody else used the cluster.
    """
    late = [(name, holder) for name, holder in requests if _is_late(holder) or name in lost]
    certain = [(name, holder) for name, holder in requests if not _is_late(holder) and name not in lost]
    for name, holder in certain:
        _check_alone(nodes, name, holder)
    everything = _Filling(nodes, {node.id: node.total for node in nodes})
    left_out = everything.take_in(certain)
    if left_out is not None:
        name, holder = left_out
        inall = _amounts(_sum(_asked(other) for _, other in certain))
        raise InputError(
            f"{name}: asks for {_amounts(_asked(holder))}, which no node that it fits has left beside the others of"
            f" this run ({inall} in all); the nodes: {described(nodes)}"
        )
    now = _Filling(nodes, {node.id: node.free for node in nodes})
    left_out = now.take_in(certain)
    if left_out is not None:
        name, holder = left_out
        raise InUse(
            f"{name}: asks for {_amounts(_asked(holder))}, which others on the Ray cluster are using; the nodes:"
            f" {described(nodes)}"
        )
    away = {name: None for name, holder in late if not now.add(name, holder) or name in lost}
    return Placement({name: now.node_of[name] for name, _ in requests if name not in away}, tuple(away))


def left_by(nodes: Sequence[Node], taken: Iterable[tuple[str, HolderConfig]]) -> list[Node]:
    """``nodes`` with no more free than ``taken`` leave, by the ids of their nodes: of an actor that was begun a moment
    before, Ray has not reserved anything yet.
    """
    on: dict[str, list[Mapping[str, float]]] = {}
    for node_id, holder in taken:
        on.setdefault(node_id, []).append(_asked(holder))
    sums = {node.id: _sum(on.get(node.id, ())) for node in nodes}
    return [
        replace(
            node,
            free={
                what: min(much, node.total.get(what, 0.0) - sums[node.id].get(what, 0.0))
                for what, much in node.free.items()
            },
        )
        for node in nodes
    ]


def room_for(nodes: Sequence[Node], holder: HolderConfig, before: Node | None) -> Node | None:
    """The node for a holder that is begun anew: where it was ``before``, else the one with the most CPUs free."""
    fitting = [node for node in nodes if _matches(node, holder) and _suffices(node.free, _asked(holder))]
    stay = [node for node in fitting if before is not None and node.id == before.id]
    return max(stay or fitting, key=lambda node: node.free.get("CPU", 0.0), default=None)


def described(nodes: Sequence[Node]) -> str:
    """What each node has, in one line."""
    shown = [f"{node} has {_contents(node)}" for node in nodes[:_NODES_SHOWN]]
    more = len(nodes) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _contents(node: Node) -> str:
    words = []
    for what, much in sorted(node.total.items()):
        if not what.startswith(_RAYS_OWN):
            free = node.free.get(what, 0.0)
            words.append(f"{much:g} {what}" if free >= much else f"{free:g} of {much:g} {what} free")
    words += [f"{key}={value}" for key, value in sorted(node.labels.items()) if not key.startswith(_RAYS_LABELS)]
    return ", ".join(words) or "nothing"


def _is_late(holder: HolderConfig) -> bool:
    return isinstance(holder, ClientConfig) and holder.late


def _asked(holder: HolderConfig) -> dict[str, float]:
    wanted = {"CPU": holder.num_cpus, "GPU": holder.num_gpus, **holder.resources}
    return {what: much for what, much in wanted.items() if much > 0}


def _amounts(asked: Mapping[str, float]) -> str:
    return ", ".join(f"{much:g} {what}" for what, much in asked.items()) or "nothing"


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for what, much in part.items():
            total[what] = total.get(what, 0.0) + much
    return total


def _suffices(room: Mapping[str, float], asked: Mapping[str, float]) -> bool:
    return all(room.get(what, 0.0) >= much - _ROUNDING for what, much in asked.items())


def _is_named(node: Node, holder: HolderConfig) -> bool:
    return holder.node is None or holder.node in (node.host, node.address, node.name)


def _matches(node: Node, holder: HolderConfig) -> bool:
    return _is_named(node, holder) and holder.labels.items() <= node.labels.items()


def _check_alone(nodes: Sequence[Node], name: str, holder: HolderConfig) -> None:
    """Refuse what no node could give ``holder`` even if it were alone on the cluster."""
    named = [node for node in nodes if _is_named(node, holder)]
    if not named:
        there = ", ".join(str(node) for node in nodes[:_NODES_SHOWN])
        raise InputError(f"{name}: node: {holder.node} is not in the Ray cluster; it has {there}")
    fitting = [node for node in named if _matches(node, holder)]
    if not fitting:
        wanted = ", ".join(f"{key}={value}" for key, value in holder.labels.items())
        raise InputError(f"{name}: labels: no node {_pinned(holder)}has {wanted}; {described(named)}")
    for what, much in _asked(holder).items():
        most = max(node.total.get(what, 0.0) for node in fitting)
        if not _suffices({what: most}, {what: much}):
            key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(what, f"resources.{what}")
            hint = "; run on CPUs with --cpu" if what == "GPU" else ""
            raise InputError(
                f"{name}: {key}: {much:g} asked, no node {_pinned(holder)}has more than {most:g}{hint};"
                f" {described(fitting)}"
            )
    if not any(_suffices(node.total, _asked(holder)) for node in fitting):
        raise InputError(
            f"{name}: asks for {_amounts(_asked(holder))}, and no node {_pinned(holder)}has all of it;"
            f" {described(fitting)}"
        )


def _pinned(holder: HolderConfig) -> str:
    return f"of the name {holder.node} " if holder.node is not None else ""


class _Filling:
    """Fills nodes with holders, one after another.

    Args:
        nodes: to fill.
        room: by node what there is to give.

    Attributes:
        node_of: by holder the node that it has.
    """

    def __init__(self, nodes: Sequence[Node], room: Mapping[str, Mapping[str, float]]) -> None:
        self._nodes = nodes
        self._room = {node: dict(amounts) for node, amounts in room.items()}
        self._asked: dict[str, dict[str, float]] = {}
        self._fitting: dict[str, list[Node]] = {}
        self._on: dict[str, list[str]] = {node.id: [] for node in nodes}
        self.node_of: dict[str, Node] = {}

    def take_in(self, requests: Sequence[Request]) -> Request | None:
        """Add all of ``requests``; returns the first that has no place."""

        def order(request: Request) -> tuple[float, ...]:
            _, holder = request
            fitting = sum(_matches(node, holder) and _suffices(node.total, _asked(holder)) for node in self._nodes)
            return fitting, -holder.num_gpus, -holder.num_cpus, -sum(holder.resources.values())

        return next((request for request in sorted(requests, key=order) if not self.add(*request)), None)

    def add(self, name: str, holder: HolderConfig) -> bool:
        """Give ``holder`` a node, if need be by moving others; whether there is one."""
        self._asked[name] = _asked(holder)
        self._fitting[name] = [node for node in self._nodes if _matches(node, holder)]
        return self._settle(name, set())

    def _settle(self, name: str, emptied: set[str]) -> bool:
        """Augmenting paths, as in matching: where no node has room, somebody moves on, who may move another."""
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
                self._take_away(other)
                if self._has_room(node, name):
                    self._put(name, node)
                    if self._settle(other, emptied):
                        return True
                    self._take_away(name)
                self._put(other, node)
        return False

    def _has_room(self, node: Node, name: str) -> bool:
        return _suffices(self._room[node.id], self._asked[name])

    def _put(self, name: str, node: Node) -> None:
        self.node_of[name] = node
        self._on[node.id].append(name)
        self._change(node, name, -1)

    def _take_away(self, name: str) -> None:
        node = self.node_of.pop(name)
        self._on[node.id].remove(name)
        self._change(node, name, 1)

    def _change(self, node: Node, name: str, sign: int) -> None:
        room = self._room[node.id]
        for what, much in self._asked[name].items():
            room[what] = room.get(what, 0.0) + sign * much
