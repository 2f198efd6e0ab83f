from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hsplit.observe.events import read_events
from hsplit.planning.plan import Plan
from hsplit.report.run_record import PlanHistory, load_run, plan_history
from tests.observe.conftest import scores, write_decisions


def planned(done: int, plan: Plan) -> dict[str, Any]:
    return {"event": "planned", "round": done, "plan": plan.to_json()}


def probed(done: int, *by_kind: float) -> dict[str, Any]:
    return {"event": "importance", "round": done, "scores": scores(*by_kind)}


def test_every_plan_and_probe_of_a_run_is_known(
    fake_run: Callable[..., Path], plan: Plan, other_plan: Plan, tmp_path: Path
) -> None:
    run = fake_run("changing")
    write_decisions(run, plan, other_plan)
    record = load_run(run)
    history = record.history
    assert history.plans == {0: plan, 2: other_plan}
    assert record.plan == other_plan  # not the older checkpoint's
    assert list(history.importance) == [1, 2]
    assert history.changed == (0, 1, 2)
    assert history.reasons == {2: ("the budget of phone-0 is now memory_gb 0.001",)}
    assert [history.plan_after(done) for done in (0, 1, 2, 9)] == [plan, plan, other_plan, other_plan]
    assert history.importance_after(0) is None
    shares = history.importance_after(7)
    assert shares is not None
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert shares["model.layers.3.mlp.down_proj"] == pytest.approx(5 / 8 / 6)
    shown = {event["event"] for event in record.events}
    assert {"replanned", "budget", "data"} <= shown
    assert not {"planned", "importance", "round"} & shown


def test_a_resumed_run_takes_its_later_rounds_back(plan: Plan, other_plan: Plan) -> None:
    third = replace(other_plan, captured_importance=7.0)
    events = [
        *(planned(0, plan), probed(1, 1, 1, 1), planned(1, other_plan), probed(2, 1, 1, 2), planned(3, plan)),
        # killed, and resumed from the end of round 1 with the plan of its start
        *(planned(1, plan), probed(1, 3, 1, 1), planned(1, third)),
    ]
    history = plan_history(events)
    assert history.plans == {0: plan, 1: third}
    assert list(history.importance) == [1]
    assert history.importance[1]["model.layers.0.self_attn.q_proj"] == pytest.approx(3 / 5 / 6)


def test_a_plan_that_is_only_repeated_is_no_change(plan: Plan, other_plan: Plan) -> None:
    history = plan_history([planned(0, plan), planned(2, other_plan), planned(4, other_plan)])
    assert list(history.plans) == [0, 2]


@pytest.mark.parametrize(
    "damage",
    [
        {"round": "two"},
        {"round": None},
        {"round": -1},
        {"round": True},
        {"plan": None},
        {"plan": []},
        {"plan": {"layers": 3}},
        {"plan": "text"},
    ],
)
def test_damaged_plans_are_left_out(plan: Plan, other_plan: Plan, damage: dict[str, Any]) -> None:
    assert plan_history([planned(0, plan), planned(2, other_plan) | damage]).plans == {0: plan}


def test_a_plan_with_ranks_that_are_no_numbers_is_left_out(plan: Plan) -> None:
    bad = planned(0, plan)
    bad["plan"]["server"]["ranks"]["model.layers.3.mlp.down_proj"] = "nan"
    assert plan_history([bad]) == PlanHistory()


@pytest.mark.parametrize("bad", [None, [], {}, "x", {"a": "nan"}, {"a": 0.0, "b": 0}])
def test_scores_that_are_none_are_left_out(bad: Any) -> None:
    assert plan_history([{"event": "importance", "round": 1, "scores": bad}]).importance == {}


def test_events_without_fields_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [f'{{"time": "", "text": "", "event": "{kind}"}}' for kind in ("planned", "importance", "replanned")]
    path.write_text("\n".join(lines))
    assert plan_history(read_events(path)) == PlanHistory()
