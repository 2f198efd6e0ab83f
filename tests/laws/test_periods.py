"""Law E6: turns, periods and overlap change who waits and nothing that is learned (METHOD section 10)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hsplit.config import Importance, Job, Pace, Policy
from hsplit.lora.learned import learned
from hsplit.models.spec import ModelSpec
from hsplit.planning.plan import Plan
from hsplit.run.coordinator import Coordinator
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples, rows_of
from tests.laws.reference import keep_double, lora_A, lora_B, mean_loss, peft_model
from tests.tiny import LAYERS

laws = settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_double(monkeypatch)


@st.composite
def turns(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    """Split, rows, group, period in local steps and offset of each client."""
    clients = []
    for _ in range(draw(st.integers(1, 4))):
        every = draw(st.integers(1, 3))
        clients.append(
            (
                draw(st.integers(0, LAYERS)),
                draw(st.integers(1, 3)),
                draw(st.integers(0, 2)),
                every,
                draw(st.integers(0, every - 1)),
            )
        )
    return clients


def paced(plan: Plan, clients: list[tuple[int, int, int, int, int]], groups: int = 3) -> Plan:
    """``plan`` with the rows and turns of ``clients``; with one group all come to the server together."""
    parts = tuple(
        replace(part, rows=rows, group=group % groups, every=every, offset=offset)
        for part, (_, rows, group, every, offset) in zip(plan.clients, clients, strict=True)
    )
    return replace(plan, clients=parts, groups=groups)


def trained(
    model: Path,
    to: Path,
    clients: list[tuple[int, int, int, int, int]],
    pace: Pace,
    groups: int,
    servers: int,
    **job: Any,
) -> Coordinator:
    plan = paced(
        fixed_plan(model, Job.model_validate(job), [c[0] for c in clients], [2] * len(clients), 2, servers),
        clients,
        groups,
    )
    policy = Policy(name="hsplitlora", init="shared", importance=Importance(metric="equal"), pace=pace)
    shares = {f"c{i}": random_examples(9 + i, seed=i) for i in range(len(clients))}
    run = coordinator(model, to, plan, shares, Recorder(), policy, **job)
    assert run.run()
    return run


def state_of(run: Coordinator) -> dict[str, torch.Tensor]:
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    names = [*run.context.clients, "server"]
    return {f"{name}:{key}": value for name in names for key, value in actors[name].state().items()}


def assert_equal(one: Coordinator, other: Coordinator, tolerance: float) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (tensor.double() - second[name].double()).norm()
        assert difference <= tolerance * max(tensor.double().norm(), 1e-30), (name, float(difference))
    for row, same in zip(rows_of(one), rows_of(other), strict=True):
        assert row["val_loss"] == pytest.approx(same["val_loss"], rel=tolerance)
        assert (row["tokens"], row["bytes_up"], row["bytes_down"]) == (
            same["tokens"],
            same["bytes_up"],
            same["bytes_down"],
        )


@laws
@given(
    family=st.sampled_from(["llama", "gpt2"]),
    clients=turns(),
    labels=st.sampled_from(["server", "client"]),
    base=st.sampled_from(["fp32", "nf4", "int8"]),
    microbatches=st.integers(1, 2),
    accumulation=st.integers(1, 2),
    servers=st.integers(1, 2),
    step=st.sampled_from(["cycle", "group"]),
    optimizer=st.sampled_from(["sgd", "adamw"]),
)
@example(
    family="llama",
    clients=[(2, 3, 0, 1, 0), (1, 1, 1, 2, 1), (4, 2, 2, 3, 0)],
    labels="server",
    base="nf4",
    microbatches=2,
    accumulation=1,
    servers=1,
    step="cycle",
    optimizer="sgd",
)
@example(
    family="gpt2",
    clients=[(0, 2, 2, 1, 0), (3, 3, 0, 1, 0)],
    labels="client",
    base="fp32",
    microbatches=2,
    accumulation=2,
    servers=2,
    step="cycle",
    optimizer="sgd",
)
def test_e6_overlap_changes_no_number(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    clients: list[tuple[int, int, int, int, int]],
    labels: str,
    base: str,
    microbatches: int,
    accumulation: int,
    servers: int,
    step: str,
    optimizer: str,
) -> None:
    """The same rows join the same steps, whether everybody waits for everybody or nobody does.

    With one step a cycle the groups themselves only change the order of sums.
    """
    if step == "group":
        accumulation = 1
    job: dict[str, Any] = {
        "base": base,
        "dtype": "fp64",
        "wire": "fp64",
        "rounds": 2,
        "local_steps": 3,
        "lr": 1e-2,
        "optimizer": optimizer,
        "grad_accumulation": accumulation,
        "pipeline": {"microbatches": microbatches},
        "privacy": {"labels": labels},
        "batch_size": 2,
    }
    to = tmp_path_factory.mktemp("e6")

    def run(name: str, periods: Any, groups: int) -> Coordinator:
        pace = Pace.model_validate({"periods": periods, "server_step": step})
        return trained(models[family], to / name, clients, pace, groups, servers=servers, **job)

    overlapped = run("overlapped", "planned", 3)
    assert_equal(overlapped, run("waiting", "none", 3), 1e-12)
    # Adam divides by the root of second moments, which magnifies rounding where there is next to no gradient.
    if step == "cycle" and optimizer == "sgd":
        sums, same = (
            learned(made._executor.actors["server"].state())  # type: ignore[attr-defined]
            for made in (overlapped, run("together", "none", 1))
        )
        for name, term in sums.items():
            assert (term.dense() - same[name].dense()).norm() <= 1e-10 * term.dense().norm()


@pytest.mark.parametrize(
    ("family", "split", "optimizer", "job"),
    [
        ("llama", 2, "sgd", {}),
        ("llama", 2, "adamw", {"pipeline": {"microbatches": 2}}),
        ("llama", 4, "adamw", {"fast": {"flat_optimizer": False}}),
        ("gpt2", 1, "adamw", {"fast": {"fused_lora": False, "flat_optimizer": False}}),
        ("gpt2", 3, "adamw", {"privacy": {"labels": "client"}, "base": "nf4"}),
    ],
)
def test_one_batch_ahead_a_clients_own_layers_alone_are_a_step_behind(
    models: dict[str, Path], tmp_path: Path, family: str, split: int, optimizer: str, job: dict[str, Any]
) -> None:
    """Equal to the unsplit model whose shallow adapters have the gradient at their values of one step before."""
    steps, lr = 12, 2e-2
    settings: dict[str, Any] = {"base": "fp32", "dtype": "fp64", "wire": "fp64", "local_steps": steps, "lr": lr}
    settings |= {"batch_size": 3, "optimizer": optimizer} | job
    plan = fixed_plan(models[family], Job.model_validate(settings), [split], [2], 2)
    policy = Policy(init="shared", importance=Importance(metric="equal"), pace=Pace(periods=1, ahead=True))
    recorder, shares = Recorder(), {"c0": random_examples(30, 5)}
    run = coordinator(models[family], tmp_path, plan, shares, recorder, policy, **settings)
    run.run()
    client = run._executor.actors["c0"]  # type: ignore[attr-defined]  # in-process by construction
    assert not client._sent and not client._behind

    parsed = run.context.job
    reference = peft_model(models[family], settings["base"], torch.float64, 2, parsed.alpha, "0|shared|{name}|1")
    shapes = ModelSpec.read(models[family]).linears
    own = [f(reference, s.name) for s in shapes if s.layer < split for f in (lora_A, lora_B)]
    every = [p for p in reference.parameters() if p.requires_grad]
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](every, lr=lr, weight_decay=0.0)
    before = [factor.detach().clone() for factor in own]
    apart = False
    for step in range(steps):
        now = [factor.detach().clone() for factor in own]
        for factor, then in zip(own, before, strict=True):
            factor.data.copy_(then)
        loss = mean_loss(reference, client.data.step_batches(step).values())
        loss.backward()
        for factor, value in zip(own, now, strict=True):
            factor.data.copy_(value)
        apart |= any(not torch.equal(then, value) for then, value in zip(before, now, strict=True))
        before = now
        made.step()
        made.zero_grad()
        assert recorder.losses[step]["c0"] == pytest.approx(float(loss.detach()), rel=1e-12), step
    assert apart


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_weighted_loss_counts_as_so_many_tokens(
    models: dict[str, Path], tmp_path: Path, labels: str, accumulation: int
) -> None:
    """A client of weight 2 and one of weight 1 bring the same texts: the server learns the weighted mean of two steps.

    With SGD and one step a round, the server's update is linear in the gradients, so that it is known from the runs in
    which either client is alone.
    """
    job: dict[str, Any] = {
        "base": "fp32",
        "dtype": "fp64",
        "wire": "fp64",
        "local_steps": 1,
        "optimizer": "sgd",
        "lr": 0.1,
        "batch_size": 2,
        "grad_accumulation": accumulation,
        "privacy": {"labels": labels},
    }
    shares = {f"c{i}": random_examples(8, seed=i) for i in range(2)}

    def moved(weights: dict[str, float]) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        plan = fixed_plan(models["llama"], Job.model_validate(job), [1, 1], [2, 2], 2)
        parts = tuple(replace(part, weight=weights[part.name]) for part in plan.clients if part.name in weights)
        policy = Policy(name="hsplitlora", init="shared", importance=Importance(metric="equal"))
        to = tmp_path / "-".join(f"{name}{weight:g}" for name, weight in weights.items())
        own = {name: shares[name] for name in weights}
        run = coordinator(models["llama"], to, replace(plan, clients=parts), own, Recorder(), policy, **job)
        run.start()
        actors = run._executor.actors  # type: ignore[attr-defined]
        before = {name: actors[name].state()["parameters"] for name in (*weights, "server")}
        run.begin_round()
        outcome = run.local_step(0)
        tokens = {name: sum(loss.tokens for loss in outcome.losses if loss.client == name) for name in weights}
        return {name: actors[name].state()["parameters"] - start for name, start in before.items()}, tokens

    both, tokens = moved({"c0": 2.0, "c1": 1.0})
    first, _ = moved({"c0": 1.0})
    second, _ = moved({"c1": 1.0})
    # Each client's own layers see its own mean loss, whatever its weight.
    assert torch.allclose(both["c0"], first["c0"], rtol=1e-9) and torch.allclose(both["c1"], second["c1"], rtol=1e-9)
    share = 2 * tokens["c0"] / (2 * tokens["c0"] + tokens["c1"])
    expected = share * first["server"] + (1 - share) * second["server"]
    assert torch.allclose(both["server"], expected, rtol=1e-9, atol=1e-15) and expected.any()
