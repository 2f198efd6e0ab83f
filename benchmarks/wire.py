"""Cost of a narrower wire: the same short run with activations and gradients in bf16, int8 and int4, and their errors.

    python -m benchmarks.wire [--rounds N] [--steps N] [--seeds N] [--only error|training]    # or: hsplit bench wire

The run is a cluster file's (``cluster/hetero.yaml`` by default), in this process, with the plans that its budgets give
and the same seeds. Only ``job.wire`` differs: a narrower wire would move the splits, so all go by the plans that are
made for the first wire, each timed at its own. Perplexity is taken twice: through the wire, as the run's holders have
it, and of what was learned, with nothing between the layers.

The errors are of one batch's hidden states and of their gradients at some split points, in each format, and with other
blocks than ``int4`` has.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import common
from hsplit.actors.messages import WireTensor
from hsplit.actors.wire_codes import hadamard, signed_scales
from hsplit.config import RunConfig, load_run_config
from hsplit.models.lookup import ModelSource
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.observe.displays import PlainDisplay
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, perplexities
from hsplit.planning.scheduler import Scheduler
from hsplit.planning.wire import BLOCK, row_bytes
from hsplit.run.coordinator import Inputs
from hsplit.run.inputs import resolved_config

WIRES = ("bf16", "int8", "int4")
BLOCKS = (16, 32, 64, 128)
EXAMPLES = 12
"""Examples that errors are measured on."""


@dataclass(frozen=True)
class Narrowed:
    """One wire's row.

    Attributes:
        wire: ``job.wire``.
        seed: ``job.seed``.
        val_ppl_before, val_ppl: validation perplexity through the wire before any training, and at the end.
        learned_ppl: of the model at the end with nothing between its layers.
        val_loss_difference, learned_loss_difference: of both losses at the end to the first wire's, in nats.
        bytes_up, bytes_down: sent and received by all clients in the whole run, adapters and validation included.
        bytes_of_first: both together, relative to the first wire.
        virtual_time_s: time of the run at the declared budgets.
        wall_time_s: time of the run here, on a machine that may have been busy.
    """

    wire: str
    seed: int
    val_ppl_before: float
    val_ppl: float
    learned_ppl: float
    val_loss_difference: float
    learned_loss_difference: float
    bytes_up: int
    bytes_down: int
    bytes_of_first: float
    virtual_time_s: float
    wall_time_s: float


@dataclass(frozen=True)
class Error:
    """Error of a format, relative to a token's L2 norm: the root of the mean square over tokens.

    Attributes:
        wire: the format.
        block: entries with one scale.
        rotated: each block is multiplied by a Hadamard matrix first.
        bits: for an entry, with the scales.
        activations, gradients: mean of the error over the split points.
        worst: the largest at any of them.
    """

    wire: str
    block: int | None
    rotated: bool
    bits: float
    activations: float
    gradients: float
    worst: float


@dataclass(frozen=True)
class _Finished:
    """A run: its rounds, and the loss of what it has learned in nats."""

    curve: list[MetricsRow]
    learned_loss: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them down."""
    options = _options(arguments)
    console = Console(width=130)
    overrides = list(options.set)
    overrides += [f"job.rounds={options.rounds}"] if options.rounds else []
    overrides += [f"job.local_steps={options.steps}"] if options.steps else []
    first = resolved_config(load_run_config(options.cluster, options.policy, overrides))
    job = first.job
    described = f"{options.cluster}, {job.model}, base {job.base}, {job.rounds} rounds of {job.local_steps} steps"
    header = common.header_of(
        "wire", arguments, "torch", "bitsandbytes", "transformers", run=described, seeds=str(options.seeds)
    )
    parts = []
    if options.only != "training":
        parts.append(_show_errors(first, options.to, header, console))
    if options.only != "error":
        parts.append(_show_training(options, overrides, header, console))
    common.write_markdown(options.to / "wire.md", header, parts)
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("wire", __doc__)
    parser.add_argument("--cluster", default="hetero", help="cluster file or preset (default: hetero)")
    parser.add_argument("--policy", help="policy file or name")
    parser.add_argument(
        "--wires", nargs="+", choices=("fp32", *WIRES), default=list(WIRES), help="the first is compared with"
    )
    parser.add_argument("--rounds", type=int, help="instead of the cluster file's")
    parser.add_argument("--steps", type=int, help="local steps a round, instead of the cluster file's")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, by job.seed from 0 on (default: 1)")
    parser.add_argument("--only", choices=("error", "training"), help="one of the two parts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other override")
    return parser.parse_args(arguments)


