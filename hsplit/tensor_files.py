"""Safetensors files that whoever may read their neighbours may read too."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write ``tensors`` to ``file``, with the mode that any new file gets there.

    safetensors writes a temporary file for the owner alone and renames it, whatever the umask is.

    Args:
        tensors: by name; no two share memory.
        file: to write; one that is there is replaced and its mode kept.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # The umask is asked for by making a file: to read it is to set it, for every thread of the process.
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # What the system says is in its text alone.
        raise OSError(f"{error}: {file}") from error
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)
