"""What Ray's own metrics endpoint shows of a run: read as Prometheus reads it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import hsplit
from hsplit.observe.exported_metrics import METRICS
from hsplit.observe.ray_metrics import RayMetrics, metrics_address
from hsplit.observe.tables import TimingRow, plan_rows
from hsplit.planning.plan import HolderPlan, Plan
from tests.in_process import Recorder
from tests.observe.conftest import metrics_row

pytestmark = pytest.mark.usefixtures("ray_cluster")

_TAGS = {metric.in_prometheus: metric.tags for metric in METRICS}

_Series = dict[tuple[str, ...], float]

PLAN = Plan(
    layers=6,
    server=HolderPlan("server", "server", True, 1, {"a": 8, "b": 8}, 8_000, 310, 0.25),
    clients=(
        HolderPlan("phone", "client", True, 1, {"a": 1, "b": 2}, 160, 150, 0.5),
        HolderPlan("laptop", "client", True, 3, {"a": 4, "b": 4}, 250, 201, 0.125),
        HolderPlan("watch", "client", False, None, {}, 50, 0, 0.0, lacking_bytes=71),
    ),
    makespan_s=1.5,
    captured_importance=42.5,
    importance="equal",
)


def _shown(run: str) -> _Series:
    """Values of a run's series by metric and own tags."""
    with urllib.request.urlopen(f"http://{metrics_address()}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [s for family in families for s in family.samples if s.name in _TAGS and s.labels.get("run") == run]
    return {(s.name, *(s.labels[tag] for tag in _TAGS[s.name])): s.value for s in samples}


def _wait_for(run: str, what: Callable[[_Series], bool]) -> _Series:
    """The run's series once they are as they should be, or at last."""
    until = time.monotonic() + 60
    while not what(shown := _shown(run)) and time.monotonic() < until:
        time.sleep(0.2)
    return shown


def test_the_endpoint_shows_what_the_observer_is_told_and_nothing_when_it_ends() -> None:
    with RayMetrics() as metrics:
        metrics.started("fed", [])
        metrics.plan(PLAN)
        metrics.round_done(metrics_row(0), plan_rows(0, PLAN), [])
        metrics.note("lost", "lost", client="laptop", kind="died")
        metrics.note("lost", "lost", client="laptop", kind="died")
        metrics.note("repeated", "repeated", actor="server", kind="error", gone={"phone": "died"})
        metrics.note("nothing", "replanned", reasons=[])
        metrics.step(1, 2, 10, 20, {"phone": 4.0}, {})
        metrics.step(1, 2, 10, 20, {"phone": 2.0, "laptop": 3.0}, {})
        timing = [TimingRow(1, "phone", "forward", 5.0), TimingRow(1, "server", "waiting", 2.5)]
        metrics.round_done(metrics_row(1), plan_rows(1, PLAN, {"phone": 149, "server": 300}), timing)
        # A round in which the phone alone is measured, and the server's last figure stays.
        metrics.step(2, 2, 20, 20, {"phone": 1.5}, {})
        row = metrics_row(2)
        metrics.round_done(row, plan_rows(2, PLAN, {"phone": 147}), timing)
        expected = {
            ("round",): 2,
            ("step",): 20,
            ("tokens",): row.tokens,
            ("train_loss",): row.train_loss,
            ("client_train_loss", "phone"): 1.5,
            ("validation_loss",): row.val_loss,
            ("validation_perplexity",): row.val_ppl,
            ("worst_client_perplexity",): row.worst_ppl,
            ("step_seconds", "phone", "forward"): 0.5,
            ("step_seconds", "server", "waiting"): 0.25,
            ("virtual_step_seconds", "server"): 0.25,
            ("virtual_step_seconds", "phone"): 0.5,
            ("virtual_step_seconds", "laptop"): 0.125,
            ("wall_seconds",): row.wall_time_s,
            ("virtual_seconds",): row.virtual_time_s,
            ("train_wall_seconds",): row.train_wall_time_s,
            ("train_virtual_seconds",): row.train_virtual_time_s,
            ("wire_bytes", "up"): row.bytes_up,
            ("wire_bytes", "down"): row.bytes_down,
            ("memory_declared_bytes", "server"): 8_000,
            ("memory_declared_bytes", "phone"): 160,
            ("memory_declared_bytes", "laptop"): 250,
            ("memory_predicted_bytes", "server"): 310,
            ("memory_predicted_bytes", "phone"): 150,
            ("memory_predicted_bytes", "laptop"): 201,
            ("memory_measured_bytes", "server"): 300,
            ("memory_measured_bytes", "phone"): 147,
            ("rank_total", "server"): 16,
            ("rank_total", "phone"): 3,
            ("rank_total", "laptop"): 8,
            ("split", "server"): 1,
            ("split", "phone"): 1,
            ("split", "laptop"): 3,
            ("clients",): 2,
            ("captured_importance",): row.captured_importance,
            ("failures", "laptop", "died"): 2,
            ("failures", "phone", "died"): 1,
            ("failures", "server", "error"): 1,
        }
        expected = {(f"ray_hsplit_{name}", *tags): value for (name, *tags), value in expected.items()}
        assert {name for name, *_ in expected} == _TAGS.keys()
        assert _wait_for("fed", lambda shown: shown == expected) == expected

        # The phone goes: no series of it stays but its failures.
        gone = replace(PLAN.clients[0], available=False, split=None, ranks={})
        metrics.plan(replace(PLAN, clients=(gone, *PLAN.clients[1:])))
        metrics.step(2, 2, 20, 20, {"phone": 1.5}, {})
        kept = {("ray_hsplit_failures", "phone", "died")}
        left = _wait_for("fed", lambda shown: {key for key in shown if "phone" in key} == kept)
        assert {key for key in left if "phone" in key} == kept
    assert _wait_for("fed", lambda shown: not shown) == {}


def test_a_run_shows_its_metrics_and_announces_where(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "cache"))
    found: list[Any] = []
    # The display is told of a step before the metrics are.
    figures = {("ray_hsplit_step",): 1, ("ray_hsplit_round",): 0, ("ray_hsplit_clients",): 3}
    perplexity, split = ("ray_hsplit_validation_perplexity",), ("ray_hsplit_split", "large-1")

    def all_there(shown: _Series) -> bool:
        # Each has its own time at which Ray learns of it, and an export may come between two of them.
        return figures.items() <= shown.items() and {perplexity, split} <= shown.keys()

    def look(step: int) -> None:
        if step == 2:
            found.append(_wait_for("shown", all_there))
            (file,) = (tmp_path / "cache" / "prometheus").iterdir()
            found.append(json.loads(file.read_text())[0]["targets"])

    overrides = {"rounds": 1, "local_steps": 2}
    recorder = Recorder(after_step=look)
    run = hsplit.launch(cluster_file, None, overrides, runs_dir=tmp_path, name="shown", display=recorder)
    shown, targets = found
    assert figures.items() <= shown.items() and split in shown
    assert shown[perplexity] == pytest.approx(run.metrics.iloc[0]["val_ppl"], rel=1e-12)
    assert targets == [metrics_address()]
    assert list((tmp_path / "cache" / "prometheus").iterdir()) == []


def test_metrics_that_fail_do_not_end_a_run(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no metrics here")

    monkeypatch.setattr("ray.util.metrics.Gauge", broken)
    recorder = Recorder()
    overrides = {"rounds": 1, "local_steps": 1}
    assert hsplit.launch(cluster_file, None, overrides, runs_dir=tmp_path, display=recorder).complete
    assert "RayMetrics has failed and is left out from here on: no metrics here" in recorder.notes
