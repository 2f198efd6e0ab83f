"""A node that goes away with its clients, and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from hsplit.observe.events import read_events
from hsplit.observe.tables import read_metrics

pytestmark = pytest.mark.drill

# In a process of its own: this cluster is not the one that other tests share.
PROGRAM = """
import os, sys, time
from pathlib import Path

# Else a node's end shows after a quarter of a minute.
os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"}
os.environ |= {"RAY_health_check_timeout_ms": "2000"}
import ray
from ray.cluster_utils import Cluster

import hsplit
from tests.in_process import Recorder

cluster_file, runs = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 16, "include_dashboard": False})
away = cluster.add_node(num_cpus=20)
ray.init(address=cluster.address, log_to_driver=False)
steps = []

def alive():
    return sum(node["Alive"] for node in ray.nodes())

def after_step(step):
    # Once each: a round may be repeated.
    if step >= 6 and not steps:
        steps.append(step)
        cluster.remove_node(away, allow_graceful=False)
        # Its processes go on until they notice.
        until = time.monotonic() + 60
        while alive() > 1:
            assert time.monotonic() < until, "the node's end does not show"
            time.sleep(0.1)
    if step >= 14 and len(steps) == 1:
        steps.append(step)
        cluster.add_node(num_cpus=20)
        cluster.wait_for_nodes()

# Twenty CPUs are on the second node alone.
overrides = {"rounds": 6, "clients.small.num_cpus": 20, "faults.max_failures": 5}
run = hsplit.launch(cluster_file, None, overrides, runs_dir=runs, name="away", display=Recorder(after_step=after_step))
assert run.complete
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_goes_away_and_comes_back(
    cluster_file: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(program), str(cluster_file), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events = read_events(tmp_path / "away" / "events.jsonl")
    told = [event for event in events if event["event"] in ("lost", "repeated", "away", "returned")]
    kinds = [event["event"] for event in told]
    # If something of the client's was on its way to the server, that is lost as well, and the round is repeated.
    assert kinds[0] in ("lost", "repeated") and kinds.count("away") == 1 and kinds[-1] == "returned", kinds
    assert {event["client"] for event in told if "client" in event} == {"small"}
    assert "no node that is there has room for it" in told[kinds.index("away")]["text"]
    metrics = read_metrics(tmp_path / "away" / "metrics.csv")
    there = metrics["available_clients"].tolist()
    # A client at work when its node goes may end its round: away from the third round or the fourth, once.
    assert there[:2] == [3, 3] and there[-1] == 3, there
    changes = [count for count, earlier in zip(there[1:], there, strict=False) if count != earlier]
    assert changes == [2, 3], there
    record_property("final_ppl", round(float(metrics["val_ppl"].iloc[-1]), 4))
