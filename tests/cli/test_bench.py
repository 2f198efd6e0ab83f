"""Experiments by name, and the lines of ``hsplit plan`` beside the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner

from benchmarks import common
from hsplit import experiments
from hsplit.cli import main
from hsplit.errors import InputError

ROOT = Path(__file__).parents[2]


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
    assert timings.clients.tolist() == timings.distinct_budgets.tolist() == 2 * [2, 4, 2, 4]
    assert timings.pace.tolist() == 4 * [True] + 4 * [False]
    assert (timings.seconds_min <= timings.seconds_median).all()
    worths = pandas.read_csv(tmp_path / "results" / "configurations.csv", comment="#")
    assert worths.of_planned.max() == 1.0
    header = json.loads((tmp_path / "results" / "planner.json").read_text())
    assert header["processor"] and "numpy" in header["versions"]
    assert (tmp_path / "results" / "planner.svg").read_text().startswith("<?xml")


def _bench(experiment: str, *flags: str) -> str:
    """Output of ``hsplit bench`` in its own process, since an experiment may keep itself to one core."""
    code = "from hsplit.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", experiment, *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_aggregation_benchmark_writes_what_merging_loses(tmp_path: Path, models: dict[str, Path]) -> None:
    results = tmp_path / "results"
    shown = _bench("aggregation", "--quick", "--model", str(models["llama"]), "--to", str(results))
    assert "What merging an update loses" in shown and "noise of averaging" in shown
    size = pandas.read_csv(results / "size.csv", comment="#")
    assert set(size.way) == {"concat, mean", "concat, random", "concat, svd", "dense"}
    assert (size.error < 1e-6).all()
    # Nothing is cut unless a cap is asked for.
    assert (size.cut == 0).all() and size.cap.isna().all()
    merging = pandas.read_csv(results / "merging.csv", comment="#")
    assert set(merging.base) == {"fp32", "bf16", "int8", "nf4"}
    worst = merging[merging.merged > 0.01].base.unique()
    assert "nf4" in worst and "int8" in worst and "fp32" not in worst
    # A tiny model's cap may cut; otherwise what is kept is the update to the rounding of fp32.
    assert merging.kept.median() < 1e-6
    noise = pandas.read_csv(results / "noise.csv", comment="#")
    assert noise[noise.init == "independent"].noise.min() > 0.1
    # With a shared A and B = 0 the first step changes B alone: averages of equal ranks are exact then.
    assert noise[(noise.init == "shared") & (noise.steps == 1) & (noise["ranks"] == "8 8 8")].noise.max() < 1e-6
    assert (results / "aggregation.md").read_text().count("\n## ") == 3


def test_the_wire_benchmark_counts_fewer_bytes_for_narrower_wires(tmp_path: Path, models: dict[str, Path]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.001}}
clients: [{{name: pair, count: 2, memory_gb: 0.02, tflops: 0.001}}]
job:
  {{model: {models["llama"]}, rank_set: [1, 2], data: {{examples: 40}}, validation: {{max_examples: 2}}}}
"""
    )
    flags = ["--wires", "fp32", "int8", "int4", "--seeds", "2", "--to", str(tmp_path / "results")]
    shown = _bench("wire", "--cluster", str(cluster), "--rounds", "1", "--steps", "1", *flags)
    # A title as long as the path of its file is broken into lines.
    assert "narrower wire" in " ".join(shown.split())
    wires = pandas.read_csv(tmp_path / "results" / "wire.csv", comment="#")
    assert wires.seed.tolist() == [0, 0, 0, 1, 1, 1]
    for _, own in wires.groupby("seed"):
        assert own.wire.tolist() == ["fp32", "int8", "int4"]
        assert (own[["bytes_up", "bytes_down"]].diff().iloc[1:] < 0).all(axis=None)
        assert own.val_loss_difference.iloc[0] == own.learned_loss_difference.iloc[0] == 0
        differences = own.learned_loss_difference.abs()
        # One step of Adam is hardly more than signs, which 8 bits need not change.
        assert (differences < 0.1).all() and differences.iloc[2] > 0
        # Through an exact wire the holders compute what the model does that they have learned.
        assert own.learned_ppl.iloc[0] == pytest.approx(own.val_ppl.iloc[0], rel=1e-4)
    rounds = pandas.read_csv(tmp_path / "results" / "rounds.csv", comment="#")
    assert rounds.groupby("wire")["round"].max().eq(1).all()
    errors = pandas.read_csv(tmp_path / "results" / "error.csv", comment="#").groupby("wire").activations
    assert errors.max()["bf16"] < errors.max()["int8"] < errors.min()["int4"]
    assert (tmp_path / "results" / "wire.md").read_text().count("\n## ") == 2


def test_the_policies_benchmark_counts_who_and_what_is_lost(tmp_path: Path, models: dict[str, Path]) -> None:
    from benchmarks.policies import main

    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.001}}
clients: [{{name: small, memory_gb: 0.0022, tflops: 0.001}}, {{name: large, memory_gb: 0.05, tflops: 0.001}}]
job:
  {{model: {models["llama"]}, rank_set: [1, 2], rounds: 1, local_steps: 2, data: {{examples: 40}}}}
