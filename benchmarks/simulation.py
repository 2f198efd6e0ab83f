"""Simulated against emulated rounds, at 5, 16 and 100 clients; and the cost of simulating.

    python -m benchmarks.simulation [--quick]        # or: hsplit bench simulation

**Cross-check**: a tiny random model and real actors, one process each, on emulated speeds: every actor waits until its
declared time has passed (``clock: emulated``). Clients of two kinds with drawn budgets. A local step, the aggregation,
the validation and a whole round are measured by the wall, and compared with ``hsplit simulate`` on the same
cluster file (virtual). ``--quick``: 5 clients only.

**Growth**: ``hsplit simulate`` as a process of its own for 10 to 100,000 clients of ``cluster/fleet-10k.yaml``: seconds
of the wall and peak memory (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from hsplit.config import SERVER, RunConfig
from hsplit.models.spec import ModelSpec
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Coordinator
from hsplit.simulation.rounds import simulated

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
# Declared seconds of the slowest client's part of a step and of the server's, which are long against this machine's
# time to run all the processes.
SECONDS = {5: (2.0, 1.0), 16: (3.0, 2.0), 100: (12.0, 8.0)}
# Longest allowed time to simulate 20 rounds, by the number of clients.
WANTED_S = {10_000: 60.0, 100_000: 600.0}
PHASES = ("step", "aggregation", "validation", "round")


@dataclass(frozen=True)
class Checked:
    """A part of a round, simulated and measured.

    Attributes:
        clients: how many.
        phase: of :data:`PHASES`.
        simulated_s: virtual.
        measured_s: of the wall: the median of all but the first round.
        off: measured by simulated, less 1.
    """

    clients: int
    phase: str
    simulated_s: float
    measured_s: float
    off: float


@dataclass(frozen=True)
class Cost:
    """Cost of a simulation: seconds of the wall and peak memory of its process, imports included."""

    clients: int
    rounds: int
    wall_s: float
    peak_mb: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them down."""
    options = _options(arguments)
    console = Console(width=140)
    to: Path = options.to
    header = common.header_of("simulation", arguments, "ray", "torch", "numpy", seeds="0")
    if options.part != "growth":
        checked = _all_checked(options, console)
        common.write_rows(to / "crosscheck.csv", checked, header)
        common.keep_table(console, *checked_table(checked), to / "crosscheck.md")
    if options.part != "crosscheck":
        costs = [_cost(clients, options.rounds, console) for clients in options.growth]
        common.write_rows(to / "growth.csv", costs, header)
        common.keep_table(console, *cost_table(costs), to / "growth.md")
        _plot(costs, to / "growth.svg")
    console.print(f"written to {to}")


def checked_table(checked: Sequence[Checked]) -> Table:
    """Columns and cells, a row a part of a round."""
    columns = ["clients", "of a round", "simulated, s (virtual)", "measured, s", "off"]
    cells = [
        [str(row.clients), row.phase, f"{row.simulated_s:.2f}", f"{row.measured_s:.2f}", f"{row.off:+.1%}"]
        for row in checked
    ]
    return columns, cells


def cost_table(costs: Sequence[Cost]) -> Table:
    """Columns and cells, a row a number of clients."""
    cells = [[f"{c.clients:,}", str(c.rounds), f"{c.wall_s:.1f}", f"{c.peak_mb:.0f}"] for c in costs]
    return ["clients", "rounds", "seconds (wall)", "peak memory, MB"], cells


# -- cross-check --------------------------------------------------------------------------------------------------


def _all_checked(options: argparse.Namespace, console: Console) -> list[Checked]:
    most = max(options.clients)
    checked: list[Checked] = []
    with common.local_ray(4 + most / 10) as folder:
        model, data = common.tiny_model(folder / "model"), common.texts(folder / "texts.csv", 20 * most)
        for clients in options.clients:
            checked += _checked(folder, model, data, clients, options)
            console.print(f"{clients} clients: a round off by {checked[-1].off:+.1%}")
    return checked


def _checked(folder: Path, model: Path, data: Path, clients: int, options: argparse.Namespace) -> list[Checked]:
    run = _configured(folder, model, data, clients, options.steps)
    # From the second round on: in the first there is no residual yet, then it is at its cap.
    told = simulated(run, Scheduler(run, ModelSpec.read(model)), 2).rounds[-1]
    with common.on_ray(f"simulation-{clients}", run, model, folder) as (coordinator, _):
        coordinator.start()
        # The first round also includes one-time work.
        rounds = [_timed_round(coordinator, options.steps) for _ in range(options.check_rounds + 1)][1:]
    simulated_s = dict(zip(PHASES, (told.step_s, told.aggregation_s, told.validation_s, told.round_s), strict=True))
    measured_s = {phase: median(row[phase] for row in rounds) for phase in PHASES}
    return [
        Checked(clients, phase, simulated_s[phase], measured_s[phase], measured_s[phase] / simulated_s[phase] - 1)
        for phase in PHASES
    ]


