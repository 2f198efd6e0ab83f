"""The README's main job on real SmolLM2-135M, and uses of its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hsplit.observe.tables import read_metrics

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
E2E = ROOT.parent / "shared" / "data" / "e2e" / "devset.csv"
SHORT = ("--set", "rounds=1", "--set", "local_steps=4", "--set", "validation.max_examples=4")


def _hsplit(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hsplit.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE)


def _launch(runs: Path, name: str, *arguments: object) -> Path:
    _hsplit("launch", "--cluster", "cluster/hetero.yaml", "--runs-dir", runs, "--name", name, *arguments)
    return runs / name


@pytest.fixture(scope="module")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # fp32 wherever the test runs: the comparison with PEFT below is closer than bf16's rounding.
    return _launch(tmp_path_factory.mktemp("runs"), "main", "--set", "dtype=fp32")


def _assert_peft_agrees(run: Path) -> None:
    script = [sys.executable, str(ROOT / "tests" / "peft_validation.py"), str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = subprocess.run(script, check=True, text=True, stdout=subprocess.PIPE, env=environment, cwd=run).stdout
    loss = json.loads(printed.splitlines()[-1])["val_loss"]
    assert loss == pytest.approx(read_metrics(run / "metrics.csv")["val_loss"].iloc[-1], abs=1e-3)


def test_main_job_more_than_halves_the_perplexity(main_run: Path) -> None:
    perplexity = read_metrics(main_run / "metrics.csv")["val_ppl"]
    assert perplexity.iloc[-1] < perplexity.iloc[0] / 2
    assert perplexity.is_monotonic_decreasing
    report = (main_run / "report.html").read_text()
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "")


def test_main_jobs_clients_differ_in_split_points_and_ranks(main_run: Path) -> None:
    import pandas as pd

    rows = pd.read_csv(main_run / "plan.csv").query("round == 0 and kind == 'client'").set_index("name")
    kinds = rows.loc[["phone-0", "laptop-0", "workstation"]]
    assert kinds["split"].is_monotonic_increasing and kinds["split"].is_unique
    assert kinds["rank_total"].is_unique
    assert (rows["predicted_bytes"] <= rows["declared_bytes"]).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_budget_of_the_main_cluster_is_felt(dtype: str) -> None:
    """Whether bf16 is native or not: everybody trains, ranks are chosen, phones store codes, more memory has a use."""
    plan = json.loads(_hsplit("plan", "--cluster", "cluster/hetero.yaml", "--set", f"dtype={dtype}", "--json").stdout)
    of = {holder["name"]: holder for holder in (plan["server"], *plan["clients"])}
    assert all(holder["available"] and min(holder["ranks"].values()) > 0 for holder in of.values())
    kinds = [of[name] for name in ("phone-0", "laptop-0", "workstation")]
    splits, ranks = [kind["split"] for kind in kinds], [sum(kind["ranks"].values()) for kind in kinds]
    assert splits == sorted(set(splits)) and ranks == sorted(set(ranks))
    for name in ("phone-0", "workstation", "server"):
        assert len(set(of[name]["ranks"].values())) > 1, name
        memory = of[name]["memory_bytes"]
        assert 0.97 * memory["declared"] <= memory["predicted"] <= memory["declared"], name
    assert len({tuple(sorted(holder["ranks"].items())) for holder in of.values()}) > 3
    assert {of[name]["stored"] for name in ("phone-0", "phone-1")} == {"codes"}
    objective = plan["captured_importance"] * plan["speed"]["rows_per_s"]
    assert max(gain["objective_change"] for gain in plan["one_more_gb"]) > 0.1 * objective


def test_a_probe_moves_ranks_of_the_main_job(main_run: Path) -> None:
    events = [json.loads(line) for line in (main_run / "events.jsonl").read_text().splitlines()]
    plans = [event["plan"] for event in events if event["event"] == "planned"]
    first, last = (
        {part["name"]: part["ranks"] for part in (plan["server"], *plan["clients"])} for plan in (plans[0], plans[-1])
    )
    common = {name: first[name].keys() & last[name].keys() for name in first}
    moved = {name: sum(first[name][w] != last[name][w] for w in weights) for name, weights in common.items()}
    assert sum(moved.values()) > 0.1 * sum(map(len, common.values()))


def test_adapter_of_the_nf4_run_gives_the_runs_loss_in_plain_peft(main_run: Path) -> None:
    _assert_peft_agrees(main_run)


def test_adapter_of_an_fp32_run_gives_the_runs_loss_in_plain_peft(tmp_path: Path) -> None:
    # An fp32 base takes more than the memory of server and phones in the file.
    memory = ("--set", "server.memory_gb=8", "--set", "clients.phone.memory_gb=0.04")
    fp32 = ("--set", "base=fp32", "--set", "dtype=fp32", *memory)
    _assert_peft_agrees(_launch(tmp_path, "fp32", *SHORT, *fp32))


def test_splitlora_and_labels_at_home(tmp_path: Path) -> None:
    memory = ("--set", "clients.phone.memory_gb=0.25", "--set", "server.memory_gb=1")
    run = _launch(tmp_path, "both", "--policy", "splitlora", "--set", "privacy.labels=client", *SHORT, *memory)
    perplexity = read_metrics(run / "metrics.csv")["val_ppl"]
    assert perplexity.iloc[-1] < perplexity.iloc[0]


@pytest.mark.skipif(not E2E.exists(), reason="the E2E development set is not beside the project")
def test_real_e2e_data(tmp_path: Path) -> None:
    run = _launch(tmp_path, "e2e", "--set", f"job.data.source={E2E}", *SHORT)
    perplexity = read_metrics(run / "metrics.csv")["val_ppl"]
    assert perplexity.iloc[-1] < perplexity.iloc[0]


def test_export_again_is_the_same_adapter(main_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _hsplit("export", main_run, "--to", tmp_path / "again")
    first, again = (
        load_file(folder / "adapter_model.safetensors") for folder in (main_run / "adapter", tmp_path / "again")
    )
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