"""
    )
    flags = ["--policies", "hsplitlora", "flexlora", "ft", "--to", str(tmp_path / "results")]
    main(["--cluster", str(cluster), *flags])
    rows = pandas.read_csv(tmp_path / "results" / "policies.csv").set_index("policy")
    assert rows.available.tolist() == [2, 1, 2]
    # Half as many clients take twice the steps, so that the tokens are about the same.
    assert rows.steps.tolist() == [2, 4, 2]
    assert rows.data_lost.tolist() == [0, 0.5, 0]
    assert (rows.bytes_up_mb > 0).tolist() == [True, True, False]
    # The score is over all clients' data; the run's own figures are over the clients that took part.
    assert rows.ppl["hsplitlora"] == pytest.approx(rows.val_ppl["hsplitlora"], rel=1e-2)
    assert rows.ppl["ft"] == pytest.approx(rows.val_ppl["ft"], rel=1e-5)
    assert "| flexlora |" in (tmp_path / "results" / "policies.md").read_text()


def test_experiments_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (experiments.experiment_directory() / "planner.py").is_file()
    assert experiments.results_directory("planner") == experiments.experiment_directory() / "results" / "planner"
    package = tmp_path / "hsplit"
    (package / "benchmarks").mkdir(parents=True)
    (package / "benchmarks" / "__init__.py").write_text("")
    (package / "benchmarks" / "common.py").write_text("def end(code):\n    raise SystemExit(code)\n")
    hello = "from benchmarks.common import end\ndef main(arguments):\n    end(len(arguments))\n"
    (package / "benchmarks" / "hello.py").write_text(hello)
    # A package of this name that is imported already, such as a user's, is not used.
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "benchmarks"}
    monkeypatch.setattr(experiments, "_PACKAGE", package)
    assert experiments.results_directory("hello") == Path("benchmarks/results/hello")
    try:
        with pytest.raises(SystemExit, match="2"):
            experiments.run_experiment("hello", ["--clients", "10"])
        with pytest.raises(InputError, match="no experiment nothing"):
            experiments.run_experiment("nothing", [])
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
            del sys.modules[name]
        sys.modules.update(known)


def test_the_throughput_benchmark_times_hsplit_against_plain_loops(tmp_path: Path, models: dict[str, Path]) -> None:
    results = tmp_path / "results"
    flags = ["--model", str(models["llama"]), "--split", "2", "--rank", "2", "--clients", "2", "--to", str(results)]
    flags += ["--parts", "step", "server", "residual", "client", "--dtypes", "fp32", "--repeat", "1", "--steps", "1"]
    flags += ["--server-clients", "2", "4"]
    # In a process of its own: it starts a Ray of its own.
    code = "from hsplit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "throughput", *flags], env=os.environ | {"COLUMNS": "120"}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "repeat 0 hsplit" in done.stdout
    assert "hsplit is faster by" in (results / "throughput.md").read_text()
    steps = pandas.read_csv(results / "step.csv", comment="#").set_index("contender")
    assert steps.index.tolist() == ["hsplit", "hsplit-later", "unsplit", "tuned", "splitlora", "federated"]
    assert (steps.seconds > 0).all() and (steps.processor_s > 0).all() and steps.overhead.notna().sum() == 2
    # The same model on the same examples from the same B = 0: the first steps' losses are alike.
    losses = steps.loss[["hsplit", "unsplit", "tuned", "federated"]]
    assert losses.max() - losses.min() < 0.2
    assert pandas.read_csv(results / "server.csv", comment="#").clients.tolist() == [2, 4]
    assert pandas.read_csv(results / "residual.csv", comment="#").form.nunique() == 4
    messages = pandas.read_csv(results / "wire.csv", comment="#")
    assert (messages.pickled_bytes >= messages.tensor_bytes).all() and messages.wire.nunique() == 3
    peaks = pandas.read_csv(results / "memory.csv", comment="#")
    assert (peaks.peak_mb <= peaks.declared_mb).iloc[1:].all()
    assert (results / "throughput.md").is_file() and (results / "step.svg").is_file()


SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text())
PARTS_OF_THROUGHPUT = {"overlap", "startup"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_experiment_tells_its_flags(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One of them sets these when it is imported.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit) as ended:
        experiments.run_experiment(path.stem, ["--help"])
    assert ended.value.code == 0
    named = path.stem if path.stem in PARTS_OF_THROUGHPUT else f"hsplit bench {path.stem}"
    assert named in capsys.readouterr().out.partition("\n")[0]


def test_every_experiment_is_a_command() -> None:
    assert main.commands["bench"].commands.keys() == {path.stem for path in SCRIPTS} - PARTS_OF_THROUGHPUT


@pytest.mark.parametrize("way", [[str(ROOT / "benchmarks" / "startup.py")], ["-m", "benchmarks.startup"]])
def test_an_experiment_is_a_script_and_a_module(way: list[str], tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *way, "--help"], env=env, cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_pace_lists_the_runs_that_are_left(tmp_path: Path) -> None:
    shown = _bench("pace", "--only", "learning", "--list", "--to", str(tmp_path))
    # Eleven ways by three settings and three seeds; each run is compared with the one without any lever.
    assert len(set(shown.split())) == 99
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "nothing-iid-h0-s0.json").write_text("{}")
    assert (
        "nothing-iid-h0-s0" in shown
        and len(_bench("pace", "--only", "learning", "--list", "--to", str(tmp_path)).split()) == 98
    )


def test_results_say_what_was_run_and_not_where() -> None:
    flags = ["--data", "/home/ada/sets/devset.csv", "--to", "/tmp/out", "--only", "speed", "there/b.csv"]
    header = common.header_of("pace", flags)
    assert header["command"] == "hsplit bench pace --data devset.csv --to out --only speed there/b.csv"
