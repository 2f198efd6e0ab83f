"""Time before training begins: ``hsplit --help``, ``hsplit plan``, and launch to the first step.

    python -m benchmarks.startup [--repeat 3]            # a part of: hsplit bench throughput

Whole processes, on the wall; the model is in the cache. A launch ends here as soon as its ``events.jsonl`` reports that
training begins: Ray, the actors, the model's parts, the data and the validation before any training are behind it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import Table
from hsplit.observe.events import read_events

CODE = "from hsplit.cli import run; run()"
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Start:
    """One command in one repeat.

    Attributes:
        command: as a user types it.
        repeat: counted from 0.
        seconds: of the wall; for a launch until training begins.
    """

    command: str
    repeat: int
    seconds: float


def starts(cluster: str, repeat: int) -> list[Start]:
    """Time every command ``repeat`` times, in turn."""
    found = []
    for index in range(repeat):
        found.append(Start("hsplit --help", index, _seconds(["--help"])))
        found.append(Start(f"hsplit plan --cluster {cluster}", index, _seconds(["plan", "--cluster", cluster])))
        found.append(Start(f"hsplit launch --cluster {cluster}", index, _until_training(cluster)))
    return found


def table(rows: Sequence[Start]) -> Table:
    """Columns and cells."""
    cells = []
    for command in dict.fromkeys(row.command for row in rows):
        seconds = [row.seconds for row in rows if row.command == command]
        cells.append([command, f"{median(seconds):.2f}", f"{min(seconds):.2f}-{max(seconds):.2f}"])
    return ["command", "s (launch: until training begins)", "spread"], cells


def _environment() -> dict[str, str]:
    # As on a machine that keeps compiled modules.
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _seconds(arguments: list[str]) -> float:
    begun = time.time()
    command = [sys.executable, "-c", CODE, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    return time.time() - begun


def _until_training(cluster: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        arguments = ["launch", "--cluster", cluster, "--runs-dir", folder, "--name", "start"]
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        try:
            while True:
                at = _event_time(Path(folder) / "start" / "events.jsonl", "training")
                if at is not None:
                    return at - begun
                if process.poll() is not None or time.time() - begun > TIMEOUT_S:
                    process.kill()
                    raise RuntimeError(f"the launch did not get to training: {process.communicate()[1]}")
                time.sleep(0.1)
        finally:
            # Twice: at once, not after the step.
            for _ in range(2):
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    time.sleep(0.5)
            process.wait(60)


def _event_time(log: Path, kind: str) -> float | None:
    times = [event["time"] for event in read_events(log) if event["event"] == kind]
    return datetime.fromisoformat(times[0]).timestamp() if times else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="startup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cluster", default="hetero")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    print(common.markdown_table(*table(starts(options.cluster, options.repeat))))


if __name__ == "__main__":
    main()
