"""Parts of ``hsplit bench capacity``, and small runs of it on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capacity, common
from benchmarks.capacity import CLIENTS, Cell, Setting, as_read, cells, gamma_of, kappa_of, run_cell, tokens_to
from hsplit.errors import InputError


def test_every_sweep_begins_with_its_ends() -> None:
    every = cells(["one", "two"])
    assert len({cell.key for cell in every}) == len(every)
    assert {(cell.sweep, cell.value) for cell in every[:12]} == {("rank", 1), ("rank", 32)}
    assert {cell.sweep for cell in every} == {"rank", "frozen", "apart"}
    assert not any((cell.sweep, cell.value) == ("frozen", 30) for cell in every)


def test_tokens_to_a_loss_lie_straight_between_validations() -> None:
    curve = [(0, 3.0), (100, 2.0), (200, 2.5), (300, 1.0)]
    assert tokens_to(curve, 2.5) == 50
    assert tokens_to(curve, 2.0) == 100
    assert tokens_to(curve, 1.5) == pytest.approx(200 + 100 / 1.5)
    assert tokens_to(curve, 0.5) is None


def test_constants_that_made_the_tokens_are_found() -> None:
    gamma, kappa = 0.4, 0.15
    depth = [Setting("d", "frozen", k, [1.0], [1e5 * (1 - k / 40) ** -gamma], {"together": 1 - k / 40, "apart": 0.0})
             for k in (1, 10, 20)]  # fmt: skip
    assert gamma_of(depth) == pytest.approx(gamma)
    apart = []
    for k in (1, 10, 20):
        learning = {"together": 1 - k / 40, "apart": k / 40}
        whole = learning["together"] + CLIENTS**-kappa * learning["apart"]
        apart.append(Setting("d", "apart", k, [1.0], [2e5 * whole**-gamma], learning))
    assert kappa_of(apart, gamma) == pytest.approx(kappa)


def test_constants_of_whole_sweeps_are_found() -> None:
    """Centralized LoRA at the usual rank stands in all three sweeps."""
    gamma, rho, kappa = 0.6, 0.2, 0.4

    def run(sweep: str, value: int, rank: int, together: float, apart: float) -> dict[str, Any]:
        part, curve = math.log2(1 + rank), list[tuple[int, float]]()
        learning = (together + CLIENTS**-kappa * apart) * part**rho
        # The loss falls by the logarithm of what has been learned.
        for tokens in range(0, 2001, 10):
            curve.append((tokens, 5.0 - math.log(1 + tokens * learning**gamma)))
        own = {"together": together * part, "apart": apart * part}
        return {"data": "d", "sweep": sweep, "value": value, "seed": 0, "curve": curve, "learning": own}

    runs = [run("rank", rank, rank, 1.0, 0.0) for rank in (1, 8, 32)]
    runs += [run("frozen", k, 8, 1 - k / 30, 0.0) for k in (8, 15)]
    runs += [run("apart", k, 8, 1 - k / 30, k / 30) for k in (15, 30)]
    found = {constant: float(value) for _, constant, value, _ in capacity.fitted(runs)[1]}
    assert found == pytest.approx({"gamma": gamma, "rho": rho, "kappa": kappa}, abs=0.02)


def test_questions_and_answers_become_a_table(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"question": f"q, {i}", "answer": f"a\n{i}"}) + "\n" for i in range(3)))
    table = Path(as_read(str(lines), tmp_path, 0))
    assert table.read_text().splitlines()[0] == "prompt,response" and table.read_text().count("q, ") == 3
    lines.write_text(json.dumps({"prompt": "a", "response": "b"}))
    assert as_read(str(lines), tmp_path, 0) == str(lines)
    assert as_read("restaurants", tmp_path, 0) == "restaurants"


def test_without_the_package_of_tasks_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(InputError, match="pip install reasoning-gym"):
        next(capacity.task_examples(0))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(capacity, "ROUNDS", 2)
    monkeypatch.setattr(capacity, "STEPS", 2)
    model = common.tiny_model(tmp_path / "model", 64, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    data = common.texts(tmp_path / "texts.csv", 80, 64, 8)
    return {"source": str(data), "model": str(model)}


def test_depth_apart_learns_in_the_clients_and_frozen_depth_does_not(small: dict[str, Any]) -> None:
    frozen, apart, centralized = (
        run_cell(Cell("texts", sweep, value, 0), **small) for sweep, value in (("frozen", 1), ("apart", 1), ("rank", 8))
    )
    for found in (frozen, apart, centralized):
        tokens, losses = zip(*found["curve"], strict=True)
        assert list(tokens) == sorted(set(tokens)) and all(map(math.isfinite, losses)) and len(losses) == 3
    assert frozen["learning"]["apart"] == 0 < apart["learning"]["apart"]
    assert frozen["learning"]["together"] == apart["learning"]["together"]
    whole = math.log2(1 + capacity.USUAL_RANK)
    assert sum(apart["learning"].values()) == pytest.approx(whole)
    assert centralized["learning"] == {"together": pytest.approx(whole), "apart": 0.0}
    assert frozen["curve"][-1][1] != apart["curve"][-1][1]


def test_tables_and_figure_say_when_a_sweep_shows_nothing(tmp_path: Path) -> None:
    def run(sweep: str, value: int, seed: int, last: float, learning: float) -> dict[str, Any]:
        curve = [[0, 3.0], [100, last]]
        own = {"together": learning, "apart": 0.0}
        return {"data": "d", "sweep": sweep, "value": value, "seed": seed, "curve": curve, "learning": own}

    flat = [run("rank", r, s, 2.0 + 0.01 * ((r * 7 + s * 3) % 4), math.log2(1 + r)) for r in (1, 8) for s in (0, 1, 2)]
    steep = [run("frozen", k, s, 2.0 + 0.1 * k + 0.001 * ((k + s) % 2), 1 / k) for k in (1, 3) for s in (0, 1, 2)]
    columns, rows = capacity.swept([*flat, *steep])
    said = {(row[1], row[columns.index("spread / seeds")].endswith("shows nothing")) for row in rows}
    assert said == {("rank", True), ("frozen", False)}
    _, constants = capacity.fitted([*flat, *steep])
    assert {row[1] for row in constants} == {"gamma", "rho"}
    assert capacity.fitted(flat)[1] == []
    capacity.plot([*flat, *steep], tmp_path / "capacity.svg")
    assert (tmp_path / "capacity.svg").stat().st_size > 0
