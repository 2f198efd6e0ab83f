"""The worked example of docs/policies.md, taken from the page and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hsplit.config import ClientConfig, Job, RunConfig, ServerConfig, load_run_config
from hsplit.config.reading import preset_directory
from hsplit.errors import InputError
from hsplit.lora.learned import learned
from hsplit.models.lookup import ModelSource
from hsplit.models.spec import ModelSpec
from hsplit.planning.cost.model import CostModel
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.coordinator import Inputs
from hsplit.run.in_process import local_run
from hsplit.run.inputs import check_model
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, random_examples
from tests.tiny import LAYERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "policies.md").read_text()


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the page's two files, the working directory of the test."""
    for language, name in (("python", "my_rules.py"), ("yaml", "mine.yaml")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
        (tmp_path / name).write_text(block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*(path for path in sys.path if path), str(tmp_path)])
    yield tmp_path
    sys.modules.pop("my_rules", None)


def a_run(example: Path) -> RunConfig:
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=0.05, tflops=1.0) for name in ("c0", "c1"))
    job = Job(dtype="fp32", wire="fp32", rounds=2, local_steps=2, max_length=24)
    policy = load_run_config("hetero", "mine.yaml").policy
    return RunConfig(clients=clients, server=ServerConfig(), job=job, policy=policy)


def test_the_pages_own_rules_make_the_plan_and_the_aggregation(example: Path, models: dict[str, Path]) -> None:
    run, recorder = a_run(example), Recorder()
    check_model(run, ModelSource(models["llama"], "here"))
    directory = RunDirectory.create(example / "runs", None)
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    made = local_run(run, ModelSpec.read(models["llama"]), directory, Inputs(shares, "model", "data"), recorder)
    assert made.run()
    plan = made.context.plan
    assert [client.split for client in plan.available] == [LAYERS // 2] * 2
    for holder in (*plan.available, plan.server):
        by_kind = {("attn" in name): rank for name, rank in holder.ranks.items()}
        assert by_kind == {True: 32, False: 1}
    # Fresh adapters every round: all that was learned is in the residual.
    _, tensors = read_checkpoint(latest_checkpoint(directory.checkpoints)[0])
    assert learned(tensors["server"]) and not any(key.startswith("common.") for key in tensors["server"])
    # The metric was asked: the first plan had no score yet, the one after the first round has its.
    assert plan.importance == "probes until round 1"


def test_the_pages_command_finds_the_rules_beside_it(example: Path, models: dict[str, Path]) -> None:
    cluster = example / "cluster.yaml"
    cluster.write_text(f"clients: [{{name: one, count: 2, memory_gb: 0.05}}]\njob: {{model: {models['llama']}}}\n")
    command = [sys.executable, "-c", "from hsplit.cli import main; main()", "plan", "--policy", "mine.yaml"]
    # What the page says to run it with: the directory itself is not looked into.
    assert "PYTHONPATH=. hsplit plan" in PAGE
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}."}
    done = subprocess.run(
        [*command, "--cluster", str(cluster)], capture_output=True, text=True, cwd=example, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "One local step takes" in done.stdout
    for rule in ("equal_voices", "attention_first", "half_at_most", "magnitude"):
        assert f"my_rules:{rule} is code from {example / 'my_rules.py'}\n" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return ranks", "return {name: 32 for name in ranks}", "more than the smallest"),
        ("return ranks", "return {name: 3 for name in ranks}", "must give every weight a rank out of"),
        ("// 2)", "* 2) + 9", "the deepest that it fits"),
        ("def half_at_most", "def another", "has no 'half_at_most'"),
        ("from hsplit.lora.low_rank", "from hsplit.nowhere", "no module named 'hsplit.nowhere'"),
    ],
)
def test_a_rule_that_is_wrong_is_one_line_that_names_it(
    example: Path, models: dict[str, Path], old: str, new: str, reason: str
) -> None:
    rules = example / "my_rules.py"
    rules.write_text(rules.read_text().replace(old, new))
    run = a_run(example)
    if reason == "more than the smallest":
        cost = CostModel.of_run(ModelSpec.read(models["llama"]), run)
        tight = cost.client_bytes(2, {w.name: 2 for w in cost.model.weights if w.layer < 2}) / 1e9
        run = run.model_copy(update={"clients": tuple(c.changed({"memory_gb": tight}) for c in run.clients)})
    with pytest.raises(InputError, match=r"policy: (ranks|split|aggregation): .*" + re.escape(reason)):
        check_model(run, ModelSource(models["llama"], "here"))
        Scheduler(run, ModelSpec.read(models["llama"])).plan()


def test_every_row_of_the_pages_table_is_a_preset() -> None:
    rows = set(re.findall(r"^\| `([\w-]+)` \|", PAGE, flags=re.MULTILINE))
    assert rows == {path.stem for path in preset_directory("policies").glob("*.yaml")}
