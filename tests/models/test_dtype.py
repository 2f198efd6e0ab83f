"""dtype names, and that ``auto`` asks for native bf16 arithmetic."""

from __future__ import annotations

import pytest
import torch

from hsplit.errors import InputError
from hsplit.models import dtype


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp64"])
def test_a_name_survives_the_round_trip(name: str) -> None:
    assert dtype.dtype_name(dtype.resolve_dtype(name)) == name


def test_an_unknown_name_lists_what_is_allowed() -> None:
    with pytest.raises(InputError, match="auto, fp32, bf16, fp64"):
        dtype.resolve_dtype("fp16")
    with pytest.raises(InputError, match="float16"):
        dtype.dtype_name(torch.float16)


@pytest.mark.parametrize(
    ("machine", "flags", "native"),
    [
        ("x86_64", set(), False),
        ("x86_64", {"_is_avx512_bf16_supported"}, True),
        ("x86_64", {"_is_amx_tile_supported"}, True),
        ("arm64", {"bf16"}, True),
        ("aarch64", set(), False),
    ],
)
def test_auto_is_bf16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], native: bool
) -> None:
    monkeypatch.setattr(dtype.platform, "machine", lambda: machine)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in flags, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": "bf16" in flags}, raising=False)
    assert dtype.resolve_dtype("auto") is (torch.bfloat16 if native else torch.float32)


def test_auto_is_fp32_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype.platform, "machine", lambda: "x86_64")
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert dtype.resolve_dtype("auto") is torch.float32


def test_auto_on_other_devices_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert dtype.resolve_dtype("auto", "cuda:0") is torch.bfloat16
    assert dtype.resolve_dtype("auto", torch.device("meta")) is torch.float32
