"""Experiments by name, and what ``hsplit plan`` says beside the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner

import hsplit.benchmark as benchmark
from hsplit.cli import main
from hsplit.errors import InputError


def test_plan_says_who_is_waited_for_and_what_memory_would_buy(tmp_path: Path, models: dict[str, Path]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.001}}
clients: [{{name: pair, count: 2, memory_gb: 0.002}}, {{name: large, memory_gb: 1}}]
job: {{model: {models["llama"]}, max_length: 32, rank_set: [1, 2, 4]}}
"""
    )
    told = CliRunner().invoke(main, ["plan", "--cluster", str(cluster), "--json"])
    assert told.exit_code == 0, told.output
    plan = json.loads(told.stdout)
    assert set(plan["bottleneck"]) == {"name", "kind", "alike", "shortens_s"}
    assert {gain["name"] for gain in plan["one_more_gb"]} == {"pair-0", "large", "server"}
    shares = [part["captured_share"] for part in (plan["server"], *plan["clients"])]
    assert sum(shares) == pytest.approx(1)
    shown = CliRunner().invoke(main, ["plan", "--cluster", str(cluster)])
    assert "Bottleneck: " in shown.output and "One more GB" in shown.output


def test_the_planner_benchmark_writes_tables_and_a_curve(tmp_path: Path, models: dict[str, Path]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"""
clients: [{{name: small, memory_gb: 0.002, tflops: 0.001}}, {{name: large, memory_gb: 1}}]
job: {{model: {models["llama"]}, max_length: 32, rank_set: [1, 2, 4]}}
"""
    )
    # In a process of its own: it keeps itself to one core.
    flags = ["--clients", "2", "4", "--repeat", "1", "--cluster", str(cluster), "--to", str(tmp_path / "results")]
    code = "from hsplit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "planner", *flags], env=os.environ | {"COLUMNS": "100"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "by memory alone" in done.stdout
    timings = pandas.read_csv(tmp_path / "results" / "planner.csv", comment="#")
    assert timings.clients.tolist() == timings.distinct_budgets.tolist() == [2, 4, 2, 4]
    assert (timings.seconds_min <= timings.seconds_median).all()
    worths = pandas.read_csv(tmp_path / "results" / "configurations.csv", comment="#")
    assert worths.of_planned.max() == 1.0
    header = json.loads((tmp_path / "results" / "planner.json").read_text())
    assert header["processor"] and "numpy" in header["versions"]
    assert (tmp_path / "results" / "planner.svg").read_text().startswith("<?xml")


def test_experiments_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (benchmark.benchmark_directory() / "planner.py").is_file()
    assert benchmark.results_directory("planner") == benchmark.benchmark_directory() / "results" / "planner"
    package = tmp_path / "hsplit"
    (package / "benchmarks").mkdir(parents=True)
    (package / "benchmarks" / "hello.py").write_text("def main(arguments):\n    raise SystemExit(len(arguments))\n")
    monkeypatch.setattr(benchmark, "_PACKAGE", package)
    assert benchmark.results_directory("hello") == Path("benchmarks/results/hello")
    with pytest.raises(SystemExit, match="2"):
        benchmark.run_benchmark("hello", ["--clients", "10"])
    with pytest.raises(InputError, match="no experiment nothing"):
        benchmark.run_benchmark("nothing", [])
