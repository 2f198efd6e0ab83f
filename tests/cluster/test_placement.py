"""Which node each holder gets, and what is refused, on clusters that are only described."""

from __future__ import annotations

from typing import Any

import pytest

from hsplit.cluster.placement import InUse, Node, Placement, Request, placement_of, remaining, requests_of, room_for
from hsplit.config import ClientConfig, Policy, RunConfig, ServerConfig
from hsplit.errors import InputError


def node(name: str, cpus: float = 4, free: dict[str, float] | None = None, **more: Any) -> Node:
    total = {"CPU": cpus, "memory": 1e9, f"node:10.0.0.{name[-1]}": 1.0, **more.get("resources", {})}
    labels = {"ray.io/node-id": name, **more.get("labels", {})}
    return Node(f"id-{name}", f"host-{name}", f"10.0.0.{name[-1]}", name, labels, total, {**total, **(free or {})})


def client(name: str, **fields: Any) -> Request:
    return name, ClientConfig(name=name, kind=name, memory_gb=1, tflops=1, **fields)


def server(**fields: Any) -> Request:
    return "server", ServerConfig(**fields)


def where(placement: Placement) -> dict[str, str]:
    return {name: node.name for name, node in placement.nodes.items()}


@pytest.mark.parametrize(
    "pin",
    [
        {"node": "host-n2"},
        {"node": "10.0.0.2"},
        {"node": "n2"},
        {"labels": {"site": "ward"}},
        {"resources": {"clinic": 1}},
    ],
)
def test_a_pinned_client_is_on_its_node(pin: dict[str, Any]) -> None:
    nodes = [node("n1", 8), node("n2", 1, resources={"clinic": 1.0}, labels={"site": "ward"}), node("n3", 8)]
    assert where(placement_of(nodes, [server(), client("pinned", **pin)]))["pinned"] == "n2"


def test_those_who_may_go_anywhere_do_not_take_a_pinned_one_s_place() -> None:
    nodes = [node("n1", 2), node("n2", 1)]
    found = where(placement_of(nodes, [server(), client("free"), client("pinned", node="n1")]))
    assert found["pinned"] == "n1"
    assert sorted(found.values()) == ["n1", "n1", "n2"]


def test_a_large_one_is_given_its_place_before_small_ones() -> None:
    """Of four small ones spread over both nodes no single one could make room for it."""
    nodes = [node("n1", 4), node("n2", 4)]
    small = [client(str(i)) for i in range(4)]
    found = where(placement_of(nodes, [*small, client("large", num_cpus=4)]))
    assert list(found.values()).count(found["large"]) == 1


def test_holders_spread_over_equal_nodes() -> None:
    nodes = [node("n1", 4), node("n2", 4)]
    for cpus in (0.0, 1.0):
        found = where(placement_of(nodes, [client(str(i), num_cpus=cpus) for i in range(4)]))
        assert sorted(found.values()) == ["n1", "n1", "n2", "n2"]


def test_one_who_could_go_elsewhere_makes_room() -> None:
    """Each fits two of three nodes, and only one arrangement holds them all."""
    nodes = [
        node("n1", 1, labels={"a": "x"}),
        node("n2", 1.5, labels={"a": "x", "b": "x"}),
        node("n3", 1, labels={"b": "x"}),
    ]
    # The first takes the node with the most room, which the third needs if the second is to have a place.
    requests = [
        client("first", labels={"b": "x"}),
        client("second", labels={"a": "x"}),
        client("third", labels={"a": "x"}),
    ]
    assert where(placement_of(nodes, requests))["first"] == "n3"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (client("a", node="n9"), "a: node: n9 is not in the Ray cluster; it has n1 (10.0.0.1), n2 (10.0.0.2)"),
        (
            client("a", labels={"site": "mars"}),
            "a: labels: no node has site=mars; n1 (10.0.0.1) has 4 CPU; n2 (10.0.0.2) has 2 CPU, 1 clinic, site=ward",
        ),
        (
            client("a", labels={"site": "ward"}, node="n1"),
            "a: labels: no node of the name n1 has site=ward; n1 (10.0.0.1) has 4 CPU",
        ),
        (client("a", num_cpus=5), "a: num_cpus: 5 asked, no node has more than 4; n1 (10.0.0.1) has 4 CPU; n2"),
        (client("a", num_gpus=0.5), "a: num_gpus: 0.5 asked, no node has more than 0; run on CPUs with --cpu; n1"),
        (client("a", resources={"clinic": 2}), "a: resources.clinic: 2 asked, no node has more than 1; n1"),
        (
            client("a", num_cpus=3, resources={"clinic": 1}),
            "a: asks for 3 CPU, 1 clinic, and no node has all of it; n1",
        ),
    ],
)
def test_what_no_node_could_ever_give_is_refused(request_: Request, reason: str) -> None:
    nodes = [node("n1", 4), node("n2", 2, resources={"clinic": 1.0}, labels={"site": "ward"})]
    with pytest.raises(InputError) as refusal:
        placement_of(nodes, [server(), request_])
    assert str(refusal.value).startswith(reason)
    assert not isinstance(refusal.value, InUse)
    assert "\n" not in str(refusal.value)


