"""The setting of ``throughput.py``, the bytes of a step's messages on the wire, and the memory of a client."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, rivals
from benchmarks.common import Table
from hsplit.actors.client import Client
from hsplit.actors.profiling import PeakMemory
from hsplit.actors.server import Server
from hsplit.config import RunConfig
from hsplit.data import read_source
from hsplit.lora.holder import RoundUpdate
from hsplit.models.dtype import DTYPES
from hsplit.models.lookup import ModelSource
from hsplit.models.segment import BaseModel
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Inputs

CLUSTER = """
server: {{memory_gb: {memory}, tflops: 2}}
clients: [{{name: client, count: {clients}, memory_gb: 2, tflops: 1}}]
job:
  base: {base}
  dtype: {dtype}
  data: {{source: "{data}", partition: iid, long: {long}}}
  wire: {wire}
  max_length: {length}
  rounds: 1000
  local_steps: 8
  validation: {{share: 0.1, max_examples: 2}}
"""


@dataclass(frozen=True)
class Message:
    """A client's activations, or the gradient that it gets back.

    Attributes:
        what: ``activations up`` or ``gradient down``.
        wire: ``job.wire``.
        tensor_bytes: entries of the tensor at the wire's dtype.
        pickled_bytes: all that Ray moves for it, by pickle's protocol 5.
        copied_bytes: the part of it that pickle copies; the rest are buffers that travel as they lie.
    """

    what: str
    wire: str
    tensor_bytes: int
    pickled_bytes: int
    copied_bytes: int


@dataclass(frozen=True)
class Peak:
    """Peak memory of a client's tensors in two local steps; for hsplit's client, loading included.

    Attributes:
        who: hsplit's client, or a client of plain federated LoRA (``rivals.py``).
        layers: layers held.
        held: part of the model's values held, embedding included.
        peak_mb: measured by the allocator's own events.
        declared_mb: the budget that its plan keeps to; ``None`` where there is none.
    """

    who: str
    layers: int
    held: float
    peak_mb: float
    declared_mb: float | None


def configured(
    options: argparse.Namespace,
    dtype: str,
    base: str,
    clients: int,
    folder: Path,
    wire: str | None = None,
    split: int | None = None,
) -> RunConfig:
    """The resolved configuration of equal clients, all at ``options.rank`` and ``split``, or ``options.split``."""
    data = Path(options.data).resolve() if Path(options.data).is_file() else options.data
    length, full = getattr(options, "length", 128), getattr(options, "full", False)
    if full:
        data = _full_texts(str(data), folder / "texts.jsonl", length, FULL_TEXTS * clients)
    cluster = CLUSTER.format(
        clients=clients, base=base, dtype=dtype, wire=wire or dtype, data=data, length=length,
        long="cut" if full else "skip", memory=max(8, clients // 2),
    )  # fmt: skip
    policy = common.FIXED_POLICY.format(split=options.split if split is None else split, rank=options.rank)
    return common.configured(folder, cluster, policy, [f"job.model={options.model}"] if options.model else [])


CHARACTERS_A_TOKEN = 8
# Texts for each client that fill their length.
FULL_TEXTS = 40


def _full_texts(source: str, to: Path, length: int, count: int) -> Path:
    """Write texts of more than ``length`` tokens each, of a source's texts one after another, to be learned whole."""
    examples = read_source(source).examples
    # Tokens have fewer characters on average; what is over is cut.
    joined: list[str] = []
    lines: list[str] = []
    place = 0
    while len(lines) < count:
        example = examples[place % len(examples)]
        place += 1
        joined.append(example.prompt + example.response)
        if sum(map(len, joined)) > CHARACTERS_A_TOKEN * length:
            lines.append(json.dumps({"text": " ".join(joined)}))
            joined = []
    to.write_text("\n".join(lines) + "\n")
    return to


