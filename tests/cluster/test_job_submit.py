"""``ray job submit`` of a launch, on a Ray that was started as docs/clusters.md says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsplit.observe.tables import read_metrics

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]
_PATIENCE_S = 120.0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def head() -> Iterator[str]:
    """A head node with a dashboard, which takes jobs; gives the dashboard's URL."""
    port, dashboard, agent = _free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:
        log = Path(temporary) / "log"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=6"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *("--node-ip-address=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir={temporary}"),
        ]
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
                start_new_session=True,
            )
        try:
            until = time.monotonic() + _PATIENCE_S
            while "Ray runtime started" not in log.read_text():
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.1)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            # `ray start --block` ends what it has started; its session is killed in any case.
            process.terminate()
            try:
                process.wait(30)
            finally:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_submitted_launch_runs_on_the_cluster(head: str, cluster_file: Path, tmp_path: Path) -> None:
    (working := tmp_path / "working").mkdir()
    shutil.copy(cluster_file, working / "mine.yaml")
    launch = "from hsplit.cli import run; run()"
    submitted = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head),
            *("--working-dir", str(working), "--", sys.executable, "-c", launch, "launch"),
            *("--cluster", "mine.yaml", "--address", "auto", "--set", "rounds=1", "--set", "local_steps=2"),
            *("--set", "server.replicas=2"),
            *("--runs-dir", str(tmp_path / "runs"), "--name", "submitted"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-2000:]
    metrics = read_metrics(tmp_path / "runs" / "submitted" / "metrics.csv")
    assert metrics["round"].tolist() == [0, 1]
    assert (metrics["available_clients"] == 3).all()
