"""Whether a simulation tells what emulated runs take, at 5, 16 and 100 clients; and what simulating itself costs.

    python -m benchmarks.simulation [--quick]        # or: hsplit bench simulation

**Cross-check**: a tiny random model and real actors, one process each, on emulated speeds: everybody waits until its
declared time has passed (``clock: emulated``). Clients of three kinds with drawn budgets. Local steps and a whole round
(steps, aggregation, validation) are measured by the wall, and held against what ``hsplit simulate`` tells of the same
cluster file (virtual). ``--quick``: 5 clients only.

**Growth**: ``hsplit simulate`` as a process of its own for 10 to 100,000 clients of ``cluster/fleet-10k.yaml``: seconds
of the wall and peak memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from hsplit.benchmark import (
    load_benchmark,
    machine_description,
    markdown_table,
    results_directory,
    show_table,
    write_rows,
)

CLUSTER = """
server: {{memory_gb: 4, tflops: {server_tflops}, num_cpus: 0.01}}
clients:
  - {{name: slow, count: {slow}, memory_gb: 1, tflops: {{uniform: [{slow_tflops}]}}, bandwidth_mbps: 10,
      latency_ms: 20, num_cpus: 0.01}}
  - {{name: fast, count: {fast}, memory_gb: 1, tflops: {{uniform: [{fast_tflops}]}}, bandwidth_mbps: 100,
      latency_ms: 5, num_cpus: 0.01}}
job:
  model: {model}
  base: fp32
  dtype: fp32
  wire: fp32
  data: {{source: "{data}"}}
  batch_size: 2
  max_length: 32
  rounds: 1000
  local_steps: {steps}
  validation: {{max_examples: 2}}
  residual: {{max_rank: 4}}
  clock: emulated
"""
POLICY = "split: 4\nranks: 4\nimportance: {metric: equal}\nreinit: random\nfreeze: never\n"
# Declared seconds of the slowest client's part of a step and of the server's, which are long against what this machine
# takes to run all the processes.
SECONDS = {5: (2.0, 1.0), 16: (3.0, 2.0), 100: (12.0, 8.0)}


@dataclass(frozen=True)
class Checked:
    """A cluster simulated and run.

    Attributes:
        clients: how many.
        step_simulated_s, round_simulated_s: virtual.
        step_measured_s, round_measured_s: of the wall: the median of steps, and the last round.
        step_off, round_off: measured by simulated, less 1.
    """

    clients: int
    step_simulated_s: float
    step_measured_s: float
    step_off: float
    round_simulated_s: float
    round_measured_s: float
    round_off: float


@dataclass(frozen=True)
class Cost:
    """What a simulation takes: seconds of the wall and peak memory of its process, imports included."""

    clients: int
    rounds: int
    wall_s: float
    peak_mb: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them down."""
    options = _options(arguments)
    console = Console(width=140)
    to: Path = options.to
    to.mkdir(parents=True, exist_ok=True)
    header = {
        **machine_description("ray", "torch", "numpy"),
        "command": " ".join(["hsplit bench simulation", *(sys.argv[1:] if arguments is None else arguments)]),
        "seeds": "0",
    }
    if options.part != "growth":
        checked = _all_checked(options, console)
        _show(checked_table(checked), to / "crosscheck.md", console)
        write_rows(to / "crosscheck.csv", [asdict(row) for row in checked], header)
    if options.part != "crosscheck":
        costs = [_cost(clients, options.rounds, console) for clients in options.growth]
        _show(cost_table(costs), to / "growth.md", console)
        write_rows(to / "growth.csv", [asdict(row) for row in costs], header)
    console.print(f"written to {to}")


def _show(table: tuple[list[str], list[list[str]]], to: Path, console: Console) -> None:
    columns, cells = table
    show_table(console, columns, cells)
    to.write_text(markdown_table(columns, cells))


