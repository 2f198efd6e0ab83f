"""Names of floating-point types in a configuration, and the type that ``auto`` stands for."""

from __future__ import annotations

import platform
from typing import Any

import torch

from hsplit.errors import InputError

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def resolve_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """Return the torch dtype called ``name`` (``auto``, ``fp32``, ``bf16`` or ``fp64``).

    ``auto`` is bf16 where ``device`` has native bf16 arithmetic and fp32 everywhere else: emulated bf16 is
    slower than fp32 and less exact.

    Raises:
        InputError: for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype: {name!r} is not known; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the configuration's name of ``dtype``: the inverse of :func:`resolve_dtype`.

    Raises:
        InputError: for a dtype that no configuration can name (fp16, integers).
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise InputError(f"dtype: {dtype} has no name here; allowed: {', '.join(DTYPES)}")


def has_native_bf16(device: str | torch.device = "cpu") -> bool:
    """True if ``device`` multiplies bf16 matrices in hardware.

    CUDA: compute capability 8.0 and up. CPU: x86 with AVX512-BF16 or AMX, ARM with the BF16 extension, as
    far as this torch reports it. (``torch.ops.mkldnn._is_mkldnn_bf16_supported`` is not the test: it is True
    on any AVX-512 processor, where bf16 is emulated.) Any other kind of device: False.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        # Older torch versions do not list the processor's features.
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)
        return bool(capabilities().get("bf16", False))
    # AMX tiles without amx_bf16 do not exist: every processor with tiles so far has the bf16 product too.
    return _cpu_flag("_is_avx512_bf16_supported") or _cpu_flag("_is_amx_tile_supported")


def _cpu_flag(name: str) -> bool:
    """Result of the private probe ``torch.cpu.<name>()``; False where this torch has no such probe."""
    probe: Any = getattr(torch.cpu, name, None)
    return bool(probe()) if probe is not None else False
