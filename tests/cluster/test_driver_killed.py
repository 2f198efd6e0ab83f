"""The driver ends in every way there is: nothing is lost, nothing is left behind, and no number changes."""

from __future__ import annotations

import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hsplit.cluster.cleanup import MARK
from hsplit.observe.events import read_events
from hsplit.observe.run_list import list_runs
from hsplit.observe.tables import read_metrics
from tests.cluster.killing import without_wall_time

pytestmark = pytest.mark.drill

# Ray's processes end by themselves within seconds; the cleanup process ends what has not.
_GONE_S = 40.0


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The driver's folder for temporary files: a socket's path in it has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="t"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _started(temporary: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from hsplit.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def _wait_for_line(driver: subprocess.Popen[str], start: str) -> list[str]:
    """What the driver prints up to a line that begins with ``start``."""
    assert driver.stdout is not None
    printed = []
    for line in driver.stdout:
        printed.append(line)
        if line.startswith(start):
            return printed
    raise AssertionError(f"no line {start!r}: {printed[-3:]} {driver.stderr.read() if driver.stderr else ''}")


def _left(temporary: Path, run: Path) -> list[str]:
    """Processes, files and shared memory of a driver that is gone."""
    found = [str(path) for path in temporary.iterdir()]
    found += [str(path) for path in run.rglob("*") if "partial" in path.name or path.name.endswith(".tmp")]
    for entry in glob.glob("/proc/[0-9]*"):
        try:
            environment = Path(entry, "environ").read_bytes().split(b"\0")
            if any(value.startswith(f"{MARK}={temporary}".encode()) for value in environment):
                found.append(Path(entry, "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


def _assert_nothing_left(temporary: Path, run: Path, shared_memory: set[str]) -> None:
    until = time.monotonic() + _GONE_S
    while (left := _left(temporary, run)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    assert set(os.listdir("/dev/shm")) <= shared_memory


def _state(run: Path) -> str:
    (found,) = [state for state in list_runs(run.parent) if state.name == run.name]
    return found.state


@pytest.mark.parametrize("end", ["success", "failure", "Ctrl-C", "SIGKILL"])
def test_nothing_is_left_behind(cluster_file: Path, tmp_path: Path, temporary: Path, end: str) -> None:
    before, run = set(os.listdir("/dev/shm")), tmp_path / "tidy"
    steps = ["--set", "local_steps=10"]
    driver = _started(temporary, "launch", "--cluster", cluster_file, "--runs-dir", tmp_path, "--name", "tidy", *steps)
    printed = _wait_for_line(driver, "round 2/3 step")
    assert _left(temporary, run), "there is something to tidy up"
    assert _state(run) == "running"
    if end == "success":
        # Held up, so that it cannot end before the second has looked.
        driver.send_signal(signal.SIGSTOP)
        second = _started(temporary, "resume", run)
        _, error = second.communicate()
        driver.send_signal(signal.SIGCONT)
        assert second.returncode == 2 and "tidy: is running" in error
    elif end == "failure":
        # The table of metrics cannot be written any more.
        (run / "metrics.csv").unlink()
        (run / "metrics.csv").mkdir()
    elif end == "Ctrl-C":
        # A terminal sends it to every process of the group, Ray's included; only the driver may heed it.
        os.killpg(driver.pid, signal.SIGINT)
    elif end == "SIGKILL":
        driver.kill()
    out, error = driver.communicate()
    expected = {"success": 0, "failure": 1, "Ctrl-C": 130, "SIGKILL": -signal.SIGKILL}
    assert driver.returncode == expected[end], error
    _assert_nothing_left(temporary, run, before)
    states = {"success": "complete", "failure": "failed", "Ctrl-C": "stopped", "SIGKILL": "interrupted"}
    assert _state(run) == states[end]
    if end == "failure":
        assert "error: round 2: a file could not be written: " in error and "Traceback" not in error
        assert error.strip().endswith(f"go on from the last checkpoint with: hsplit resume {run}")
    elif end == "Ctrl-C":
        assert "hsplit resume" in out
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert names[-1].startswith("round-0001-step-00"), (names, printed[-1])
        resumed = _started(temporary, "resume", run)
        assert resumed.wait() == 0
        assert list(read_metrics(run / "metrics.csv")["round"]) == [0, 1, 2, 3]


def test_a_driver_killed_ten_times_changes_no_number(cluster_file: Path, tmp_path: Path, temporary: Path) -> None:
    """Killed at random moments, of its start too; metrics.csv is the same to the last byte but for the wall's clock."""
    launch: list[Any] = ["launch", "--cluster", cluster_file, "--runs-dir", tmp_path]
    settings = {"rounds": 60, "faults.deadline": "null", "policy.replan.measured": "false"}
    launch += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    whole = _started(temporary, *launch, "--name", "whole")
    assert whole.communicate() and whole.returncode == 0

    run, draw, moments = tmp_path / "killed", random.Random(0), []
    for number in range(10):
        # Killed before its first checkpoint it begins again.
        command = ["resume", run] if (run / "config.yaml").exists() else [*launch, "--name", "killed"]
        driver = _started(temporary, *command)
        if number % 3 == 2:
            delay = draw.uniform(0.5, 8.0)
        else:
            _wait_for_line(driver, "round ")
            delay = draw.uniform(0.0, 3.0)
        ending = threading.Timer(delay, driver.kill)
        ending.start()
        driver.communicate()
        ending.cancel()
        assert driver.returncode == -signal.SIGKILL, "the run is long enough for ten kills"
        moments.append(len(read_metrics(run / "metrics.csv")) if (run / "metrics.csv").exists() else 0)
    last = _started(temporary, "resume", run)
    assert last.communicate() and last.returncode == 0
    assert without_wall_time(run / "metrics.csv") == without_wall_time(tmp_path / "whole" / "metrics.csv")
    assert len(set(moments)) > 1, "the kills came in different rounds"
    assert len([event for event in read_events(run / "events.jsonl") if event["event"] == "resumed"]) >= 5
