"""Examples a second: hsplit on Ray against what people would write instead, interleaved in one run.

    hsplit bench throughput [--data devset.csv] [--parts step ...] [--dtypes fp32 bf16] [--repeat 5] [--steps 2]

Every contender trains the same model on the same examples at the same rank, and is given the same steps in turn: while
one computes, the others wait. What counts are the ratios of seconds within one repeat. hsplit is the product: actors,
messages, optimizers. The rivals are in ``rivals.py``. Further parts serve an NF4 base to 4 and to 16 clients, joined by
depth and one client after another; hold what travels and what a client takes of memory against the tensors and against
a federated client (``footprint.py``); cut batches into microbatches on emulated speeds (``overlap.py``); and time the
start (``startup.py``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from hsplit.actors.fork_server import MODULES, ForkServer
from hsplit.benchmark import (
    load_benchmark,
    machine_description,
    markdown_table,
    results_directory,
    show_table,
    write_rows,
)
from hsplit.observe.silent_display import SilentDisplay
from hsplit.observe.timing import timing_rows
from hsplit.observe.timing_record import step_shares

PARTS = ("step", "server", "client", "overlap", "start")
WARM_UP = 2
ROUNDS_BEFORE = 4
# Numbers of clients that the server phase is timed with, and most repeats of each: a repeat of many takes long.
SERVER_REPEATS = {4: 5, 16: 3}
CLUSTER = """
server: {{memory_gb: 8, tflops: 2}}
clients: [{{name: client, count: {clients}, memory_gb: 2, tflops: 1}}]
job:
  base: {base}
  dtype: {dtype}
  data: {{source: "{data}", partition: iid}}
  wire: {wire}
  rounds: 1000
  local_steps: {local_steps}
  validation: {{share: 0.1, max_examples: 2}}
"""
POLICY = """
split: {split}
ranks: {rank}
importance: {{metric: equal}}
freeze: never
"""

# Steps [first, first + count) to seconds of the wall and the last loss.
Contender = Callable[[int, int], tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """One contender in one repeat.

    Attributes:
        dtype: of base, computation and wire.
        contender: ``hsplit``, ``hsplit-later`` (after some rounds, with a residual) or a rival.
        repeat: counted from 0.
        seconds: of the wall, a step.
        examples_per_s: examples of all clients a second.
        loss: mean loss of the last step.
        overhead: hsplit only: part of the time that was not the model's arithmetic, on the way that everybody waits
            for: the slowest client's and the server's.
    """

    dtype: str
    contender: str
    repeat: int
    seconds: float
    examples_per_s: float
    loss: float
    overhead: float | None = None


@dataclass(frozen=True)
class Phase:
    """The server phase with an NF4 base in one repeat.

    Attributes:
        clients: how many it serves.
        repeat: counted from 0.
        joined_s, apart_s: seconds of a step, joined by depth and one client after another.
    """

    clients: int
    repeat: int
    joined_s: float
    apart_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Time everything, print the tables, write CSV, markdown and a plot."""
    options = _options(arguments)
    console = Console(width=120)
    header = machine_description("torch", "transformers", "peft", "ray") | {
        "command": " ".join(["hsplit bench throughput", *(sys.argv[1:] if arguments is None else arguments)]),
        "setting": f"{options.clients} clients x 2 examples, split {options.split}, rank {options.rank}",
        "cores": _cores(),
    }
    options.to.mkdir(parents=True, exist_ok=True)
    tables = []
    if "step" in options.parts:
        timings = [timing for dtype in options.dtypes for timing in step_timings(options, dtype, console)]
        write_rows(options.to / "step.csv", [asdict(t) for t in timings], header)
        tables.append(_summary(timings))
        _plot(options.to / "step.svg", timings)
    if "server" in options.parts:
        phases = [phase for clients in SERVER_REPEATS for phase in server_phases(options, clients)]
        write_rows(options.to / "server.csv", [asdict(p) for p in phases], header)
        tables.append(_server_summary(phases))
    if "client" in options.parts:
        footprint = load_benchmark("footprint")
        messages, peaks = footprint.messages(options), footprint.peaks(options)
        write_rows(options.to / "wire.csv", [asdict(m) for m in messages], header)
        write_rows(options.to / "memory.csv", [asdict(p) for p in peaks], header)
        tables += [footprint.message_table(messages), footprint.peak_table(peaks)]
    if "overlap" in options.parts:
        overlap = load_benchmark("overlap")
        overlaps = overlap.overlaps(options.steps, console)
        write_rows(options.to / "overlap.csv", [asdict(o) for o in overlaps], header)
        tables.append(overlap.table(overlaps))
    if "start" in options.parts:
        startup = load_benchmark("startup")
        starts = startup.starts("hetero", 3)
        write_rows(options.to / "start.csv", [asdict(s) for s in starts], header)
        tables.append(startup.table(starts))
    facts = "\n".join(f"- {key}: {value}" for key, value in header.items())
    (options.to / "throughput.md").write_text("\n".join([facts, *("\n" + markdown_table(*t) for t in tables)]))
    for columns, rows in tables:
        show_table(console, columns, rows)
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hsplit bench throughput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="restaurants", help="as job.data.source (default: the built-in texts)")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rivals", nargs="+", default=["unsplit", "splitlora", "federated"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--split", type=int, default=4, help="layers on a client")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in a repeat")
    parser.add_argument("--model", help="instead of SmolLM2-135M")
    parser.add_argument("--to", type=Path, default=results_directory("throughput"))
    return parser.parse_args(arguments)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def configured(
    options: argparse.Namespace, dtype: str, base: str, clients: int, folder: Path, wire: str | None = None
) -> Any:
    """The resolved configuration of equal clients, all at ``options.split`` and ``options.rank``."""
    from hsplit.config import load_run_config
    from hsplit.preparation import settled

    cluster, policy = folder / "cluster.yaml", folder / "policy.yaml"
    data = Path(options.data).resolve() if Path(options.data).is_file() else options.data
    local_steps = 8
    cluster.write_text(
        CLUSTER.format(clients=clients, base=base, dtype=dtype, wire=wire or dtype, data=data, local_steps=local_steps)
    )
    policy.write_text(POLICY.format(split=options.split, rank=options.rank))
    return settled(load_run_config(cluster, policy, [f"job.model={options.model}"] if options.model else []))


