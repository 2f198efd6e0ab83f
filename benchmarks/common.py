"""The common part of the experiments: flags, clusters and models, runs on Ray and in this process, and results."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TerminalTable

from hsplit.config import SERVER, RunConfig, load_run_config
from hsplit.config.overrides import Overrides
from hsplit.config.reading import read_json
from hsplit.evaluation.perplexity import CrossEntropy, cross_entropy
from hsplit.evaluation.split_model import split_model
from hsplit.experiments import results_directory
from hsplit.files import write_text_atomically
from hsplit.lora.learned import learned_parts
from hsplit.models.lookup import ModelSource, find_model
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.observe.observer import Observer, SilentDisplay
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.coordinator import Coordinator, Inputs
from hsplit.run.in_process import local_run
from hsplit.run.inputs import check_model, read_inputs, resolved_config
from hsplit.run_directory import RunDirectory

# Ray and matplotlib are imported where needed: most experiments do not use both.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hsplit.cluster.ray_executor import RayExecutor

WORDS = 96
"""Words of the tiny model's vocabulary."""

Table = tuple[list[str], list[list[str]]]
"""Columns, and cells row by row."""


# -- flags and the description of the machine ---------------------------------------------------------------------
FIXED_POLICY = """
split: {split}
ranks: {rank}
importance: {{metric: equal}}
freeze: never
"""
"""One split and one rank for all, as a template: nothing is planned."""


