"""Compute: what is timed is what is counted, so that a time and its count make an honest rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.config import Job, Policy, RunConfig
from hsplit.measuring.compute import (
    LAYERS,
    MOST_JOINED,
    StepSeconds,
    StepWork,
    client_flops,
    joined_clients,
    server_flops,
)
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.planning.cost.counting import flop_counter
from hsplit.planning.cost.model import CostModel
from tests.tiny import LAYERS as ALL_LAYERS


class Ticks:
    """A clock that advances by a second at each reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def _job(**changes: Any) -> Job:
    settings = {"dtype": "fp32", "base": "nf4", "batch_size": 2, "max_length": 16, "rank_set": (1, 2, 4)}
    return Job(**(settings | changes))


def _cost(directory: Path, job: Job, servers: int = 1) -> CostModel:
    clients: Any = [{"name": "a", "kind": "a", "memory_gb": 1.0, "tflops": 1.0}]
    run = RunConfig.model_validate({"clients": clients, "job": job, "server": {"replicas": servers}})
    return CostModel.of_run(ModelSpec.read(directory), run)


def _work(
    directory: Path, job: Job, *, at_server: bool = False, clients: int = 1, servers: int = 1
) -> tuple[CostModel, StepWork]:
    cost = _cost(directory, job, servers)
    model = cost.model
    setting = model.setting(model.top_rank, clients * job.batch_size, job.base if at_server else None)
    base = BaseModel.of_job(ModelSpec.read(directory), job)
    return cost, StepWork(base, job, Policy(), setting, at_server=at_server, clients=clients, clock=Ticks())


def _widened(cost: CostModel) -> float:
    """Operations that stand for the time in which a server dequantizes its layers in a step: no products."""
    job = cost.model.job
    return float(2 * job.batches_per_step * cost.model.dequantization_flops.sum())


JOBS: list[dict[str, Any]] = [
    {},
    {"base": "fp32"},
    {"grad_accumulation": 3, "pipeline": {"microbatches": 2}},
    {"privacy": {"labels": "client"}},
    {"targets": ("q_proj", "down_proj"), "residual": {"max_rank": 3}},
]


@pytest.mark.parametrize("changes", JOBS, ids=[" ".join(job) or "default" for job in JOBS])
def test_a_step_does_the_products_that_the_cost_model_counts(models: dict[str, Path], changes: dict[str, Any]) -> None:
    job = _job(**changes)
    at_home = job.privacy.labels == "client"
    cost, client = _work(models["llama"], job)
    with flop_counter() as done:
        client.step()
    # At 1 second a step, FLOP/s are FLOPs.
    assert client_flops(cost, StepSeconds(1.0, 0.0)) == pytest.approx(done.get_total_flops(), rel=1e-3)
    clients = 3
    cost, server = _work(models["llama"], job, at_server=True, clients=clients)
    with flop_counter() as done:
        server.step()
    tail = 0 if at_home else 4 * clients * 2 * 16 * 32 * 96 * job.grad_accumulation
    layers = (done.get_total_flops() - tail) * ALL_LAYERS / LAYERS
    # A step in which the timed layers take their part of a second, and the tail nothing more.
    counted = server_flops(cost, clients, StepSeconds(LAYERS / ALL_LAYERS, 0.0))
    assert counted == pytest.approx(layers + tail + _widened(cost), rel=1e-3)


@pytest.mark.parametrize(("servers", "drawn"), [(4, None), (1, 3), (2, 3)])
def test_a_server_s_products_are_those_of_whom_it_is_timed_with(
    models: dict[str, Path], servers: int, drawn: int | None
) -> None:
    job = _job(privacy={"labels": "client"}, clients_per_round=drawn)
    clients = joined_clients(_cost(models["llama"], job, servers).model, 8)
    cost, server = _work(models["llama"], job, at_server=True, clients=clients, servers=servers)
    with flop_counter() as done:
        server.step()
    counted = server_flops(cost, clients, StepSeconds(LAYERS / ALL_LAYERS, 0.0))
    assert counted == pytest.approx(done.get_total_flops() * ALL_LAYERS / LAYERS + _widened(cost), rel=1e-3)


def test_twice_the_work_in_the_same_time_is_twice_the_rate(models: dict[str, Path]) -> None:
    rates = {}
    for batch_size in (2, 4):
        cost, work = _work(models["gpt2"], _job(batch_size=batch_size))
        rates[batch_size] = client_flops(cost, work.seconds(0.0))
    assert rates[4] == pytest.approx(2 * rates[2], rel=1e-6) and rates[2] > 0
    cost, work = _work(models["gpt2"], _job(), at_server=True)
    alone = server_flops(cost, 1, work.seconds(0.0))
    cost, work = _work(models["gpt2"], _job(), at_server=True, clients=2)
    both = server_flops(cost, 2, work.seconds(0.0))
    # What is dequantized does not grow with the clients.
    assert alone < both < 2 * alone


def test_steps_are_done_until_the_time_has_passed_and_their_mean_is_told(models: dict[str, Path]) -> None:
    _, work = _work(models["llama"], _job())
    once, often = work.seconds(0.0), work.seconds(50.0)
    # Forward, backward and optimizer are timed apart; a client without labels has no tail but its border is looked at.
    assert once == StepSeconds(3.0, 1.0) == often
    assert isinstance(work._clock, Ticks) and work._clock.now > 50.0


def test_timing_leaves_the_weights_what_they_are(models: dict[str, Path]) -> None:
    _, work = _work(models["llama"], _job())
    before = work._holder.adapters.flat.detach().clone()
    for _ in range(5):
        work.step()
    assert torch.isfinite(work._holder.adapters.flat).all()
    assert (work._holder.adapters.flat - before).abs().max() < 1e-7


def test_a_client_holds_its_layers_dense_and_the_server_the_last_ones_as_codes(models: dict[str, Path]) -> None:
    _, client = _work(models["llama"], _job())
    _, server = _work(models["llama"], _job(), at_server=True)
    assert list(client.segment.layers) == ["0", "1"] and client.segment.tail is None
    assert list(server.segment.layers) == ["2", "3"] and server.segment.tail is not None
    kinds = [type(next(iter(part.segment.linears.values())).weight).__name__ for part in (client, server)]
    assert kinds == ["DenseWeight", "NF4Weight"]


@pytest.mark.parametrize(
    ("servers", "drawn", "clients", "joined"),
    [
        (1, None, 5, 5),
        (1, None, 1000, MOST_JOINED),
        (4, None, 8, 2),
        (4, None, 9, 3),
        (4, None, 1000, MOST_JOINED),
        (1, 3, 8, 3),
        (2, 3, 8, 2),
        (1, 9, 8, 8),
    ],
)
def test_a_server_joins_those_whom_it_serves_up_to_a_number(
    models: dict[str, Path], servers: int, drawn: int | None, clients: int, joined: int
) -> None:
    assert joined_clients(_cost(models["llama"], _job(clients_per_round=drawn), servers).model, clients) == joined
