"""What a step's messages weigh on the wire, and what a client takes of memory: a part of ``throughput.py``."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplit.benchmark import load_benchmark


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
    """The most that somebody's tensors took in two local steps; with hsplit's client, loading included.

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


def messages(options: argparse.Namespace) -> list[Message]:
    """One client's messages of a step, for each type on the wire."""
    import torch

    from hsplit.actors.messages import WIRE_DTYPES

    found = []
    for wire in ("fp32", "bf16", "int8"):
        client, server, _ = _pair(options, "fp32", 1, wire)
        _, message = client.forward(0, 0)
        _, gradient = server.train_step(0, 0, message)
        size = torch.int8.itemsize if wire == "int8" else WIRE_DTYPES[wire].itemsize
        for what, value, tensor in (("activations up", message, message.hidden), ("gradient down", gradient, gradient)):
            entries = tensor.shape[0] * tensor.shape[1]
            found.append(Message(what, wire, entries * size, *_pickled(value)))
    return found


def _pickled(value: Any) -> tuple[int, int]:
    import ray

    buffers: list[Any] = []
    copied = len(ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append))
    return copied + sum(buffer.raw().nbytes for buffer in buffers), copied


def message_table(rows: Sequence[Message]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
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
    import torch

    from hsplit.actors.peak_memory import PeakMemory
    from hsplit.models.segment import layer_count, model_config

    client, _, setting = _pair(options, "fp32", 1, "fp32")
    run, source, inputs = setting
    name = client.name
    del client
    gc.collect()
    layers = layer_count(model_config(source.directory))
    memory = PeakMemory(torch.device("cpu"))
    federated = load_benchmark("rivals").Federated
    shares = {name: inputs.shares[name]}
    rival = federated(source.directory, torch.float32, shares, run.job, options.rank, options.split, 1)
    # Loaded by transformers' own threads, which the meter does not see: counted as given to the steps.
    with memory.window(list(rival.models[0].parameters())):
        rival.run(0, 2)
    values = sum(p.numel() for p in rival.models[0].parameters() if not p.requires_grad)
    found = [Peak("federated client, PEFT", layers, 1.0, memory.peak_bytes() / 1e6, None)]
    del rival
    for split in sorted({1, max(1, 2 * layers // 15), max(1, 2 * layers // 5)}):
        client, server, _ = _pair(options, "fp32", 1, "fp32", split)
        held = sum(client.parameters_held().values()) / values
        for step in range(2):
            _, message = client.forward(step, 0)
            _, gradient = server.train_step(step, 0, message)
            client.backward(step, 0, gradient)
        declared = client.predicted_mb
        found.append(Peak(f"hsplit client, split {split}", split, held, client.peak_bytes() / 1e6, declared))
        del client, server
        gc.collect()
    return found


def peak_table(rows: Sequence[Peak]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
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


def _pair(options: argparse.Namespace, base: str, clients: int, wire: str, split: int | None = None) -> Any:
    """A client and a server in this process, configured, with what they were made of."""
    from hsplit.actors.client import Client
    from hsplit.actors.participant import base_model
    from hsplit.actors.scheduler import Scheduler
    from hsplit.actors.server import Server
    from hsplit.lora.holder import RoundUpdate
    from hsplit.models.source import find_model
    from hsplit.preparation import read_inputs

    options = argparse.Namespace(**{**vars(options), "split": options.split if split is None else split})
    with tempfile.TemporaryDirectory() as folder:
        run = load_benchmark("throughput").configured(options, "fp32", base, clients, Path(folder), wire)
        source = find_model(run.job.model)
        inputs = read_inputs(run, source)
    made = base_model(source.directory, run.job)
    plan = Scheduler(run, source.directory).plan()
    (part,) = plan.available
    client = Client(part.name, run.job, run.policy, made)
    client.predicted_mb = part.predicted_bytes / 1e6
    client.load_data({part.name: inputs.shares[part.name]}, None)
    client.configure(part.split, part.ranks)
    client.restart(RoundUpdate(1, {}, {}))
    server = Server("server", run.job, run.policy, made, measure=False)
    server.configure(plan)
    server.restart(RoundUpdate(1, {}, {}))
    return client, server, (run, source, inputs)
