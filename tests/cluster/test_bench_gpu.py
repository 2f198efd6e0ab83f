"""``hsplit bench gpu``, rehearsed on CPUs with a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from hsplit.errors import InputError


def options_of(to: Path) -> argparse.Namespace:
    options = gpu._options(["--device", "cpu", "--model", "tiny", "--to", str(to)])
    options.command = []
    return options


def made(part: str, to: Path) -> dict[str, Any]:
    gpu.run_part(part, options_of(to))
    found: dict[str, Any] = json.loads((to / f"{part}.json").read_text())
    assert found["ended"] == "well", found
    assert set(gpu.PARTS[part].about) <= found.keys()
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_client_comes_back_and_a_second_device_learns_the_same(tmp_path: Path) -> None:
    found = made("shared", tmp_path)
    assert found["complete"] and found["killed"]
    assert any(gpu.KILLED in text and "is back" in text for text in found["events"]), found["events"]
    # The device is a CPU here too.
    assert found["largest_difference"] == 0
    assert found["losses"]["device"]["val_loss"][-1] < found["losses"]["device"]["val_loss"][0]
    held = made("peaks", tmp_path)
    assert {row["name"] for row in held["holders"]} >= {"server", "laptop-0", "workstation"}
    assert 0 < held["least"] <= held["most"] and held["over_declared"] == 0


@pytest.mark.usefixtures("ray_cluster")
def test_both_contenders_are_timed_on_the_same_tokens(tmp_path: Path) -> None:
    """In a rehearsal part ``large`` is the same with the same sizes."""
    found = made("small", tmp_path)
    assert found["tokens_a_step"] == 4 * 16
    assert all(seen > 0 for contender in found["tokens_per_s"].values() for seen in contender)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("part", ["joined", "store", "cells"])
def test_every_other_part_comes_to_its_end(part: str, tmp_path: Path) -> None:
    found = made(part, tmp_path)
    assert all(found[figure] > 0 for figure in gpu.PARTS[part].about)


def test_what_a_part_has_found_survives_its_error(tmp_path: Path) -> None:
    gpu.run_part("peaks", options_of(tmp_path))
    found = json.loads((tmp_path / "peaks.json").read_text())
    assert found["ended"].startswith("InputError: ") and "part shared makes it" in found["ended"]
    assert "in peaks" in found["traceback"]


def test_a_part_that_is_late_is_ended_and_one_that_ended_well_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--device", "cpu", "--model", "tiny", "--to", str(tmp_path), "--only", "joined", "store"]
    (tmp_path / "store.json").write_text(json.dumps({"ended": "well", "seconds": 3.0, "mb_per_s": 12.5}))
    gpu.main([*command, "--patience", "0"])
    assert json.loads((tmp_path / "joined.json").read_text())["ended"] == "it took more than 0 s"
    table = (tmp_path / "gpu.md").read_text()
    assert "| joined | it took more than 0 s |" in table and "| store | well | 3 s | mb_per_s 12.5 |" in table
    assert "joined; it took more than 0 s" in capsys.readouterr().out


def test_without_a_gpu_only_a_rehearsal_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: PyTorch finds no GPU here; --device cpu rehearses"):
        gpu.main(["--to", str(tmp_path)])
    assert not list(tmp_path.iterdir())
