"""A run on a machine that lacks nearly everything: it starts, and goes on after its reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hsplit.observe.run_list import run_state
from hsplit.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]


def test_no_home_a_long_tmpdir_modules_of_pythons_names_and_no_reader(cluster_file: Path, tmp_path: Path) -> None:
    temporary = tmp_path / ("x" * 90)
    temporary.mkdir()
    for name in ("random", "queue", "types", "cmd", "selectors", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "HOME": "/proc/nohome",
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        "PYTHONIOENCODING": "ascii",
    }
    code = "from hsplit.cli import run; run()"
    arguments = ["launch", "--cluster", str(cluster_file), "--name", "poor", "--set", "job.rounds=1"]
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-P", "-c", code, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run poor\n" and "Traceback" not in done.stderr
    assert run_state(RunDirectory.open(tmp_path / "runs" / "poor")).state == "complete"
    assert not Path("/proc/nohome").exists() and not (tmp_path / "~").exists()
