"""Whether actors that share a GPU work, what they hold, and how fast they are.

    hsplit bench gpu                                  # on one large GPU: under 9 minutes
    hsplit bench gpu --model random                   # the same where no pretrained model can be fetched
    hsplit bench gpu --device cpu --model tiny        # a rehearsal of every part on a tiny model

Its parts, those first that are worth most:

- ``shared``: ``cluster/gpu.yaml`` with the default policy on a Ray of its own, to its end, with a client killed on the
  way; then a few rounds in fp32 on the GPU and with ``--cpu``, whose losses are compared;
- ``peaks``: predicted against measured peak memory of every holder of the first of these runs;
- ``small``, ``large``: hsplit on Ray with an NF4 base, all its actors on one GPU, against an unsplit PEFT loop over the
  same tokens on a bf16 base: random Llamas of SmolLM2-135M's sizes, and of 1.3 billion weights;
- ``joined``: the server's part of a step for 4 and for 16 clients, joined by depth and one client after another;
- ``store``: bytes and seconds of a message from one actor's GPU through Ray's object store to another's;
- ``cells``: cells of ``hsplit bench convergence`` a minute.

Each part is a process with a time limit of its own and writes ``PART.json`` as it goes, so that one that fails or hangs
takes nothing from the others. The same command again makes the parts that have not ended well, and those alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from benchmarks import common, convergence, server_phase, throughput
from benchmarks.protocol import Protocol, Variant
from hsplit.actors.executor import one_line
from hsplit.actors.messages import WireTensor
from hsplit.config import RunConfig
from hsplit.config.reading import read_json
from hsplit.errors import InputError
from hsplit.experiments import call_of
from hsplit.files import write_text_atomically
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.observe.events import read_events
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import read_plan

MODELS = ("smollm2", "random", "tiny")
KILLED, KILLED_IN_ROUND = "phone-1", 2
LOSSES = ["train_loss", "val_loss"]
# Between the two devices: fixed numbers, and plans that do not follow from measurements, which differ.
EXACT = ["job.dtype=fp32", "job.wire=fp32", "policy.replan.measured=false", "job.faults.deadline=null"]
JOINED = (4, 16)
CLUSTER = """
server: {{memory_gb: 64, tflops: 2, num_gpus: {share}}}
clients: [{{name: client, count: 4, memory_gb: 16, tflops: 1, num_gpus: {share}}}]
job:
  model: {model}
  base: nf4
  dtype: {dtype}
  wire: {dtype}
  data: {{source: {data}, partition: iid}}
  rounds: 1000
  local_steps: 1000
  batch_size: {rows}
  max_length: {length}
  validation: {{share: 0.1, max_examples: 2}}
  faults: {{deadline: null}}
