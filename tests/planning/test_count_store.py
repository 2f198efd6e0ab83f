"""Counts that are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsplit.lora import low_rank
from hsplit.models import adapted_linear, packing, segment
from hsplit.planning.cost import counting, fake_layer
from hsplit.planning.cost.counting import CountStore
from hsplit.planning.cost.model import CostModel
from tests.planning.test_planner import JOB
from tests.tiny import tiny_spec

pytestmark = pytest.mark.usefixtures("own_cache")


def test_what_is_kept_is_found_by_its_key_alone() -> None:
    store = CountStore()
    assert store.get("layer", 1) is None
    store.put([3, 4], "layer", 1)
    assert CountStore().get("layer", 1) == [3, 4]
    assert store.get("layer", 2) is None


def test_other_code_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    CountStore().put([1], "layer")
    monkeypatch.setattr(counting, "_code", lambda: "another version")
    assert CountStore().get("layer") is None


def test_the_digest_covers_the_code_that_counts_and_that_is_counted() -> None:
    traced = {file.resolve() for file in counting.traced_files()}
    modules = (counting, adapted_linear, packing, segment, low_rank, fake_layer)
    assert {Path(str(module.__file__)).resolve() for module in modules} <= traced


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '["a"]'])
def test_what_cannot_be_read_is_counted_again(tmp_path: Path, text: str) -> None:
    store = CountStore()
    store.put([1], "layer")
    (file,) = (tmp_path / "cache" / "counts").iterdir()
    file.write_text(text)
    assert store.get("layer") is None


def test_a_cache_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    store = CountStore()
    store.put([1], "layer")
    assert store.get("layer") is None


def cost() -> CostModel:
    return CostModel(tiny_spec("llama"), JOB)


def test_kept_counts_give_the_costs_that_counting_gave(tmp_path: Path) -> None:
    counted = cost()
    files = sorted((tmp_path / "cache" / "counts").iterdir())
    assert files
    before = {file: file.stat().st_mtime_ns for file in files}
    kept = cost()
    assert (kept.client.constant == counted.client.constant).all()
    assert {file: file.stat().st_mtime_ns for file in files} == before
    # They are really read: other numbers give other costs.
    for file in files:
        file.write_text(json.dumps([2 * number for number in json.loads(file.read_text())]))
    assert (cost().client.constant > counted.client.constant).any()
