"""Actors ready for a probe, with non-zero live adapters and residuals, and the same scores by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.actors.client import Client
from hsplit.actors.executor import InProcess
from hsplit.actors.server import Server
from hsplit.config import SERVER, Job, Policy
from hsplit.data import Example
from hsplit.data.batches import Batch
from hsplit.lora.holder import RoundUpdate
from hsplit.lora.residual import ResidualUpdate
from hsplit.models.factors import LowRank
from hsplit.models.segment import BaseModel
from hsplit.models.spec import LinearShape, ModelSpec
from hsplit.models.weights import base_values
from hsplit.seeds import hash_seed
from tests.in_process import fixed_plan, random_examples
from tests.laws.reference import mean_loss

RANK = 3


def job_of(base: str, **changes: Any) -> Job:
    settings = {"base": base, "dtype": "fp32", "wire": "fp32", "rounds": 1, "batch_size": 4, **changes}
    return Job.model_validate(settings)


def shapes_of(model: Path, job: Job) -> list[LinearShape]:
    return ModelSpec.read(model).targeted(job.targets)


def probed_actors(
    model: Path,
    job: Job,
    splits: Sequence[int],
    matrices: bool = False,
    plain: bool = False,
    data: Callable[[int, int], list[Example]] = random_examples,
    metric: str = "rngwp",
) -> InProcess:
    """Clients ``c{i}`` and the server, every weight with the same adapter and residual wherever it is held.

    Args:
        matrices: residuals as matrices instead of as factors.
        plain: no residuals and adapters that are zero, as at a run's start.
        data: a client's examples, from their number and the client's.
        metric: of importance.
    """
    policy = Policy.model_validate({"init": "shared", "importance": {"metric": metric}})
    base = BaseModel.of_job(ModelSpec.read(model), job)
    plan = fixed_plan(model, job, splits, [RANK] * len(splits), RANK)
    clients = {f"c{i}": Client(f"c{i}", job, policy, base) for i in range(len(splits))}
    server = Server("server", job, policy, base)
    server.configure(plan)
    for i, (name, client) in enumerate(clients.items()):
        client.load_data({client.name: data(12, i)}, None)
        client.configure(plan.client(name))
    dtype = torch.promote_types(base.dtype, torch.float32)
    for holder in [server.holder, *(client.holder for client in clients.values())]:
        names = {shape.name: shape for shape in shapes_of(model, job) if shape.name in holder.adapters.names}
        residuals = {}
        for name, shape in names.items():
            residual = residual_of(shape, dtype)
            matrix = residual.dense() if matrices else None
            residuals[name] = ResidualUpdate(0, None if matrices else residual, matrix)
        holder.restart(RoundUpdate(1, {} if plain else residuals, {}))
        if plain:
            continue
        with torch.no_grad():
            for name, shape in names.items():
                live = live_of(shape, dtype)
                holder.adapters.A(name).copy_(live.A)
                holder.adapters.B(name).copy_(live.B)
    return InProcess({**clients, SERVER: server})


def residual_of(shape: LinearShape, dtype: torch.dtype) -> LowRank:
    return _drawn(shape, dtype, "residual")


def live_of(shape: LinearShape, dtype: torch.dtype) -> LowRank:
    """Live factors, without their scale."""
    return _drawn(shape, dtype, "live")


def _drawn(shape: LinearShape, dtype: torch.dtype, kind: str) -> LowRank:
    draw = torch.Generator().manual_seed(hash_seed(shape.name, kind))
    B, A = torch.randn(shape.d_out, RANK, generator=draw), torch.randn(RANK, shape.d_in, generator=draw)
    return LowRank((0.1 * B).to(dtype), (0.1 * A).to(dtype))


def effective_model(model: Path, job: Job, dtype: torch.dtype) -> Any:
    """The unsplit model with trainable ``W_0 + R + s B A`` in place of each adapted weight."""
    from transformers import AutoModelForCausalLM

    unsplit = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().requires_grad_(False)
    transposed = ModelSpec.read(model).family.transposed
    for shape in shapes_of(model, job):
        weight = unsplit.get_submodule(shape.name).weight
        values = base_values((weight.T if transposed else weight).detach().contiguous(), job.base, dtype)
        values = values + residual_of(shape, dtype).dense() + job.alpha / RANK * live_of(shape, dtype).dense()
        weight.copy_(values.T if transposed else values)
        weight.requires_grad_()
    return unsplit


def sums_by_autograd(unsplit: Any, batch: Batch, shapes: Sequence[LinearShape]) -> dict[str, float]:
    """``sum |W G|`` by weight name, with ``G`` the gradient of the mean loss over ``batch``."""
    weights: list[Tensor] = [unsplit.get_submodule(shape.name).weight for shape in shapes]
    gradients = torch.autograd.grad(mean_loss(unsplit, [batch]), weights)
    return {
        shape.name: float((weight.detach() * gradient).abs().sum(dtype=torch.float64))
        for shape, weight, gradient in zip(shapes, weights, gradients, strict=True)
    }


def sums_by_client(reports: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Every client's raw sums by weight name, from all holders."""
    found: dict[str, dict[str, float]] = {}
    for report in reports:
        own = found.setdefault(report.client, {})
        assert not own.keys() & report.scores.keys()
        own.update(report.scores)
    return found
