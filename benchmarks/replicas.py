"""What several servers give and cost, at 4, 16 and 64 clients.

    python -m benchmarks.replicas [--clients 4 16 64] [--servers 1 2 4]        # or: hsplit bench replicas

**Speed**: a tiny random model and real actors, one process each, on emulated speeds: everybody waits until its declared
time has passed (``clock: emulated``), so that the wall shows what the declared machines would take. The server takes
0.25 declared seconds for the rows of one client, a client about one second for its own. A step is measured and held
against the plan's prediction. This machine has to run all the processes all the same, which takes the more time the
more of them there are.

**Cost**: memory that a plan reserves for each server, what the servers hand in to the first at a round's end, and what
the same number of tokens comes to: adapters of several servers are trained apart for a round and then aggregated. That
is a run in this process on the default model, by validation perplexity, with and without ``lr_scaling: sqrt``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from hsplit.benchmark import keep_table, load_benchmark, machine_description, results_directory, write_rows
from hsplit.observe.silent_display import SilentDisplay

CLUSTER = """
server: {{memory_gb: 4, tflops: {server_tflops}, num_cpus: 0.01, replicas: {servers}}}
clients:
  - {{name: client, count: {clients}, memory_gb: 1, tflops: {client_tflops}, bandwidth_mbps: 1000, latency_ms: 1,
      num_cpus: 0.01}}
job:
  model: {model}
  base: fp32
  wire: fp32
  data: {{source: "{data}"}}
  batch_size: 2
  max_length: 32
  rounds: 1000
  local_steps: {steps}
  validation: {{max_examples: 2}}
  residual: {{max_rank: full}}
  clock: emulated
"""
# At a round's end nothing is decomposed: on so small a model that would be most of the work.
SPEED_POLICY = "split: 4\nranks: 4\nimportance: {metric: equal}\nreinit: random\nfreeze: never\n"
# Declared seconds of a server for the rows of one client, and of a client for its own.
SERVER_S_A_CLIENT, CLIENT_S = 0.25, 1.0
LEARNING = ["job.local_steps=6", "job.rounds=4", "job.batch_size=1", "job.data.partition=iid"]


@dataclass(frozen=True)
class Speed:
    """A step on emulated speeds.

    Attributes:
        clients, servers: how many there are.
        predicted_s: of a step, by the plan (virtual).
        measured_s: of a step, seconds of the wall, the median.
        server_mb: memory that the plan reserves for each server.
        handed_in_mb: adapters of the other servers that go to the first at a round's end.
        start_s: of the wall, until everybody is there and has its layers.
    """

    clients: int
    servers: int
    predicted_s: float
    measured_s: float
    server_mb: float
    handed_in_mb: float
    start_s: float


@dataclass(frozen=True)
class Learned:
    """A run of the default model.

    Attributes:
        clients, servers: how many there are.
        lr_scaling: the policy's, of clients and of servers.
        tokens: supervised tokens trained on.
        val_ppl: validation perplexity at the end.
    """

    clients: int
    servers: int
    lr_scaling: str
    tokens: int
    val_ppl: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it down."""
    options = _options(arguments)
    console = Console(width=140)
    to: Path = options.to
    to.mkdir(parents=True, exist_ok=True)
    header = {
        **machine_description("ray", "torch"),
        "command": " ".join(["hsplit bench replicas", *(sys.argv[1:] if arguments is None else arguments)]),
        "seeds": "1",
        "steps": f"{options.steps} a setting, of which the first two do not count",
        "learning": f"the default job with {', '.join(LEARNING)}",
    }
    if options.part != "learning":
        speeds = _speeds(options, console)
        keep_table(console, *speed_table(speeds), to / "speed.md")
        write_rows(to / "speed.csv", [asdict(row) for row in speeds], header)
        _plot(speeds, to / "replicas.svg")
    if options.part != "speed":
        learned = _all_learned(options, console)
        keep_table(console, *learning_table(learned), to / "learning.md")
        write_rows(to / "learning.csv", [asdict(row) for row in learned], header)
    console.print(f"written to {to}")


