"""SIGKILL of the driver in the middle of a round, then ``hsplit resume``: no number changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hsplit.observe.metrics import read_metrics


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from hsplit.cli import main; main()", *map(str, arguments)]


@pytest.mark.drill
def test_killed_driver_resumes_to_the_same_metrics(cluster_file: Path, tmp_path: Path) -> None:
    launch = _command("launch", "--cluster", cluster_file, "--runs-dir", tmp_path, "--set", "local_steps=10")
    subprocess.run([*launch, "--name", "whole"], check=True, stdout=subprocess.DEVNULL)

    driver = subprocess.Popen([*launch, "--name", "killed"], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert driver.stdout is not None
    for line in driver.stdout:
        # Printed every few steps: round 2 is under way and its end is not yet near.
        if line.startswith("round 2/3 step"):
            driver.send_signal(signal.SIGKILL)
            break
    assert driver.wait() == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == ["round-0000", "round-0001"], "the kill came in the middle of round 2"

    subprocess.run(_command("resume", tmp_path / "killed"), check=True, stdout=subprocess.DEVNULL)
    whole, killed = (
        read_metrics(tmp_path / name / "metrics.csv").drop(columns="wall_time_s") for name in ("whole", "killed")
    )
    assert whole.to_csv() == killed.to_csv()


@pytest.mark.drill
def test_ctrl_c_in_a_terminal_ends_after_the_step_and_resumes(cluster_file: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to every process of the group, Ray's included; only the driver may heed it."""
    launch = _command("launch", "--cluster", cluster_file, "--runs-dir", tmp_path, "--set", "local_steps=10")
    driver = subprocess.Popen([*launch, "--name", "stopped"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None
    printed = []
    for line in driver.stdout:
        printed.append(line)
        if line.startswith("round 2/3 step"):
            os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait() == 130
    assert any("hsplit resume" in line for line in printed)
    names = sorted(p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert names[-1].startswith("round-0001-step-00"), names
    subprocess.run(_command("resume", tmp_path / "stopped"), check=True, stdout=subprocess.DEVNULL)
    assert list(read_metrics(tmp_path / "stopped" / "metrics.csv")["round"]) == [0, 1, 2, 3]
