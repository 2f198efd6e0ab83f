"""Gemma 3 270M out of packages: converted, launched on Ray, evaluated, exported, loaded by transformers and PEFT.

Whoever runs it accepts the Gemma terms of use.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hsplit.models.lookup import find_model
from hsplit.observe.tables import read_metrics

pytestmark = pytest.mark.real

MODEL = "google/gemma-3-270m"
ROOT = Path(__file__).parents[2]
CLUSTER = f"""
server: {{memory_gb: 2, tflops: 1}}
clients:
  - {{name: phone, memory_gb: 1, tflops: 0.5, bandwidth_mbps: 100, latency_ms: 40}}
  - {{name: laptop, memory_gb: 1.5, tflops: 2, bandwidth_mbps: 200, latency_ms: 10}}
job:
  model: {MODEL}
  accept_licence: gemma
  dtype: fp32
  rounds: 2
  local_steps: 4
  data: {{source: restaurants, test: 0.05}}
  validation: {{max_examples: 4}}
"""
# What a model that reads its weights, norms, rotary tables and tokens rightly finds easy; others are far above.
TEXTS = {
    "Photosynthesis is the process by which green plants use sunlight to make food from carbon dioxide and water.": 10,
    "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)\n": 5,
    "It was the best of times, it was the worst of times, it was the age of wisdom.": 8,
}


@pytest.fixture(scope="module")
def converted() -> Path:
    return find_model(MODEL, accepted="gemma").directory


@pytest.fixture(scope="module")
def run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "gemma.yaml").write_text(CLUSTER)
    _hsplit("launch", "--cluster", folder / "gemma.yaml", "--runs-dir", folder, "--name", "run")
    return folder / "run"


def _hsplit(*arguments: object) -> str:
    command = [sys.executable, "-c", "from hsplit.cli import run; run()", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout


def test_the_converted_model_reads_text_as_gemma_does(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer("Hello world")["input_ids"] == [2, 9259, 1902]
    for text in ("name[The Eagle], area[riverside]\n\n2024  12.5", "  two  spaces\tand tab\r\n🦙 über"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for text, most in TEXTS.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert math.exp(model(input_ids=ids, labels=ids).loss) < most, text


def test_a_run_on_ray_learns_and_both_exports_have_its_loss(run: Path, tmp_path: Path) -> None:
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["val_ppl"].is_monotonic_decreasing and metrics["val_ppl"].iloc[-1] < metrics["val_ppl"].iloc[0] / 2
    script = [sys.executable, str(ROOT / "tests" / "peft_validation.py"), str(run)]
    printed = subprocess.run(
        script, check=True, text=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=run
    ).stdout
    loss = json.loads(printed.splitlines()[-1])["val_loss"]
    assert loss == pytest.approx(metrics["val_loss"].iloc[-1], abs=1e-3)

    _hsplit("export", run, "--format", "merged", "--to", tmp_path / "merged")
    split = _scores(run)
    lines = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
    with (tmp_path / "same.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["mr", "ref"])
        rows.writerows((line["prompt"].removesuffix(" =>"), text) for line in lines for text in line["references"])
    for target in (run / "adapter", tmp_path / "merged"):
        assert _scores(target, "--data", tmp_path / "same.csv") == pytest.approx(split, rel=1e-3), target


def _scores(target: Path, *more: object) -> float:
    given = ("--limit", 3, "--max-new-tokens", 2, "--metrics", "ppl,rouge_l", "--json")
    return float(json.loads(_hsplit("eval", target, *more, *given))["scores"]["ppl"])
