"""Whom the Ray executor begins, where, and who checks the base; no Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsplit.cluster import ray_executor
from hsplit.cluster.placement import Node, Placement, placement_of, requests_of
from hsplit.cluster.ray_executor import RayExecutor
from hsplit.config import ClientConfig, RunConfig, ServerConfig
from tests.cluster.test_placement import client, node


class Idle(RayExecutor):
    """Starts no actor; only reports where and from which base it would."""

    def _start(self, name: str) -> Any:
        return name

    def begun(self) -> list[str]:
        return sorted(name for name in self._handles if name in self._requests)

    def node_of(self, name: str) -> str:
        return self._nodes[name].name

    def checks_base(self, name: str) -> bool:
        return self._base_of(name).fingerprint is not None


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes that are there, as Ray says."""
    nodes: list[Node] = []
    monkeypatch.setattr(ray_executor, "alive_nodes", lambda: nodes)
    monkeypatch.setattr("ray.kill", lambda handle: None)
    monkeypatch.setattr(ray_executor, "_NODE_FREE_S", 0.0)
    return nodes


def named(name: str, **fields: Any) -> ClientConfig:
    holder = client(name, **fields)[1]
    assert isinstance(holder, ClientConfig)
    return holder


def executor_of(
    nodes: list[Node], *clients: ClientConfig, without: tuple[str, ...] = (), lost: tuple[str, ...] = ()
) -> Idle:
    run = RunConfig(server=ServerConfig(num_cpus=0), clients=clients)
    requests = [(name, holder) for name, holder in requests_of(run) if name not in without]
    return executor_on(run, placement_of(nodes, requests, lost))


def executor_on(run: RunConfig, placement: Placement) -> Idle:
    return Idle("run", run, Path("/models/base"), placement, "fingerprint")


def test_who_has_left_or_is_lost_is_begun_when_it_comes_back(there: list[Node]) -> None:
    there.append(node("n1", 3))
    executor = executor_of(there, named("a"), named("gone"), named("lost"), without=("gone",), lost=("lost",))
    assert executor.begun() == ["a", "server"] and executor.away() == ["lost"]
    executor.end("gone")
    assert executor.restart("gone") and executor.restart("lost")
    assert executor.begun() == ["a", "gone", "lost", "server"] and executor.away() == []
    assert executor.checks_base("gone") is False


def test_those_of_a_dead_node_are_spread_before_ray_has_reserved_anything(there: list[Node]) -> None:
    dead = node("n9", 3)
    executor = executor_of([dead], named("a"), named("b"), named("c"))
    # Ray says the same of them as long as the first is not there.
    there.extend([node("n1", 1), node("n2", 1)])
    assert executor.restart("a") and executor.restart("b")
    assert {executor.node_of("a"), executor.node_of("b")} == {"n1", "n2"}
    assert not executor.restart("c") and executor.away() == ["c"]
    executor.end("a")
    assert executor.restart("c")


def test_who_stays_away_takes_no_room(there: list[Node]) -> None:
    there.append(node("n1", 1))
    executor = executor_of(there, named("a"), named("b", late=True))
    there[0] = node("n1", 1, free={"CPU": 0.0})
    assert not executor.restart("a") and executor.away() == ["a", "b"]
    there[0] = node("n1", 1)
    assert executor.restart("b")


def test_a_base_counts_as_checked_only_where_and_as_it_was_looked_for(there: list[Node]) -> None:
    there.extend([node("n1", 4), node("n2", 4), node("n3", 4)])
    own = named("own", node="n2", model="/srv/llama")
    executor = executor_of(there, named("a", node="n1"), own, named("b", node="n1"))
    assert not any(map(executor.checks_base, ("server", "a", "own", "b")))
    executor.add(named("b", node="n2"))
    assert executor.restart("b") and executor.node_of("b") == "n2"
    # The client there has a base of its own: that of the others was not looked for.
    assert executor.checks_base("b")
    executor.add(named("own", node="n2", model="/srv/other"))
    assert executor.restart("own") and executor.checks_base("own")


def test_a_newcomer_is_none_of_one_that_had_its_name(there: list[Node]) -> None:
    there.extend([node("n1", 3), node("n2", 1)])
    executor = executor_of(there, named("a", node="n1"))
    executor.add(named("tablet", node="n2", model="/srv/wrong"))
    assert executor.restart("tablet") and executor.node_of("tablet") == "n2"
    executor.end("tablet")
    executor.add(named("tablet", model="/srv/right"))
    assert executor.restart("tablet") and executor.node_of("tablet") == "n1"
    assert executor._base_of("tablet").model == "/srv/right"
    # Who comes back as it was stays where it was.
    there.append(node("n3", 8))
    executor.add(named("tablet", model="/srv/right"))
    assert executor.restart("tablet") and executor.node_of("tablet") == "n1"