# -- whole steps ----------------------------------------------------------------------------------------------------


def step_timings(options: argparse.Namespace, dtype: str, console: Console) -> list[Timing]:
    """All contenders in turn, in one dtype."""
    import ray

    from hsplit.actors.ray_connection import connect
    from hsplit.models.source import find_model
    from hsplit.preparation import read_inputs

    rivals = load_benchmark("rivals")
    ray.cloudpickle.register_pickle_by_value(rivals)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = configured(options, dtype, dtype, options.clients, folder)
        source = find_model(run.job.model)
        inputs = read_inputs(run, source)
        with ForkServer((*MODULES, "peft")) as fork_server:
            cpus = 2 * (run.server.num_cpus + len(run.clients))
            connect(None, cpus, dashboard=False, fork_server=fork_server)
            try:
                return _interleaved(options, dtype, run, source, inputs, folder, console)
            finally:
                ray.shutdown()


def _interleaved(
    options: argparse.Namespace, dtype: str, run: Any, source: Any, inputs: Any, folder: Path, console: Console
) -> list[Timing]:
    import ray

    from hsplit.models.dtype import resolve_dtype

    products = {
        "hsplit": _Product("now", run, source, inputs, folder, 0),
        "hsplit-later": _Product("later", run, source, inputs, folder, ROUNDS_BEFORE),
    }
    contenders: dict[str, Contender] = {name: product.run for name, product in products.items()}
    given = (resolve_dtype(dtype), inputs.shares, run.job, options.rank, options.split, _cores())
    for rival in options.rivals:
        actor = ray.remote(load_benchmark("rivals").RIVALS[rival]).options(num_cpus=0)
        handle = actor.remote(source.directory, *given)
        contenders[rival] = lambda first, steps, handle=handle: ray.get(handle.run.remote(first, steps))
    for name, contender in contenders.items():
        # hsplit's first two steps of a round are also measured for memory.
        contender(0, WARM_UP if name in products else 1)
    timings = []
    examples = run.job.batch_size * len(run.clients)
    for repeat in range(options.repeat):
        first = WARM_UP + repeat * options.steps
        # Everybody is first once, should the machine's pace change within a repeat.
        turn = repeat % len(contenders)
        for contender in [*list(contenders)[turn:], *list(contenders)[:turn]]:
            seconds, loss = contenders[contender](first, options.steps)
            each = seconds / options.steps
            overhead = products[contender].overhead if contender in products else None
            timings.append(Timing(dtype, contender, repeat, each, examples / each, loss, overhead))
            console.print(f"{dtype} repeat {repeat} {contender}: {each:.3f} s a step, loss {loss:.3f}")
    return timings


