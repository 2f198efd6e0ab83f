"""Predicted against measured peak memory of clients and of the server (METHOD 4).

    python -m benchmarks.memory [--to FOLDER] [--only PART]        # or: hsplit bench memory

A real ``Client`` (or ``Server``) executes all calls of a run, at the sizes that a plan reserves for: batches of the
greatest length with every token supervised, residuals at their cap, an importance probe, a resumption. The other side's
messages are random numbers of the right shape, so that only one holder's memory is in the process. Every combination
runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
from rich.console import Console

from benchmarks import common
from hsplit.actors.client import Client
from hsplit.actors.factory import participant_class
from hsplit.actors.messages import Activations, WireTensor
from hsplit.actors.participant import Participant
from hsplit.actors.server import Server
from hsplit.actors.whole_client import WholeClient
from hsplit.config import ClientConfig as ClientConfig
from hsplit.config import Job, Policy, RunConfig
from hsplit.data import Example
from hsplit.errors import InputError
from hsplit.experiments import call_of
from hsplit.lora.holder import HeldAdapters, RoundUpdate, exchange_dtype
from hsplit.lora.learned import LearnedTerm
from hsplit.lora.residual import ResidualUpdate
from hsplit.models.dtype import DTYPES
from hsplit.models.factors import LowRank
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel
from hsplit.models.spec import LinearShape, ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.models.weights import is_quantized
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import HolderPlan, Plan

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Case:
    """One combination.

    Attributes:
        model: name in the table.
        base, dtype, wire: of the job.
        splits: one client's split point, or for the server those of all its clients.
        rank: of every adapted weight, and the largest that the job allows.
        batch_size, length: a client's batch.
        labels: where the tail is: ``server`` or ``client``.
        cap: ``residual.max_rank``.
        dropout: the adapters'.
        noise: ``privacy.noise``.
        grad_accumulation: batches a step.
        holds: ``front``, the whole ``model``, or all ``weights`` to train them.
        aggregation: the policy's.
        optimizer: the job's.
        stored: how a client keeps a quantized base: ``dense`` or ``codes``.
        working_copy: the server computes with dense copies beside the codes.
        vocabulary: distinct token ids of a client's texts, of which alone it holds the embedding; 0: it holds all.
        exchange: format of adapters at a round's end, as ``pace.exchange``.
        metric: of importance, for which it is probed.
        lr_scaling: the policy's.
    """

    model: str
    base: str
    splits: tuple[int, ...]
    rank: int = 8
    batch_size: int = 2
    length: int = 64
    labels: str = "server"
    dtype: str = "fp32"
    wire: str = "bf16"
    cap: int | str = 32
    dropout: float = 0.0
    noise: float = 0.0
    grad_accumulation: int = 1
    holds: str = "front"
    aggregation: str = "concat"
    optimizer: str = "adamw"
    stored: Literal["dense", "codes"] = "dense"
    working_copy: bool = False
    vocabulary: int = 0
    exchange: str = "whole"
    metric: str = "rngwp"
    lr_scaling: str = "none"

    @property
    def policy(self) -> Policy:
        if self.holds == "weights":
            return Policy(placement="single", train="weights", aggregation="none")
        placement = "split" if self.holds == "front" else "full"
        chosen: dict[str, Any] = {"placement": placement, "ranks": self.rank, "aggregation": self.aggregation}
        chosen |= {"importance": {"metric": self.metric}, "lr_scaling": self.lr_scaling}
        if self.holds == "front":
            chosen["pace"] = {"embedding": "own" if self.vocabulary else "whole", "exchange": self.exchange}
        return Policy.model_validate(chosen)

    def cost(self, model: ModelSpec) -> CostModel:
        """Return the cost model of a run of this job under this policy."""
        one = ClientConfig(name="one", kind="one", memory_gb=1.0, tflops=1.0)
        return CostModel.of_run(model, RunConfig(clients=(one,), job=self.job, policy=self.policy))

    @property
    def job(self) -> Job:
        return Job.model_validate(
            {
                "base": self.base,
                "dtype": self.dtype,
                "wire": self.wire,
                "rank_set": [self.rank],
                "batch_size": self.batch_size,
                "max_length": self.length,
                "residual": {"max_rank": self.cap},
                "privacy": {"labels": self.labels, "noise": self.noise},
                "dropout": self.dropout,
                "grad_accumulation": self.grad_accumulation,
                "optimizer": self.optimizer,
                "validation": {"max_examples": self.batch_size, "share": 0.5},
            }
        )


@dataclass(frozen=True)
class Measured:
    """Memory of a holder, in bytes above its start.

    Attributes:
        rest: held when nothing runs: weights, adapters with gradients, moments, and the residual at its cap.
        peak: most at any time.
        parts: most during each part of a round.
        predicted: the cost model's peak.
    """

    rest: int
    peak: int
    parts: dict[str, int]
    predicted: int

    @property
    def error(self) -> float:
        """Excess of the prediction over the measurement, relative to the bytes above the start."""
        return self.predicted / self.peak - 1

    @property
    def error_at_work(self) -> float:
        """The same, relative to the bytes above the holder at rest."""
        return (self.predicted - self.peak) / max(self.peak - self.rest, 1)


class _Holder:
    """Counts one holder's memory part by part."""

    def __init__(self, actor: Participant | Server, case: Case, spec: ModelSpec) -> None:
        self.actor = actor
        if case.lr_scaling != "none":
            actor.set_lr_scales(dict.fromkeys(range(spec.layers), 2.0))
        self.parts: dict[str, int] = {}
        self._part = "start"

    @property
    def peak(self) -> int:
        return max(peak for part, peak in self.parts.items() if part != "filling")

    def call(self, part: str, method: Callable[Concatenate[Any, P], R], *given: P.args, **named: P.kwargs) -> R:
        self.settle(part)
        # As calls reach it: by the name, so that a class of its own may have another.
        called: Callable[P, R] = getattr(self.actor, method.__name__)
        return called(*given, **named)

    def settle(self, part: str = "rest") -> int:
        """Read the last call's peak once its arguments and results are gone; returns the bytes held then."""
        self.parts[self._part] = max(self.parts.get(self._part, 0), self.actor.peak_bytes())
        self._part = part
        return self.actor.peak_bytes()