def _timed_round(coordinator: Coordinator, steps: int) -> dict[str, float]:
    """Seconds of the wall of :data:`PHASES`; of a step, their median."""
    begun = time.perf_counter()
    coordinator.begin_round()
    steps_s = [common.seconds_of(coordinator.local_step, coordinator.state.step) for _ in range(steps)]
    stepped = time.perf_counter()
    coordinator.aggregate()
    aggregated = time.perf_counter()
    coordinator.state.round += 1
    coordinator.validate()
    done = time.perf_counter()
    return dict(zip(PHASES, (median(steps_s), aggregated - stepped, done - aggregated, done - begun), strict=True))


def _configured(folder: Path, model: Path, data: Path, clients: int, steps: int) -> RunConfig:
    slow = max(1, clients * 2 // 5)

    def configured(client_tflops: float, server_tflops: float) -> RunConfig:
        def between(low: float, high: float) -> str:
            return f"{low * client_tflops:.12f}, {high * client_tflops:.12f}"

        speeds = {"slow_tflops": between(1, 1.5), "fast_tflops": between(2, 4)}
        sizes = {"slow": slow, "fast": clients - slow, "steps": steps}
        own = {"server_tflops": f"{server_tflops:.12f}", "model": model, "data": data}
        return common.configured(folder, CLUSTER.format(**own, **speeds, **sizes), POLICY)

    # Speeds that make the phases as long as wanted: computing is in proportion to them.
    client_s, server_s = SECONDS[min(SECONDS, key=lambda known: abs(known - clients))]
    unit = 1e-6
    calls = common.call_times_s(configured(unit, unit), model)
    slowest = max(sum(own.values()) for name, own in calls.items() if name != SERVER)
    return configured(unit * slowest / client_s, unit * common.joined_turn_s(calls) / server_s)


# -- growth -------------------------------------------------------------------------------------------------------


def _plot(costs: Sequence[Cost], to: Path) -> None:
    figure = common.new_figure(8, 3.2)
    time_axes, memory_axes = figure.subplots(1, 2)
    clients = [cost.clients for cost in costs]
    time_axes.plot(clients, [cost.wall_s for cost in costs], marker="o", label=f"{costs[0].rounds} rounds")
    time_axes.plot([*WANTED_S], [*WANTED_S.values()], "x", color="black", label="at most")
    time_axes.set(xlabel="simulated clients", ylabel="seconds (wall)", xscale="log", yscale="log")
    time_axes.legend()
    memory_axes.plot(clients, [cost.peak_mb for cost in costs], marker="o")
    memory_axes.set(xlabel="simulated clients", ylabel="peak memory, MB", xscale="log", ylim=(0, None))
    common.save_figure(figure, to)


# The process's own peak: the figure from waiting for it starts with its parent's.
TELLING_ITS_PEAK = """
import atexit, sys
from pathlib import Path
atexit.register(lambda: sys.stderr.write(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
from hsplit.cli import run
run()
"""


def _cost(clients: int, rounds: int, console: Console) -> Cost:
    command = [sys.executable, "-c", TELLING_ITS_PEAK, "simulate", "--cluster", "fleet-10k"]
    command += ["--clients", str(clients), "--rounds", str(rounds), "--leave", "0.02", "--return", "0.2"]
    # With room for all clients, so that there is a plan for every size.
    command += ["--link-variation", "0.3", "--set", "server.memory_gb=1e8"]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wall_s = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.stderr)
    console.print(f"{clients} clients: {wall_s:.1f} s")
    return Cost(clients, rounds, wall_s, int(done.stderr.split()[-1]) / 1e3)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("simulation", __doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 16, 100], help="of the cross-check")
    parser.add_argument("--steps", type=int, default=2, help="local steps of each of its rounds")
    parser.add_argument("--check-rounds", type=int, default=3, help="its measured rounds, after one that is not")
    parser.add_argument("--growth", type=int, nargs="+", default=[10, 100, 1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=20, help="of a simulation whose cost is measured")
    parser.add_argument("--part", choices=["all", "crosscheck", "growth"], default="all", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="5 clients; simulations of up to 1,000")
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.growth = [5], [10, 100, 1000]
    return options


if __name__ == "__main__":
    main()
