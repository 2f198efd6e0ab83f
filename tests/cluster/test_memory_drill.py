"""Ray's memory monitor ends actors: client, server and scheduler, at the start, in training and in resuming.

A monitor ends workers of its own node alone. So whom it is to end has a node to itself, and that node's monitor alone
has a limit that is near: as much above what the machine uses as the actor takes at the chosen moment. Each test records
what happened, so that ``pytest -m drill --junitxml FILE`` leaves a table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hsplit.observe.events import read_events
from hsplit.observe.run_list import run_state
from hsplit.run_directory import RunDirectory
from tests.errors import error_lines

pytestmark = pytest.mark.drill

Record = Callable[[str, object], None]
# By actor and phase the call that it does not come to; which of them, counted from the phase's own beginning.
CELLS = {
    ("small", "start"): ("load_data", 1),
    ("small", "training"): ("forward", 3),
    ("small", "resuming"): ("resume_state", 1),
    ("server", "start"): ("configure", 1),
    ("server", "training"): ("train_step", 6),
    ("server", "resuming"): ("load_state", 1),
    ("scheduler", "start"): ("first", 1),
    ("scheduler", "training"): ("review", 1),
    ("scheduler", "resuming"): ("review", 1),
}
# Of the machine's memory, between what is used before Ray starts and the limit: several times what the run takes.
ROOM_BYTES = 4e9

# In a process of its own: this cluster is not the one that other tests share.
PROGRAM = """
import json, sys
from pathlib import Path

import psutil, ray
from ray.cluster_utils import Cluster

from hsplit.cluster.fork_server import ForkServer
from hsplit.run.checkpoint import latest_checkpoint
from tests.cluster.killing import Happening, drill

cluster_file, runs, actor, room_bytes, cells = sys.argv[1:]
cluster_file, runs = Path(cluster_file), Path(runs)
memory = psutil.virtual_memory()
limit = (memory.total - memory.available + float(room_bytes)) / memory.total
watched = {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
unwatched = {"RAY_memory_monitor_refresh_ms": "0"}
# The scheduler is where the driver is, on the head; nobody else has room there then.
head_is_watched = actor == "scheduler"
head = {"num_cpus": 0 if head_is_watched else 16, "env_vars": watched if head_is_watched else unwatched}
cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False, "node_name": "head"})
other = {"num_cpus": 16 if head_is_watched else 1, "env_vars": unwatched if head_is_watched else watched}
cluster.add_node(**other, node_name="other")
cluster.wait_for_nodes()
fork_server = ForkServer().__enter__()
worker = {"py_executable": fork_server.worker_command}
ray.init(address=cluster.address, log_to_driver=False, runtime_env=worker)
pinned = {} if head_is_watched else {"server.node" if actor == "server" else f"clients.{actor}.node": "other"}
overrides = {**pinned, "faults.max_failures": 8}

for phase, method, nth in json.loads(cells):
    happening = Happening(actor, method, nth, lambda executor: executor.have_memory_taken(actor))
    if phase == "resuming":
        # Stopped in the middle of a round, which a plan is for.
        stopped = drill(cluster_file, runs, overrides=overrides, name=phase, stop_after=7)
        assert not stopped.complete
        checkpoint, _ = latest_checkpoint(stopped.path / "checkpoints")
        run = drill(cluster_file, runs, happening, overrides=overrides, name=phase, checkpoint=checkpoint)
    else:
        run = drill(cluster_file, runs, happening, overrides=overrides, name=phase)
    assert run.complete
    (runs / f"{phase}.json").write_text(json.dumps(run.metrics))
ray.shutdown()
cluster.shutdown()
fork_server.__exit__(None, None, None)
"""


@pytest.fixture(scope="module")
def drilled(cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of an actor's runs, one a phase; made when first asked for."""
    made: dict[str, Path] = {}

    def runs_of(actor: str) -> Path:
        if actor not in made:
            folder = tmp_path_factory.mktemp(actor)
            cells = [(phase, *call) for (name, phase), call in CELLS.items() if name == actor]
            program = folder / "program.py"
            program.write_text(PROGRAM)
            arguments = [str(cluster_file), str(folder), actor, str(ROOM_BYTES), json.dumps(cells)]
            done = subprocess.run(
                [sys.executable, str(program), *arguments],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
                timeout=500,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            made[actor] = folder
        return made[actor]

    return runs_of


@pytest.mark.parametrize(("actor", "phase"), CELLS)
def test_whoever_the_monitor_ends_the_run_is_complete(
    drilled: Callable[[str], Path], record_property: Record, actor: str, phase: str
) -> None:
    folder = drilled(actor)
    events = read_events(folder / phase / "events.jsonl")
    found = [event for event in events if event["event"] in ("lost", "repeated")]
    hit = [event for event in found if actor in (event.get("client"), event.get("actor"))]
    record_property("outcome", hit[0]["text"])
    assert hit and {event["kind"] for event in hit} == {"memory"}
    assert all("Ray's memory monitor ended it: its node used " in event["text"] for event in hit)
    assert {event.get("client", event.get("actor")) for event in found} == {actor}, "nobody else is blamed"
    metrics = json.loads((folder / f"{phase}.json").read_text())
    record_property("final_ppl", round(metrics[-1]["val_ppl"], 4))
    assert [row["round"] for row in metrics] == [0, 1, 2, 3] and metrics[-1]["available_clients"] == 3
    if actor != "scheduler":
        reasons = [reason for event in events if event["event"] == "replanned" for reason in event["reasons"]]
        assert any(f"{actor} ran out of memory" in reason for reason in reasons), reasons


# -- the command line ---------------------------------------------------------------------------------------------


def limit_above_use(room_bytes: float) -> dict[str, str]:
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + room_bytes) / memory.total
    return {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}


