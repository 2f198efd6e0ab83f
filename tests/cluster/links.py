"""What Ray itself gets through the links between nodes, and where a run's actors were; prints JSON.

python -m tests.cluster.links ADDRESS SERVER_NODE CLIENT_NODE=BYTES ...
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Others use the machine too: the best of several transfers is the link's.
TIMES = 4


@ray.remote(num_cpus=0)
class Peer:
    """Keeps and takes objects on its node."""

    def make(self, size: int) -> list[Any]:
        # In a list, so that a receiver gets a reference and fetches it when it wants.
        return [ray.put(np.random.default_rng().integers(0, 255, size, np.uint8))]

    def fetch_s(self, refs: list[Any]) -> float:
        """Seconds until the object is on this node."""
        began = time.monotonic()
        ray.get(refs)
        return time.monotonic() - began


def mbps(source: Any, sink: Any, size: int) -> float:
    """The best of several transfers of ``size`` bytes, in Mbit/s."""
    best = 0.0
    for _ in range(TIMES):
        refs = ray.get(source.make.remote(size))
        best = max(best, size * 8 / 1e6 / ray.get(sink.fetch_s.remote(refs)))
        del refs
    return best


def main(address: str, server: str, *clients: str) -> None:
    ray.init(address=address, log_to_driver=False)
    ids = {node["NodeName"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    names = {node_id: name for name, node_id in ids.items()}
    ran = {
        actor["Name"].partition(":")[2]: names[actor["Address"]["NodeID"]]
        for actor in ray._private.state.actors().values()
        if actor["Name"].startswith("hsplit:")
    }

    def peer(name: str) -> Any:
        return Peer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(ids[name], soft=False)).remote()

    at_server, links = peer(server), {}
    for name, _, size in (client.partition("=") for client in clients):
        at_client = peer(name)
        # The first transfer opens connections.
        mbps(at_client, at_server, 100_000)
        links[name] = {"up": mbps(at_client, at_server, int(size)), "down": mbps(at_server, at_client, int(size))}
    print(json.dumps({"actors": ran, "links": links}))


if __name__ == "__main__":
    main(*sys.argv[1:])
