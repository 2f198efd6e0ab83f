"""Gain and cost of several servers, at 4, 16 and 64 clients.

    python -m benchmarks.replicas [--clients 4 16 64] [--servers 1 2 4]        # or: hsplit bench replicas

**Speed**: a tiny random model and real actors, one process each, on emulated speeds: every actor waits until its
declared time has passed (``clock: emulated``), so that wall time is that of the declared machines. The server takes
0.25 declared seconds for the rows of one client, a client about one second for its own. A step is measured and held
against the plan's prediction. This machine still has to run all the processes, which takes more time the more of them
there are.

**Cost**: memory that a plan reserves for each server, the adapters that the servers hand in to the first at a round's
end, and learning at equal tokens: adapters of several servers are trained separately for a round and then aggregated.
That is a run in this process on the default model, by validation perplexity, with and without ``lr_scaling: sqrt``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from hsplit.actors.replica import Replica
from hsplit.config import SERVER, RunConfig
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import perplexities

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
        clients, servers: their numbers.
        predicted_s: of a step, by the plan (virtual).
        measured_s: of a step, seconds of the wall, the median.
        server_mb: memory that the plan reserves for each server.
        handed_in_mb: adapters of the other servers that go to the first at a round's end.
        start_s: of the wall, until every actor has started and has its layers.
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
        clients, servers: their numbers.
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
    header = common.header_of(
        "replicas",
        arguments,
        "ray",
        "torch",
        seeds="1",
        steps=f"{options.steps} a setting, of which the first two do not count",
        learning=f"the default job with {', '.join(LEARNING)}",
    )
    if options.part != "learning":
        speeds = _speeds(options, console)
        common.write_rows(to / "speed.csv", speeds, header)
        common.keep_table(console, *speed_table(speeds), to / "speed.md")
        _plot(speeds, to / "replicas.svg")
    if options.part != "speed":
        learned = _all_learned(options, console)
        common.write_rows(to / "learning.csv", learned, header)
        common.keep_table(console, *learning_table(learned), to / "learning.md")
    console.print(f"written to {to}")


def speed_table(speeds: Sequence[Speed]) -> Table:
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


def learning_table(learned: Sequence[Learned]) -> Table:
    """Columns and cells, a row a number of clients and servers."""
    cells = [
        [str(row.clients), str(row.servers), row.lr_scaling, f"{row.tokens:,}", f"{row.val_ppl:.3f}"] for row in learned
    ]
    return ["clients", "servers", "lr_scaling", "tokens", "perplexity"], cells


# -- speed --------------------------------------------------------------------------------------------------------


def _speeds(options: argparse.Namespace, console: Console) -> list[Speed]:
    most = max(options.clients)
    found = []
    with common.local_ray(4 + most / 10) as folder:
        model, data = common.tiny_model(folder / "model"), common.texts(folder / "texts.csv", 20 * most)
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
    run = _configured(folder, model, data, clients, servers, options.steps)
    with common.on_ray(f"replicas-{clients}-{servers}", run, model, folder) as (coordinator, executor):
        start_s = common.seconds_of(coordinator.start)
        coordinator.begin_round()
        seconds = [common.seconds_of(coordinator.local_step, step) for step in range(options.steps)]
        handed = executor.get([executor.call_pair(name, Replica.collect)[0] for name in run.server.names[1:]])
        plan = coordinator.context.plan
    # The first step also includes one-time work.
    measured_s, server_mb = median(seconds[2:]), plan.server.predicted_bytes / 1e6
    return Speed(clients, servers, plan.makespan_s, measured_s, server_mb, sum(handed) / 1e6, start_s)


def _configured(folder: Path, model: Path, data: Path, clients: int, servers: int, steps: int) -> RunConfig:
    def configured(client_tflops: float, server_tflops: float, clients: int, servers: int) -> RunConfig:
        speeds = {"client_tflops": f"{client_tflops:.12f}", "server_tflops": f"{server_tflops:.12f}"}
        sizes = {"clients": clients, "servers": servers, "steps": steps}
        cluster = CLUSTER.format(model=model, data=data, **speeds, **sizes)
        return common.configured(folder, cluster, SPEED_POLICY, ["job.dtype=fp32"])

    # Speeds that make the phases as long as wanted: computing is in proportion to them.
    unit = 1e-3
    calls = common.call_times_s(configured(unit, unit, 1, 1), model)
    own = next(phases for name, phases in calls.items() if name != SERVER)
    client_tflops, server_tflops = (own["up"] + own["down"]) / CLIENT_S, common.joined_turn_s(calls) / SERVER_S_A_CLIENT
    return configured(unit * client_tflops, unit * server_tflops, clients, servers)


def _plot(speeds: Sequence[Speed], to: Path) -> None:
    figure = common.new_figure(6, 3.5)
    axes = figure.subplots()
    for clients in dict.fromkeys(row.clients for row in speeds):
        own = [row for row in speeds if row.clients == clients]
        servers = [row.servers for row in own]
        (line,) = axes.plot(servers, [row.measured_s for row in own], "o-", label=f"{clients} clients, measured")
        predicted_s = [row.predicted_s for row in own]
        axes.plot(servers, predicted_s, "x--", color=line.get_color(), label="predicted (virtual)")
    axes.set(xlabel="servers", ylabel="declared seconds a step", xscale="log", yscale="log")
    ticks = sorted({row.servers for row in speeds})
    axes.set_xticks(ticks, labels=[str(servers) for servers in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    common.save_figure(figure, to)


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
    cluster = (
        f"server: {{memory_gb: 64, tflops: 2, replicas: {servers}}}\n"
        f"clients: [{{name: client, count: {clients}, memory_gb: 0.3, tflops: 0.5}}]\n"
        + ("" if model is None else f"job: {{model: {model}}}\n")
    )
    with tempfile.TemporaryDirectory() as name:
        run = common.configured(Path(name), cluster, None, [*LEARNING, f"policy.lr_scaling={scaling}"])
    source, inputs = common.read(run)
    watch = SilentDisplay()
    with common.in_process(run, source.directory, inputs, watch) as (coordinator, _):
        coordinator.run()
    return Learned(clients, servers, scaling, watch.rows[-1].tokens, perplexities(watch.rows)[-1][1])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("replicas", __doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2, 4])
    steps = "local steps; the first two, measured for memory, do not count"
    parser.add_argument("--steps", type=int, default=4, help=steps)
    parser.add_argument("--learning-clients", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--lr-scaling", nargs="+", choices=["none", "sqrt"], default=["none", "sqrt"])
    parser.add_argument("--model", help="what learns; default: the job's own")
    parser.add_argument("--part", choices=["all", "speed", "learning"], default="all", help="what to measure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
