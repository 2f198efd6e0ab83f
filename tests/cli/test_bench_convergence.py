"""``hsplit bench convergence``: its protocols, and its cells on a tiny model."""

from __future__ import annotations

import hashlib
import math
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from benchmarks import convergence, protocol
from benchmarks import convergence_page as page
from benchmarks.protocol import Protocol
from hsplit.errors import InputError
from tests.in_process import random_examples

TINY = """
why: to test
model: {model}
clients: {{count: 5, memory_gb: {memory_gb}, tflops: 0.5, bandwidth_mbps: 200, latency_ms: 5}}
server: {{memory_gb: 64, tflops: 2}}
data:
  words: {{changes: ["job.data.source={{folder}}/words.txt"], files: {{words.txt: {sha256}}}}}
job: [job.base=fp32, job.dtype=fp32, job.max_length=32, job.keep_checkpoints=1, job.batch_size=1]
rounds: 2
local_steps: 1
rates: {{usual: 1.0e-3, weights: 5.0e-5, factors: [0.5, 1], beyond: 1, rounds: 1, seed: 100}}
target: {{policy: cenlora, part: 0.6666667}}
levels: [0.0, 0.6]
parts:
  headline: {{seeds: [0, 1], variants: {{hsplitlora: [], cenlora: []}}}}
  others: {{seeds: [0], variants: {{fedlora: []}}}}
  one off:
    {{policy: hsplitlora, rate_of: hsplitlora, levels: [0.6], seeds: [0], variants: {{all: [policy.freeze=never]}}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{e.prompt}||{e.response.strip()}\n" for e in random_examples(120, seed=3)))
    return tmp_path


def tiny(folder: Path, model: Path, memory_gb: float = 0.004) -> Path:
    sha256 = hashlib.sha256((folder / "words.txt").read_bytes()).hexdigest()
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(model=model, memory_gb=memory_gb, sha256=sha256))
    return path


@pytest.mark.parametrize("h", [0.0, 0.3, 0.6, 0.9])
def test_draws_have_exactly_their_mean_and_variation_and_keep_everybodys_place(h: float) -> None:
    for seed in range(20):
        values = protocol.draws(5, h, seed, "memory_gb")
        assert fmean(values) == pytest.approx(1)
        assert math.sqrt(fmean((v - 1) ** 2 for v in values)) == pytest.approx(h, abs=1e-6)
        milder = protocol.draws(5, 0.1, seed, "memory_gb")
        if h:
            assert sorted(range(5), key=values.__getitem__) == sorted(range(5), key=milder.__getitem__)
    fixed = Protocol.read(protocol.DEFAULT)
    (equal, *_), unequal = protocol.budgets(fixed, 0.0, 1), protocol.budgets(fixed, 0.9, 1)
    assert equal == {"memory_gb": fixed.clients.memory_gb, "tflops": 0.5, "bandwidth_mbps": 200.0}
    assert unequal != protocol.budgets(fixed, 0.9, 2)


@pytest.mark.parametrize("path", [protocol.DEFAULT, convergence.QUICK], ids=lambda path: path.stem)
def test_every_variant_of_a_protocol_is_a_policy_that_can_be_read(path: Path) -> None:
    fixed = Protocol.read(path)
    assert fixed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    tuned = convergence.tuned_variants(fixed)
    keys = list[str]()
    for one in convergence.wanted(fixed):
        variant = one.variant
        run, _ = convergence.drawn_run(fixed, one.h, one.seed, variant.policy, variant.changes)
        assert run.policy.name == variant.policy and variant.rate_of in tuned
        keys.append(convergence.Cell(variant.name, variant.data, one.h, one.seed, 1.0).key)
    # No run has another one's file.
    assert len(keys) == len(set(keys))


def test_a_protocol_that_is_none_and_other_files_are_refused(folder: Path) -> None:
    path = tiny(folder, Path("model"))
    fixed = Protocol.read(path)
    assert fixed.data_changes("words", folder) == [f"job.data.source={folder}/words.txt"]
    (folder / "words.txt").write_text("other||words\n")
    with pytest.raises(InputError, match=r"words\.txt is not the protocol's"):
        fixed.data_changes("words", folder)
    with pytest.raises(InputError, match=r"words\.txt is not there, which words needs"):
        fixed.data_changes("words", folder / "elsewhere")
    path.write_text(path.read_text() + "more: 1\n")
    with pytest.raises(InputError, match="more: Extra inputs are not permitted"):
        Protocol.read(path)


def rows(*ppl: float) -> list[dict[str, Any]]:
    shared = {"tokens": 10, "bytes_up": 1e6, "bytes_down": 1e6, "captured_importance": 4.0, "worst_ppl": 9.0}
    times = ({"train_virtual_time_s": 10.0 * i, "virtual_time_s": 11.0 * i} for i in range(len(ppl)))
    return [
        {"round": i, "ppl": value, **shared, **time} for i, (value, time) in enumerate(zip(ppl, times, strict=True))
    ]


def test_the_time_to_a_target_is_interpolated_between_rounds() -> None:
    assert page.reached(rows(10, 6, 4), 5, page.TRAINING) == 15
    assert page.reached(rows(10, 6, 4), 6, "round") == 1
    assert page.reached(rows(10, 6, 7), 5, "round") == math.inf
    assert math.isnan(page.reached(rows(10, 6, 7), math.nan, "round"))
    assert page.target_of(rows(9, 6, 5, 4), 2 / 3) == page.target_of(rows(9, 6, 5, 4), 0.6666667) == 5
    slowed = page.slowed({"variant": "ft", "rows": rows(9, 8)}, 4)["rows"][1]
    assert (slowed[page.TRAINING], slowed[page.EVALUATED]) == (40, 44)


def test_a_ratio_of_times_is_a_geometric_mean_beside_every_seed() -> None:
    assert page.ratio_text([(20.0, 10.0), (10.0, 20.0)]) == "1.00 (2.00, 0.50)"
    assert page.ratio_text([(20.0, 10.0)]) == "2.00"
    assert page.ratio_text([(20.0, 10.0), (math.inf, 20.0)]) == "not reached (2.00, never)"
    assert page.ratio_text([(20.0, math.inf)]) == "" == page.ratio_text([]) == page.ratio_text([(math.nan, 1.0)])


def test_a_rate_at_the_edge_is_not_taken_before_the_next_one_has_been_tried(folder: Path) -> None:
    cells = convergence.Cells(folder / "cells", Protocol.read(tiny(folder, Path("model"))))

    def ran(lr: float, ppl: float) -> None:
        cell = convergence.Cell("hsplitlora", "words", 0.6, 100, lr)
        with cells.claimed(cell) as mine, cells.claimed(cell) as twice:
            assert mine and not twice
            of = {"protocol": cells.protocol.sha256, "seed": 100, "variant": "hsplitlora", "h": 0.6, "lr": lr}
            cells.keep(cell, {**of, "rows": rows(9, ppl)})

    def left() -> list[float]:
        return [cell.lr for cell in convergence.tuning(cells, "hsplitlora", 0.6)[1]]

    assert left() == [5e-4, 1e-3]
    ran(5e-4, 5.0)
    ran(1e-3, 4.0)
    assert left() == [2e-3]
    ran(2e-3, 4.5)
    assert convergence.tuning(cells, "hsplitlora", 0.6) == (1e-3, [])
    # Another protocol's results are not read.
    other = cells.protocol.model_copy(update={"sha256": "0" * 64})
    assert convergence.tuning(convergence.Cells(folder / "cells", other), "hsplitlora", 0.6)[0] is None


def test_a_cell_that_nobody_has_the_memory_for_is_a_result(models: dict[str, Path], folder: Path) -> None:
    fixed, shown = Protocol.read(tiny(folder, models["llama"], 1e-5)), StringIO()
    cell = convergence.Cell("fedlora", "words", 0.6, 0, 1e-3)
    data = fixed.data_changes("words", folder)
    found = convergence.run_cell(fixed, cell, fixed.variant("fedlora", "others"), data, Console(file=shown))
    assert (found["available"], found["data_lost"], found["rows"]) == (0, 1.0, [])
    assert len(found["budgets"]) == 5 and found["variant"] == "fedlora"
    assert "none has the memory for the full model" in shown.getvalue()


def test_cells_run_once_and_tables_plots_and_page_follow_from_them(
    models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, to = tiny(folder, models["llama"]), folder / "to"
    ran: list[str] = []
    run_cell = convergence.run_cell

    def counted(fixed: Protocol, cell: convergence.Cell, *arguments: Any) -> Any:
        ran.append(cell.key)
        return run_cell(fixed, cell, *arguments)

    monkeypatch.setattr(convergence, "run_cell", counted)
    arguments = ["--protocol", str(path), "--data", str(folder), "--to", str(to)]
    convergence.main([*arguments, "--minutes", "0"])
    assert ran == []
    convergence.main(arguments)
    tuned = [key for key in ran if "-s100-" in key]
    # hsplitlora and fedlora at two levels, cenlora at one; at least two rates each, and the one beyond an edge.
    assert len(ran) == len(set(ran)) and 2 * 5 <= len(tuned) <= 3 * 5
    assert len(ran) - len(tuned) == 2 * (2 + 1) + 2 + 1
    cells = convergence.Cells(to / "cells", Protocol.read(path))
    assert all(
        cell["cuts"].keys() == {str(row["round"]) for row in cell["rows"][1:]} for cell in cells.all() if cell["rows"]
    )
    again = list(ran)
    convergence.main(arguments)
    assert ran == again
    text = (to / "convergence.md").read_text()
    for title in (
        "headline: time to the target",
        "one off (hsplitlora, words)",
        "The papers' claims",
        "Learning rates",
    ):
        assert f"## {title}" in text
    assert "cenlora, mean client" in text and cells.protocol.sha256 in text
    html = (to / "convergence.html").read_text()
    assert html.count("<svg") == 3 and "http://" not in html.replace("http://www.w3.org", "")
    assert (to / "curves.csv").is_file() and (to / "budgets.csv").is_file()
    assert " 0 left" in convergence.cost_line(cells, convergence.wanted(cells.protocol))