# -- errors -------------------------------------------------------------------------------------------------------


def _show_errors(run: RunConfig, to: Path, header: dict[str, Any], console: Console) -> str:
    source, inputs = common.read(run)
    activations, gradients = _passing(source, inputs)
    found = list(_errors(activations, gradients))
    common.write_rows(to / "error.csv", found, header)
    columns = ["format", "block", "rotated", "bits an entry", "activations", "gradients", "worst"]
    cells = [
        [e.wire, str(e.block or "token"), "yes" if e.rotated else "no", f"{e.bits:.2f}"]
        + [f"{error:.2%}" for error in (e.activations, e.gradients, e.worst)]
        for e in found
    ]
    title = "Error of a token's activations and gradients, relative to their norm"
    common.show_table(console, columns, cells, title=title)
    return common.titled(title, (columns, cells))


def _passing(source: ModelSource, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of the untrained model at some split points, and gradients of the mean loss, ``(n, d)`` each."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32, trust_remote_code=False)
    model = model.eval().requires_grad_(False)
    tokenizer = load_tokenizer(source.directory)
    examples = [example for share in inputs.shares.values() for example in share or ()]
    layers = source.spec.layers
    splits = sorted({1, 2, layers // 4, layers // 2, layers})
    states: dict[int, list[Tensor]] = {split: [] for split in splits}
    slopes: dict[int, list[Tensor]] = {split: [] for split in splits}
    for example in random.Random(0).sample(examples, min(EXAMPLES, len(examples))):
        ids = tokenizer(example.prompt + example.response, return_tensors="pt").input_ids
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        result = model(inputs_embeds=embedded, labels=ids, output_hidden_states=True)
        for hidden in result.hidden_states:
            hidden.retain_grad()
        result.loss.backward()
        for split in splits:
            hidden = result.hidden_states[split]
            states[split].append(hidden.detach()[0])
            slopes[split].append(hidden.grad[0])
    return [torch.cat(own) for own in states.values()], [torch.cat(own) for own in slopes.values()]


def _errors(activations: list[Tensor], gradients: list[Tensor]) -> Iterator[Error]:
    width = activations[0].shape[1]
    for wire, block in (("bf16", None), ("int8", BLOCK)):
        found = [
            [_relative(tensor, WireTensor.pack(tensor, wire).unpack(torch.float32, "cpu") - tensor) for tensor in some]
            for some in (activations, gradients)
        ]
        yield _error(wire, block, block is not None, 8 * row_bytes(wire, width) / width, *found)
    for block in BLOCKS:
        for rotated in (False, True):
            found = [
                [_relative(tensor, _deviation(tensor, block, rotated)) for tensor in some]
                for some in (activations, gradients)
            ]
            # Blocks are filled up.
            yield _error("int4", block, rotated, -(-width // block) * (4 * block + 16) / width, *found)


def _error(wire: str, block: int | None, rotated: bool, bits: float, up: list[float], down: list[float]) -> Error:
    return Error(wire, block, rotated, bits, statistics.mean(up), statistics.mean(down), max(*up, *down))


def _deviation(tensor: Tensor, block: int, rotated: bool) -> Tensor:
    """Standard deviation of each entry that is rounded at random, in blocks of any size, ``(n, entries)``."""
    blocks = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % block)).unflatten(1, (-1, block))
    if rotated:
        blocks = blocks @ hadamard(block, tensor.device)
    scales = signed_scales(blocks).float()[..., None]
    part = (blocks / scales).frac().abs()
    return (scales * (part * (1 - part)).sqrt()).flatten(1)


def _relative(tensor: Tensor, error: Tensor) -> float:
    norms = tensor.norm(dim=1)
    there = norms > 0
    return float((error.norm(dim=1)[there] / norms[there]).square().mean().sqrt())


# -- training -----------------------------------------------------------------------------------------------------


def _show_training(options: argparse.Namespace, overrides: list[str], header: dict[str, Any], console: Console) -> str:
    rows: list[Narrowed] = []
    points: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        finished: dict[str, _Finished] = {}
        first = None
        for wire in options.wires:
            # All messages in this format, whatever a plan would choose for some.
            seeded = [*overrides, f"job.wire={wire}", "policy.pace.wire=job", f"job.seed={seed}"]
            run = resolved_config(load_run_config(options.cluster, options.policy, seeded))
            source, inputs = common.read(run)
            first = first or run
            console.print(f"wire {wire}, seed {seed}: {run.job.rounds} rounds of {run.job.local_steps} steps")
            finished[wire] = _run(run, first, source.directory, inputs)
            rows.append(_row(wire, seed, finished[wire], finished[options.wires[0]]))
            points += [{"wire": wire, "seed": seed, **asdict(point)} for point in finished[wire].curve]
    common.write_rows(options.to / "wire.csv", rows, header)
    common.write_rows(options.to / "rounds.csv", points, header)
    columns = ["wire", "perplexity before", "after", "loss against first", "learned", "loss against first"]
    columns += ["MB up", "MB down", "bytes", "virtual s"]
    cells = [_cells([row for row in rows if row.wire == wire]) for wire in options.wires]
    title = f"{options.cluster}: activations and gradients at a narrower wire"
    common.show_table(console, columns, cells, title=title)
    return common.titled(title, (columns, cells))


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
        return getattr(self._own if name == "clock" else self._first, name)


def _run(run: RunConfig, first: RunConfig, model: Path, inputs: Inputs) -> _Finished:
    display, scheduler = _Rows(), _PlannedAsFirst(run, first, model)
    with common.in_process(run, model, inputs, display, scheduler=scheduler) as (coordinator, directory):
        coordinator.run()
        losses = common.learned_losses(run, model, coordinator, directory).values()
        return _Finished(display.rows, sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses))


def _row(wire: str, seed: int, finished: _Finished, first: _Finished) -> Narrowed:
    curve, last = finished.curve, finished.curve[-1]
    sent, received = sum(r.bytes_up for r in curve), sum(r.bytes_down for r in curve)
    # There is a validation before any training, and after the last round.
    assert last.val_loss is not None and first.curve[-1].val_loss is not None
    (_, before), *_, (_, after) = perplexities(curve)
    return Narrowed(
        wire=wire,
        seed=seed,
        val_ppl_before=before,
        val_ppl=after,
        learned_ppl=math.exp(finished.learned_loss),
        val_loss_difference=last.val_loss - first.curve[-1].val_loss,
        learned_loss_difference=finished.learned_loss - first.learned_loss,
        bytes_up=sent,
        bytes_down=received,
        bytes_of_first=(sent + received) / sum(r.bytes_up + r.bytes_down for r in first.curve),
        virtual_time_s=last.virtual_time_s,
        wall_time_s=last.wall_time_s,
    )


def _cells(rows: list[Narrowed]) -> list[str]:
    """One wire's line: means over the seeds, differences with their range."""

    def mean(name: str) -> float:
        return statistics.mean(getattr(row, name) for row in rows)

    def difference(name: str) -> str:
        own = [getattr(row, name) for row in rows]
        spread = f" ({min(own):+.5f} to {max(own):+.5f})" if len(own) > 1 else ""
        return f"{mean(name):+.5f}{spread}"

    quality = [f"{mean('val_ppl_before'):.3f}", f"{mean('val_ppl'):.4f}", difference("val_loss_difference")]
    quality += [f"{mean('learned_ppl'):.4f}", difference("learned_loss_difference")]
    sizes = [f"{mean('bytes_up') / 1e6:.2f}", f"{mean('bytes_down') / 1e6:.2f}", f"{mean('bytes_of_first'):.1%}"]
    return [rows[0].wire, *quality, *sizes, f"{mean('virtual_time_s'):.1f}"]


if __name__ == "__main__":
    main()