NO_MEMORY = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}


def hsplit_command(*arguments: object, watched: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from hsplit.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | (watched or {}),
    )


def ended_well(command: subprocess.Popen[str], run: Path, record: Record) -> str:
    """Wait for a command that cannot succeed; returns its one line."""
    out, errors = command.communicate(timeout=300)
    lines = error_lines(errors)
    record("exit_code", command.returncode)
    record("told", lines[-1])
    assert command.returncode == 1 and "Traceback" not in out + errors
    assert len(lines) == 1 and lines[0].startswith("error: ") and "Ray's memory monitor ended it" in lines[0], lines
    events = read_events(run / "events.jsonl")
    assert events[-1]["event"] == "failed" and lines[0].startswith(f"error: {events[-1]['text']}; ")
    assert run_state(RunDirectory(run)).state == "failed"
    return lines[0]


@pytest.fixture(scope="module")
def one_round(cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that has been stopped after its first round."""
    runs = tmp_path_factory.mktemp("runs")
    # More rounds than are done before it is stopped.
    arguments = ["launch", "--cluster", cluster_file, "--runs-dir", runs, "--name", "cut", "--set", "job.rounds=40"]
    command = hsplit_command(*arguments)
    checkpoint = runs / "cut" / "checkpoints" / "round-0001"
    until = time.monotonic() + 200
    while not checkpoint.exists() and command.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    command.terminate()
    command.communicate(timeout=100)
    assert checkpoint.exists()
    yield runs / "cut"


def test_a_start_without_memory_is_one_line(cluster_file: Path, tmp_path: Path, record_property: Record) -> None:
    command = hsplit_command(
        "launch", "--cluster", cluster_file, "--runs-dir", tmp_path, "--name", "short", watched=NO_MEMORY
    )
    ended_well(command, tmp_path / "short", record_property)


def test_a_resume_without_memory_is_one_line_and_one_with_memory_goes_on(
    one_round: Path, record_property: Record
) -> None:
    told = ended_well(hsplit_command("resume", one_round, watched=NO_MEMORY), one_round, record_property)
    assert told.endswith(f"go on from the last checkpoint with: hsplit resume {one_round}")
    resumed = hsplit_command("resume", one_round)
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert run_state(RunDirectory(one_round)).state == "complete"


def test_memory_that_others_take_during_training_is_one_line_and_the_run_is_resumed(
    cluster_file: Path, tmp_path: Path, record_property: Record
) -> None:
    import numpy as np

    run = tmp_path / "pressed"
    arguments = ["launch", "--cluster", cluster_file, "--runs-dir", tmp_path, "--name", "pressed"]
    # Rounds enough for it to be under way still.
    command = hsplit_command(*arguments, "--set", "job.rounds=200", watched=limit_above_use(4e9))
    until = time.monotonic() + 200
    while not (run / "checkpoints" / "round-0001").exists() and command.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    taken: list[Any] = [np.ones(1 << 28, dtype=np.uint8) for _ in range(20)]
    told = ended_well(command, run, record_property)
    del taken
    assert told.endswith(f"go on from the last checkpoint with: hsplit resume {run}")
    before = len([event for event in read_events(run / "events.jsonl") if event["event"] == "checkpoint"])
    resumed = hsplit_command("resume", run)
    until = time.monotonic() + 200
    while resumed.poll() is None and time.monotonic() < until:
        if len([event for event in read_events(run / "events.jsonl") if event["event"] == "checkpoint"]) > before + 1:
            break
        time.sleep(0.1)
    resumed.terminate()
    resumed.communicate(timeout=100)
    assert run_state(RunDirectory(run)).state == "stopped"
