"""The process that tidies up after a driver, however that ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hsplit.cluster.cleanup import MARK, CleanupProcess

DRIVER = """
import os, subprocess, sys
from hsplit.cluster.cleanup import MARK, CleanupProcess

cleanup = CleanupProcess()
(cleanup.root / "socket").write_text("")
cleanup.remove_at_end(sys.argv[1] + "/.partial-*", sys.argv[1] + "/.*.tmp")
child = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: str(cleanup.root)})
print(cleanup.root, child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_driver_that_ends_well_has_its_folder_removed(tmp_path: Path) -> None:
    with CleanupProcess() as cleanup:
        (cleanup.root / "folder").mkdir()
        (tmp_path / ".half.tmp").write_text("")
        cleanup.remove_at_end(tmp_path / ".*.tmp")
        root = cleanup.root
        assert root.stat().st_mode & 0o077 == 0, "for this user alone"
    assert not root.exists() and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
def test_a_driver_that_is_killed_leaves_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hsplit.cluster import cleanup

    monkeypatch.delenv(MARK, raising=False)
    partial = tmp_path / ".partial-round-0001"
    partial.mkdir()
    (partial / "server.safetensors").write_text("half")
    (tmp_path / ".metrics.csv.77.tmp").write_text("half")
    (tmp_path / "metrics.csv").write_text("whole")
    driver = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True)
    assert driver.returncode == -9, driver.stderr
    root, pid = driver.stdout.split()
    until = time.monotonic() + cleanup._PATIENCE_S + 30
    # A process that does not end by itself is ended after the patience.
    while (Path(root).exists() or _alive(int(pid))) and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(root).exists() and not _alive(int(pid))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_other_processes_are_let_alone() -> None:
    with CleanupProcess() as cleanup:
        other = subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: f"{cleanup.root}-another"})
    assert other.poll() is None
    other.kill()
    other.wait()