def measured_client(directory: Path, case: Case) -> Measured:
    """Drive one client of ``case`` through all that a run asks of it."""
    job, policy = case.job, case.policy
    spec = ModelSpec.read(directory)
    shapes = spec.targeted(job.targets)
    (split,) = case.splits
    ranks = {} if case.holds == "weights" else {s.name: case.rank for s in shapes if s.layer < split}
    base = BaseModel(spec, case.base, DTYPES[case.dtype])
    actor = participant_class(policy)("one", job, policy, base)
    examples = [Example("", text, None) for text in [_text(directory, case.length)] * 2 * case.batch_size]
    report = actor.load_data({actor.name: examples}, None)
    if report.too_long:
        raise RuntimeError("the examples are longer than they should be")
    if case.vocabulary:
        # As if its texts had so many words.
        drawn = torch.randperm(spec.vocab_size)[: case.vocabulary]
        actor.data.vocabulary = torch.cat([actor.data.vocabulary, drawn]).unique()
    holder = _Holder(actor, case, spec)
    held = [s for s in shapes if s.name in ranks]
    part = HolderPlan("one", "client", True, split, ranks, stored=case.stored)
    holder.call("load", Participant.configure, part)
    holder.call("round", Participant.restart, RoundUpdate(1, {}, {}))
    _client_steps(holder, case, spec.width, 0)
    # As after a resumption, which brings the state back and the residual whole.
    state = {name: tensor.clone() for name, tensor in holder.call("round", Participant.state).items()}
    holder.call("round", Participant.resume_state, state, _update(held, case))
    del state
    # The residual is at its cap already, and all of it changes.
    holder.call("round", Participant.restart, _update(held, case))
    _client_steps(holder, case, spec.width, 1)
    _client_checks(holder, case, spec.width)
    holder.call("round", Participant.collect)
    rest = holder.settle()
    cost = case.cost(spec)
    own = len(actor.data.vocabulary) if case.vocabulary else None
    predicted = cost.client_bytes(split, ranks, stored=case.stored, embedding_rows=own)
    if case.holds == "weights":
        predicted = cost.training_bytes
    return Measured(rest, holder.peak, holder.parts, predicted)


