"""Codes that are kept on disk are those that quantizing anew gives, or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsplit import kept
from hsplit.kept import KeptTensors
from hsplit.models import weights
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import NF4Weight, base_values, freeze, kept_codes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where codes of weights of every size are kept, however full the disk is."""
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LEFT_FREE_BYTES", 0)
    monkeypatch.setattr(weights, "SMALLEST_ENTRIES", 0)
    return tmp_path / "cache" / "codes"


@pytest.fixture
def values() -> Tensor:
    return torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def never(values: Tensor) -> dict[str, Tensor]:
    raise AssertionError("quantized anew")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def anew(values: Tensor) -> dict[str, Tensor]:
    return NF4Weight(values).state_dict()


# bitsandbytes has another way with an odd number of columns.
@pytest.mark.parametrize("shape", [(24, 40), (7, 33), (1, 1)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_that_were_kept_are_those_of_quantizing_anew(
    shape: tuple[int, int], stored: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(shape).to(stored)
    expected, dense = NF4Weight(values), NF4Weight(values).dense(torch.float32)
    first = NF4Weight(values, once=True)
    assert len(list(folder.iterdir())) == 1
    monkeypatch.setattr(NF4Weight, "_quantized", staticmethod(never))
    kept = NF4Weight(values, once=True)
    for weight in (first, kept):
        assert same(weight.state_dict(), expected.state_dict())
        assert weight.shape == expected.shape
        assert torch.equal(weight.dense(torch.float32), dense)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_segment_has_the_same_values_whether_its_codes_were_kept_or_not(
    base: str, quantized: bool, family: str, models: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tensors() -> dict[str, Tensor]:
        spec = SegmentSpec(1, 3)
        return load_segment(
            BaseModel(ModelSpec.read(models[family]), base, torch.float32), spec, quantized=quantized
        ).state_dict()

    with monkeypatch.context() as nothing_kept:
        nothing_kept.setattr(KeptTensors, "get", lambda kept: None)
        nothing_kept.setattr(KeptTensors, "put", lambda kept, tensors: None)
        expected = tensors()
    assert same(tensors(), expected)
    # Reading int8 codes would save nothing.
    assert folder.exists() == (base == "nf4")
    monkeypatch.setattr(NF4Weight, "_quantized", staticmethod(never))
    assert same(tensors(), expected)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_both_ways_to_store_kept_codes_have_the_values_of_the_base(base: str, values: Tensor) -> None:
    def read(dtype: torch.dtype | None = None) -> Tensor:
        return values.to(dtype or values.dtype)

    expected = base_values(values, base, torch.float32)
    for quantized in (True, False, True):
        assert torch.equal(freeze(read, base, torch.float32, quantized=quantized).dense(torch.float32), expected)


def test_only_the_same_values_of_the_same_type_and_shape_find_codes(
    values: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_codes("nf4", values).put(anew(values))
    assert kept_codes("nf4", values.clone()).get() is not None
    changed = values.clone()
    changed[0, 0] += 1
    for other in (changed, values.T.contiguous(), values.view(torch.int32), values.to(torch.bfloat16)):
        assert kept_codes("nf4", other).get() is None
    assert kept_codes("another", values).get() is None
    monkeypatch.setattr(weights, "_versions", lambda: "another bitsandbytes")
    assert kept_codes("nf4", values).get() is None


@pytest.mark.parametrize("place", range(0, 900, 29))
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_none_and_is_written_anew(damage: str, place: int, values: Tensor, folder: Path) -> None:
    expected = NF4Weight(values, once=True).state_dict()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    assert len(whole) >= 900
    damaged = bytearray(whole[:place] if damage == "cut" else whole)
    if damage == "changed":
        damaged[place] ^= 1
    file.write_bytes(damaged)
    assert kept_codes("nf4", values).get() is None
    assert same(NF4Weight(values, once=True).state_dict(), expected)
    assert file.read_bytes() == whole


def test_another_weights_file_is_none(values: Tensor, folder: Path) -> None:
    NF4Weight(values, once=True)
    (file,) = folder.iterdir()
    NF4Weight(-values, once=True)
    (other,) = (found for found in folder.iterdir() if found != file)
    other.replace(file)
    assert kept_codes("nf4", values).get() is None


def test_a_cache_that_cannot_be_written_keeps_nothing(values: Tensor, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    for _ in range(2):
        assert same(NF4Weight(values, once=True).state_dict(), anew(values))


def test_a_full_disk_keeps_nothing(values: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.open

    def full(path: Path, mode: str = "r", *further: Any) -> Any:
        stream = whole(path, mode, *further)
        if path.parent == folder and "x" in mode:
            stream.write(b"the first part")
            stream.close()
            raise OSError(28, "No space left on device")
        return stream

    monkeypatch.setattr(Path, "open", full)
    assert same(NF4Weight(values, once=True).state_dict(), anew(values))
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_nearly_full_is_left_alone(
    values: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LEFT_FREE_BYTES", 1 << 60)
    NF4Weight(values, once=True)
    assert list(folder.iterdir()) == []


def test_a_kill_before_a_file_is_in_its_place_leaves_none_that_is_read(
    values: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor] | None] = []

    def killed(written: Path, place: Path) -> None:
        seen.append(kept_codes("nf4", values).get())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        NF4Weight(values, once=True)
    assert seen == [None]
    assert kept_codes("nf4", values).get() is None


def test_small_weights_are_not_kept(values: Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SMALLEST_ENTRIES", values.numel() + 1)
    NF4Weight(values, once=True)
    assert not folder.exists()


def test_what_was_kept_is_memory_of_its_own(values: Tensor) -> None:
    NF4Weight(values, once=True)
    one, other = NF4Weight(values, once=True), NF4Weight(values, once=True)
    one.codes.zero_()
    assert same(other.state_dict(), anew(values))