def speed_table(speeds: Sequence[Speed]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a row a number of clients and servers."""
    columns = ["clients", "servers", "step predicted, s (virtual)", "step measured, s", "faster than one server by"]
    columns += ["each server, MB", "servers hand in, MB"]
    cells = []
    for row in speeds:
        one = next((s for s in speeds if (s.clients, s.servers) == (row.clients, 1)), None)
        gain = "" if one is None else f"{one.measured_s / row.measured_s:.2f}"
        cells.append(
            [
                str(row.clients),
                str(row.servers),
                f"{row.predicted_s:.2f}",
                f"{row.measured_s:.2f}",
                gain,
                f"{row.server_mb:.1f}",
                f"{row.handed_in_mb:.2f}",
            ]
        )
    return columns, cells


def learning_table(learned: Sequence[Learned]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, a row a number of clients and servers."""
    cells = [
        [str(row.clients), str(row.servers), row.lr_scaling, f"{row.tokens:,}", f"{row.val_ppl:.3f}"] for row in learned
    ]
    return ["clients", "servers", "lr_scaling", "tokens", "perplexity"], cells


# -- speed --------------------------------------------------------------------------------------------------------


def _speeds(options: argparse.Namespace, console: Console) -> list[Speed]:
    tiny = load_benchmark("tiny_cluster")
    most = max(options.clients)
    found = []
    with tiny.local_ray(4 + most / 10) as folder:
        model, data = tiny.tiny_model(folder / "model"), tiny.texts(folder / "texts.csv", 20 * most)
        for clients in options.clients:
            for servers in options.servers:
                found.append(_speed(folder, model, data, clients, servers, options))
                last = found[-1]
                console.print(
                    f"{clients} clients, {servers} servers: {last.measured_s:.2f} s a step, predicted"
                    f" {last.predicted_s:.2f}"
                )
    return found


def _speed(folder: Path, model: Path, data: Path, clients: int, servers: int, options: argparse.Namespace) -> Speed:
    from hsplit.actors.ray_executor import RayExecutor
    from hsplit.actors.replica import Replica
    from hsplit.coordinator import Coordinator
    from hsplit.models.source import find_model
    from hsplit.preparation import read_inputs
    from hsplit.run_directory import RunDirectory

    run = _configured(folder, model, data, clients, servers, options.steps)
    executor = RayExecutor(f"replicas-{clients}-{servers}", run, model)
    try:
        directory = RunDirectory.create(folder, f"{clients}-{servers}")
        inputs = read_inputs(run, find_model(str(model)))
        coordinator = Coordinator(run, executor, directory, inputs, SilentDisplay())
        begun = time.perf_counter()
        coordinator.start()
        start_s = time.perf_counter() - begun
        coordinator.begin_round()
        seconds = []
        for step in range(options.steps):
            begun = time.perf_counter()
            coordinator.local_step(step)
            seconds.append(time.perf_counter() - begun)
        handed = executor.get([executor.call_pair(name, Replica.hand_in)[0] for name in run.server.names[1:]])
        return Speed(
            clients,
            servers,
            coordinator.standing.plan.makespan_s,
            # The first step also takes what is only once.
            median(seconds[2:]),
            coordinator.standing.plan.server.predicted_bytes / 1e6,
            sum(handed) / 1e6,
            start_s,
        )
    finally:
        executor.close()


def _configured(folder: Path, model: Path, data: Path, clients: int, servers: int, steps: int) -> Any:
    from hsplit.actors.executor import SERVER
    from hsplit.actors.scheduler import Scheduler
    from hsplit.config import load_run_config
    from hsplit.preparation import settled

    cluster, policy = folder / "cluster.yaml", folder / "policy.yaml"
    policy.write_text(SPEED_POLICY)

    def configured(client_tflops: float, server_tflops: float, clients: int, servers: int) -> Any:
        speeds = {"client_tflops": f"{client_tflops:.12f}", "server_tflops": f"{server_tflops:.12f}"}
        sizes = {"clients": clients, "servers": servers, "steps": steps}
        cluster.write_text(CLUSTER.format(model=model, data=data, **speeds, **sizes))
        return settled(load_run_config(cluster, policy, ["job.dtype=fp32"]))

    # Speeds that make the phases as long as wanted: computing is in proportion to them.
    unit = 1e-3
    scheduler = Scheduler(configured(unit, unit, 1, 1), model)
    calls = scheduler.call_times_s(scheduler.plan())
    own = next(phases for name, phases in calls.items() if name != SERVER)
    return configured(
        unit * (own["up"] + own["down"]) / CLIENT_S, unit * calls[SERVER]["step"] / SERVER_S_A_CLIENT, clients, servers
    )


def _plot(speeds: Sequence[Speed], to: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for clients in dict.fromkeys(row.clients for row in speeds):
        own = [row for row in speeds if row.clients == clients]
        (line,) = axes.plot(
            [row.servers for row in own], [row.measured_s for row in own], "o-", label=f"{clients} clients, measured"
        )
        axes.plot(
            [row.servers for row in own],
            [row.predicted_s for row in own],
            "x--",
            color=line.get_color(),
            label="predicted (virtual)",
        )
    axes.set(xlabel="servers", ylabel="declared seconds a step", xscale="log", yscale="log")
    axes.set_xticks(
        sorted({row.servers for row in speeds}), labels=[str(s) for s in sorted({r.servers for r in speeds})]
    )
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(to)


# -- learning -----------------------------------------------------------------------------------------------------


def _all_learned(options: argparse.Namespace, console: Console) -> list[Learned]:
    found = []
    for clients in options.learning_clients:
        for servers in options.servers:
            for scaling in options.lr_scaling:
                found.append(_learned(clients, servers, scaling, options.model))
                told = f"{clients} clients, {servers} servers, lr_scaling {scaling}"
                console.print(f"{told}: perplexity {found[-1].val_ppl:.3f}")
    return found


def _learned(clients: int, servers: int, scaling: str, model: str | None) -> Learned:
    from hsplit.config import load_run_config
    from hsplit.local_run import local_run
    from hsplit.models.source import find_model
    from hsplit.preparation import read_inputs, settled
    from hsplit.run_directory import RunDirectory

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = folder / "cluster.yaml"
        cluster.write_text(
            f"server: {{memory_gb: 64, tflops: 2, replicas: {servers}}}\n"
            f"clients: [{{name: client, count: {clients}, memory_gb: 0.3, tflops: 0.5}}]\n"
            + ("" if model is None else f"job: {{model: {model}}}\n")
        )
        run = settled(load_run_config(cluster, None, [*LEARNING, f"policy.lr_scaling={scaling}"]))
        source = find_model(run.job.model)
        directory = RunDirectory.create(folder, "run")
        watch = SilentDisplay()
        local_run(run, source.directory, directory, read_inputs(run, source), watch).run()
    return Learned(clients, servers, scaling, watch.rows[-1].tokens, watch.rows[-1].val_ppl)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hsplit bench replicas", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="local steps; the first two, measured for memory, do not count",
    )
    parser.add_argument("--learning-clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--lr-scaling", nargs="+", choices=["none", "sqrt"], default=["none", "sqrt"])
    parser.add_argument("--model", help="what learns; default: the job's own")
    parser.add_argument("--part", choices=["all", "speed", "learning"], default="all", help="what to measure")
    parser.add_argument("--to", type=Path, default=results_directory("replicas"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