def _client_steps(holder: _Holder, case: Case, width: int, round_: int) -> None:
    shape = (case.batch_size * case.length, width)
    at_home = case.labels == "client"
    if case.holds != "front":
        for step in (2 * round_, 2 * round_ + 1):
            holder.call("step", WholeClient.train_step, step)
        return
    for step, micro in product((2 * round_, 2 * round_ + 1), range(case.grad_accumulation)):
        holder.call("step", Client.forward, step, micro)
        if at_home:
            holder.call("step", Client.tail, step, micro, _random(shape, case.wire))
        holder.call("step", Client.backward, step, micro, _random(shape, case.wire) if case.splits[0] else None)


def _client_checks(holder: _Holder, case: Case, width: int) -> None:
    shape = (case.batch_size * case.length, width)
    at_home = case.labels == "client"
    if case.holds != "front":
        holder.call("validation", WholeClient.validate, 0)
        if case.holds == "model":
            holder.call("probe", WholeClient.probe, 1, shape[0])
        return
    holder.call("validation", Client.validation_forward, 0)
    if at_home:
        holder.call("validation", Client.validation_tail, 0, _random(shape, case.wire))
    holder.call("probe", Client.probe_forward, 1, shape[0])
    if at_home:
        holder.call("probe", Client.probe_tail, _random(shape, case.wire))
    holder.call("probe", Client.probe_backward, _random(shape, case.wire) if case.splits[0] else None)


def measured_server(directory: Path, case: Case) -> Measured:
    """Drive the server of ``case`` through all that a run asks of it, with residuals at their cap."""
    job, policy = case.job, case.policy
    spec = ModelSpec.read(directory)
    shapes = spec.targeted(job.targets)
    plan = _plan(spec, shapes, case)
    base = BaseModel(spec, case.base, DTYPES[case.dtype])
    holder = _Holder(Server("server", job, policy, base), case, spec)
    holder.call("load", Server.configure, plan)
    holder.call("round", Server.restart, RoundUpdate(1, {}, {}))
    messages = [_activations(f"c{i}", split, case, spec) for i, split in enumerate(case.splits)]
    gradients = [_random((case.batch_size * case.length, spec.width), case.wire) for _ in messages]
    _server_steps(holder, case, messages, gradients, 0)
    tensors = holder.actor.state()
    if case.aggregation == "concat":
        for s in shapes:
            tensors |= LearnedTerm(_factors(s, _cap(s, case), case)).tensors(s.name)
    holder.call("round", Server.load_state, tensors, *(c.name for c in plan.clients))
    del tensors
    # The replaced tensors were made here, outside the allocator's log, so their end is not recorded.
    holder.call("filling", Server.aggregate, 2, *[_held(c, shapes, case) for c in plan.clients])
    _server_steps(holder, case, messages, gradients, 1)
    _server_checks(holder, case, messages, gradients)
    holder.call("round", Server.aggregate, 3, *[_held(c, shapes, case) for c in plan.clients])
    _server_steps(holder, case, messages, gradients, 2)
    del messages, gradients
    holder.call("round", Server.state)
    rest = holder.settle()
    cost = case.cost(spec)
    predicted = cost.server_bytes(case.splits, plan.server.ranks)
    if case.working_copy:
        predicted += cost.working_copy_bytes(min(case.splits))
    return Measured(rest, holder.peak, holder.parts, predicted)


def _server_steps(
    holder: _Holder, case: Case, messages: Sequence[Activations], gradients: Sequence[WireTensor], round_: int
) -> None:
    if case.holds != "front":
        # Nothing of a step comes here.
        return
    for step in (2 * round_, 2 * round_ + 1):
        for turn in range(case.grad_accumulation):
            if case.labels == "server":
                holder.call("step", Server.train_step, step, turn, *messages)
            else:
                holder.call("step", Server.forward, step, turn, *messages)
                holder.call("step", Server.backward, step, turn, [m.client for m in messages], *gradients)
        holder.call("step", Server.end_step, step)


