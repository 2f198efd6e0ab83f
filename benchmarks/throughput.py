"""Examples a second: hsplit on Ray against plain training loops, interleaved in one run.

    hsplit bench throughput [--data devset.csv] [--parts step ...] [--dtypes fp32 bf16] [--repeat 5] [--steps 2]

Every contender trains the same model on the same examples at the same rank, and is given the same steps in turn: while
one computes, the others wait. Read the ratios of seconds within one repeat. hsplit is the product: actors,
messages, optimizers. The rivals are in ``rivals.py``. Further parts serve an NF4 base to 4 and to 16 clients, joined by
depth and one client after another; compare messages and a client's memory with the tensors and with
a federated client (``footprint.py``); cut batches into microbatches on emulated speeds (``overlap.py``); and time the
start (``startup.py``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import ray
from rich.console import Console

from benchmarks import common, footprint, overlap, rivals, startup
from benchmarks.common import Table
from hsplit.actors.messages import Activations
from hsplit.config import RunConfig
from hsplit.models.dtype import resolve_dtype
from hsplit.models.lookup import ModelSource
from hsplit.observe.tables import timing_rows
from hsplit.report.usage import step_shares
from hsplit.run.coordinator import Coordinator, Inputs

PARTS = ("step", "server", "client", "overlap", "start")
WARM_UP = 2
ROUNDS_BEFORE = 4
# Numbers of clients that the server phase is timed with, and most repeats of each: a repeat of many takes long.
SERVER_REPEATS = {4: 5, 16: 3}
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
        overhead: hsplit only: part of the time that was not the model's arithmetic, on the critical path: the slowest
            client's and the server's.
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
    setting = f"{options.clients} clients x 2 examples, split {options.split}, rank {options.rank}"
    packages, facts = ("torch", "transformers", "peft", "ray"), {"setting": setting, "cores": common.cores()}
    header = common.header_of("throughput", arguments, *packages, **facts)
    tables: list[Table] = []

    def keep(name: str, rows: Sequence[object], table: Table) -> None:
        common.write_rows(options.to / name, rows, header)
        tables.append(table)

    if "step" in options.parts:
        timings = [timing for dtype in options.dtypes for timing in step_timings(options, dtype, console)]
        keep("step.csv", timings, _summary(timings))
        _plot(options.to / "step.svg", timings)
    if "server" in options.parts:
        phases = [phase for clients in SERVER_REPEATS for phase in server_phases(options, clients)]
        keep("server.csv", phases, _server_summary(phases))
    if "client" in options.parts:
        messages, peaks = footprint.messages(options), footprint.peaks(options)
        keep("wire.csv", messages, footprint.message_table(messages))
        keep("memory.csv", peaks, footprint.peak_table(peaks))
    if "overlap" in options.parts:
        overlaps = overlap.overlaps(options.steps, console)
        keep("overlap.csv", overlaps, overlap.table(overlaps))
    if "start" in options.parts:
        starts = startup.starts("hetero", 3)
        keep("start.csv", starts, startup.table(starts))
    common.write_markdown(options.to / "throughput.md", header, [common.markdown_table(*table) for table in tables])
    for columns, rows in tables:
        common.show_table(console, columns, rows)
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("throughput", __doc__)
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
    return parser.parse_args(arguments)


# -- whole steps ----------------------------------------------------------------------------------------------------


def step_timings(options: argparse.Namespace, dtype: str, console: Console) -> list[Timing]:
    """All contenders in turn, in one dtype."""
    # Its actors' processes know nothing of this package.
    ray.cloudpickle.register_pickle_by_value(rivals)
    cpus = 2 * (1 + options.clients)
    with common.local_ray(cpus, ("peft",)) as folder, ExitStack() as ends:
        run = footprint.configured(options, dtype, dtype, options.clients, folder)
        source, inputs = common.read(run)
        products = {
            "hsplit": _Product("now", run, source, folder, 0, ends),
            "hsplit-later": _Product("later", run, source, folder, ROUNDS_BEFORE, ends),
        }
        contenders: dict[str, Contender] = {name: product.run for name, product in products.items()}
        for rival in options.rivals:
            contenders[rival] = _rival(rival, dtype, run, source, inputs, options)
        for name, contender in contenders.items():
            # hsplit's first two steps of a round are also measured for memory.
            contender(0, WARM_UP if name in products else 1)
        timings = []
        examples = run.job.batch_size * len(run.clients)
        for repeat in range(options.repeat):
            first = WARM_UP + repeat * options.steps
            # Everybody is first once, should the machine's pace change within a repeat.
            turn = repeat % len(contenders)
            for name in [*list(contenders)[turn:], *list(contenders)[:turn]]:
                seconds, loss = contenders[name](first, options.steps)
                each = seconds / options.steps
                overhead = products[name].overhead if name in products else None
                timings.append(Timing(dtype, name, repeat, each, examples / each, loss, overhead))
                console.print(f"{dtype} repeat {repeat} {name}: {each:.3f} s a step, loss {loss:.3f}")
        return timings


def _rival(
    name: str, dtype: str, run: RunConfig, source: ModelSource, inputs: Inputs, options: argparse.Namespace
) -> Contender:
    actor = ray.remote(rivals.RIVALS[name]).options(num_cpus=0)
    given = (resolve_dtype(dtype), inputs.shares, run.job, options.rank, options.split, common.cores())
    handle = actor.remote(source.directory, *given)

    def steps(first: int, count: int) -> tuple[float, float]:
        seconds, loss = ray.get(handle.run.remote(first, count))
        return seconds, loss

    return steps


class _Product:
    """hsplit itself, driven a step at a time.

    Args:
        rounds: aggregations before the timing, so that there is a residual.
        ends: where its actors end.
    """

    def __init__(
        self, name: str, run: RunConfig, source: ModelSource, folder: Path, rounds: int, ends: ExitStack
    ) -> None:
        context = common.on_ray(name, run, source.directory, folder)
        self._coordinator: Coordinator = ends.enter_context(context)[0]
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


def _summary(timings: Sequence[Timing]) -> Table:
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
    labels = list(dict.fromkeys((t.dtype, t.contender) for t in timings))
    figure = common.new_figure(7, 0.45 * len(labels) + 1.2)
    axes = figure.subplots()
    for place, key in enumerate(labels):
        values = [t.examples_per_s for t in timings if (t.dtype, t.contender) == key]
        axes.barh(place, median(values), color="#4477aa" if key[1].startswith("hsplit") else "#bbbbbb")
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(labels)), [f"{contender}, {dtype}" for dtype, contender in labels])
    axes.invert_yaxis()
    axes.set_xlabel("examples a second (bar: median; dots: repeats)")
    common.save_figure(figure, path)


# -- the server phase -----------------------------------------------------------------------------------------------


def server_phases(options: argparse.Namespace, clients: int) -> list[Phase]:
    """The server phase of one step with an NF4 base, joined and apart, in this process."""
    setting = footprint.Setting.of(options, "nf4", clients)
    server, parts = setting.server, setting.plan.available
    # One client's layers serve for all clients, which have the same; only messages matter here.
    client = setting.client(parts[0], measure=False)
    messages: list[Activations] = []
    for part in parts:
        client.load_data({part.name: setting.inputs.shares[part.name]}, None)
        messages.append(replace(client.forward(len(messages), 0)[1], client=part.name))

    def joined() -> None:
        server.train_step(0, 0, *messages)

    def apart() -> None:
        for message in messages:
            server.train_step(0, 0, message)

    phases = []
    joined()
    apart()
    for repeat in range(min(options.repeat, SERVER_REPEATS[clients])):
        phases.append(Phase(clients, repeat, common.seconds_of(joined), common.seconds_of(apart)))
    return phases


def _server_summary(phases: Sequence[Phase]) -> Table:
    rows = []
    for clients in dict.fromkeys(p.clients for p in phases):
        own = [p for p in phases if p.clients == clients]
        ratios = [p.apart_s / p.joined_s for p in own]
        times = [f"{median(p.joined_s for p in own):.3f}", f"{median(p.apart_s for p in own):.3f}"]
        rows.append([f"{clients} clients", *times, f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"])
    return ["server phase, NF4 base", "joined, s", "apart, s", "joined is faster by", "spread"], rows


if __name__ == "__main__":
    main()