"""


@dataclass(frozen=True)
class Sizes:
    """A model and the batches that it is timed on.

    Attributes:
        model: sizes of a Llama, without its number of layers.
        layers: decoder layers.
        rows, length: examples of a client's batch, and tokens of each.
        split, rank: layers on a client, and rank of every adapter.
        steps, repeat: timed at once, and how often.
    """

    model: Mapping[str, int]
    layers: int
    rows: int = 8
    length: int = 128
    split: int = 4
    rank: int = 8
    steps: int = 4
    repeat: int = 3


_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
_LARGE = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_key_value_heads": 16}
SIZES = {
    "tiny": Sizes({**_TINY, "vocab_size": common.WORDS}, 4, rows=1, length=16, split=1, rank=2, steps=1, repeat=1),
    "small": Sizes({**_SMALL, "vocab_size": 49152}, 30),
    "large": Sizes({**_LARGE, "vocab_size": 32000}, 24),
}

Keep = Callable[..., None]
"""Writes what a part has found so far."""


@dataclass(frozen=True)
class Part:
    """A part of the experiment.

    Attributes:
        make: returns its figures, given the options and a :data:`Keep`.
        limit_s: seconds after which it is ended.
        about: the figures that a line on it shows, by name.
    """

    make: Callable[[argparse.Namespace, Keep], dict[str, Any]]
    limit_s: float
    about: tuple[str, ...]


# -- models and data -----------------------------------------------------------------------------------------------


def random_llama(to: Path, sizes: Sizes) -> Path:
    """Save a random Llama in bf16, with a tokenizer, into ``to``.

    Its layers are copies of one: it is made, and quantized, once.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shared: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, **sizes.model}
    one = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **shared)).to(torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in one.state_dict().items():
        if name != "lm_head.weight":
            copies = range(sizes.layers) if ".layers.0." in name else (0,)
            tensors |= {name.replace(".layers.0.", f".layers.{i}."): tensor.clone() for i in copies}
    to.mkdir(parents=True)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    config = LlamaConfig(num_hidden_layers=sizes.layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **shared)
    config.save_pretrained(to)
    common.word_tokenizer([f"w{i}" for i in range(2, common.WORDS)]).save_pretrained(to)
    return to


def sizes_of(options: argparse.Namespace, name: str) -> Sizes:
    """The sizes called ``name``, in a rehearsal the tiny ones."""
    return SIZES["tiny" if options.model == "tiny" else name]


def trained_model(options: argparse.Namespace, folder: Path) -> list[str]:
    """Overrides that give a run its model and data; none for the cluster file's own."""
    if options.model == "smollm2":
        return []
    sizes = sizes_of(options, "small")
    model = random_llama(folder / "model", sizes)
    data = common.texts(folder / "texts.csv", length=sizes.length // 4, prompt="w2")
    given = [f"job.model={model}", f"job.data.source={data}", "job.data.partition=iid"]
    # A tiny model's plans are soon made if there is little to choose.
    few = ["job.rank_set=[1, 2]"] if options.model == "tiny" else []
    return [*given, f"job.max_length={sizes.length}", *few]


def timed_run(options: argparse.Namespace, name: str, folder: Path, share: float) -> tuple[RunConfig, int]:
    """The run of four equal clients that part ``name`` times, and the tokens of each example.

    Args:
        share: of a GPU, of every actor.
    """
    sizes = sizes_of(options, name)
    # A word is a token; the prompt is one, and an end follows.
    data = common.texts(folder / "texts.csv", length=sizes.length - 2, prompt="w2")
    given = {"model": random_llama(folder / "model", sizes), "data": data, "share": share, "dtype": _dtype(options)}
    cluster = CLUSTER.format(**given, rows=sizes.rows, length=sizes.length)
    return common.configured(
        folder, cluster, common.FIXED_POLICY.format(split=sizes.split, rank=sizes.rank)
    ), sizes.length


def _dtype(options: argparse.Namespace) -> str:
    return "fp32" if torch.device(options.device).type == "cpu" else "bf16"


def _quantize_once(run: RunConfig) -> None:
    """Put the layers' codes into the user's cache, before every actor quantizes the same weights by itself."""
    torch.set_num_threads(common.cores())
    base = BaseModel.of_job(common.read(run)[0].spec, run.job)
    load_segment(base, SegmentSpec(0, 1), quantized=True)


# -- parts ---------------------------------------------------------------------------------------------------------


class _Killer(SilentDisplay):
    """Kills a client's process in the middle of a round, once."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._actor = f"hsplit:{run}:client:{KILLED}"
        self.killed = False

    def step(self, round: int, rounds: int, step: int, steps: int, losses: Any, states: Any) -> None:
        if self.killed or round < KILLED_IN_ROUND:
            return
        import ray

        from hsplit.cluster.ray_executor import NAMESPACE

        actor = ray.get_actor(self._actor, namespace=NAMESPACE)
        os.kill(ray.get(actor.__ray_call__.remote(lambda shell: os.getpid())), signal.SIGKILL)
        self.killed = True


def shared(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Run ``cluster/gpu.yaml`` to its end, and compare losses with those on CPUs."""
    import hsplit

    runs, on_cpus = options.to / "runs", torch.device(options.device).type == "cpu"
    shutil.rmtree(runs, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        model = trained_model(options, Path(name))
        short = [*model, "job.rounds=2", "job.local_steps=2"]
        exact = [*short, *EXACT, *(["job.rounds=1"] if options.model == "tiny" else [])]
        killer = _Killer("shared")
        begun = time.monotonic()
        run = hsplit.launch(
            "gpu",
            None,
            short if options.model == "tiny" else model,
            runs_dir=runs,
            name="shared",
            cpu=on_cpus,
            display=killer,
        )
        found: dict[str, Any] = {
            "complete": run.complete,
            "wall_s": time.monotonic() - begun,
            "killed": killer.killed,
            "val_loss": run.metrics["val_loss"].tolist(),
            "events": [event["text"] for event in read_events(run.path / "events.jsonl") if "text" in event],
        }
        keep(**found)
        losses = {}
        with common.local_ray(12, device=options.device):
            for where, cpu in (("device", on_cpus), ("cpu", True)):
                same = hsplit.launch("gpu", None, exact, runs_dir=runs, name=where, cpu=cpu, display=SilentDisplay())
                losses[where] = same.metrics[LOSSES]
                keep(**found, losses={name: table.to_dict("list") for name, table in losses.items()})
    difference = (losses["device"] / losses["cpu"] - 1).abs().max().max()
    return found | {
        "losses": {name: table.to_dict("list") for name, table in losses.items()},
        "largest_difference": float(difference),
    }


def peaks(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Read predicted and measured peaks of the run that part ``shared`` has left."""
    table = options.to / "runs" / "shared" / "plan.csv"
    if not table.is_file():
        raise InputError(f"{table}: is not there: part shared makes it")
    plan = read_plan(table)
    plan = plan[plan["measured_bytes"] > 0]
    columns = ["round", "name", "declared_bytes", "predicted_bytes", "measured_bytes"]
    ratio = plan["measured_bytes"] / plan["predicted_bytes"]
    return {
        "holders": plan[columns].astype(object).where(plan[columns].notna(), None).to_dict(orient="records"),
        "least": float(ratio.min()),
        "most": float(ratio.max()),
        "over_declared": int((plan["measured_bytes"] > plan["declared_bytes"]).sum()),
    }


def small(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Time steps at SmolLM2-135M's sizes."""
    return _speed(options, "small", keep)


def large(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Time steps at 1.3 billion weights."""
    return _speed(options, "large", keep)


def _speed(options: argparse.Namespace, name: str, keep: Keep) -> dict[str, Any]:
    sizes, console = sizes_of(options, name), Console()
    on_gpu = torch.device(options.device).type == "cuda"
    # A server, four clients and the loop that they are compared with.
    share = 0.16 if on_gpu else 0.0
    how = argparse.Namespace(
        rivals=["unsplit"],
        rivals_gpus=share,
        rank=sizes.rank,
        split=sizes.split,
        steps=sizes.steps,
        repeat=sizes.repeat,
    )
    with common.local_ray(12, ("peft",), options.device) as folder:
        run, length = timed_run(options, name, folder, share)
        _quantize_once(run)
        timings = throughput.timings_of(run, folder, how, _dtype(options), {"hsplit": 0}, console)
    tokens_per_s = {
        contender: [t.examples_per_s * length for t in timings if t.contender == contender]
        for contender in ("hsplit", "unsplit")
    }
    ratios = [ours / theirs for ours, theirs in zip(*tokens_per_s.values(), strict=True)]
    return {
        "tokens_a_step": length * run.job.batch_size * len(run.clients),
        "tokens_per_s": tokens_per_s,
        "hsplit_by_unsplit": median(ratios),
        "spread": (min(ratios), max(ratios)),
        "not_arithmetic": [t.overhead for t in timings if t.overhead is not None],
    }


def joined(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Time the server's part of a step, joined by depth and one client after another."""
    sizes = sizes_of(options, "small")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        model = random_llama(Path(name) / "model", sizes)
        data = common.texts(Path(name) / "texts.csv", length=sizes.length // 4, prompt="w2")
        how = argparse.Namespace(
            data=str(data), model=str(model), split=sizes.split, rank=sizes.rank, repeat=sizes.repeat
        )
        for clients in JOINED:
            phases = server_phase.phases(how, clients, _dtype(options), options.device)
            faster = median(phase.apart_s / phase.joined_s for phase in phases)
            found[f"clients_{clients}"] = faster
            found[f"seconds_{clients}"] = [(phase.joined_s, phase.apart_s) for phase in phases]
            keep(**found)
    return found


class _End:
    """One end of a message's way: packs tensors of a device, and unpacks them there."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def pack(self, nbytes: int) -> tuple[float, WireTensor]:
        """Pack ``nbytes`` of bf16 entries; returns seconds, and the message."""
        tensor = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=self._device)
        self._wait()
        begun = time.perf_counter()
        message = WireTensor.pack(tensor, "bf16")
        return time.perf_counter() - begun, message

    def unpack(self, message: WireTensor) -> float:
        """Unpack onto the device; returns seconds."""
        begun = time.perf_counter()
        message.unpack(torch.bfloat16, self._device)
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def store(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Send messages of several sizes from one actor to another."""
    import sys

    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    share = 0.4 if torch.device(options.device).type == "cuda" else 0.0
    sizes_mb = (0.01, 0.1) if options.model == "tiny" else (1, 8, 64)
    found: dict[str, Any] = {}
    with common.local_ray(4, device=options.device):
        ends = [ray.remote(_End).options(num_cpus=1, num_gpus=share).remote(options.device) for _ in range(2)]
        for size in sizes_mb:
            nbytes, rows = int(size * 1e6) // 2 * 2, []
            # The first is not counted: the device's libraries load with it.
            for _ in range(2 if options.model == "tiny" else 6):
                begun = time.perf_counter()
                pack_ref, message = ends[0].pack.options(num_returns=2).remote(nbytes)
                pack_s, unpack_s = ray.get([pack_ref, ends[1].unpack.remote(message)])
                rows.append((pack_s, time.perf_counter() - begun - pack_s - unpack_s, unpack_s))
                del message
            pack_s, between_s, unpack_s = (median(column) for column in zip(*rows[1:], strict=True))
            found[f"{size:g}_mb"] = {"pack_s": pack_s, "store_s": between_s, "unpack_s": unpack_s}
            found["mb_per_s"] = size / (pack_s + between_s + unpack_s)
            keep(**found)
        for end in ends:
            ray.kill(end)
    # From the device, into the store, out of it, and to the device.
    return found | {"bytes_copied_by_bytes_sent": 4}


def cells(options: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Make cells of the convergence grid for a while."""
    tiny, walls = options.model == "tiny", list[float]()
    protocol = Protocol.read(convergence.QUICK)
    if tiny:
        protocol = protocol.model_copy(update={"rounds": 1, "local_steps": 2})
    # The protocol's budgets are in proportion to the model, and a tiny one's clients would hold nothing.
    policy, changes = ("cenlora", ("job.base=fp32", "job.dtype=fp32")) if tiny else ("hsplitlora", ())
    variant = Variant(policy, policy, changes, policy, protocol.main_data)
    with tempfile.TemporaryDirectory() as name:
        data = [*protocol.data_changes(protocol.main_data, Path(name)), *trained_model(options, Path(name))]
        begun, seed = time.monotonic(), 0
        while not walls or (not tiny and time.monotonic() - begun < CELLS_S):
            cell = convergence.Cell(policy, protocol.main_data, 0.9, seed, protocol.rates.usual)
            made = convergence.run_cell(protocol, cell, variant, data, Console(), options.device)
            walls.append(made["wall_s"])
            seed += 1
            keep(wall_s=walls, per_minute=60 * len(walls) / (time.monotonic() - begun))
    return {"wall_s": walls, "per_minute": 60 * len(walls) / (time.monotonic() - begun)}


CELLS_S = 40.0
ALL_S = 520.0
"""Seconds that all parts have together: a late one leaves less to those after it."""
PARTS = {
    "shared": Part(shared, 200, ("complete", "killed", "largest_difference")),
    "peaks": Part(peaks, 20, ("least", "most", "over_declared")),
    "small": Part(small, 90, ("hsplit_by_unsplit",)),
    "large": Part(large, 120, ("hsplit_by_unsplit",)),
    "joined": Part(joined, 60, tuple(f"clients_{clients}" for clients in JOINED)),
    "store": Part(store, 40, ("mb_per_s",)),
    "cells": Part(cells, 70, ("per_minute",)),
}


# -- the experiment ------------------------------------------------------------------------------------------------


def run_part(name: str, options: argparse.Namespace) -> None:
    """Make one part and write its file; errors are written too."""
    header, begun = common.header_of("gpu", options.command, "torch", "ray", "bitsandbytes"), time.monotonic()

    def write(**found: Any) -> None:
        facts = {"part": name, "device": common.device_name(options.device), "seconds": time.monotonic() - begun}
        text = json.dumps({"machine": header, **facts, **found}, indent=1, default=str) + "\n"
        options.to.mkdir(parents=True, exist_ok=True)
        write_text_atomically(options.to / f"{name}.json", text)

    so_far: dict[str, Any] = {}

    def keep(**found: Any) -> None:
        so_far.update(found)
        write(ended="not yet", **so_far)

    write(ended="not yet")
    try:
        found = PARTS[name].make(options, keep)
    except Exception as error:
        # Kept whole: whoever reads it may have no GPU any more.
        write(ended=one_line(error), traceback=traceback.format_exc(), **so_far)
        return
    write(ended="well", **found)


def _made(name: str, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """Make a part in a process of its own, within its limit and ``left_s``, and read its file."""
    path, limit_s = options.to / f"{name}.json", max(0.0, min(PARTS[name].limit_s * options.patience, left_s))
    process = multiprocessing.get_context("spawn").Process(target=call_of, args=("gpu", "run_part", name, options))
    path.unlink(missing_ok=True)
    process.start()
    with _ended(process):
        process.join(limit_s)
        late = process.is_alive()
    found: dict[str, Any] = read_json(path, dict[str, Any]) if path.is_file() else {"part": name, "ended": "not yet"}
    if found["ended"] == "not yet":
        found["ended"] = f"it took more than {limit_s:.0f} s" if late else f"its process ended with {process.exitcode}"
        write_text_atomically(path, json.dumps(found, indent=1) + "\n")
    return found


@contextmanager
def _ended(process: Any) -> Iterator[None]:
    """End a process with the block; its Ray ends with it."""
    try:
        yield
    finally:
        process.terminate()
        process.join(5)
        process.kill()
        process.join()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the parts that have not ended well, and write a table of all."""
    options = _options(arguments)
    options.command = arguments
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {options.device}: PyTorch finds no GPU here; --device cpu rehearses")
    console = Console(width=140)
    options.to.mkdir(parents=True, exist_ok=True)
    rows, end = [], time.monotonic() + ALL_S * options.patience
    for name in options.only:
        path = options.to / f"{name}.json"
        found = read_json(path, dict[str, Any]) if path.is_file() else {}
        if found.get("ended") != "well":
            found = _made(name, options, end - time.monotonic())
        figures = [f"{figure} {_shown(found[figure])}" for figure in PARTS[name].about if figure in found]
        rows.append([name, found["ended"], f"{found.get('seconds', 0):.0f} s", ", ".join(figures)])
        console.print(*rows[-1], sep="; ")
    columns = ["part", "ended", "took", "figures"]
    header = common.header_of("gpu", arguments, "torch", "ray", "bitsandbytes")
    header["device"] = common.device_name(options.device)
    common.write_markdown(options.to / "gpu.md", header, [common.markdown_table(columns, rows)])
    console.print(f"written to {options.to}")


def _shown(figure: Any) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("gpu", __doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument(
        "--model", choices=MODELS, default="smollm2", help="of parts shared and cells; tiny: of all parts"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the parts' time limits")
    options = parser.parse_args(arguments)
    options.to = options.to.resolve()
    return options


if __name__ == "__main__":
    main()