def _server_checks(
    holder: _Holder, case: Case, messages: Sequence[Activations], gradients: Sequence[WireTensor]
) -> None:
    if case.holds != "front":
        return
    if case.labels == "server":
        holder.call("validation", Server.evaluate, *messages)
        holder.call("probe", Server.probe, *messages)
    else:
        holder.call("validation", Server.evaluate_deep, *messages)
        holder.call("probe", Server.probe_forward, *messages)
        holder.call("probe", Server.probe_backward, *gradients)


# -- messages of the other side -----------------------------------------------------------------------------------


def _random(shape: tuple[int, int], wire: str) -> WireTensor:
    return WireTensor.pack(torch.randn(shape) / 100, wire)


def _activations(name: str, split: int, case: Case, spec: ModelSpec) -> Activations:
    rows = case.batch_size * case.length
    targets = torch.randint(spec.vocab_size, (rows,), dtype=torch.int32).numpy()
    hidden = _random((rows, spec.width), case.wire)
    lengths = (case.length,) * case.batch_size
    return Activations(name, split, hidden, lengths, rows, rows, targets if case.labels == "server" else None)


def _cap(shape: LinearShape, case: Case) -> int:
    most = min(shape.d_out, shape.d_in) // 2
    return most if isinstance(case.cap, str) else min(case.cap, most)


def _factors(shape: LinearShape, rank: int, case: Case) -> LowRank:
    master = torch.promote_types(DTYPES[case.dtype], torch.float32)
    B, A = torch.randn(shape.d_out, rank, dtype=master), torch.randn(rank, shape.d_in, dtype=master)
    return LowRank(B.mul_(1e-3), A.mul_(1e-3))


def _sent(term: LowRank, case: Case) -> LowRank:
    """An adapter or a restart in the exchange's format."""
    sent = exchange_dtype(case.policy, DTYPES[case.dtype])
    return term if sent is None else term.to(sent)


def _update(shapes: Sequence[LinearShape], case: Case) -> RoundUpdate:
    dtype = DTYPES[case.dtype]
    narrow = is_quantized(case.base) or exchange_dtype(case.policy, dtype) is not None
    wide = torch.promote_types(dtype, torch.float32)
    factors = {s.name: _factors(s, _cap(s, case), case).to(dtype if narrow else wide) for s in shapes}
    residuals = {name: ResidualUpdate(0, own) for name, own in factors.items()}
    return RoundUpdate(2, residuals, {s.name: _sent(_factors(s, case.rank, case), case) for s in shapes})


def _held(client: HolderPlan, shapes: Sequence[LinearShape], case: Case) -> HeldAdapters:
    own = [s for s in shapes if s.name in client.ranks]
    tokens = case.batch_size * case.length
    terms = {s.name: _sent(_factors(s, case.rank, case), case) for s in own}
    return HeldAdapters(client.name, terms, {s.layer: tokens for s in own}, {s.name: s.layer for s in own})


def _plan(spec: ModelSpec, shapes: Sequence[LinearShape], case: Case) -> Plan:
    def ranks(first: int, last: int) -> dict[str, int]:
        return {s.name: case.rank for s in shapes if first <= s.layer < last}

    layers, first = spec.layers, min(case.splits)
    clients = [HolderPlan(f"c{i}", "client", True, k, ranks(0, k)) for i, k in enumerate(case.splits)]
    server = HolderPlan("server", "server", True, first, ranks(first, layers), working_copy=case.working_copy)
    return Plan(layers, server, tuple(clients), 1.0, 0.0, "none")


def _text(directory: Path, length: int) -> str:
    """A response of ``length`` tokens, its end included."""
    tokenizer = load_tokenizer(directory)
    text = " a" * (length - 1 if tokenizer.eos_token_id is not None else length)
    if len(tokenizer(text, add_special_tokens=False)["input_ids"]) != text.count("a"):
        raise RuntimeError(f"{directory}: the tokenizer does not make one token of ' a'")
    return text


# -- the table ----------------------------------------------------------------------------------------------------

