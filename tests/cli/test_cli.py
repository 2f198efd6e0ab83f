"""The command line: refusals are one line and exit 2, plans print, and nothing heavy is imported for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result

from hsplit.cli import main
from hsplit.observe.events import EventLog
from hsplit.run_directory import RunDirectory
from hsplit.session import report_failures
from tests.errors import error_lines
from tests.finished_run import finished_run


@pytest.fixture
def cluster_file(tmp_path: Path, models: dict[str, Path]) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f"""
server: {{memory_gb: 1}}
clients:
  - {{name: small, memory_gb: 0.00113}}
  - {{name: large, memory_gb: 0.002}}
job: {{model: {models["llama"]}, max_length: 32, rank_set: [1, 2, 4]}}
"""
    )
    return path


def _call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_imports_nothing_heavy() -> None:
    modules = "hsplit.cli, hsplit.observe.watch"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'transformers', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "launch" in _call("--help").output


def test_a_plan_needs_the_models_configuration_alone(
    cluster_file: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    plan = ("plan", "--cluster", cluster_file)
    for form in ((), ("--json",)):
        # Plans with pace know what the texts use of the embedding, unless there is no tokenizer.
        for policy in ((), ("--policy", "splitlora")):
            whole, planned = (_call(*plan, *form, *policy, *m) for m in ((), ("--set", f"model={bare}")))
            assert whole.exit_code == planned.exit_code == 0, planned.output
            assert (planned.stdout == whole.stdout) == bool(policy)
            assert ("data not read" in planned.stderr) == (not policy) and "data not read" not in whole.stderr
    launched = _call("launch", "--cluster", cluster_file, "--set", f"model={bare}", "--runs-dir", tmp_path / "runs")
    assert launched.exit_code == 2 and "has no weights: neither model.safetensors" in launched.output
    assert not (tmp_path / "runs").exists()


def test_plan_as_json_has_the_documented_keys(cluster_file: Path) -> None:
    result = _call("plan", "--cluster", cluster_file, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["makespan_s"] > 0 and plan["captured_importance"] > 0
    small, large = plan["clients"]
    assert small["name"] == "small" and small["available"]
    assert small["split"] <= large["split"]
    assert small["memory_bytes"]["predicted"] <= small["memory_bytes"]["declared"] == 1_130_000
    # 0 where it only computes forward.
    assert set(small["ranks"].values()) <= {0, 1, 2, 4}
    assert all(name.startswith("model.layers.") for name in small["ranks"])
    assert small["step_time_s"] > 0 and 0 < small["busy_share"] <= 1
    assert 0 <= small["phase"] < small["period"] and small["stored"] in ("dense", "codes")
    assert small["rows"] >= 1 and small["wire"] in ("bf16", "int8", "int4")
    speed = plan["speed"]
    assert speed["rows_per_s"] > 0 and speed["bound_rows_per_s"] > 0 and speed["binding"]


def test_plan_as_a_table_names_everybody(cluster_file: Path) -> None:
    result = _call("plan", "--cluster", cluster_file)
    assert result.exit_code == 0
    for word in ("small", "large", "server", "virtual", "equal importance"):
        assert word in result.output


def test_presets_are_found_by_name() -> None:
    result = _call("plan", "--cluster", "no-such-preset")
    assert result.exit_code == 2
    for preset in ("hetero", "homo"):
        assert preset in result.stderr


BAD = [
    (["--set", "job.rounds=0"], "--set job.rounds"),
    (["--set", "clients.small.memory_gb=-1"], "memory_gb"),
    (["--set", "no_such_key=1"], "no_such_key"),
    (["--set", "job.model=/nowhere"], "job.model: there is no directory /nowhere"),
    (["--set", "policy.split=5"], "split: must be at most 4"),
    (["--set", "targets=[no_proj]"], "no linear named 'no_proj'"),
    (["--set", "data.source=/nowhere.csv"], "/nowhere.csv"),
    (["--set", "data.source=thing.xyz"], "thing.xyz"),
    (["--set", "data.examples=3"], "more clients than examples"),
    (["--policy", "no-such-policy"], "no-such-policy"),
    (["--name", "../escape"], "../escape"),
    (["--set", "server.memory_gb=0.0001"], "server: memory_gb: 0.000 is"),
    (["--set", "clients.small.memory_gb=1e-6", "--set", "clients.large.memory_gb=1e-6"], "none has the memory"),
]


@pytest.mark.parametrize(("arguments", "told"), BAD, ids=[told for _, told in BAD])
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2_before_ray_starts(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    def starting(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", starting)
    runs = tmp_path / "runs"
    result = _call("launch", "--cluster", cluster_file, "--runs-dir", runs, *arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0], lines
    assert not runs.exists() or not any(runs.iterdir())


def test_resume_and_report_refuse_what_is_no_run(tmp_path: Path) -> None:
    for command in ("resume", "report", "export"):
        result = _call(command, tmp_path / "nothing")
        assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1


def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_run(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: object) -> None:
        raise Exception("\nThe last 20 lines of dashboard.log:\nINFO loading\n")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", failing)
    runs = tmp_path / "runs"
    result = _call("launch", "--cluster", cluster_file, "--runs-dir", runs)
    assert result.exit_code == 1, result.output
    told = "error: no Ray could be started on this machine: Exception: INFO loading; if it only has too much to do, "
    (line,) = error_lines(result.stderr)
    assert line.startswith(told)
    assert not any(runs.iterdir())


def test_a_run_that_is_complete_is_not_begun_again(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, models["llama"], base="fp32", rounds=1)
    monkeypatch.setattr("hsplit.api.helpers_of", Mock(side_effect=AssertionError("started")))
    EventLog(run.directory.events).write("finished", "the run is complete")
    result = _call("resume", run.path)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{run.path}: is complete already\nadapter ")
    # A crash between the last checkpoint and the export leaves something to do.
    EventLog(run.directory.events).write("failed", "no space left")
    begun = _call("resume", run.path)
    (line,) = error_lines(begun.stderr)
    assert begun.exit_code == 1 and line.startswith("error: AssertionError: started; the traceback is in ")


def test_a_run_that_is_interrupted_at_once_says_how_to_go_on(
    cluster_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.create(tmp_path, "cut")
    (directory.checkpoints / "round-0001").mkdir()

    def interrupted(*_: object, **__: object) -> None:
        with report_failures(directory):
            raise KeyboardInterrupt

    monkeypatch.setattr("hsplit.api.launch", interrupted)
    result = _call("launch", "--cluster", cluster_file)
    assert result.exit_code == 130
    assert result.stderr == f"interrupted; go on from the last checkpoint with: hsplit resume {directory.path}\n"


def test_who_stops_watching_is_told_that_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hsplit.observe.watch.watch", Mock(side_effect=KeyboardInterrupt))
    result = _call("watch", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "interrupted; this ended the watching, not the run\n")


def test_no_module_takes_the_name_of_a_public_function() -> None:
    """Importing a module makes it an attribute of the package, in place of a function of that name."""
    modules = "hsplit.api, hsplit.evaluation.evaluate, hsplit.exporting.export, hsplit.measuring.measured_budgets"
    code = f"import hsplit, {modules}; assert all(callable(getattr(hsplit, n)) for n in hsplit.__all__ if n[0] != '_')"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
