"""``hsplit runs``: what state each run is in."""

from __future__ import annotations

import fcntl
import io
import json
import os
import socket
import time
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from rich.console import Console

from hsplit.cli import main
from hsplit.config import ClientConfig, Job, RunConfig
from hsplit.errors import InputError
from hsplit.observe.events import EventLog
from hsplit.observe.run_list import list_runs, runs_table
from hsplit.observe.tables import MetricsRow, MetricsTable
from hsplit.run_directory import RunDirectory


def made(runs: Path, name: str, *events: str, rounds: int = 0) -> RunDirectory:
    directory = RunDirectory.create(runs, name)
    clients = (ClientConfig(name="phone", kind="phone", memory_gb=1.0, tflops=1.0),)
    RunConfig(clients=clients, job=Job(rounds=3)).save(directory.config)
    with EventLog(directory.events) as log:
        for event in events:
            log.write(event, f"it has {event}")
    table = MetricsTable(directory.metrics, MetricsRow)
    for round_ in range(rounds + 1):
        table.append(MetricsRow(round_, 0, None, 1.0, 2.5 - round_ / 4, 0, 0.0, 0.0, 0, 0, 0.0, 1))
    return directory


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["training"], "interrupted"),
        (["training", "stopped"], "stopped"),
        (["training", "failed"], "failed"),
        (["training", "failed", "resumed", "training"], "interrupted"),
        (["training", "failed", "resumed", "training", "finished"], "complete"),
        ([], "interrupted"),
    ],
)
def test_the_last_ending_decides(tmp_path: Path, events: list[str], state: str) -> None:
    made(tmp_path, "one", *events, rounds=2)
    (run,) = list_runs(tmp_path)
    assert (run.name, run.state, run.round, run.rounds, run.val_ppl, run.clients) == ("one", state, 2, 3, 2.0, 1)
    assert run.reason == ("it has failed" if state == "failed" else "")


def test_a_run_with_a_driver_is_running_and_lets_no_other_in(tmp_path: Path) -> None:
    directory = made(tmp_path, "one", "training")
    with directory.driven():
        assert list_runs(tmp_path)[0].state == "running"
        with pytest.raises(InputError, match="one: is running"), directory.driven():
            pass
    assert list_runs(tmp_path)[0].state == "interrupted"
    with directory.driven():
        pass


def test_the_command_lists_what_is_there(tmp_path: Path) -> None:
    nothing = CliRunner().invoke(main, ["runs", "--runs-dir", str(tmp_path / "none")])
    assert nothing.exit_code == 0 and "no runs in" in nothing.output
    made(tmp_path, "good", "training", "finished", rounds=3)
    made(tmp_path, "bad", "training", "failed")
    broken = made(tmp_path, "broken", "training")
    broken.config.write_text("job: [")
    (tmp_path / "no-run").mkdir()
    shown = CliRunner().invoke(main, ["runs", "--runs-dir", str(tmp_path)])
    assert shown.exit_code == 0
    assert "3 of 3" in shown.output and "bad: it has failed" in shown.output and "unreadable" in shown.output
    as_json = CliRunner().invoke(main, ["runs", "--runs-dir", str(tmp_path), "--json"])
    found = {run["name"]: run for run in json.loads(as_json.output)}
    states = {name: run["state"] for name, run in found.items()}
    assert states == {"good": "complete", "bad": "failed", "broken": "unreadable"}
    assert (found["good"]["policy"], found["broken"]["policy"]) == ("hsplitlora", None)
    assert datetime.fromisoformat(found["good"]["changed"]).tzinfo is not None


def test_the_table_tells_policy_and_age_and_fits_80_columns(tmp_path: Path) -> None:
    made(tmp_path, "2026-11-22_09-54-12", "training", "finished", rounds=3)
    (run,) = list_runs(tmp_path)
    assert run.changed is not None
    console = Console(width=80, record=True, file=io.StringIO())
    for ago in (timedelta(seconds=7), timedelta(minutes=3), timedelta(hours=5), timedelta(days=2)):
        console.print(runs_table([run], now=run.changed + ago))
    lines = [line for line in console.export_text().splitlines() if "complete" in line]
    assert all("hsplitlora" in line and "2026-11-22_09-54-12" in line for line in lines)
    ages = [line.rstrip().rpartition("  ")[2] for line in lines]
    assert ages == ["7 s ago", "3 min ago", "5 h ago", "2 d ago"]


def test_a_driver_on_another_machine_is_known_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machines that share a directory do not see each other's locks."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError("no locks here")))
    directory = made(tmp_path, "one", "training")
    with directory.driven():
        assert list_runs(tmp_path)[0].state == "interrupted", "its own machine goes by the lock alone"
        monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
        assert list_runs(tmp_path)[0].state == "running"
        long_ago = time.time() - 3600
        os.utime(directory.driver, (long_ago, long_ago))
        assert list_runs(tmp_path)[0].state == "interrupted", "it is silent"
    assert not directory.driver.exists()