SMOLLM2, GPT2 = "SmolLM2-135M", "GPT-2 small (random)"
GEMMA3, OLMOE, BLOOM = "Gemma 3 (random)", "OLMoE (random)", "BLOOM (random)"
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
# Models by their own forward, by the name in the table: model type and sizes.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Windows, two rotary tables, packed rows.
    GEMMA3: ("gemma3_text", {"hidden_size": 640, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 32}),
    # A mixture, packed rows.
    OLMOE: (
        "olmoe",
        {"hidden_size": 512, "intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2} | _HEADS,
    ),
    # ALiBi, padded rows.
    BLOOM: ("bloom", {"hidden_size": 512, "n_head": 8}),
}
# Few in bf16, which takes minutes where a processor only emulates it.
CLIENTS = (
    Case(SMOLLM2, "fp32", (4,)),
    Case(SMOLLM2, "fp32", (8,), rank=16, batch_size=4, labels="client"),
    Case(SMOLLM2, "nf4", (2,), rank=32, length=128),
    Case(SMOLLM2, "nf4", (10,), length=128),
    Case(SMOLLM2, "int8", (6,), rank=4, batch_size=1, length=256, labels="client"),
    Case(SMOLLM2, "bf16", (6,), dtype="bf16", length=32),
    Case(SMOLLM2, "nf4", (4,), rank=32, batch_size=1, length=16, cap=128),
    Case(GPT2, "fp32", (3,), length=128),
    Case(GPT2, "nf4", (6,), rank=16, labels="client"),
    Case(GPT2, "int8", (2,), batch_size=8, wire="fp32"),
    Case(GPT2, "nf4", (4,), dtype="bf16", rank=4, length=32),
    Case(GPT2, "nf4", (1,), rank=32, batch_size=1, length=32),
    Case(SMOLLM2, "nf4", (4,), length=128, stored="codes"),
    Case(SMOLLM2, "nf4", (12,), rank=32, batch_size=8, stored="codes"),
    Case(SMOLLM2, "nf4", (24,), rank=4, batch_size=3, labels="client", stored="codes"),
    Case(SMOLLM2, "int8", (8,), rank=16, batch_size=1, length=256, stored="codes"),
    Case(SMOLLM2, "int8", (12,), labels="client", stored="codes"),
    Case(SMOLLM2, "nf4", (2,), batch_size=16, length=128, stored="codes"),
    Case(GPT2, "nf4", (3,), length=128, stored="codes"),
    Case(GPT2, "int8", (9,), rank=16, batch_size=6, stored="codes"),
    Case(SMOLLM2, "nf4", (0,), batch_size=8, length=128, vocabulary=3000),
    Case(SMOLLM2, "nf4", (4,), length=128, stored="codes", vocabulary=3000),
    Case(SMOLLM2, "fp32", (2,), batch_size=4, vocabulary=3000),
    Case(GPT2, "int8", (4,), batch_size=3, stored="codes", vocabulary=2000),
    Case(SMOLLM2, "nf4", (30,), length=128, holds="model"),
    Case(GPT2, "fp32", (12,), rank=16, holds="model"),
    Case(SMOLLM2, "int8", (30,), batch_size=4, cap=16, holds="model"),
    Case(GPT2, "nf4", (12,), batch_size=4, holds="weights"),
    *(Case(name, "fp32", (4,), length=128) for name in OTHERS),
    *(Case(name, "nf4", (6,), rank=16, labels="client") for name in OTHERS),
)
SERVERS = (
    Case(SMOLLM2, "nf4", (4,), rank=16, length=128),
    Case(SMOLLM2, "nf4", (2, 6, 10, 20)),
    Case(SMOLLM2, "nf4", (4,), rank=16, length=128, working_copy=True),
    Case(SMOLLM2, "nf4", (2, 6, 10, 20), cap=128, working_copy=True),
    Case(SMOLLM2, "int8", (4, 16), labels="client"),
    Case(GPT2, "nf4", (1, 2, 4, 8), rank=16),
    Case(GPT2, "fp32", (3, 9), labels="client"),
    Case(GPT2, "int8", (6, 6, 6)),
    Case(SMOLLM2, "nf4", (30, 30, 30), holds="model", rank=16, aggregation="hetlora"),
    Case(SMOLLM2, "nf4", (30, 30), holds="model", aggregation="flexlora"),
    Case(GPT2, "fp32", (12,), holds="model", rank=16, aggregation="fedavg"),
)