def flags_of(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser that has ``--to`` already, described by the first line of ``about``, a module's docstring."""
    parser = argparse.ArgumentParser(prog=f"hsplit bench {name}", description=(about or "").split("\n")[0])
    parser.add_argument("--to", type=Path, default=results_directory(name), metavar="DIR", help="directory to write")
    return parser


def header_of(name: str, arguments: Sequence[str] | None, *packages: str, **facts: object) -> dict[str, Any]:
    """Facts to stand above results: the machine, versions of ``packages``, the command, and ``facts``.

    Args:
        name: of the experiment.
        arguments: its flags; ``None`` for those that this process was started with.
    """
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    # Results say what was run, not where on a machine it was.
    named = [Path(word).name if Path(word).is_absolute() else word for word in given]
    command = " ".join(["hsplit bench", name, *named])
    return {**machine_description(*packages), "command": command, **facts}


def machine_description(*packages: str) -> dict[str, str]:
    """Processor and system of this machine, and versions of Python and of ``packages``."""
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    return {"processor": _processor(), "system": platform.platform(), "versions": ", ".join(versions)}


def device_name(device: str) -> str:
    """The name of a GPU, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_one_core() -> None:
    """Compute on one thread of one core, so that seconds can be compared."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def seconds_of(work: Callable[..., object], *arguments: Any) -> float:
    """Wall seconds of ``work(*arguments)``."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


# -- clusters and models ------------------------------------------------------------------------------------------


def configured(folder: Path, cluster: str, policy: str | None = None, overrides: Overrides = ()) -> RunConfig:
    """The resolved configuration of a cluster file and a policy that are given as text.

    Args:
        folder: for both files.
        cluster: content of the cluster file.
        policy: content of the policy file; or, in one line without a colon, the name of a policy.
        overrides: as for :func:`~hsplit.config.load_run_config`.
    """
    file, named = folder / "cluster.yaml", policy
    file.write_text(cluster)
    if policy is not None and ":" in policy:
        named = str(folder / "policy.yaml")
        Path(named).write_text(policy)
    return resolved_config(load_run_config(file, named, overrides))


def read(run: RunConfig) -> tuple[ModelSource, Inputs]:
    """Find the model and the data of ``run``, and check that they go together."""
    source = find_model(run.job.model)
    check_model(run, source)
    return source, read_inputs(run, source)


def call_times_s(run: RunConfig, model: Path) -> dict[str, dict[str, float]]:
    """Virtual seconds of each call of a local step under the first plan, by holder and call."""
    scheduler = Scheduler(run, ModelSpec.read(model))
    return scheduler.clock().call_s(scheduler.plan())


def joined_turn_s(calls: Mapping[str, Mapping[str, float]]) -> float:
    """Virtual seconds of a server's turn over a microbatch of every client, from :func:`call_times_s`."""
    return sum(seconds for call, seconds in calls[SERVER].items() if call.split()[0] == "step")


def learned_losses(
    run: RunConfig, model: Path, coordinator: Coordinator, directory: RunDirectory
) -> dict[str, CrossEntropy]:
    """Loss on the held-out texts of each client of the plan, of one model with what the last checkpoint has learned."""
    _, tensors = read_checkpoint(latest_checkpoint(directory.checkpoints)[0])
    learned = learned_parts({key: tensor for own in tensors.values() for key, tensor in own.items()})
    whole = split_model(BaseModel.of_job(ModelSpec.read(model), run.job), learned, None)
    actors, tokenizer = coordinator._executor.actors, load_tokenizer(model)  # type: ignore[attr-defined]
    held_out = {
        part.name: [example for data in actors[part.name].data.clients for example in data.held_out]
        for part in coordinator.context.plan.available
    }
    return {name: cross_entropy(whole, tokenizer, own, run.job.batch_size) for name, own in held_out.items()}


def perplexities(losses: Mapping[str, CrossEntropy]) -> dict[str, Any]:
    """Perplexity over all clients' texts, that of the worst client, and each client's loss and tokens."""
    total, tokens = (sum(part) for part in zip(*((own.total, own.tokens) for own in losses.values()), strict=True))
    return {
        "ppl": math.exp(total / tokens),
        "worst_ppl": max(math.exp(own.total / max(own.tokens, 1)) for own in losses.values()),
        "losses": {client: (own.total, own.tokens) for client, own in losses.items()},
    }


def said(found: Mapping[str, Any]) -> str:
    """One line on a finished run, from :func:`perplexities`."""
    return f"perplexity {found['ppl']:.3f}, worst client {found['worst_ppl']:.3f}"


def against(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    """Cells of :func:`perplexities` over seeds, each with the difference to another run of the same seed.

    Args:
        pairs: a run and the one that it is compared with, by seed; the same one twice is compared with nothing.
    """
    cells = []
    for field in ("ppl", "worst_ppl"):
        differences = [one[field] - other[field] for one, other in pairs]
        spread = f"{statistics.fmean(differences):+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"
        cells.append(f"{statistics.fmean(one[field] for one, _ in pairs):.3f}")
        cells.append("" if all(one is other for one, other in pairs) else spread)
    return cells


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer that makes one token of each of ``words``, after ``<eos>`` and ``<unk>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def tiny_model(to: Path, words: int = WORDS, **changes: int) -> Path:
    """Save a random Llama with a tokenizer of ``words`` words into ``to``; ``changes`` are of its sizes.

    Computing takes next to nothing on it: an experiment on it measures Ray, hsplit, and declared time.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    config = LlamaConfig(vocab_size=words, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(to)
    word_tokenizer([f"w{i}" for i in range(2, words)]).save_pretrained(to)
    return to


def texts(to: Path, count: int = 200, words: int = WORDS, length: int = 12, prompt: str | None = None) -> Path:
    """Write ``count`` examples in the tiny model's words, a CSV.

    Args:
        length: words of a response.
        prompt: of every example; the response's first letters by default.
    """
    draw = random.Random(0)
    lines = [" ".join(f"w{draw.randrange(2, words)}" for _ in range(length)) for _ in range(count)]
    prompts = [line[:8] if prompt is None else prompt for line in lines]
    pairs = (f"{prompt},{line}" for prompt, line in zip(prompts, lines, strict=True))
    to.write_text("prompt,response\n" + "\n".join(pairs) + "\n")
    return to


# -- runs ---------------------------------------------------------------------------------------------------------


@contextmanager
def local_ray(cpus: float, more_modules: Sequence[str] = (), device: str = "cpu") -> Iterator[Path]:
    """Start a Ray with ``cpus`` nominal CPUs on this machine, or use the one that this process is connected to.

    Args:
        cpus: at least.
        more_modules: for the process that workers are forked from to import.
        device: where actors are to compute. Only for a CPU are workers forked: a forked process sees no GPU.

    Yields:
        A temporary folder for all output on the way.
    """
    import ray

    from hsplit.cluster.connection import connect
    from hsplit.cluster.fork_server import MODULES, ForkServer

    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        if not ray.is_initialized():
            forking = torch.device(device).type == "cpu"
            fork_server = ends.enter_context(ForkServer((*MODULES, *more_modules))) if forking else None
            connect(None, cpus, dashboard=False, fork_server=fork_server)
            ends.callback(ray.shutdown)
        yield folder


@contextmanager
def on_ray(
    name: str, run: RunConfig, model: Path, folder: Path, display: Observer | None = None
) -> Iterator[tuple[Coordinator, RayExecutor]]:
    """The coordinator of ``run`` and its actors, which end with the block.

    Args:
        name: of the run, and of its directory in ``folder``.
        model: directory.
    """
    from hsplit.cluster.ray_executor import RayExecutor

    executor = RayExecutor(name, run, model)
    try:
        directory, inputs = RunDirectory.create(folder, name), read_inputs(run, find_model(str(model)))
        clock_of = Scheduler(run, ModelSpec.read(model)).clock
        yield Coordinator(run, executor, directory, inputs, display or SilentDisplay(), clock_of), executor
    finally:
        executor.close()


def pid_of(executor: RayExecutor, name: str) -> int:
    """The process of an actor."""
    import ray

    return int(ray.get(executor._handles[name].__ray_call__.remote(lambda self: os.getpid())))


@contextmanager
def in_process(
    run: RunConfig, model: Path, inputs: Inputs, display: Observer, **how: Any
) -> Iterator[tuple[Coordinator, RunDirectory]]:
    """The coordinator of ``run`` in this process, without Ray, and its directory, which is gone after the block.

    Args:
        model: directory.
        how: as for :func:`~hsplit.run.in_process.local_run`.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = RunDirectory.create(Path(name), "run")
        yield local_run(run, ModelSpec.read(model), directory, inputs, display, **how), directory


# -- experiments of many runs -------------------------------------------------------------------------------------


class Keyed(Protocol):
    """One run of an experiment."""

    @property
    def key(self) -> str:
        """Of its file."""


C = TypeVar("C", bound=Keyed)


def cell_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`finished_cells` reads: which runs to make, or to list them only."""
    parser.add_argument("--list", action="store_true", help="list the runs that are left, and end")
    part = "every N-th run from the I-th on"
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help=part)


def finished_cells(
    cells: Sequence[C],
    options: argparse.Namespace,
    console: Console,
    header: Mapping[str, Any],
    run: Callable[[C], dict[str, Any]],
    outcome: Callable[[Mapping[str, Any]], str],
) -> list[dict[str, Any]]:
    """Make the runs that are left, each into a file of its own in ``cells/``, so that a stopped experiment continues.

    Args:
        cells: all runs.
        options: of :func:`flags_of` with :func:`cell_flags`.
        header: facts to keep with each run.
        run: makes one.
        outcome: what to say of a finished one.

    Returns:
        The finished runs, of earlier calls too; none where they are only listed.
    """
    folder: Path = options.to / "cells"
    which, of = options.part
    left = [cell for cell in cells[which::of] if not (folder / f"{cell.key}.json").is_file()]
    if options.list:
        console.print("\n".join(cell.key for cell in left))
        return []
    for cell in left:
        found = run(cell) | {"machine": dict(header)}
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / f"{cell.key}.json", json.dumps(found, indent=1, default=str) + "\n")
        console.print(f"{cell.key}: {outcome(found)}")
    return [read_json(path, dict[str, Any]) for path in sorted(folder.glob("*.json"))]


# -- results ------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Any], header: Mapping[str, Any]) -> None:
    """A CSV with ``# key: value`` lines before its header, which pandas reads with ``comment="#"``.

    Args:
        rows: dataclass instances or mappings, all with the same fields.
        header: of facts; may be empty.
    """
    records = [row if isinstance(row, Mapping) else asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a markdown file, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def titled(title: str, table: Table) -> str:
    """A heading and its table for a markdown file."""
    return f"## {title}\n\n{markdown_table(*table)}"


def write_markdown(path: Path, header: Mapping[str, Any], parts: Sequence[str]) -> None:
    """Write facts as a list, and below them ``parts``, each a text that ends its last line."""
    facts = "".join(f"- {key}: {value}\n" for key, value in header.items())
    path.write_text("\n".join([facts, *parts]))


def show_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int = 1
) -> None:
    """A table on the terminal, the first ``left`` columns to the left and the others to the right."""
    table = TerminalTable(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def keep_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], to: Path) -> None:
    """Show a table, and write it into a markdown file."""
    show_table(console, columns, rows)
    to.write_text(markdown_table(columns, rows))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, to: Path) -> None:
    """Write a figure as SVG, the same file for the same figures."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "hsplit"}):
        figure.savefig(to, metadata={"Date": None})
