"""Which node of a Ray cluster a holder may run on, and whether what is asked for is there."""

from __future__ import annotations

from typing import Any

import ray

from hsplit.config import Holder, RunConfig
from hsplit.errors import InputError


def server_request(run: RunConfig) -> Holder:
    """What Ray must reserve for the server: nothing beside a single node, which has the server's resources."""
    if run.policy.placement != "single":
        return run.server
    return run.server.model_copy(update={"num_cpus": 0.0, "num_gpus": 0.0})


def check_requests(run: RunConfig) -> None:
    """Refuse at once what no node could ever give.

    Raises:
        InputError: names the holder, what it asks for and what the largest node has.
    """
    nodes = alive_nodes()
    servers = [(name, server_request(run)) for name in run.server.names]
    for name, holder in [*servers, *((c.name, c) for c in run.participants)]:
        fitting = matching_nodes(nodes, name, holder)
        for resource, wanted in (("CPU", holder.num_cpus), ("GPU", holder.num_gpus)):
            most = max(node["Resources"].get(resource, 0.0) for node in fitting)
            if wanted > most:
                hint = "; run on CPUs with --cpu" if resource == "GPU" else ""
                raise InputError(
                    f"{name}: num_{resource.lower()}s: {wanted:g} asked, no node has more than {most:g}{hint}"
                )


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of every node that is there."""
    return [node for node in ray.nodes() if node["Alive"]]


def matching_nodes(nodes: list[dict[str, Any]], name: str, holder: Holder) -> list[dict[str, Any]]:
    """Those of ``nodes`` that ``holder`` may run on.

    Raises:
        InputError: there is none; names ``name`` and what there is.
    """
    if holder.node is None:
        return nodes
    found = [n for n in nodes if holder.node in (n["NodeManagerHostname"], n["NodeManagerAddress"])]
    if not found:
        there = ", ".join(sorted(f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})" for n in nodes))
        raise InputError(f"{name}: node: {holder.node} is not in the Ray cluster; it has {there}")
    return found
