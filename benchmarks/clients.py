"""Cost of many clients: time of a round, and memory of driver, scheduler and server, against the number of clients.

    python -m benchmarks.clients [--clients 10 30 100] [--rounds 30]        # or: hsplit bench clients

A tiny random model and real actors, one process each, on this machine. So it measures the orchestrator's
overhead: calls, messages, aggregation, checkpoints. Memory is the unique set size of a process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from hsplit.config import SCHEDULER, SERVER
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import MetricsRow

CLUSTER = """
server: {{memory_gb: 4, tflops: 1}}
clients: [{{name: client, count: {clients}, memory_gb: 0.01, tflops: 0.01, num_cpus: 0.01}}]
job:
  model: {model}
  base: fp32
  wire: fp32
  data: {{source: "{data}"}}
  batch_size: 2
  max_length: 32
  rounds: {rounds}
  local_steps: {steps}
  validation: {{max_examples: 2}}
"""
# Rounds after which memory is expected to stay: the residual is at its cap, and every table has its first rows.
SETTLED = 5


@dataclass(frozen=True)
class Round:
    """One round of one run.

    Attributes:
        clients: of the run.
        round: counted from 1.
        seconds: of the wall, its aggregation, validation and checkpoint included.
        driver_mb, scheduler_mb, server_mb: memory at its end.
        virtual_s: its time at the declared budgets.
    """

    clients: int
    round: int
    seconds: float
    driver_mb: float
    scheduler_mb: float
    server_mb: float
    virtual_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every number of clients, print the table and write it down."""
    options = _options(arguments)
    console = Console(width=120)
    rounds: list[Round] = []
    starts: dict[int, float] = {}
    for clients in options.clients:
        starts[clients], found = run_of(clients, options.rounds, options.steps)
        rounds += found
        console.print(f"{clients} clients: {starts[clients]:.1f} s to the first step, {len(found)} rounds")
    to: Path = options.to
    machine = common.machine_description("ray", "torch")
    header = {**machine, "rounds": options.rounds, "local_steps": options.steps}
    common.write_rows(to / "clients.csv", rounds, header)
    common.keep_table(console, *table(rounds, starts), to / "clients.md")
    _plot(rounds, to / "clients.svg")
    console.print(f"written to {to}")


def run_of(clients: int, rounds: int, steps: int) -> tuple[float, list[Round]]:
    """Train with ``clients`` clients on a Ray of its own; seconds until the first step, and the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = common.tiny_model(folder / "model"), common.texts(folder / "texts.csv", 20 * clients)
        cluster = CLUSTER.format(clients=clients, model=model, data=data, rounds=rounds, steps=steps)
        run = common.configured(folder, cluster, overrides=["job.dtype=fp32"])
        watch = _Watch(clients)
        begun = time.perf_counter()
        with (
            common.local_ray(4 + clients / 10),
            common.on_ray("clients", run, model, folder, watch) as (coordinator, executor),
        ):
            watch.pids |= {name: common.pid_of(executor, name) for name in (SCHEDULER, SERVER)}
            coordinator.run()
    return watch.trained_at - begun, watch.rounds


class _Watch(SilentDisplay):
    """A display that looks at memory and at the clock when a round is done."""

    def __init__(self, clients: int) -> None:
        super().__init__()
        self._clients, self.pids = clients, {"driver": os.getpid()}
        self.rounds: list[Round] = []
        self.trained_at = self._last = 0.0
        self._virtual_s = 0.0

    def round_done(self, row: MetricsRow, *more: Any) -> None:
        now = time.perf_counter()
        if row.round == 0:
            self.trained_at = now
        else:
            memory = {f"{name}_mb": _memory_mb(pid) for name, pid in self.pids.items()}
            virtual_s = row.virtual_time_s - self._virtual_s
            self.rounds.append(Round(self._clients, row.round, now - self._last, **memory, virtual_s=virtual_s))
        self._last, self._virtual_s = time.perf_counter(), row.virtual_time_s


def _memory_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_full_info().uss) / 1e6


def table(rounds: Sequence[Round], starts: dict[int, float]) -> Table:
    """Columns and cells: time of a round, and memory once it has settled and at the end."""
    columns = ["clients", "start, s", "round, s", "a client, ms"]
    columns += [f"{name}, MB" for name in ("driver", "scheduler", "server")]
    cells = []
    for clients, start in starts.items():
        own = [row for row in rounds if row.clients == clients]
        seconds = median(row.seconds for row in own)
        first, last = own[min(SETTLED, len(own)) - 1], own[-1]
        memory = [
            f"{getattr(first, name):.0f} to {getattr(last, name):.0f}"
            for name in ("driver_mb", "scheduler_mb", "server_mb")
        ]
        cells.append([str(clients), f"{start:.1f}", f"{seconds:.2f}", f"{1e3 * seconds / clients:.0f}", *memory])
    return columns, cells


def _plot(rounds: Sequence[Round], to: Path) -> None:
    figure = common.new_figure(9, 3.5)
    time_axes, memory_axes = figure.subplots(1, 2)
    numbers = list(dict.fromkeys(row.clients for row in rounds))
    times = [median(row.seconds for row in rounds if row.clients == clients) for clients in numbers]
    time_axes.plot(numbers, times, marker="o")
    time_axes.set(xlabel="clients", ylabel="seconds a round (median)", xlim=(0, None), ylim=(0, None))
    most = [row for row in rounds if row.clients == max(numbers)]
    for name in ("driver", "scheduler", "server"):
        memory_axes.plot([row.round for row in most], [getattr(row, f"{name}_mb") for row in most], label=name)
    memory_axes.set(xlabel=f"round, {max(numbers)} clients", ylabel="memory, MB", ylim=(0, None))
    memory_axes.legend()
    common.save_figure(figure, to)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("clients", __doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="local steps a round")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
