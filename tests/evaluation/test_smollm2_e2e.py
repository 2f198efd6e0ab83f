"""A short SmolLM2-135M run on the E2E development set, and its exports, evaluated from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.exporting.export import export
from hsplit.models.lookup import find_model
from tests.finished_run import finished_run

E2E = Path(__file__).parents[3] / "shared" / "data" / "e2e" / "devset.csv"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not E2E.is_file(), reason=f"the E2E development set is not at {E2E}"),
]


def _eval(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["eval", *map(str, arguments), "--max-new-tokens", "40", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_run_and_its_exports_agree_and_generate_texts_like_the_references(tmp_path: Path) -> None:
    model = find_model("HuggingFaceTB/SmolLM2-135M-Instruct").directory
    data = {"source": str(E2E), "limit": 60, "test": 0.1}
    run = finished_run(tmp_path, model, base="nf4", data=data, local_steps=5, rounds=1, lr=2e-3, batch_size=4)
    on_test = _eval(run.path, "--limit", 3)
    assert on_test["inputs"] == 3 and on_test["data"] == "the test part (0.1) of devset.csv"
    names = {"ppl", "bleu", "nist", "rouge_l", "cider"} | ({"meteor"} if shutil.which("java") else set())
    assert set(on_test["scores"]) == names
    assert 1 < on_test["scores"]["ppl"] < 21 and on_test["scores"]["rouge_l"] > 0.1
    lines = [json.loads(line) for line in (run.path / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["output"] and line["references"] for line in lines)

    prompts = tmp_path / "three.csv"
    rows = [f'"{one["prompt"].removesuffix(" =>")}","{text}"' for one in lines for text in one["references"]]
    prompts.write_text("mr,ref\n" + "\n".join(rows) + "\n")
    for format_ in ("peft", "merged"):
        exported = export(run.path, tmp_path / format_, format=format_)
        found = _eval(exported, "--data", prompts, "--metrics", "ppl,bleu,rouge_l")
        for name, value in found["scores"].items():
            assert value == pytest.approx(on_test["scores"][name], rel=1e-3), (format_, name)
