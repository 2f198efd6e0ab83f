"""Many clients, and many rounds, on one machine: memory stays flat once a run has settled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest

from hsplit.config import SCHEDULER, SERVER
from tests.cluster.killing import KillingExecutor, drill

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]


def test_memory_stays_flat_with_many_clients(tmp_path: Path) -> None:
    arguments = ["--clients", "20", "--rounds", "12", "--steps", "1", "--to", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.clients", *arguments], check=True, cwd=ROOT)
    rounds = pd.read_csv(tmp_path / "clients.csv", comment="#").set_index("round")
    assert list(rounds.index) == list(range(1, 13))
    for name in ("driver_mb", "scheduler_mb", "server_mb"):
        # The residual is at its cap, and each round is the same.
        assert rounds.loc[12, name] <= 1.1 * rounds.loc[6, name] + 2.0, name
    assert (tmp_path / "clients.svg").stat().st_size > 0


ROUNDS, SETTLED = 200, 80


@pytest.mark.usefixtures("ray_cluster")
def test_two_hundred_rounds_leave_memory_and_the_object_store_flat(
    cluster_file: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Plans stay as they are, and the residual is at its cap."""
    executors: list[KillingExecutor] = []
    found: dict[int, dict[str, float]] = {}

    def look(step: int) -> None:
        if step in (SETTLED, ROUNDS):
            pids = {name: executors[0].pid(name) for name in (SCHEDULER, SERVER, "small")} | {"driver": os.getpid()}
            found[step] = {name: psutil.Process(pid).memory_full_info().uss / 1e6 for name, pid in pids.items()}
            found[step]["object store"] = store_bytes() / 1e6

    overrides = {
        "rounds": ROUNDS,
        "local_steps": 1,
        "residual.max_rank": 4,
        "validation.every": 50,
        "policy.replan.measured": False,
        "clients.large.schedule": [],
    }
    run = drill(cluster_file, tmp_path, overrides=overrides, after_step=look, beside=executors.append)
    assert run.complete and sorted(found) == [SETTLED, ROUNDS]
    for name, before in found[SETTLED].items():
        record_property(f"{name}_mb", f"{before:.1f} after {SETTLED} rounds, {found[ROUNDS][name]:.1f} after {ROUNDS}")
        # Python's objects grow by 5 kB a round (the tables' rows), allocators by some megabytes, and not every time.
        assert found[ROUNDS][name] <= 1.05 * before + 5.0, (name, found)


def store_bytes() -> int:
    """Bytes of the objects that are in Ray's object store now."""
    import ray
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return int(stats.store_stats.object_store_bytes_used)