def test_a_sum_that_does_not_fit_is_refused_with_what_there_is() -> None:
    nodes = [node("n1", 2), node("n2", 2)]
    requests = [server(), *(client(f"c{i}") for i in range(4))]
    with pytest.raises(InputError, match=r"asks for 1 CPU, which no node that it fits has left") as refusal:
        placement_of(nodes, requests)
    assert "(5 CPU in all); the nodes: n1 (10.0.0.1) has 2 CPU; n2 (10.0.0.2) has 2 CPU" in str(refusal.value)
    assert not isinstance(refusal.value, InUse)
    placement_of(nodes, requests[:-1])


def test_what_others_use_is_said_to_be_in_use() -> None:
    nodes = [node("n1", 2, free={"CPU": 1.0})]
    with pytest.raises(InUse, match=r"others on the Ray cluster are using; .* 1 of 2 CPU free"):
        placement_of(nodes, [server(), client("a")])


def test_many_nodes_are_listed_in_short() -> None:
    with pytest.raises(InputError, match=r"; n08 [^;]*; and 4 more$"):
        placement_of([node(f"n{i:02}", 1) for i in range(1, 13)], [server(num_cpus=2)])


def test_a_late_client_without_a_place_is_away() -> None:
    nodes = [node("n1", 2)]
    late = [
        client("elsewhere", node="n9", late=True),
        client("crowded", late=True),
        client("fits", num_cpus=0, late=True),
    ]
    found = placement_of(nodes, [*late, server(), client("a")])
    assert found.away == ("elsewhere", "crowded")
    assert where(found) == {"server": "n1", "a": "n1", "fits": "n1"}


def test_a_lost_client_is_away_and_finds_room_when_it_comes_back() -> None:
    nodes = [node("n1", 1), node("n2", 2, labels={"site": "ward"})]
    lost = [client("pinned", labels={"site": "ward"}, num_cpus=2), client("elsewhere", node="n9"), client("any")]
    found = placement_of(nodes, [*lost[:2], client("a")], lost=("pinned", "elsewhere"))
    # The node with the most CPUs is left to the only one that needs it.
    assert where(found) == {"a": "n1"} and found.away == ("pinned", "elsewhere")
    with pytest.raises(InputError, match="elsewhere: node: n9 is not in the Ray cluster"):
        placement_of(nodes, [*lost, client("a")], lost=("pinned",))


def test_what_was_begun_a_moment_before_counts_as_taken_once() -> None:
    (_, one), (_, two) = client("one"), client("two", resources={"clinic": 1})
    nodes = [node("n1", 4, resources={"clinic": 1.0}), node("n2", 4, free={"CPU": 1.0})]
    # Of the three on the second node Ray has reserved what they ask for already.
    n1, n2 = remaining(nodes, [("id-n1", one), ("id-n1", two), *[("id-n2", one)] * 3, ("id-n9", one)])
    assert (n1.free["CPU"], n1.free["clinic"], n2.free["CPU"]) == (2, 0, 1)


def test_a_holder_that_is_begun_anew_stays_where_there_is_room() -> None:
    _, holder = client("a", labels={"site": "ward"})
    ward = {"labels": {"site": "ward"}}
    nodes = [node("n1", 9), node("n2", 2, **ward), node("n3", 4, **ward), node("n4", 8, free={"CPU": 0.5}, **ward)]
    assert room_for(nodes, holder, nodes[1]) is nodes[1]
    assert room_for(nodes, holder, nodes[3]) is nodes[2]
    assert room_for(nodes, holder, None) is nodes[2]
    assert room_for(nodes[:1], holder, None) is None


def test_beside_a_single_node_the_server_reserves_nothing() -> None:
    one = ClientConfig(name="a", kind="a", memory_gb=1, tflops=1)
    run = RunConfig(
        server=ServerConfig(num_cpus=2, node="n1", resources={"clinic": 1}, labels={"site": "ward"}),
        clients=(one,),
        policy=Policy(placement="single", aggregation="none"),
    )
    (_, beside), (_, central) = requests_of(run)
    assert (beside.num_cpus, beside.resources) == (0, {})
    assert (central.num_cpus, central.resources, central.labels) == (2, {"clinic": 1}, {"site": "ward"})
    assert beside.node == central.node == "n1" and beside.labels == central.labels
    assert placement_of([node("n1", 2, resources={"clinic": 1.0}, labels={"site": "ward"})], requests_of(run))


def test_a_thousand_clients_on_a_hundred_nodes_are_placed_and_refused() -> None:
    nodes = [node(f"n{i}", 10) for i in range(100)]
    requests = [client(f"c{i}") for i in range(1000)]
    assert len(placement_of(nodes, requests).nodes) == 1000
    with pytest.raises(InputError, match="1001 CPU in all"):
        placement_of(nodes, [*requests, server()])