@dataclass(frozen=True)
class Setting:
    """Clients and a server in this process, all computing in one dtype on one device.

    Attributes:
        run, source, inputs: their configuration, model and data.
        base: the model that they share.
        plan: the plan of all.
        server: one that has its layers and its first adapters.
        device: where they compute.
    """

    run: RunConfig
    source: ModelSource
    inputs: Inputs
    base: BaseModel
    plan: Plan
    server: Server
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        options: argparse.Namespace,
        base: str,
        clients: int,
        wire: str = "fp32",
        split: int | None = None,
        *,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> Setting:
        """The setting of ``clients`` equal clients, all at ``split``."""
        with tempfile.TemporaryDirectory() as folder:
            run = configured(options, dtype, base, clients, Path(folder), wire, split)
            source, inputs = common.read(run)
        made = BaseModel.of_job(source.spec, run.job)
        plan = Scheduler(run, source.spec).plan()
        server = Server("server", run.job, run.policy, made, device, measure=False)
        server.configure(plan)
        server.restart(RoundUpdate(1, {}, {}))
        return cls(run, source, inputs, made, plan, server, device)

    def client(self, part: HolderPlan, measure: bool) -> Client:
        """A client with the layers, adapters and data of ``part``; ``measure``: its memory is followed."""
        assert part.split is not None
        client = Client(part.name, self.run.job, self.run.policy, self.base, self.device, measure)
        client.load_data({part.name: self.inputs.shares[part.name]}, None)
        client.configure(part)
        client.restart(RoundUpdate(1, {}, {}))
        return client


def messages(options: argparse.Namespace) -> list[Message]:
    """One client's messages of a step, for each type on the wire."""
    found = []
    for wire in ("fp32", "bf16", "int8"):
        setting = Setting.of(options, "fp32", 1, wire)
        _, message = setting.client(setting.plan.available[0], measure=False).forward(0, 0)
        _, *gradients = setting.server.train_step(0, 0, message)
        setting.server.end_step(0)
        (gradient,) = gradients
        assert gradient is not None
        size = torch.int8.itemsize if wire == "int8" else DTYPES[wire].itemsize
        for what, value, tensor in (("activations up", message, message.hidden), ("gradient down", gradient, gradient)):
            entries = tensor.shape[0] * tensor.shape[1]
            found.append(Message(what, wire, entries * size, *_pickled(value)))
    return found


def _pickled(value: Any) -> tuple[int, int]:
    import ray

    buffers: list[Any] = []
    copied = len(ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append))
    return copied + sum(buffer.raw().nbytes for buffer in buffers), copied


def message_table(rows: Sequence[Message]) -> Table:
    """Columns and cells, a row a message."""
    cells = [
        [
            f"{row.what}, {row.wire}",
            f"{row.tensor_bytes:,}",
            f"{row.pickled_bytes:,}",
            f"{row.pickled_bytes / row.tensor_bytes - 1:+.2%}",
            f"{row.copied_bytes:,}",
        ]
        for row in rows
    ]
    return ["message of one client", "tensor, bytes", "on the wire, bytes", "more by", "copied, bytes"], cells


def peaks(options: argparse.Namespace) -> list[Peak]:
    """A federated client's peak, then those of hsplit's clients by layers held, all in fp32."""
    setting = Setting.of(options, "fp32", 1)
    (part,) = setting.plan.available
    layers = setting.source.spec.layers
    memory, shares = PeakMemory(torch.device("cpu")), {part.name: setting.inputs.shares[part.name] or []}
    model, job = setting.source.directory, setting.run.job
    del setting
    gc.collect()
    rival = rivals.Federated(model, torch.float32, shares, job, options.rank, options.split, 1)
    # Loaded by transformers' own threads, which the meter does not see: counted as given to the steps.
    with memory.window(list(rival.models[0].parameters())):
        rival.run(0, 2)
    values = sum(p.numel() for p in rival.models[0].parameters() if not p.requires_grad)
    found = [Peak("federated client, PEFT", layers, 1.0, memory.peak_bytes() / 1e6, None)]
    del rival
    for split in sorted({1, max(1, 2 * layers // 15), max(1, 2 * layers // 5)}):
        setting = Setting.of(options, "fp32", 1, split=split)
        client = setting.client(setting.plan.available[0], measure=True)
        held = sum(client.parameters_held().values()) / values
        for step in range(2):
            _, message = client.forward(step, 0)
            _, *gradients = setting.server.train_step(step, 0, message)
            setting.server.end_step(step)
            client.backward(step, 0, *gradients)
        declared = setting.plan.available[0].predicted_bytes / 1e6
        found.append(Peak(f"hsplit client, split {split}", split, held, client.peak_bytes() / 1e6, declared))
        del client, setting
        gc.collect()
    return found


def peak_table(rows: Sequence[Peak]) -> Table:
    """Columns and cells, a row a client."""
    whole = rows[0].peak_mb
    cells = [
        [
            row.who,
            str(row.layers),
            f"{row.held:.0%}",
            f"{row.peak_mb:.0f}",
            "" if row.declared_mb is None else f"{row.declared_mb:.0f}",
            f"{row.peak_mb / whole:.0%}",
        ]
        for row in rows
    ]
    return ["fp32, 2 examples", "layers", "values held", "peak, MB", "plan's budget, MB", "of federated"], cells
