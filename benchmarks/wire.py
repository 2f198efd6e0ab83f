"""Cost of a narrower wire: the same short run with activations and gradients in fp32, bf16 and int8.

    python -m benchmarks.wire [--rounds N] [--steps N]        # or: hsplit bench wire

The run is a cluster file's (``cluster/hetero.yaml`` by default), in this process, with the plans that its budgets give
and the same seeds. Only ``job.wire`` differs: a narrower wire would move the splits, so all go by the plans that are
made for the first wire, each timed at its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import common
from hsplit.config import RunConfig, load_run_config
from hsplit.models.spec import ModelSpec
from hsplit.observe.displays import PlainDisplay
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, perplexities
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Inputs
from hsplit.run.inputs import resolved_config

WIRES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Narrowed:
    """One wire's row.

    Attributes:
        wire: ``job.wire``.
        val_ppl_before, val_ppl: validation perplexity before any training, and at the end.
        val_loss_difference: of the final validation loss to the first wire's, in nats.
        bytes_up, bytes_down: sent and received by all clients in the whole run, adapters and validation included.
        bytes_of_first: both together, relative to the first wire.
        virtual_time_s: time of the run at the declared budgets.
        wall_time_s: time of the run here, on a machine that may have been busy.
    """

    wire: str
    val_ppl_before: float
    val_ppl: float
    val_loss_difference: float
    bytes_up: int
    bytes_down: int
    bytes_of_first: float
    virtual_time_s: float
    wall_time_s: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every wire, print the table and write it down."""
    options = _options(arguments)
    console = Console(width=130)
    overrides = list(options.set)
    overrides += [f"job.rounds={options.rounds}"] if options.rounds else []
    overrides += [f"job.local_steps={options.steps}"] if options.steps else []
    curves: dict[str, list[MetricsRow]] = {}
    first = None
    for wire in options.wires:
        run = resolved_config(load_run_config(options.cluster, options.policy, [*overrides, f"job.wire={wire}"]))
        source, inputs = common.read(run)
        first = first or run
        console.print(f"wire {wire}: {run.job.rounds} rounds of {run.job.local_steps} steps")
        curves[wire] = _run(run, first, source.directory, inputs)
    assert first is not None
    job = first.job
    rows = [_row(wire, curve, curves[options.wires[0]]) for wire, curve in curves.items()]
    told = f"{options.cluster}, {job.model}, base {job.base}, {job.rounds} rounds of {job.local_steps} steps"
    header = common.header_of("wire", arguments, "torch", "bitsandbytes", "transformers", run=told, seeds="1")
    common.write_rows(options.to / "wire.csv", rows, header)
    points = [{"wire": wire, **asdict(point)} for wire, curve in curves.items() for point in curve]
    common.write_rows(options.to / "rounds.csv", points, header)
    columns = ["wire", "perplexity before", "after", "loss against first", "MB up", "MB down", "bytes", "virtual s"]
    cells = [_cells(row) for row in rows]
    common.write_markdown(options.to / "wire.md", header, [common.markdown_table(columns, cells)])
    title = f"{options.cluster}: activations and gradients at a narrower wire"
    common.show_table(console, columns, cells, title=title)
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("wire", "The same run with activations and gradients in fp32, bf16 and int8.")
    parser.add_argument("--cluster", default="hetero", help="cluster file or preset (default: hetero)")
    parser.add_argument("--policy", help="policy file or name")
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES), help="the first is compared with")
    parser.add_argument("--rounds", type=int, help="instead of the cluster file's")
    parser.add_argument("--steps", type=int, help="local steps a round, instead of the cluster file's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other override")
    return parser.parse_args(arguments)


class _Rows(PlainDisplay):
    """Keeps the rounds' rows beside showing them."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.rows: list[MetricsRow] = []

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        self.rows.append(row)
        super().round_done(row, holders, timing)


class _PlannedAsFirst:
    """Plans as if the wire were the first one's, with the times of the run's own."""

    def __init__(self, run: RunConfig, first: RunConfig, model: Path) -> None:
        self._own, self._first = Scheduler(run, ModelSpec.read(model)), Scheduler(first, ModelSpec.read(model))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own if name.endswith("_time_s") else self._first, name)


def _run(run: RunConfig, first: RunConfig, model: Path, inputs: Inputs) -> list[MetricsRow]:
    display, scheduler = _Rows(), _PlannedAsFirst(run, first, model)
    with common.in_process(run, model, inputs, display, scheduler=scheduler) as (coordinator, _):
        coordinator.run()
    return display.rows


def _row(wire: str, curve: list[MetricsRow], first: list[MetricsRow]) -> Narrowed:
    sent, received = sum(r.bytes_up for r in curve), sum(r.bytes_down for r in curve)
    of_first = (sent + received) / sum(r.bytes_up + r.bytes_down for r in first)
    last = curve[-1]
    # There is a validation before any training, and after the last round.
    assert last.val_loss is not None and first[-1].val_loss is not None
    difference = last.val_loss - first[-1].val_loss
    times = last.virtual_time_s, last.wall_time_s
    (_, before), *_, (_, after) = perplexities(curve)
    return Narrowed(wire, before, after, difference, sent, received, of_first, *times)


def _cells(row: Narrowed) -> list[str]:
    quality = [f"{row.val_ppl_before:.3f}", f"{row.val_ppl:.4f}", f"{row.val_loss_difference:+.5f}"]
    sizes = [f"{row.bytes_up / 1e6:.2f}", f"{row.bytes_down / 1e6:.2f}", f"{row.bytes_of_first:.1%}"]
    return [row.wire, *quality, *sizes, f"{row.virtual_time_s:.1f}"]


if __name__ == "__main__":
    main()
