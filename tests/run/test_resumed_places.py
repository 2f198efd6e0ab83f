"""Clients that need a node when a run is resumed, and a local Ray's room for clients that join; without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hsplit import api, session
from hsplit.api import resume
from hsplit.cluster import placement, preflight
from hsplit.cluster.placement import Placement, placement_of, remaining, requests_of, room_for
from hsplit.cluster.ray_session import local_cpus
from hsplit.config import ClientConfig, Job, RunConfig, ServerConfig
from hsplit.errors import InputError
from hsplit.run.checkpoint import save_checkpoint
from hsplit.run.state import Member, RunState, Status
from hsplit.run_directory import RunDirectory
from tests.cluster.test_placement import node


def a_client(name: str, **fields: Any) -> ClientConfig:
    return ClientConfig(name=name, kind=name, memory_gb=1, tflops=1, **fields)


class LookedAt(Exception):
    """Carries the placement for which the nodes were to be checked."""


@pytest.fixture
def stopped(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run of four clients with files of their own, and one node."""

    @contextmanager
    def nothing(*arguments: Any, **more: Any) -> Iterator[Any]:
        yield Mock()

    def look(run: RunConfig, places: Placement, *arguments: Any) -> list[str]:
        raise LookedAt(places)

    monkeypatch.setattr(api, "helpers_of", nothing)
    monkeypatch.setattr(session, "ray_of", nothing)
    monkeypatch.setattr(placement, "alive_nodes", lambda: [node("n1", 8)])
    monkeypatch.setattr(preflight, "preflight", look)
    names = {"home": "n1", "clinic": "n2", "ward": "n3", "phone": "n4"}
    clients = tuple(a_client(name, node=where, data=f"/srv/{name}.csv") for name, where in names.items())
    directory = RunDirectory.create(tmp_path, "stopped")
    RunConfig(clients=clients, job=Job(model=str(models["llama"]))).save(directory.config)
    return directory


def checkpoint(directory: RunDirectory, **statuses: Status) -> None:
    members = {name: Member(status) for name, status in statuses.items()}
    save_checkpoint(directory.checkpoints, "round-0001", RunState(round=1, members=members), {}, 2)


def test_who_has_left_is_set_aside_or_lost_need_not_be_there(stopped: RunDirectory) -> None:
    checkpoint(stopped, clinic=Status.LEFT, ward=Status.ASIDE, phone=Status.LOST)
    with pytest.raises(LookedAt) as looked:
        resume(stopped.path)
    places: Placement = looked.value.args[0]
    assert set(places.nodes) == {"server", "home"} and places.away == ("phone",)


def test_who_takes_part_must_be_there(stopped: RunDirectory) -> None:
    checkpoint(stopped, clinic=Status.LEFT, ward=Status.ASIDE)
    with pytest.raises(InputError, match="phone: node: n4 is not in the Ray cluster"):
        resume(stopped.path)


@pytest.mark.parametrize(("count", "cpus"), [(5, 1.0), (1, 0.1), (2, 8.0)])
def test_a_local_ray_has_room_for_who_joins(count: int, cpus: float) -> None:
    clients = tuple(a_client(f"c{number}", num_cpus=cpus) for number in range(count))
    run = RunConfig(server=ServerConfig(num_cpus=2, replicas=2), clients=clients)
    nodes = [node("n1", local_cpus(run))]
    placed = placement_of(nodes, requests_of(run)).nodes
    taken = [(placed[name].id, holder) for name, holder in requests_of(run)]
    assert room_for(remaining(nodes, taken), a_client("tablet", num_cpus=max(cpus, 1.0)), None)