CASES = (*CLIENTS, *SERVERS)


def random_model(to: Path, config: Any) -> Path:
    """Save a model of ``config`` with random weights, and a tokenizer that makes one token of every `` a``."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(to)
    common.word_tokenizer(["a"]).save_pretrained(to)
    return to


def row_of(directory: Path, case: Case) -> dict[str, Any]:
    """One row of the table: the combination, and bytes that a plan would need, that were predicted and measured."""
    begun = time.perf_counter()
    server = case in SERVERS
    measured = (measured_server if server else measured_client)(directory, case)
    row = asdict(case) | {"holder": "server" if server else "client", "splits": " ".join(map(str, case.splits))}
    row |= {f"{part}_bytes": measured.parts.get(part, 0) for part in ("load", "step", "probe", "round", "validation")}
    # A budget below the prediction is refused, so this is the least to declare.
    row |= {"declared_bytes": measured.predicted, "predicted_bytes": measured.predicted}
    row |= {"measured_bytes": measured.peak, "rest_bytes": measured.rest, "error": measured.error}
    return row | {"error_at_work": measured.error_at_work, "wall_time_s": time.perf_counter() - begun}


def measure_apart(directory: Path, number: int, results: Any) -> None:
    """Put the row of :data:`CASES` ``[number]`` into the queue ``results``."""
    torch.set_num_threads(2)
    results.put(row_of(directory, CASES[number]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every combination, write the rows and print them."""
    parser = common.flags_of("memory", __doc__)
    parser.add_argument("--out", type=Path, dest="to", metavar="DIR", help="the same as --to")
    parser.add_argument("--only", default="", help="only combinations with this in holder, model, base or aggregation")
    options = parser.parse_args(arguments)

    from transformers import AutoConfig, GPT2Config

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "bos_token_id": 0, "eos_token_id": 0}
        places = {SMOLLM2: lambda: find_model(DEFAULT_MODEL).directory}
        places[GPT2] = lambda: random_model(Path(folder), GPT2Config(**sizes))
        for name, (kind, own) in OTHERS.items():
            ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 20_000}
            config = AutoConfig.for_model(kind, num_hidden_layers=8, **ids, **own)
            places[name] = partial(random_model, Path(folder) / kind, config)
        named = [f"{'server' if c in SERVERS else 'client'} {c.model} {c.base} {c.aggregation}" for c in CASES]
        chosen = [number for number, name in enumerate(named) if options.only in name]
        if not chosen:
            raise InputError(f"--only {options.only}: is in no combination's holder, model, base or aggregation")
        needed = {CASES[number].model for number in chosen}
        directories = {name: find() for name, find in places.items() if name in needed}
        # Forked processes would inherit memory; spawned ones begin with none.
        context = multiprocessing.get_context("spawn")
        for number in chosen:
            results = context.Queue()
            given = ("memory", measure_apart.__name__, directories[CASES[number].model], number, results)
            process = context.Process(target=call_of, args=given)
            process.start()
            rows.append(results.get(timeout=600))
            process.join()
    common.write_rows(options.to / "memory.csv", rows, {})
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table, in MB (1e6 bytes) above the holder's start."""
    columns = ["holder", "model", "base", "dtype", "splits", "rank", "batch", "labels"]
    columns += ["declared", "predicted", "measured", "error", "at rest", "error at work"]
    cells = []
    for row in rows:
        named = [str(row[key]) for key in ("holder", "model", "base", "dtype", "splits", "rank")]
        sizes = [f"{row[f'{key}_bytes'] / 1e6:.1f}" for key in ("declared", "predicted", "measured")]
        batch = f"{row['batch_size']} x {row['length']}"
        errors = [f"{row['error']:+.1%}", f"{row['rest_bytes'] / 1e6:.1f}", f"{row['error_at_work']:+.1%}"]
        cells.append([*named, batch, row["labels"], *sizes, *errors])
    title = "Peak memory in MB above the holder's start; error: predicted over measured"
    common.show_table(Console(width=180), columns, cells, title=title, left=8)


if __name__ == "__main__":
    main()
