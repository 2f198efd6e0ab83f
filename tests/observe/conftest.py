"""A plan and runs' directories as a coordinator would leave them, without any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hsplit.config import load_run_config
from hsplit.observe.events import EventLog
from hsplit.observe.tables import MetricsRow, MetricsTable, PlanRow, plan_rows
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.run_directory import RunDirectory

LAYERS = 6
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")


def ranks(first: int, last: int, *by_kind: int) -> dict[str, int]:
    return {
        f"model.layers.{layer}.{kind}": rank
        for layer in range(first, last)
        for kind, rank in zip(KINDS, by_kind, strict=True)
    }


@pytest.fixture
def plan() -> Plan:
    return Plan(
        layers=LAYERS,
        server=HolderPlan("server", "server", True, 2, ranks(2, LAYERS, 8, 8, 8), 8_000_000_000, 310_000_000, 0.25),
        clients=(
            HolderPlan(
                "phone-0", "client", True, 2, ranks(0, 2, 1, 2, 8), 160_000_000, 150_000_000, 0.5, captured_share=0.125
            ),
            HolderPlan("laptop", "client", True, 3, ranks(0, 3, 4, 4, 4), 250_000_000, 201_000_000, 0.125),
            HolderPlan("watch", "client", False, None, {}, 50_000_000, 0, 0.0, lacking_bytes=71_000_000),
        ),
        makespan_s=1.5,
        captured_importance=42.5,
        importance="equal importance per parameter (no scores yet)",
    )


@pytest.fixture
def other_plan(plan: Plan) -> Plan:
    """Replaces ``plan``: the phone leaves, the watch comes, the laptop goes deeper, the server's ranks change."""
    laptop = plan.clients[1]
    return replace(
        plan,
        server=replace(plan.server, split=1, ranks=ranks(1, LAYERS, 16, 8, 4), predicted_bytes=420_000_000),
        clients=(
            HolderPlan("phone-0", "client", False, None, {}, 1_000_000, 0, 0.0, lacking_bytes=93_000_000),
            replace(laptop, split=5, ranks=ranks(0, 5, 2, 4, 8), predicted_bytes=230_000_000),
            HolderPlan("watch", "client", True, 1, ranks(0, 1, 1, 1, 1), 150_000_000, 121_000_000, 0.75),
        ),
        makespan_s=2.25,
        captured_importance=55.5,
        importance="probes until round 2",
    )


def scores(*by_kind: float) -> dict[str, float]:
    """The same scores in every layer."""
    return {
        f"model.layers.{layer}.{kind}": score
        for layer in range(LAYERS)
        for kind, score in zip(KINDS, by_kind, strict=True)
    }


def write_decisions(run: Path, plan: Plan, other: Plan) -> None:
    """The events of a run that probes after each round and plans anew after the second, for a budget that changed."""
    with EventLog(run / "events.jsonl") as events:
        events.write("planned", "plan by equal importance", round=0, plan=plan.to_json())
        events.write("importance", "importance of 18 weights after round 1", round=1, scores=scores(1.0, 1.0, 2.0))
        events.write("budget", "phone-0 asked for a new budget", round=2, holder="phone-0", values={"memory_gb": 0.001})
        events.write("importance", "importance of 18 weights after round 2", round=2, scores=scores(1.0, 2.0, 5.0))
        why = "the budget of phone-0 is now memory_gb 0.001"
        events.write("replanned", f"planned anew after round 2: {why}", round=2, reasons=[why])
        events.write("planned", "plan by probes until round 2", round=2, plan=other.to_json())


def metrics_row(round: int, **changes: float) -> MetricsRow:
    values = {
        "round": round,
        "step": 10 * round,
        "train_loss": 3.0 / round if round else None,
        "val_loss": 3.1 / (round + 1),
        "val_ppl": 21.75 / (round + 1),
        "tokens": 1234 * round,
        "wall_time_s": 12.5 * round + 4.0,
        "virtual_time_s": 15.0 * round,
        "bytes_up": 7_000_000 + round,
        "bytes_down": 9_000_000,
        "captured_importance": 42.5,
        "available_clients": 2,
        "train_wall_time_s": 10.0 * round,
        "train_virtual_time_s": 12.0 * round,
        "worst_ppl": 23.5 / (round + 1),
    }
    return MetricsRow(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def fake_run(tmp_path: Path, plan: Plan) -> Callable[..., Path]:
    """Makes the directory of a run with ``rounds`` rounds of training."""

    def make(name: str, rounds: int = 3, checkpoint: bool = True, measured: bool = True) -> Path:
        run = RunDirectory.create(tmp_path / "runs", name)
        load_run_config("hetero").save(run.config)
        metrics = MetricsTable(run.metrics, MetricsRow)
        plans = MetricsTable(run.plan, PlanRow)
        with EventLog(run.events) as events:
            events.write("data", "phone-0: 120 examples to train on, 13 held out", examples=120)
            for round in range(rounds + 1):
                metrics.append(metrics_row(round))
                sizes = {"phone-0": 148_000_000} if measured else {}
                plans.append(*plan_rows(round, plan, sizes, {"phone-0": 0.61}))
                events.write("round", f"routine {round}")
        if checkpoint:
            folder = run.checkpoints / f"round-{rounds:04d}"
            folder.mkdir()
            (folder / "state.json").write_text(json.dumps({"plan": plan.to_json()}))
        return run.path

    return make
