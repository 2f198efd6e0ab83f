"""Examples a second: hsplit on Ray against plain training loops, interleaved in one run.

    hsplit bench throughput [--data devset.csv] [--parts step ...] [--dtypes fp32 bf16] [--repeat 5] [--steps 2]

Every contender trains the same model on the same examples at the same rank, and is given the same steps in turn: while
one computes, the others wait. Read the ratios of seconds within one repeat. hsplit is the product: actors,
messages, optimizers. The rivals are in ``rivals.py``. Further parts serve an NF4 base to many clients, joined by
depth and one client after another, with and without a residual (``server_phase.py``); compare messages and a client's
memory with the tensors and with a federated client (``footprint.py``); cut batches into microbatches on emulated speeds
(``overlap.py``); and time the start (``startup.py``). With ``--full`` every text fills its length and is learned whole,
so that no padding and no unsupervised position is there to be spared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import ray
from rich.console import Console

from benchmarks import common, footprint, overlap, rivals, server_phase, startup
from benchmarks.common import Table
from hsplit.config import RunConfig
from hsplit.models.dtype import resolve_dtype
from hsplit.models.lookup import ModelSource
from hsplit.observe.tables import timing_rows
from hsplit.report.usage import step_shares
from hsplit.run.coordinator import Coordinator, Inputs

PARTS = ("step", "server", "residual", "client", "overlap", "start")
WARM_UP = 2
ROUNDS_BEFORE = 4
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
        processor_s: of the processor, a step: of all processes that this one has started.
        examples_per_s: examples of all clients a second.
        loss: mean loss of the last step.
        overhead: hsplit only: part of the time that was not the model's arithmetic, on the critical path: the slowest
            client's and the server's.
    """

    dtype: str
    contender: str
    repeat: int
    seconds: float
    processor_s: float
    examples_per_s: float
    loss: float
    overhead: float | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Time everything, print the tables, write CSV, markdown and a plot."""
    options = _options(arguments)
    console = Console(width=120)
    setting = f"{options.clients} clients x 2 examples, split {options.split}, rank {options.rank}"
    if options.full:
        setting += f", {options.length} supervised tokens in every example"
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
        phases = [phase for clients in options.server_clients for phase in server_phase.phases(options, clients)]
        keep("server.csv", phases, server_phase.phase_table(phases))
    if "residual" in options.parts:
        residuals = [row for dtype in options.dtypes for row in server_phase.residuals(options, dtype)]
        keep("residual.csv", residuals, server_phase.residual_table(residuals))
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
    parser.add_argument("--rivals", nargs="+", default=["unsplit", "tuned", "splitlora", "federated"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--split", type=int, default=4, help="layers on a client")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each contender in a repeat")
    parser.add_argument("--server-clients", type=int, nargs="+", default=[4, 16, 64], help="of the server's phase")
    parser.add_argument("--full", action="store_true", help="texts that fill their length, all of them learned")
    parser.add_argument("--length", type=int, default=128, help="tokens that a text may have")
    parser.add_argument("--model", help="instead of SmolLM2-135M")
    return parser.parse_args(arguments)


# -- whole steps ----------------------------------------------------------------------------------------------------


def step_timings(options: argparse.Namespace, dtype: str, console: Console) -> list[Timing]:
    """All contenders in turn, in one dtype."""
    with common.local_ray(2 * (1 + options.clients), ("peft",)) as folder:
        run = footprint.configured(options, dtype, dtype, options.clients, folder)
        rounds = {"hsplit": 0, "hsplit-later": ROUNDS_BEFORE}
        return timings_of(run, folder, options, dtype, rounds, console)


def timings_of(
    run: RunConfig, folder: Path, options: argparse.Namespace, dtype: str, rounds: Mapping[str, int], console: Console
) -> list[Timing]:
    """Time hsplit's actors and the rivals of ``options`` in turn, on the Ray that this process is connected to.

    Args:
        run: of equal clients.
        folder: for the runs' directories.
        options: rivals, their rank and split, repeats, and steps in each; a rival's share of a GPU, if any.
        dtype: of the rivals.
        rounds: aggregations before the timing, by name of hsplit's contender.
    """
    # Its actors' processes know nothing of this package.
    ray.cloudpickle.register_pickle_by_value(rivals)
    with ExitStack() as ends:
        source, inputs = common.read(run)
        products = {name: _Product(name, run, source, folder, before, ends) for name, before in rounds.items()}
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
                spent = _processor_s()
                seconds, loss = contenders[name](first, options.steps)
                each, spent = seconds / options.steps, (_processor_s() - spent) / options.steps
                overhead = products[name].overhead if name in products else None
                timings.append(Timing(dtype, name, repeat, each, spent, examples / each, loss, overhead))
                console.print(
                    f"{dtype} repeat {repeat} {name}: {each:.3f} s a step, processor {spent:.3f}, loss {loss:.3f}"
                )
        return timings


def _processor_s() -> float:
    """Processor seconds so far of all processes that this one has started, or that these have."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            spent = process.cpu_times()
            total += spent.user + spent.system
    return total


def _rival(
    name: str, dtype: str, run: RunConfig, source: ModelSource, inputs: Inputs, options: argparse.Namespace
) -> Contender:
    share = getattr(options, "rivals_gpus", 0.0)
    actor = ray.remote(rivals.RIVALS[name]).options(num_cpus=0, num_gpus=share)
    given = (resolve_dtype(dtype), inputs.shares, run.job, options.rank, options.split, common.cores())
    handle = actor.remote(source.directory, *given, "cuda" if share else "cpu")

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


def _ratios(timings: Sequence[Timing], dtype: str, contender: str, what: str = "seconds") -> list[float]:
    """Seconds (or ``what``) of ``contender`` by those of hsplit in the same repeat."""
    seconds = {(t.contender, t.repeat): getattr(t, what) for t in timings if t.dtype == dtype}
    repeats = sorted({t.repeat for t in timings})
    return [seconds[contender, repeat] / seconds["hsplit", repeat] for repeat in repeats]


def _summary(timings: Sequence[Timing]) -> Table:
    rows = []
    for dtype, contender in dict.fromkeys((t.dtype, t.contender) for t in timings):
        own = [t for t in timings if (t.dtype, t.contender) == (dtype, contender)]
        ratios, spent = _ratios(timings, dtype, contender), _ratios(timings, dtype, contender, "processor_s")
        overhead = [t.overhead for t in own if t.overhead is not None]
        rows.append(
            [
                f"{contender}, {dtype}",
                f"{median(t.seconds for t in own):.3f}",
                f"{median(t.examples_per_s for t in own):.2f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                f"{min(t.processor_s for t in own):.3f}",
                f"{median(spent):.2f} ({min(spent):.2f}-{max(spent):.2f})",
                f"{median(overhead):.1%}" if overhead else "",
                f"{own[-1].loss:.4f}",
            ]
        )
    columns = ["contender", "s a step", "examples/s", "hsplit is faster by", "spread"]
    return [*columns, "processor, s (min)", "by hsplit's", "not arithmetic", "last loss"], rows


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


if __name__ == "__main__":
    main()
