"""Checkpoints are written atomically, and a damaged one is passed over by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsplit.errors import InputError
from hsplit.run.checkpoint import checkpoint_name, latest_checkpoint, read_checkpoint, save_checkpoint
from hsplit.run.state import RunState


def _save(folder: Path, step: int, keep: int = 3) -> Path:
    state = RunState(round=step // 4, step=step, round_loss_sum=0.1 + step, virtual_time_s=1 / 3)
    tensors = {"server": {"parameters": torch.full((5,), float(step))}, "phone-0": {"tokens": torch.tensor([[1, 2]])}}
    return save_checkpoint(folder, checkpoint_name(state, 4), state, tensors, keep)


def test_round_trip_and_names(tmp_path: Path) -> None:
    assert [_save(tmp_path, step).name for step in (0, 4, 6)] == ["round-0000", "round-0001", "round-0001-step-0006"]
    path, passed = latest_checkpoint(tmp_path)
    assert path.name == "round-0001-step-0006" and passed == []
    state, tensors = read_checkpoint(path)
    assert state.round_loss_sum == 6.1 and state.virtual_time_s == 1 / 3
    assert tensors["server"]["parameters"].tolist() == [6.0] * 5 and tensors["phone-0"]["tokens"].dtype == torch.int64


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (0, 4, 8, 12):
        _save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    good, bad = _save(tmp_path, 4), _save(tmp_path, 8)
    file = bad / "server.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    elif damage == "remove":
        file.unlink()
    else:
        (bad / "manifest.json").write_text("{")
    path, passed = latest_checkpoint(tmp_path)
    assert path == good
    assert len(passed) == 1 and "round-0002" in passed[0]


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".partial-round-0001").mkdir()
    (tmp_path / "round-0002").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        latest_checkpoint(tmp_path)


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    import resource

    good = _save(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            _save(tmp_path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["round-0001"]
    assert latest_checkpoint(tmp_path) == (good, [])


def test_if_every_checkpoint_is_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (4, 8):
        (_save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"no complete checkpoint .*round-0002 is damaged .*round-0001 is damaged"):
        latest_checkpoint(tmp_path)
