"""Reading single tensors of a safetensors checkpoint, so that a holder reads only what it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.errors import InputError

# What is read and converted at once.
CHUNK_BYTES = 1 << 20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointReader:
    """Tensors by name from a model directory (one ``model.safetensors`` or shards with an index).

    Names are those of the causal-LM class; checkpoints saved from the bare model (without the ``model.`` or
    ``transformer.`` prefix, as GPT-2's own) are understood too.

    Files are read, not mapped: a mapped file counts in full wherever memory is measured, and a tensor over it would be
    memory that nobody allocated.

    Raises:
        InputError: the directory holds no safetensors file, or a damaged one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            files = [directory / shard for shard in sorted(shards)]
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"job.model: {directory}: holds no *.safetensors file")
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            start, header = _header(file)
            self._entries.update({name: (file, start, entry) for name, entry in header.items()})

    def _stored_name(self, name: str) -> str | None:
        bare = name.partition(".")[2]
        return next((n for n in (name, bare) if n in self._entries), None)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def read(self, name: str, dtype: torch.dtype | None = None, transposed: bool = False) -> Tensor:
        """The tensor ``name``, contiguous, in memory of its own.

        Beside the result only one chunk of the file is in memory at a time, whatever is converted.

        Args:
            dtype: what to convert to; the checkpoint's own by default.
            transposed: a matrix stored ``(m, n)`` is given as ``(n, m)``.

        Raises:
            InputError: the checkpoint has no such tensor, or ends before it does.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise InputError(f"job.model: {self.directory}: the checkpoint has no tensor {name}")
        file, start, entry = self._entries[stored]
        own_dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        result = torch.empty(shape[::-1] if transposed else shape, dtype=dtype or own_dtype)
        rows = (result.T if transposed else result).view(shape or [1])
        at_once = max(1, CHUNK_BYTES // max(1, rows[:1].numel() * own_dtype.itemsize))
        with file.open("rb", buffering=0) as stream:
            stream.seek(start + entry["data_offsets"][0])
            for part in rows.split(at_once):
                as_stored = part.dtype == own_dtype and part.is_contiguous()
                chunk = part if as_stored else torch.empty(part.shape, dtype=own_dtype)
                buffer: memoryview = chunk.view(-1).view(torch.uint8).numpy().data
                while buffer:
                    count = stream.readinto(buffer)
                    if not count:
                        raise InputError(f"job.model: {file}: ends within tensor {stored}; it is damaged")
                    buffer = buffer[count:]
                if not as_stored:
                    part.copy_(chunk)
        return result


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and dtype, shape and place of every tensor in it."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            # No header is larger than the file; a damaged size must not be believed.
            if size > file.stat().st_size:
                raise ValueError("header too long")
            header = json.loads(stream.read(size))
    except ValueError as error:
        raise InputError(f"job.model: {file}: is no safetensors file, or a damaged one") from error
    header.pop("__metadata__", None)
    return 8 + size, header


def model_fingerprint(directory: Path) -> str:
    """sha256 over the configuration and every weight file: equal for two copies of one base model."""
    digest = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
