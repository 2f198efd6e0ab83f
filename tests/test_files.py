"""A file is written whole or not at all, by whatever number of threads, and its SHA-256 is that of its bytes.

Safetensors files get the mode of any new file, wherever they are written.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hsplit
from hsplit.files import (
    directory_written_atomically,
    save_tensors,
    sha256_of,
    write_bytes_atomically,
    write_text_atomically,
)
from hsplit.planning.cost.counting import CountStore
from hsplit.run.checkpoint import save_checkpoint
from hsplit.run.state import RunState
from tests.file_modes import UMASKS, assert_new, modes, umask

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1])}


def test_atomic_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text_atomically(path, "a\r\nlonger than what follows\n")
    write_text_atomically(path, "Σ\n")
    assert path.read_bytes() == "Σ\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_failed_atomic_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "new \udc80")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text_atomically(path, "new", durable=False)
    assert path.read_text() == "new"


def test_threads_that_write_one_file_leave_the_content_of_one_of_them(tmp_path: Path) -> None:
    path = tmp_path / "codes"
    contents = [bytes([value]) * 100_000 for value in range(8)]
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda content: write_bytes_atomically(path, content, durable=False), contents * 8):
            pass
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text_atomically(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_checksum_is_of_all_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "weights").write_bytes(content)
    assert sha256_of(tmp_path / "weights") == hashlib.sha256(content).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none")


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "round-1"
    for content in ("old", "new"):
        with directory_written_atomically(path) as folder:
            assert list(folder.iterdir()) == []
            (folder / content).write_text(content)
            before = path.exists()
        assert before == (content == "new")
        assert [file.name for file in path.iterdir()] == [content]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_written_to_its_end_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "round-1"
    with directory_written_atomically(path) as folder:
        (folder / "old").write_text("old")
    # Half of it, of a process that was killed.
    (tmp_path / ".partial-round-1").mkdir()
    (tmp_path / ".partial-round-1" / "half").write_text("half")
    with pytest.raises(ZeroDivisionError), directory_written_atomically(path) as folder:
        (folder / "new").write_text("new")
        raise ZeroDivisionError
    replace = Path.replace

    def refused(source: Path, target: Path) -> Path:
        if source.name == ".partial-round-1":
            raise OSError("no")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="no"), directory_written_atomically(path, durable=False) as folder:
        (folder / "new").write_text("new")
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_a_new_file_of_tensors_has_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        save_tensors(TENSORS, tmp_path / "x.safetensors")
    assert_new(tmp_path, mask, "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in found)


def test_a_file_of_tensors_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_text("old")
    file.chmod(0o640)
    save_tensors(TENSORS, file)
    assert modes(tmp_path) == {file.name: 0o640} and load_file(file).keys() == TENSORS.keys()


def test_a_file_of_tensors_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_tensors(TENSORS, tmp_path / "none" / "x.safetensors")


@pytest.mark.parametrize("mask", UMASKS, ids=oct)
def test_the_files_of_a_checkpoint_have_one_mode(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        save_checkpoint(tmp_path, "round-0001", RunState(), {"server": TENSORS, "c0": TENSORS}, keep=1)
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
    assert writers == {"files.py"}


# Files that are whole move into a folder where others stay; a name that nobody has yet.
OF_THEIR_OWN = {"hsplit/exporting/export.py": "os.replace", "hsplit/tracebacks.py": "tempfile.mkstemp"}
WAYS = {"os.replace", "os.rename", "shutil.move", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"}


def test_files_are_put_in_place_and_hashed_in_one_way() -> None:
    root = Path(__file__).parents[1]
    found: dict[str, str] = {}
    for file in (*(root / "hsplit").rglob("*.py"), *(root / "benchmarks").glob("*.py")):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)}
        ways = calls & {*WAYS, "hashlib.file_digest"} if file != root / "hsplit" / "files.py" else set()
        found |= {file.relative_to(root).as_posix(): way for way in ways}
    assert found == OF_THEIR_OWN
