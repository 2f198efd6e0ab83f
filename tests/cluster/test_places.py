"""Places on a cluster that changes: what others use, and a client that comes late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.drill

# In a process of its own: this cluster is not the one that other tests share.
PROGRAM = """
import sys, threading
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import hsplit
from hsplit.actors.holder_actor import HolderActor
from hsplit.cluster.placement import InUse, find_placement
from hsplit.cluster.ray_executor import RayExecutor
from hsplit.config import load_run_config
from hsplit.errors import InputError
from hsplit.run.inputs import resolved_config
from hsplit.models.checkpoint_reader import model_fingerprint
from tests.in_process import Recorder

cluster_file, gpt2, runs = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
cluster.add_node(num_cpus=1, labels={"site": "ward"})
ray.init(address=cluster.address, log_to_driver=False)


@ray.remote
class Other:
    pass


def run_of(**overrides):
    return resolved_config(load_run_config(cluster_file, None, overrides))


# Four holders of one CPU each are all that fits.
with pytest.raises(InputError, match=r"large-\\d: num_cpus: 4 asked, no node has more than 3"):
    find_placement(run_of(**{"clients.large.num_cpus": 4}))
with pytest.raises(InputError, match=r"large-\\d: asks for 2 CPU, which no node that it fits has left .*6 CPU in all"):
    hsplit.launch(cluster_file, None, {"clients.large.num_cpus": 2}, runs_dir=runs, display=Recorder())
assert not list(runs.iterdir())

# What others use is waited for, for some seconds.
other = Other.options(num_cpus=1).remote()
ray.get(other.__ray_ready__.remote())
with pytest.raises(InUse, match="asks for 1 CPU, which others on the Ray cluster are using"):
    find_placement(run_of())
threading.Timer(1.0, ray.kill, [other]).start()
assert len(find_placement(run_of()).nodes) == 4

# A late client has no actor until its node is there; a base that nobody has looked at is checked there.
run = run_of(**{"clients.small.labels": {"site": "home"}, "clients.small.late": True})
model = Path(run.job.model)
placement = find_placement(run)
assert placement.away == ("small",)


def of(fingerprint, name):
    executor = RayExecutor(name, run, model, placement, fingerprint)
    assert executor.away() == ["small"] and not executor.lost()
    return executor


def look(executor):
    return executor.wait([executor.call("small", HolderActor.peak_bytes)])[0]


executor = of(model_fingerprint(model), "late")
assert not executor.restart("small") and executor.away() == ["small"]
home = cluster.add_node(num_cpus=1, labels={"site": "home"})
cluster.wait_for_nodes()
assert executor.restart("small") and executor.away() == []
assert not isinstance(look(executor), Exception), look(executor)
runs_on = executor._handles["small"].__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
assert ray.get(runs_on) == home.node_id
executor.close()

executor = of(model_fingerprint(gpt2), "late-other")
assert executor.restart("small")
assert "is not the run's base model" in str(look(executor)), look(executor)
executor.close()


# A whole run that a client comes to late.
def after_step(step):
    if step == 3:
        cluster.add_node(num_cpus=1, labels={"site": "den"})
        cluster.wait_for_nodes()


overrides = {"clients.small.labels": {"site": "den"}, "clients.small.late": True, "rounds": 2}
run = hsplit.launch(cluster_file, None, overrides, runs_dir=runs, name="late", display=Recorder(after_step=after_step))
assert run.complete
there = run.metrics["available_clients"].tolist()
assert there[0] == 2 and there[-1] == 3, there
ray.shutdown()
cluster.shutdown()
"""


def test_places_on_a_cluster_that_changes(cluster_file: Path, models: dict[str, Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (runs := tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, str(program), str(cluster_file), str(models["gpt2"]), str(runs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
