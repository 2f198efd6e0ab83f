"""Tensors kept in the user's cache directory, found by the content that they were made from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hsplit.files import write_bytes_atomically
from hsplit.home import cache_root

# A disk is for checkpoints first.
LEFT_FREE_BYTES = 1 << 30
_DIGEST = "sha256"


class KeptTensors:
    """Tensors that are slow to make, in a file that is named by a digest of all that they depend on.

    A damaged file counts as none.

    Args:
        folder: below the cache directory.
        kind: beginning of the file's name.
        key: SHA-256 of all that the tensors depend on.
    """

    def __init__(self, folder: str, kind: str, key: bytes) -> None:
        self._key = key
        self._path = cache_root() / folder / f"{kind}-{key.hex()}.safetensors"

    def get(self) -> dict[str, Tensor] | None:
        """Return the tensors of :meth:`put` in memory of their own; ``None`` if there are none, or damaged ones."""
        try:
            # Read, not mapped: see CheckpointReader. The copies are seen where memory is measured.
            tensors = load(self._path.read_bytes())
        except (OSError, SafetensorError):
            return None
        found = tensors.pop(_DIGEST, None)
        if found is None or bytes(tensor_bytes(found)) != self._digest(tensors):
            return None
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors``, for this user alone, unless the directory cannot be written or has little room."""
        digest = torch.frombuffer(bytearray(self._digest(tensors)), dtype=torch.uint8)
        data = save({**tensors, _DIGEST: digest})
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if shutil.disk_usage(folder).free < LEFT_FREE_BYTES + len(data):
                return
            # Other processes may read it, or write the same.
            write_bytes_atomically(self._path, data, durable=False)
        except OSError:
            return

    def _digest(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Digest over key, names, types, shapes and bytes: that of no other file, nor of a damaged one."""
        digest = hashlib.sha256(self._key)
        for name in sorted(tensors):
            digest.update(f"{name} {header(tensors[name])}\n".encode())
            digest.update(tensor_bytes(tensors[name]))
        return digest.digest()


def header(tensor: Tensor) -> str:
    """Type and shape of a tensor, for a digest."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous."""
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data
