"""Measuring every holder through an executor: what is asked of whom, and what becomes of the answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hsplit.actors.executor import ActorFailure, InProcess
from hsplit.cluster.placement import Node, Placement, requests_of
from hsplit.config import RunConfig
from hsplit.errors import InputError
from hsplit.measuring.compute import StepSeconds, client_flops, server_flops
from hsplit.measuring.free_memory import HEADROOM
from hsplit.measuring.measured_budgets import BudgetMeasurement, measure_budgets
from hsplit.measuring.measuring_actor import MeasuringActor
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.planning.cost.model import CostModel

KB = 1 << 10


@dataclass
class World:
    """Time, and what was done in it."""

    now: float = 0.0
    asked: list[tuple[str, str, tuple[Any, ...]]] = field(default_factory=list)
    receivers: list[str] = field(default_factory=list)


class KnownActor:
    """A actor of a holder whose figures are known."""

    def __init__(
        self, name: str, world: World, machine: str, free: int, step_s: float, latency_s: float = 0.0, bps: float = 1e9
    ) -> None:
        self.name, self.world, self._machine, self.free = name, world, machine, free
        self.step_s, self.latency_s, self.bps = step_s, latency_s, bps

    def machine(self) -> tuple[str, str]:
        return self._machine, f"{self._machine} booted"

    def free_bytes(self) -> int:
        self.free += 1000
        return self.free

    def message(self, nbytes: int) -> tuple[int, Any]:
        # Made here, without a hop.
        self.world.now += 7.0
        return nbytes, (nbytes, self)

    def pass_on(self, message: Any) -> tuple[int, Any]:
        nbytes, client = message
        self.world.receivers.append(self.name)
        self.world.now += client.latency_s + 8 * nbytes / client.bps
        return nbytes, message

    def prepare(self, setting: Any, clients: int) -> None:
        self.world.asked.append(("prepare", self.name, (setting.codes, clients)))

    def step_seconds(self, at_least_s: float) -> StepSeconds:
        self.world.asked.append(("step_seconds", self.name, (at_least_s,)))
        self.step_s += 0.5
        return StepSeconds(self.step_s, 0.25)


def _run(models: dict[str, Path], *names: str, replicas: int = 1, **job: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "server": {"replicas": replicas},
            "clients": [{"name": name, "kind": name, "memory_gb": 1.0, "tflops": 1.0} for name in names],
            "job": {"model": str(models["llama"]), "dtype": "fp32", "max_length": 16, "rank_set": [1, 2], **job},
        }
    )


def _node() -> Node:
    room = {"CPU": 64.0}
    return Node("id", "host", "10.0.0.1", "10.0.0.1", {}, room, room)


def test_figures_are_the_holders_own(models: dict[str, Path]) -> None:
    run, world = _run(models, "near", "far"), World()
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    actors = {
        "near": KnownActor("near", world, "here", 10_000, 1.0, latency_s=0.001, bps=1e10),
        "far": KnownActor("far", world, "there", 20_000, 2.0, latency_s=0.05, bps=2e6),
        "server": KnownActor("server", world, "here", 10_000, 4.0),
    }
    probe = BudgetMeasurement(run, cost, InProcess(actors), 3, 6.0, clock=lambda: world.now)
    assert probe.machines() == {"near": "here", "far": "there", "server": "here"}
    found = probe.figures()
    near, far, server = found["near"], found["far"], found["server"]
    for figures, latency_ms, bandwidth_mbps in ((near, 1, 10_000), (far, 50, 2)):
        assert figures["latency_ms"].value == pytest.approx(latency_ms, rel=1e-3)
        assert figures["bandwidth_mbps"].value == pytest.approx(bandwidth_mbps, rel=1e-3)
    # The first look is not among the samples; two on one machine share what is there.
    assert near["memory_gb"].value == server["memory_gb"].value == (1 - HEADROOM) * 6e-6
    assert (far["memory_gb"].low, far["memory_gb"].high) == pytest.approx((0.9 * 22e-6, 0.9 * 24e-6), rel=1e-3)
    assert {figure.samples for figures in found.values() for figure in figures.values()} == {3}
    # The median of three spells, each half a second a step slower.
    assert near["tflops"].value == pytest.approx(client_flops(cost, StepSeconds(2.0, 0.25)) / 1e12, rel=1e-3)
    assert far["tflops"].value == pytest.approx(client_flops(cost, StepSeconds(3.0, 0.25)) / 1e12, rel=1e-3)
    assert server["tflops"].value == pytest.approx(server_flops(cost, 2, StepSeconds(5.0, 0.25)) / 1e12, rel=1e-3)
    assert set(server) == {"memory_gb", "tflops"}


def test_every_message_goes_there_and_back(models: dict[str, Path]) -> None:
    run, world = _run(models, "a", "b"), World()
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    actors = {name: KnownActor(name, world, "here", 10_000, 1.0) for name in ("a", "b", "server")}
    BudgetMeasurement(run, cost, InProcess(actors), 1, 1.0, sizes=(KB, 2 * KB), clock=lambda: world.now).figures()
    # Two sizes, 32 journeys each, and the same once before that does not count; one client after the other.
    pairs = [("server", "a")] * 32 + [("server", "b")] * 32
    assert world.receivers == [receiver for pair in pairs * 2 for receiver in pair]


def test_clients_compute_together_and_the_server_when_they_are_done(models: dict[str, Path]) -> None:
    run, world = _run(models, "a", "b"), World()
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    actors = {name: KnownActor(name, world, "here", 10_000, 1.0) for name in ("a", "b", "server")}
    BudgetMeasurement(run, cost, InProcess(actors), 2, 6.0, clock=lambda: world.now).figures()
    assert world.asked == [
        ("prepare", "a", (None, 1)),
        ("prepare", "b", (None, 1)),
        *[("step_seconds", name, (3.0,)) for name in ("a", "b", "a", "b")],
        # The server has the batches of all clients, on codes.
        ("prepare", "server", ("nf4", 2)),
        *[("step_seconds", "server", (3.0,))] * 2,
    ]


def test_dequantizing_is_what_steps_on_codes_take_longer(models: dict[str, Path]) -> None:
    run, world = _run(models, "a"), World()
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    actors = {name: KnownActor(name, world, "here", 10_000, 1.0) for name in ("a", "server")}
    probe = BudgetMeasurement(run, cost, InProcess(actors), 1, 6.0, clock=lambda: world.now)
    probe.figures()
    found = probe.dequantization_flops()
    assert ("prepare", "a", ("nf4", 1)) in world.asked
    # A step took 1.5 s, and half a second more on codes, for the entries of two layers, forward and backward.
    entries = sum(kind.weight_parameters for kind in cost.model.counter.kinds[:2])
    assert found["a"].value == pytest.approx(client_flops(cost, StepSeconds(1.5, 0.25)) * 0.5 / (2 * entries), rel=1e-3)
    run = _run(models, "a", base="fp32")
    dense = BudgetMeasurement(run, CostModel.of_run(ModelSpec.read(models["llama"]), run), InProcess(actors), 1, 6.0)
    assert dense.dequantization_flops() == {}


def test_several_servers_share_the_memory_and_compute_together_for_their_own_clients(models: dict[str, Path]) -> None:
    names = [f"c{number}" for number in range(8)]
    run, world = _run(models, *names, replicas=4), World()
    model = ModelSpec.read(models["llama"])
    servers = run.server.names
    actors = {name: KnownActor(name, world, "here", 99_000, 1.0) for name in (*names, *servers)}
    actors["server-2"].step_s = 3.0
    probe = BudgetMeasurement(run, CostModel.of_run(model, run), InProcess(actors), 1, 6.0, clock=lambda: world.now)
    assert list(probe.machines()) == [*names, *servers]
    found = probe.figures()
    assert world.asked[-8:] == [
        *[("prepare", name, ("nf4", 2)) for name in servers],
        *[("step_seconds", name, (6.0,)) for name in servers],
    ]
    # The rate is that of a lone server which joins two.
    alone = CostModel.of_run(model, _run(models, "a", "b"))
    for name, step_s in (("server", 1.5), ("server-1", 1.5), ("server-2", 3.5)):
        counted = server_flops(alone, 2, StepSeconds(step_s, 0.25)) / 1e12
        assert found[name]["tflops"].value == pytest.approx(counted, rel=1e-3)
    # Twelve on one host.
    for name in (*names, *servers):
        assert found[name]["memory_gb"].value == pytest.approx((1 - HEADROOM) * 101_000 / 12 / 1e9, rel=1e-3)
        assert ("latency_ms" in found[name]) == (name in names)


def test_a_server_joins_as_many_as_are_drawn_for_a_round(models: dict[str, Path]) -> None:
    names = [f"c{number}" for number in range(8)]
    run, world = _run(models, *names, clients_per_round=3), World()
    model = ModelSpec.read(models["llama"])
    actors = {name: KnownActor(name, world, "here", 99_000, 1.0) for name in (*names, "server")}
    probe = BudgetMeasurement(run, CostModel.of_run(model, run), InProcess(actors), 1, 6.0, clock=lambda: world.now)
    found = probe.figures()
    assert ("prepare", "server", ("nf4", 3)) in world.asked
    counted = server_flops(CostModel.of_run(model, _run(models, "a", "b", "c")), 3, StepSeconds(1.5, 0.25))
    assert found["server"]["tflops"].value == pytest.approx(counted / 1e12, rel=1e-3)


def test_a_measuring_actor_stands_for_every_holder(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from hsplit.measuring.measured_budgets import MeasuringExecutor

    begun: dict[str, Any] = {}

    def remote(full_name: str, *_: object) -> SimpleNamespace:
        def begin(name: str, make: Any, threads: int | None, sharing: int, gpu: bool) -> None:
            assert full_name.endswith(f":{name}")
            begun[name] = make()

        return SimpleNamespace(remote=begin)

    monkeypatch.setattr("hsplit.cluster.ray_executor._remote", remote)
    run = _run(models, "a", "b", replicas=3)
    placement = Placement({name: _node() for name, _ in requests_of(run)}, ())
    MeasuringExecutor("test", run, models["llama"], placement)
    assert begun.keys() == {"a", "b", "server", "server-1", "server-2"}
    assert all(isinstance(actor, MeasuringActor) for actor in begun.values())


def test_a_late_client_that_is_away_is_refused_by_name(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starting(*_: object) -> None:
        raise AssertionError("an actor was started")

    for what in ("helpers_of", "ray_of"):
        monkeypatch.setattr(f"hsplit.measuring.measured_budgets.{what}", lambda *_, **__: nullcontext())
    monkeypatch.setattr("hsplit.cluster.placement.alive_nodes", lambda: [_node()])
    monkeypatch.setattr("hsplit.cluster.ray_executor._remote", starting)
    given, to = tmp_path / "given.yaml", tmp_path / "measured.yaml"
    clients = "[{name: here}, {name: commuter, late: true, labels: {site: den}}]"
    given.write_text(f"clients: {clients}\njob: {{model: {models['llama']}, dtype: fp32}}\n")
    with pytest.raises(InputError, match=r"^commuter: labels: no node has site=den; "):
        measure_budgets(given, to)
    assert not to.exists()


def test_real_measuring_actors_give_figures_of_all_kinds(models: dict[str, Path]) -> None:
    run = _run(models, "a", "b")
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    base = BaseModel.of_job(ModelSpec.read(models["llama"]), run.job)
    actors = {
        name: MeasuringActor(run.job, run.policy, base, at_server=name == "server") for name in ("a", "b", "server")
    }
    probe = BudgetMeasurement(run, cost, InProcess(actors), 2, 0.01, sizes=(64 * KB, 256 * KB))
    found = probe.figures()
    for name, figures in found.items():
        assert list(figures)[:2] == ["memory_gb", "tflops"] and len(figures) == (2 if name == "server" else 4)
        for key, figure in figures.items():
            assert figure.low <= figure.value <= figure.high, (name, key)
            assert figure.value > 0 or key == "latency_ms", (name, key)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "int4"])
def test_a_message_has_about_the_size_that_is_asked_for_and_keeps_it(models: dict[str, Path], wire: str) -> None:
    run = _run(models, "a")
    job = run.job.model_copy(update={"wire": wire})
    actor = MeasuringActor(job, run.policy, BaseModel.of_job(ModelSpec.read(models["llama"]), job))
    nbytes, message = actor.message(1 << 20)
    assert nbytes == message.nbytes == pytest.approx(1 << 20, rel=0.01)
    again, passed = actor.pass_on(message)
    assert again == nbytes and (wire == "int4" or (passed.data == message.data).all())


def test_a_holder_that_fails_is_named(models: dict[str, Path]) -> None:
    run, world = _run(models, "a"), World()
    cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
    actors: dict[str, Any] = {name: KnownActor(name, world, "here", 10_000, 1.0) for name in ("a", "server")}
    del actors["server"].step_s
    with pytest.raises(ActorFailure, match="server failed in step_seconds: AttributeError"):
        BudgetMeasurement(run, cost, InProcess(actors), 1, 1.0, clock=lambda: world.now).figures()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "--repeats: must be at least 1 (got 0)"),
        ({"seconds": 0.0}, "--seconds: must be above 0"),
        ({"seconds": float("nan")}, "--seconds: must be above 0"),
        ({"to": "missing/out.yaml"}, "--to missing/out.yaml: must be a file in a directory that there is"),
        ({"to": "."}, "--to .: must be a file"),
        ({"cluster": "no-such-preset"}, "no such cluster file"),
    ],
)
def test_wrong_input_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def starting(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsplit.measuring.measured_budgets.helpers_of", starting)
    given = {"cluster": "hetero", "to": "out.yaml"} | changes
    with pytest.raises(InputError) as refused:
        measure_budgets(given.pop("cluster"), given.pop("to"), **given)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())
