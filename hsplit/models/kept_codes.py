"""Codes that are kept on disk: quantizing a weight to NF4 takes ten times as long as reading what it gave.

They are found by the values that they were quantized from, not by a model's name or place: whatever becomes of a model
directory, nobody gets another weight's codes (METHOD 1, one base model). A file that is not whole is as good as none.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hsplit.files import write_bytes_atomically
from hsplit.models.packaged import cache_root

FORMAT_VERSION = 1  # of the files and of how weights are quantized; a new number makes all of them anew
# A file saves smaller weights next to nothing.
SMALLEST_ENTRIES = 1 << 15
# A disk is for checkpoints first.
LEFT_FREE_BYTES = 1 << 30
_DIGEST = "sha256"


@cache
def _libraries() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("bitsandbytes", "torch"))


class KeptCodes:
    """Where the codes of one weight are kept, in the user's cache directory.

    Args:
        base: what it is quantized to.
        values: what is quantized, ``(d_out, d_in)`` in any dtype, on the CPU.
    """

    def __init__(self, base: str, values: Tensor) -> None:
        key = hashlib.sha256(f"{FORMAT_VERSION} {base} {_libraries()} {_described(values)}\n".encode())
        key.update(_bytes(values))
        self._key = key.digest()
        self._path = cache_root() / "codes" / f"{base}-{key.hexdigest()}.safetensors"

    def get(self) -> dict[str, Tensor] | None:
        """What was :meth:`put`, in memory of its own; ``None`` if nothing was, or if it is damaged."""
        try:
            # Read, not mapped: see CheckpointReader. The copies are memory that whoever measures it sees.
            tensors = load(self._path.read_bytes())
        except (OSError, SafetensorError):
            return None
        found = tensors.pop(_DIGEST, None)
        if found is None or bytes(_bytes(found)) != self._digest(tensors):
            return None
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors``; a directory that cannot be written, or has little room, keeps nothing."""
        digest = torch.frombuffer(bytearray(self._digest(tensors)), dtype=torch.uint8)
        data = save({**tensors, _DIGEST: digest})
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < LEFT_FREE_BYTES + len(data):
                return
            # Others may read, or write the same.
            write_bytes_atomically(self._path, data, durable=False)
        except OSError:
            return

    def _digest(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Over key, names, types, shapes and bytes: true of no other weight's file, nor of a damaged one."""
        digest = hashlib.sha256(self._key)
        for name in sorted(tensors):
            digest.update(f"{name} {_described(tensors[name])}\n".encode())
            digest.update(_bytes(tensors[name]))
        return digest.digest()


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous."""
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data
