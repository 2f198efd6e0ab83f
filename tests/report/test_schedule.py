"""What a report shows of the scheduler, on runs whose plans change, and on older ones that tell less."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hsplit.observe.events import EventLog
from hsplit.observe.tables import MetricsTable, PlanRow, plan_rows
from hsplit.planning.plan import HolderPlan, Plan
from tests.observe.conftest import write_decisions
from tests.report.test_report import assert_self_contained, report_of

MakeRun = Callable[..., Path]


def test_report_of_a_run_whose_plan_changed(fake_run: MakeRun, plan: Plan, other_plan: Plan, tmp_path: Path) -> None:
    run = fake_run("changing")
    write_decisions(run, plan, other_plan)
    html, page = report_of(tmp_path / "report.html", run)
    assert_self_contained(html, page)
    maps = [label for label in page.labels if "layer and weight kind" in label]
    assert maps[0].startswith("normalized importance and ranks of server and ranks of mean of 3 clients")
    # the kinds are the configuration's; a name that it does not have is one of its own
    assert [label.split(" by ")[0] for label in maps[1:]] == [f"ranks of {n}" for n in ("phone", "laptop", "watch")]
    assert page.tags["details"] == page.tags["summary"] == 8 + 3  # the kinds' maps are folded once more
    assert "split point of each client by round" in page.labels
    shown = page.text.split("\n")
    for heading in ("Importance and ranks", "Plans and split points", "step (virtual)"):
        assert heading in shown
    for cell in ("after round 2", "the budget of phone-0 is now memory_gb 0.001", "probes until round 2", "2.250 s"):
        assert cell in shown
    assert "The importance or the plan changed twice after the start." in page.text
    assert "planned anew after round 2" in page.text  # among the events
    assert "phone-0 asked for a new budget" in page.text
    assert "importance of 18 weights" not in page.text
    assert "Shown are" not in page.text


def test_a_run_that_never_probed_says_so(fake_run: MakeRun, plan: Plan, tmp_path: Path) -> None:
    run = fake_run("fixed")
    with EventLog(run / "events.jsonl") as events:
        events.write("planned", "plan", round=0, plan=plan.to_json())
    _, page = report_of(tmp_path / "report.html", run)
    assert "The plan never changed." in page.text
    assert "No importance was probed" in page.text
    assert not any("normalized importance" in label for label in page.labels)


def test_runs_on_one_page_have_maps_of_their_own(
    fake_run: MakeRun, plan: Plan, other_plan: Plan, tmp_path: Path
) -> None:
    runs = [fake_run("first"), fake_run("second"), fake_run("old")]
    for run in runs[:2]:
        write_decisions(run, plan, other_plan)
    html, page = report_of(tmp_path / "report.html", *runs)
    assert_self_contained(html, page)
    assert sum("normalized importance" in label for label in page.labels) == 2
    assert html.count('id="run-2-maps-figure_1"') == 1


def test_damaged_events_cost_only_their_detail(fake_run: MakeRun, plan: Plan, tmp_path: Path) -> None:
    run = fake_run("damaged")
    with (run / "events.jsonl").open("a") as file:
        for fields in ({"plan": {"layers": "x"}, "round": 0}, {"round": "?"}, {}):
            file.write(json.dumps({"time": "t", "event": "planned", "text": "x", **fields}) + "\n")
        file.write('{"time": "t", "event": "importance", "text": "x", "round": 1, "scores": {"a": "nan"}}\n')
        file.write('{"time": "t", "event": "planned", "te')
    _, page = report_of(tmp_path / "report.html", run)
    assert not any("weight kind" in label for label in page.labels)
    assert "Total LoRA rank in each layer" in page.text  # the checkpoint's plan is left


def test_memory_of_all_rounds_is_shown_and_marked(fake_run: MakeRun, plan: Plan, tmp_path: Path) -> None:
    run = fake_run("memory")
    table = MetricsTable(run / "plan.csv", PlanRow)
    table.append(*plan_rows(0, plan, {"phone-0": 140_000_000, "laptop": 190_000_000}))
    table.append(*plan_rows(1, plan, {"phone-0": 169_000_000, "laptop": 207_000_000}))
    table.append(*plan_rows(2, plan, {"phone-0": 137_000_000, "laptop": 188_000_000}))
    _, page = report_of(tmp_path / "report.html", run)
    shown = page.text.split("\n")
    assert "▲ Measured more than declared: phone-0 (round 1)." in shown
    assert "▲ Measured more than predicted: phone-0 (round 1), laptop (round 1)." in shown
    for cell in ("▲ over declared", "▲ over predicted", "not measured", "0.17 GB", "0.21 GB", "0.14 GB", "worst round"):
        assert cell in shown
    assert "▲ over declared" in [text.strip() for text in shown if text.startswith(" ")]  # at the bar


def test_a_page_of_30_layers_5_clients_and_20_rounds_is_light(fake_run: MakeRun, plan: Plan, tmp_path: Path) -> None:
    run = fake_run("long", rounds=20)
    kinds = [f"self_attn.{k}_proj" for k in "qkvo"] + [f"mlp.{k}_proj" for k in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{kind}" for layer in range(30) for kind in kinds]
    with EventLog(run / "events.jsonl") as events:
        for done in range(20):
            ranks = {name: 2 ** ((i * i + 3 * done) % 6) for i, name in enumerate(names)}
            clients = tuple(
                HolderPlan(f"c-{n}", "client", True, 6 * n + 6, dict(list(ranks.items())[: 42 * (n + 1)]), 9, 8, 0.1)
                for n in range(5)
            )
            new = replace(plan, layers=30, server=replace(plan.server, split=6, ranks=ranks), clients=clients)
            events.write("importance", "x", round=done, scores={n: 1.5 + i * done % 97 for i, n in enumerate(names)})
            events.write("planned", "x", round=done, plan=new.to_json())
    html, page = report_of(tmp_path / "report.html", run)
    assert len(html) < 1_500_000
    assert "Shown are 8 of these 20 states" in page.text
    assert "after round 0, 3, 5, 8, 11, 14, 16, 19." in page.text
