"""``hsplit bench convergence``: its protocol, and its cells on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from rich.console import Console

from benchmarks import convergence as protocol
from benchmarks import convergence_page as page
from tests.in_process import random_examples

SMALL = ["job.base=fp32", "job.dtype=fp32", "job.max_length=32", "job.keep_checkpoints=1", "job.batch_size=1"]


@pytest.mark.parametrize("h", [0.0, 0.3, 0.6, 0.9])
def test_draws_have_exactly_their_mean_and_variation_and_keep_everybodys_place(h: float) -> None:
    for seed in range(20):
        values = protocol.draws(5, h, seed, "memory_gb")
        assert fmean(values) == pytest.approx(1)
        assert math.sqrt(fmean((v - 1) ** 2 for v in values)) == pytest.approx(h, abs=1e-6)
        milder = protocol.draws(5, 0.1, seed, "memory_gb")
        if h:
            assert sorted(range(5), key=values.__getitem__) == sorted(range(5), key=milder.__getitem__)
    (equal, *_), unequal = protocol.budgets(0.0, 1, 0.25), protocol.budgets(0.9, 1, 0.25)
    assert equal == {"memory_gb": 0.25, "tflops": 0.5, "bandwidth_mbps": 200.0}
    assert unequal != protocol.budgets(0.9, 2, 0.25)


def test_every_variant_is_a_policy_that_can_be_read() -> None:
    from hsplit.config import load_run_config

    for name, variant in protocol.VARIANTS.items():
        run = load_run_config("hetero", variant.policy, [*protocol.JOB, *variant.overrides])
        assert variant.lr_of in ("", "hsplitlora"), name
        assert run.policy.name == variant.policy


def rows(*ppl: float) -> list[dict[str, Any]]:
    shared = {"tokens": 10, "bytes_up": 1e6, "bytes_down": 1e6, "captured_importance": 4.0}
    return [{"round": i, "virtual_time_s": 10.0 * i, "ppl": value, **shared} for i, value in enumerate(ppl)]


def test_the_time_to_a_target_is_interpolated_between_rounds() -> None:
    assert page.reached(rows(10, 6, 4), 5, "virtual_time_s") == 15
    assert page.reached(rows(10, 6, 4), 6, "round") == 1
    assert page.reached(rows(10, 6, 7), 5, "round") == math.inf
    assert page.target_of([{"rows": rows(9, 6, 5, 4)}, {"rows": rows(9, 7, 6, 4)}], 2 / 3) == 5.5


def test_a_line_says_when_somebody_could_not_take_part_or_did_not_arrive() -> None:
    cells = [
        {"seed": 0, "available": 5, "data_lost": 0.0, "rows": rows(10, 6, 4)},
        {"seed": 1, "available": 4, "data_lost": 0.2, "rows": rows(10, 8, 6)},
    ]
    one = page.line("x", 0.3, cells, [{"seed": 0, "rows": rows(10, 3.5)}], 5.0)
    assert (one.seeds, one.ppl, one.available, one.sent_mb) == (2, 5.0, 4.5, 6.0)
    assert one.lost == 0.5 and math.isinf(one.target_s)
    nobody = page.line("x", 0.3, [{"seed": 0, "available": 0, "data_lost": 1.0, "rows": []}], [], 5.0)
    _, cells_ = page.policy_table([one, nobody])
    assert "not reached" in cells_[0] and "nobody fits" in cells_[1]
    assert page.slowed({"variant": "ft", "rows": rows(9, 8)}, 4)["rows"][1]["virtual_time_s"] == 40


def test_a_ratio_of_times_is_a_geometric_mean_beside_every_seed() -> None:
    def cell(seed: int, *ppl: float) -> dict[str, Any]:
        return {"seed": seed, "rows": rows(*ppl)}

    # To perplexity 5 the first take 20 and 10 s, the second 10 and 20 s: on average neither is faster.
    slow, fast, never = (8.0, 7.0, 5.0), (8.0, 5.0, 4.0), (8.0, 7.0, 6.0)
    pairs = [(cell(0, *slow), cell(0, *fast)), (cell(1, *fast), cell(1, *slow))]
    assert page.ratio_text(pairs, 5.0) == "1.00 (2.00, 0.50)"
    assert page.ratio_text(pairs, {0: 5.0, 1: 7.0}) == "0.82 (2.00, 0.33)"
    assert page.ratio_text(pairs[:1], 5.0) == "2.00"
    assert page.ratio_text([*pairs, (cell(2, *never), cell(2, *fast))], 5.0) == "not reached (2.00, 0.50, never)"
    assert page.ratio_text([(cell(2, *fast), cell(2, *never))], 5.0) == "" == page.ratio_text([], 5.0)


def test_an_ablation_is_held_against_the_whole_of_its_own_level_and_device() -> None:
    def cell(variant: str, h: float, device: str, end: float) -> dict[str, Any]:
        of = {"variant": variant, "h": h, "device": device, "seed": 0, "available": 5, "data_lost": 0.0}
        return {**of, "rows": rows(10, end)}

    wholes = [cell("hsplitlora", 0.0, "CPU", 4.0), cell("hsplitlora", 0.3, "CPU", 9.0)]
    wholes += [cell("hsplitlora", 0.6, "CPU", 4.5), cell(protocol.NOTHING_OFF, 0.6, "GPU", 5.0)]
    ablations = [cell("FedAvg", 0.0, "CPU", 4.25), cell("FedAvg", 0.6, "GPU", 5.5), cell("as published", 0.6, "?", 6.0)]
    found = page.ablation_rows([*ablations, wholes[-1]], wholes, 4.1)
    assert [(one.name, one.h, one.device, one.ppl) for one in found] == [
        ("hsplitlora", 0.0, "CPU", 4.0),
        ("FedAvg", 0.0, "CPU", 4.25),
        (protocol.NOTHING_OFF, 0.6, "GPU", 5.0),
        ("FedAvg", 0.6, "GPU", 5.5),
        ("as published", 0.6, "?", 6.0),
    ]
    assert [one.against for one in found][:4] == [0.0, 0.25, 0.0, 0.5] and math.isnan(found[-1].against)
    assert "not reached" in page.ablation_table(found)[1][1]


def test_a_cell_that_nobody_has_the_memory_for_is_a_result(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "JOB", SMALL)
    monkeypatch.setattr(protocol, "mean_memory_gb", lambda parameters: 1e-5)
    shown = StringIO()
    cell = protocol.Cell("fedlora", 0.3, 0, 1e-3)
    found = protocol.run_cell(cell, protocol.QUICK, None, str(models["llama"]), Console(file=shown))
    assert (found["available"], found["data_lost"], found["rows"]) == (0, 1.0, [])
    assert len(found["budgets"]) == 5 and found["variant"] == "fedlora"
    assert "none has the memory for the full model" in shown.getvalue()


def test_cells_run_once_and_tables_plots_and_page_follow_from_them(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{e.prompt}||{e.response.strip()}\n" for e in random_examples(120, seed=3)))
    monkeypatch.setattr(protocol, "JOB", SMALL)
    # As for a model of such a size, a client would have next to nothing.
    monkeypatch.setattr(protocol, "mean_memory_gb", lambda parameters: 0.004)
    monkeypatch.setattr(
        protocol,
        "QUICK",
        replace(
            protocol.QUICK,
            rounds=2,
            local_steps=1,
            levels=(0.0, 0.6),
            policies=("hsplitlora", "cenlora", "fedlora"),
            ablations=("as published",),
            ablation_levels=(0.6,),
            factors=(0.5, 1.0),
        ),
    )
    ran: list[str] = []
    run_cell = protocol.run_cell

    def counted(cell: Any, *arguments: Any) -> Any:
        ran.append(cell.key)
        return run_cell(cell, *arguments)

    monkeypatch.setattr(protocol, "run_cell", counted)
    arguments = ["--quick", "--model", str(models["llama"]), "--data", str(words), "--to", str(tmp_path / "to")]
    protocol.main([*arguments, "--minutes", "0"])
    assert ran == []
    protocol.main(arguments)
    assert len(ran) == len(set(ran)) == 3 * 2 + (2 + 1 + 2) + 1
    cells = {cell["variant"]: cell for cell in protocol.Cells(tmp_path / "to" / "cells").all() if cell["rows"]}
    assert all(cell["cuts"].keys() == {str(row["round"]) for row in cell["rows"][1:]} for cell in cells.values())
    again = list(ran)
    protocol.main(arguments)
    assert ran == again
    text = (tmp_path / "to" / "convergence.md").read_text()
    assert "## Policies" in text and "## Ablations" in text and "cenlora, mean client" in text
    html = (tmp_path / "to" / "convergence.html").read_text()
    assert html.count("<svg") == 5 and "http://" not in html.replace("http://www.w3.org", "")
    assert (tmp_path / "to" / "curves.csv").is_file()
    # Without cenlora there is no target, but there are curves.
    protocol.main([*arguments, "--policies", "hsplitlora", "--ablations", "--report"])
    assert "0 to run" in protocol.cost_line(protocol.Cells(tmp_path / "to" / "cells"), protocol.QUICK)