class _Product:
    """hsplit itself, driven a step at a time.

    Args:
        rounds: aggregations before the timing, so that there is a residual.
    """

    def __init__(self, name: str, run: Any, source: Any, inputs: Any, folder: Path, rounds: int) -> None:
        from hsplit.actors.ray_executor import RayExecutor
        from hsplit.coordinator import Coordinator
        from hsplit.run_directory import RunDirectory

        self._executor = RayExecutor(name, run, source.directory)
        directory = RunDirectory.create(folder, name)
        self._coordinator = Coordinator(run, self._executor, directory, inputs, SilentDisplay())
        self._coordinator.start()
        for round_ in range(rounds):
            self._coordinator.local_step(round_)
            self._coordinator.aggregate()
        self.overhead = 0.0

    def run(self, first: int, steps: int) -> tuple[float, float]:
        begun, loss = time.perf_counter(), 0.0
        spent: dict[str, dict[str, float]] = {}
        for step in range(first, first + steps):
            done = self._coordinator.local_step(step)
            for name, phases in done.seconds.items():
                own = spent.setdefault(name, {})
                for phase, seconds in phases.items():
                    own[phase] = own.get(phase, 0.0) + seconds
            loss = sum(part.loss_sum / part.tokens for part in done.losses) / len(done.losses)
        elapsed = time.perf_counter() - begun
        shares = step_shares(timing_rows(1, spent, elapsed))
        assert shares is not None
        self.overhead = 1 - shares.arithmetic
        return elapsed, loss


def _ratios(timings: Sequence[Timing], dtype: str, contender: str) -> list[float]:
    """Seconds of ``contender`` by seconds of hsplit in the same repeat."""
    seconds = {(t.contender, t.repeat): t.seconds for t in timings if t.dtype == dtype}
    repeats = sorted({t.repeat for t in timings})
    return [seconds[contender, repeat] / seconds["hsplit", repeat] for repeat in repeats]


def _summary(timings: Sequence[Timing]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for dtype, contender in dict.fromkeys((t.dtype, t.contender) for t in timings):
        own = [t for t in timings if (t.dtype, t.contender) == (dtype, contender)]
        ratios = _ratios(timings, dtype, contender)
        overhead = [t.overhead for t in own if t.overhead is not None]
        rows.append(
            [
                f"{contender}, {dtype}",
                f"{median(t.seconds for t in own):.3f}",
                f"{median(t.examples_per_s for t in own):.2f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{median(overhead):.1%}" if overhead else "",
                f"{own[-1].loss:.4f}",
            ]
        )
    columns = ["contender", "s a step", "examples/s", "hsplit is faster by", "spread", "not arithmetic", "last loss"]
    return columns, rows


def _plot(path: Path, timings: Sequence[Timing]) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys((t.dtype, t.contender) for t in timings))
    figure, axes = pyplot.subplots(figsize=(7, 0.45 * len(labels) + 1.2))
    for place, key in enumerate(labels):
        values = [t.examples_per_s for t in timings if (t.dtype, t.contender) == key]
        axes.barh(place, median(values), color="#4477aa" if key[1].startswith("hsplit") else "#bbbbbb")
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(labels)), [f"{contender}, {dtype}" for dtype, contender in labels])
    axes.invert_yaxis()
    axes.set_xlabel("examples a second (bar: median; dots: repeats)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# -- the server phase -----------------------------------------------------------------------------------------------


def server_phases(options: argparse.Namespace, clients: int) -> list[Phase]:
    """The server phase of one step with an NF4 base, joined and apart, in this process."""
    from hsplit.actors.client import Client
    from hsplit.actors.participant import base_model
    from hsplit.actors.scheduler import Scheduler
    from hsplit.actors.server import Server
    from hsplit.lora.holder import RoundUpdate
    from hsplit.models.source import find_model
    from hsplit.preparation import read_inputs

    with tempfile.TemporaryDirectory() as folder:
        run = configured(options, "fp32", "nf4", clients, Path(folder))
        source = find_model(run.job.model)
        inputs = read_inputs(run, source)
    base = base_model(source.directory, run.job)
    plan = Scheduler(run, source.directory).plan()
    server = Server("server", run.job, run.policy, base, measure=False)
    server.configure(plan)
    server.restart(RoundUpdate(1, {}, {}))
    # One client's layers serve for all, who have the same; only its messages matter here.
    messages = []
    client = Client("client", run.job, run.policy, base, measure=False)
    client.configure(options.split, plan.available[0].ranks)
    client.restart(RoundUpdate(1, {}, {}))
    for part in plan.available:
        client.load_data({part.name: inputs.shares[part.name]}, None)
        messages.append(replace(client.forward(len(messages), 0)[1], client=part.name))

    def joined() -> None:
        server.train_step(0, 0, *messages)

    def apart() -> None:
        for message in messages:
            server.train_step(0, 0, message)

    phases = []
    joined(), apart()
    for repeat in range(min(options.repeat, SERVER_REPEATS[clients])):
        phases.append(Phase(clients, repeat, _seconds(joined), _seconds(apart)))
    return phases


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _server_summary(phases: Sequence[Phase]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for clients in dict.fromkeys(p.clients for p in phases):
        own = [p for p in phases if p.clients == clients]
        ratios = [p.apart_s / p.joined_s for p in own]
        times = [f"{median(p.joined_s for p in own):.3f}", f"{median(p.apart_s for p in own):.3f}"]
        rows.append([f"{clients} clients", *times, f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    return ["server phase, NF4 base", "joined, s", "apart, s", "joined is faster by", "spread"], rows


if __name__ == "__main__":
    main()
