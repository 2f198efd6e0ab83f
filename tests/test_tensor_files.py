"""Safetensors files get the mode of any new file, wherever they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hsplit
from hsplit.checkpoint import Progress, save_checkpoint
from hsplit.scheduling.count_store import CountStore
from hsplit.tensor_files import save_tensors
from tests.file_modes import UMASKS, assert_new, modes, umask

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1])}


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        save_tensors(TENSORS, tmp_path / "x.safetensors")
    assert_new(tmp_path, mask, "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("old")
    file.chmod(0o640)
    save_tensors(TENSORS, file)
    assert modes(tmp_path) == {file.name: 0o640} and load_file(file).keys() == TENSORS.keys()


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_tensors(TENSORS, tmp_path / "none" / "x.safetensors")


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_the_files_of_a_checkpoint_have_one_mode(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        save_checkpoint(tmp_path, "round-0001", Progress(), {"server": TENSORS, "c0": TENSORS}, keep=1)
    names = ("state.json", "manifest.json", "server.safetensors", "c0.safetensors")
    assert_new(tmp_path, mask, *(f"round-0001/{name}" for name in names))


@pytest.mark.usefixtures("own_cache")
def test_others_may_read_kept_counts_in_a_shared_cache(tmp_path: Path) -> None:
    with umask(0o022):
        CountStore().put([1], "layer")
    assert_new(tmp_path / "cache", 0o022)
    assert modes(tmp_path / "cache")


def test_nothing_else_writes_tensors() -> None:
    """What safetensors makes by itself is for the owner alone."""
    root = Path(hsplit.__file__).parent
    writers = {str(f.relative_to(root)) for f in root.rglob("*.py") if re.search(r"\bsave_file\b", f.read_text())}
    assert writers == {"tensor_files.py"}
