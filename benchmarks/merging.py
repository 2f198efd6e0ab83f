"""Loss from merging an update into a base, and the noise of averaging factors: a part of ``aggregation.py``."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import common
from hsplit.actors.client import Client
from hsplit.actors.server import Server
from hsplit.config import SERVER, DataSpec, Job, Policy, RunConfig
from hsplit.config.policy import Importance
from hsplit.data import partition, read_source
from hsplit.lora.aggregation import Contribution, Restart, average_factors, noise_free
from hsplit.lora.holder import RoundUpdate
from hsplit.lora.learned import learned
from hsplit.lora.low_rank import LowRankSum
from hsplit.lora.residual import Residual
from hsplit.models.loading import load_segment
from hsplit.models.lookup import find_model
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import DenseWeight, FrozenWeight, Int8Weight, NF4Weight
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run_directory import RunDirectory

Init = Literal["shared", "independent"]
BASES = ("fp32", "bf16", "int8", "nf4")
HOLDERS = 3
EQUAL, UNEQUAL = (8, 8, 8), (4, 8, 16)
INITS: tuple[Init, ...] = ("shared", "independent")
SHARED_LAYERS = 8
CAP = 128

Terms = dict[str, list[Contribution]]
"""The holders' adapters by weight."""


@dataclass(frozen=True)
class Merged:
    """One weight's update, merged into one store, beside hsplit's residual; errors relative to the update (Frobenius).

    Attributes:
        update: after how many steps, or of which run.
        base, weight: the store and the weight.
        update_over_weight: ``||Delta|| / ||W_0||``.
        merged: ``||stored after - stored before - Delta|| / ||Delta||`` of the naive merge.
        lost: share of the update's entries after which the stored value is the same.
        codes_changed: share of the stored codes (of the values, where the base has none) that changed.
        kept: the same error as ``merged`` of the residual's stored factors.
        working: distance of the working weight that is computed with from ``W_0 + R``, relative to ``W_0``.
    """

    update: str
    base: str
    weight: str
    update_over_weight: float
    merged: float
    lost: float
    codes_changed: float
    kept: float
    working: float


@dataclass(frozen=True)
class Noise:
    """The noise of one weight's average, ``||averaged - mean(BA)|| / ||mean(BA)||``."""

    rule: str
    ranks: str
    init: str
    steps: int
    weight: str
    holders: int
    noise: float


def tables(options: argparse.Namespace, console: Console, header: dict[str, Any]) -> list[str]:
    """Run this part, print its tables and write their rows; returns them as markdown."""
    if options.run is not None:
        directory, terms = _of_run(options.run)
        return [_merging(directory, {str(options.run): terms}, options, console, header)]
    directory = find_model(options.model).directory
    noises: list[Noise] = []
    updates: dict[str, Terms] = {}
    for ranks in (EQUAL, UNEQUAL):
        for init in INITS:
            console.print(f"training {HOLDERS} holders of ranks {ranks}, {init} A, {options.steps} steps")
            found = _trained(directory, ranks, init, options)
            noises += [_noise(*key, ranks, init, held) for key, held in _several(found)]
            if ranks == EQUAL and init == "independent":
                updates = {f"{steps} steps" if steps > 1 else "1 step": terms for steps, terms in found.items()}
    texts = [_merging(directory, updates, options, console, header)]
    common.write_rows(options.to / "noise.csv", noises, header | _how(options))
    return [*texts, _noise_table(noises, console)]


def _how(options: argparse.Namespace) -> dict[str, str]:
    if options.run is not None:
        return {"update": f"what {options.run} had learned at its last checkpoint"}
    return {
        "update": f"{options.steps} AdamW steps at lr {options.lr}, {HOLDERS} holders, built-in restaurants data",
        "model": str(options.model),
    }


# -- a real update ------------------------------------------------------------------------------------------------