def checked_table(checked: Sequence[Checked]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a row a number of clients."""
    columns = ["clients", "step simulated, s (virtual)", "step measured, s", "off"]
    columns += ["round simulated, s (virtual)", "round measured, s", "off"]
    cells = [
        [
            str(row.clients),
            f"{row.step_simulated_s:.2f}",
            f"{row.step_measured_s:.2f}",
            f"{row.step_off:+.1%}",
            f"{row.round_simulated_s:.2f}",
            f"{row.round_measured_s:.2f}",
            f"{row.round_off:+.1%}",
        ]
        for row in checked
    ]
    return columns, cells


def cost_table(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a row a number of clients."""
    cells = [[f"{c.clients:,}", str(c.rounds), f"{c.wall_s:.1f}", f"{c.peak_mb:.0f}"] for c in costs]
    return ["clients", "rounds", "seconds (wall)", "peak memory, MB"], cells


# -- cross-check --------------------------------------------------------------------------------------------------


def _all_checked(options: argparse.Namespace, console: Console) -> list[Checked]:
    import ray

    from hsplit.actors.fork_server import ForkServer
    from hsplit.actors.ray_connection import connect

    overlap = load_benchmark("overlap")
    checked: list[Checked] = []
    with tempfile.TemporaryDirectory() as name, ForkServer() as fork_server:
        folder = Path(name)
        model = overlap.tiny_model(folder / "model")
        data = overlap.texts(folder / "texts.csv", 20 * max(options.clients))
        connect(None, 4 + max(options.clients) / 10, dashboard=False, fork_server=fork_server)
        try:
            for clients in options.clients:
                checked.append(_checked(folder, model, data, clients, options.steps))
                last = checked[-1]
                console.print(f"{clients} clients: a step off by {last.step_off:+.1%}, a round {last.round_off:+.1%}")
        finally:
            ray.shutdown()
    return checked


def _checked(folder: Path, model: Path, data: Path, clients: int, steps: int) -> Checked:
    from hsplit.actors.ray_executor import RayExecutor
    from hsplit.actors.scheduler import Scheduler
    from hsplit.coordinator import Coordinator
    from hsplit.models.source import find_model
    from hsplit.observe.silent_display import SilentDisplay
    from hsplit.preparation import read_inputs
    from hsplit.run_directory import RunDirectory
    from hsplit.simulation.rounds import simulated

    run = _configured(folder, model, data, clients, steps)
    # Two rounds: in the first there is no residual yet, in the second it is at its cap.
    told = simulated(run, Scheduler(run, model), 2).rounds[-1]
    executor = RayExecutor(f"simulation-{clients}", run, model)
    try:
        directory = RunDirectory.create(folder, f"run-{clients}")
        inputs = read_inputs(run, find_model(str(model)))
        coordinator = Coordinator(run, executor, directory, inputs, SilentDisplay())
        coordinator.start()
        rounds_s: list[float] = []
        steps_s: list[float] = []
        for _ in range(2):
            begun = time.perf_counter()
            coordinator.begin_round()
            for _ in range(steps):
                since = time.perf_counter()
                coordinator.local_step(coordinator.progress.step)
                steps_s.append(time.perf_counter() - since)
            coordinator.aggregate()
            coordinator.progress.round += 1
            coordinator.validate()
            rounds_s.append(time.perf_counter() - begun)
        # The first round's steps also take what is only once.
        step_s, round_s = median(steps_s[steps:]), rounds_s[-1]
        off = step_s / told.step_s - 1, round_s / told.round_s - 1
        return Checked(clients, told.step_s, step_s, off[0], told.round_s, round_s, off[1])
    finally:
        executor.close()


def _configured(folder: Path, model: Path, data: Path, clients: int, steps: int) -> Any:
    from hsplit.actors.executor import SERVER
    from hsplit.actors.scheduler import Scheduler
    from hsplit.config import load_run_config
    from hsplit.preparation import settled

    cluster, policy = folder / "cluster.yaml", folder / "policy.yaml"
    policy.write_text(POLICY)
    slow = max(1, clients * 2 // 5)

    def configured(client_tflops: float, server_tflops: float) -> Any:
        def between(low: float, high: float) -> str:
            return f"{low * client_tflops:.12f}, {high * client_tflops:.12f}"

        speeds = {"slow_tflops": between(1, 1.5), "fast_tflops": between(2, 4)}
        sizes = {"slow": slow, "fast": clients - slow, "steps": steps}
        own = {"server_tflops": f"{server_tflops:.12f}", "model": model, "data": data}
        cluster.write_text(CLUSTER.format(**own, **speeds, **sizes))
        return settled(load_run_config(cluster, policy))

    # Speeds that make the phases as long as wanted: computing is in proportion to them.
    client_s, server_s = SECONDS[min(SECONDS, key=lambda known: abs(known - clients))]
    unit = 1e-6
    scheduler = Scheduler(configured(unit, unit), model)
    calls = scheduler.call_times_s(scheduler.plan())
    slowest = max(sum(own.values()) for name, own in calls.items() if name != SERVER)
    return configured(unit * slowest / client_s, unit * calls[SERVER]["step"] / server_s)


# -- growth -------------------------------------------------------------------------------------------------------


def _cost(clients: int, rounds: int, console: Console) -> Cost:
    command = [sys.executable, "-c", "from hsplit.cli import run; run()", "simulate", "--cluster", "fleet-10k"]
    command += ["--clients", str(clients), "--rounds", str(rounds), "--leave", "0.02", "--return", "0.2"]
    # With room for everybody, so that there is a plan for every size.
    command += ["--link-variation", "0.3", "--set", "server.memory_gb=1e8"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    console.print(f"{clients} clients: {wall_s:.1f} s")
    return Cost(clients, rounds, wall_s, used.ru_maxrss / 1e3)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hsplit bench simulation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 16, 100], help="of the cross-check")
    parser.add_argument("--steps", type=int, default=2, help="local steps of each of its two rounds")
    parser.add_argument("--growth", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=20, help="of a simulation whose cost is measured")
    parser.add_argument("--part", choices=["all", "crosscheck", "growth"], default="all", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="5 clients; simulations of up to 1,000")
    parser.add_argument("--to", type=Path, default=results_directory("simulation"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.growth = [5], [10, 100, 1000]
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