def _trained(directory: Path, ranks: Sequence[int], init: Init, options: argparse.Namespace) -> dict[int, Terms]:
    """Adapters after one step and after the last; clients hold the first layers, and the server the rest."""
    job = Job.model_validate(
        {
            "base": "fp32",
            "dtype": "fp32",
            "wire": "fp32",
            "lr": options.lr,
            "batch_size": 1,
            "rounds": 1,
            "local_steps": options.steps,
            "seed": options.seed,
        }
    )
    policy = Policy(name="hsplitlora", init=init, reinit="random", importance=Importance(metric="equal"))
    base = BaseModel(ModelSpec.read(directory), "fp32", torch.float32)
    shapes, layers = ModelSpec.read(directory).linears, ModelSpec.read(directory).layers
    split = min(SHARED_LAYERS, layers // 2)
    names = [f"client-{i}" for i in range(HOLDERS)]
    held = {n: {s.name: r for s in shapes if s.layer < split} for n, r in zip(names, ranks, strict=True)}
    deep = {s.name: max(ranks) for s in shapes if s.layer >= split}
    holders = tuple(HolderPlan(name, "client", True, split, held[name]) for name in names)
    plan = Plan(layers, HolderPlan(SERVER, "server", True, split, deep), holders, 1.0, 0.0, "none")
    server = Server("server", job, policy, base, measure=False)
    server.configure(plan)
    server.restart(RoundUpdate(1, {}, {}))
    examples = read_source("restaurants", DataSpec(examples=60 * HOLDERS), job.seed).examples
    shares = partition(examples, HOLDERS, "iid", job.seed)
    clients = [Client(name, job, policy, base, measure=False) for name in names]
    for client, share in zip(clients, shares, strict=True):
        client.load_data({client.name: [examples[i] for i in share]}, None)
        client.configure(plan.client(client.name))
        client.restart(RoundUpdate(1, {}, {}))
    found = {}
    for step in range(options.steps):
        messages = [client.forward(step, 0)[1] for client in clients]
        _, *gradients = server.train_step(step, 0, *messages)
        server.end_step(step)
        for client, gradient in zip(clients, gradients, strict=True):
            client.backward(step, 0, gradient)
        if step in (0, options.steps - 1):
            found[step + 1] = _held([*clients, server])
    return found


def _held(holders: Sequence[Client | Server]) -> Terms:
    terms: Terms = {}
    every = [holder.holder.held() for holder in holders]
    for name in {name for held in every for name in held.terms}:
        own = [held for held in every if name in held.terms]
        tokens = [held.tokens[held.layers[name]] for held in own]
        pairs = zip(own, tokens, strict=True)
        terms[name] = [Contribution(held.terms[name], count / sum(tokens)) for held, count in pairs]
    return terms


def _of_run(path: Path) -> tuple[Path, Terms]:
    directory = RunDirectory.open(path)
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    terms = learned(read_checkpoint(checkpoint)[1][SERVER])
    model = find_model(RunConfig.load(directory.config).job.model).directory
    return model, {name: [Contribution(term, 1.0)] for name, term in terms.items()}


# -- merging ------------------------------------------------------------------------------------------------------

_STORES: dict[str, Callable[[Tensor], FrozenWeight]] = {
    "fp32": DenseWeight,
    "bf16": lambda values: DenseWeight(values.to(torch.bfloat16)),
    "int8": Int8Weight,
    "nf4": NF4Weight,
}


def _merging(
    directory: Path,
    updates: Mapping[str, Terms],
    options: argparse.Namespace,
    console: Console,
    header: dict[str, Any],
) -> str:
    layers = options.layers or ModelSpec.read(directory).layers
    rows: list[Merged] = []
    for layer in range(layers):
        for base in BASES:
            dtype = torch.bfloat16 if base == "bf16" else torch.float32
            held = load_segment(
                BaseModel(ModelSpec.read(directory), base, dtype), SegmentSpec(layer, layer + 1), quantized=True
            )
            exact = load_segment(
                BaseModel(ModelSpec.read(directory), "fp32", torch.float32), SegmentSpec(layer, layer + 1)
            )
            for name, linear in held.linears.items():
                pristine = exact.linears[name].weight.dense(torch.float32)
                own = linear.weight.dense(torch.float64).clone()
                for update, terms in updates.items():
                    if name not in terms:
                        continue
                    delta, residual = _joined(terms[name])
                    kept = residual.factors.to(torch.float64).dense()
                    linear.append_residual(0, residual.factors)
                    working = linear.weight.dense(torch.float64)
                    # Without a merge the update stays beside the base.
                    expected = own + kept if linear.merges else own
                    figures = _merged_naively(_STORES[base], pristine, delta)
                    rows.append(
                        Merged(
                            update,
                            base,
                            name,
                            float(delta.norm() / own.norm()),
                            *figures,
                            float((kept - delta).norm() / delta.norm()),
                            float((working - expected).norm() / own.norm()),
                        )
                    )
    common.write_rows(options.to / "merging.csv", rows, header | _how(options))
    return _merging_table(rows, console)


def _joined(terms: list[Contribution]) -> tuple[Tensor, Residual]:
    """The exact update, an fp64 matrix, and the residual that it was added to."""
    total = LowRankSum(tuple(c.term for c in terms), tuple(c.share for c in terms))
    d_out, d_in = terms[0].term.B.shape[0], terms[0].term.A.shape[1]
    residual = Residual(d_out, d_in, CAP)
    outcome = noise_free(terms, Restart("random", ()))
    assert outcome.residual is not None
    residual.add(outcome.residual)
    return total.dense_rows(0, d_out), residual


def _merged_naively(
    store: Callable[[Tensor], FrozenWeight], pristine: Tensor, delta: Tensor
) -> tuple[float, float, float]:
    """Error, share of entries lost and share of codes changed of ``store(stored values + delta)``."""
    before = store(pristine)
    values = before.dense(torch.float32)
    after = store(values + delta.float())
    change = after.dense(torch.float64) - values.double()
    lost = ((change == 0) & (delta != 0)).sum() / (delta != 0).sum().clamp_min(1)
    return float((change - delta).norm() / delta.norm()), float(lost), _codes_changed(before, after)


def _codes_changed(before: FrozenWeight, after: FrozenWeight) -> float:
    if isinstance(before, NF4Weight) and isinstance(after, NF4Weight):
        # Two codes a byte.
        pairs = before.codes ^ after.codes
        return float(((pairs & 15 != 0).float().mean() + (pairs >> 4 != 0).float().mean()) / 2)
    if isinstance(before, Int8Weight) and isinstance(after, Int8Weight):
        return float((before.codes != after.codes).float().mean())
    return float((before.dense(torch.float64) != after.dense(torch.float64)).float().mean())


def _merging_table(rows: list[Merged], console: Console) -> str:
    title = "What merging an update loses, over all weights: median (worst), relative to the update"
    columns = ["update", "base", "update / W", "error merged", "entries lost", "codes changed", "error kept by hsplit"]
    columns.append("working weight / W")
    cells = []
    for update in dict.fromkeys(row.update for row in rows):
        for base in BASES:
            own = [row for row in rows if (row.update, row.base) == (update, base)]
            merged, lost = [_spread([getattr(r, key) for r in own], "{:.2%}") for key in ("merged", "lost")]
            if base == "fp32":
                merged = _spread([r.merged for r in own], "{:.1e}")
            changed = f"{statistics.median(r.codes_changed for r in own):.2%}"
            kept, size = [_spread([getattr(r, key) for r in own], "{:.1e}") for key in ("kept", "update_over_weight")]
            working = _spread([r.working for r in own], "{:.1e}") if base in ("fp32", "bf16") else "not merged"
            cells.append([update, base, size, merged, lost, changed, kept, working])
    return _shown(title, columns, cells, console)


# -- averaging factors --------------------------------------------------------------------------------------------


def _several(found: Mapping[int, Terms]) -> list[tuple[tuple[int, str], list[Contribution]]]:
    return [((s, name), held) for s, terms in found.items() for name, held in terms.items() if len(held) > 1]


def _noise(steps: int, name: str, ranks: Sequence[int], init: str, held: list[Contribution]) -> Noise:
    exact = LowRankSum(tuple(c.term for c in held), tuple(c.share for c in held))
    mean = exact.dense_rows(0, held[0].term.B.shape[0])
    averaged = average_factors(held, Restart("random", tuple(ranks))).common
    assert averaged is not None
    noise = float((averaged.to(torch.float64).dense() - mean).norm() / mean.norm())
    rule = "FedAvg of A and B" if len(set(ranks)) == 1 else "zero-padded FedAvg"
    return Noise(rule, " ".join(map(str, ranks)), init, steps, name, len(held), noise)


def _noise_table(rows: list[Noise], console: Console) -> str:
    title = "The noise of averaging A and B apart: ||mean(B) mean(A) - mean(BA)|| / ||mean(BA)||, median (worst)"
    columns = ["rule", "ranks", "initial A", "steps", "holders", "noise"]
    cells = []
    for key in dict.fromkeys((r.rule, r.ranks, r.init, r.steps, r.holders) for r in rows):
        own = [r.noise for r in rows if (r.rule, r.ranks, r.init, r.steps, r.holders) == key]
        cells.append([*map(str, key), _spread(own, "{:.1%}")])
    return _shown(title, columns, cells, console)


def _spread(values: list[float], form: str) -> str:
    return f"{form.format(statistics.median(values))} ({form.format(max(values))})"


def _shown(title: str, columns: list[str], cells: list[list[str]], console: Console) -> str:
    common.show_table(console, columns, cells, title=title, left=2)
    return common.titled(title, (columns, cells))
