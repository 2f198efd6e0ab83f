"""Reading single tensors of a safetensors checkpoint, so that a holder reads only what it holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.config.files import read_json
from hsplit.config.section import shown
from hsplit.errors import InputError

# What is read and converted at once.
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""As large as the safetensors library allows a header to be."""
MAX_DIMENSIONS = 8

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
            files = [directory / shard for shard in _shards(index)]
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

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a tensor ``name`` that has another shape than the configuration gives it.

        Raises:
            InputError: it has; one that is not there is :meth:`read`'s to refuse.
        """
        stored = self._stored_name(name)
        if stored is None:
            return
        file, _, entry = self._entries[stored]
        if tuple(entry["shape"]) != tuple(shape):
            raise InputError(
                f"job.model: {file}: {stored} has the shape {entry['shape']}, by config.json it is {list(shape)}"
            )

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
        shape = entry["shape"]
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"job.model: {file}: {stored}: type {entry['dtype']} is not known")
        own_dtype = _DTYPES[entry["dtype"]]
        # A damaged shape must not be believed: as many bytes as there are is all that can be read.
        begin, end = entry["data_offsets"]
        if math.prod(shape) * own_dtype.itemsize != end - begin:
            raise InputError(f"job.model: {file}: {stored}: its shape and its place in the file do not agree")
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


def _shards(index: Path) -> list[str]:
    """The files that an index names, which must lie beside it, where the fingerprint covers them."""
    document = read_json(index)
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"job.model: {index}: weight_map: must be a mapping from tensors to files")
    for name in set(places.values()):
        if "/" in name or "\0" in name or not name.endswith(".safetensors"):
            raise InputError(f"job.model: {index}: {shown(name)} is no *.safetensors file beside it")
    return sorted(set(places.values()))


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and dtype, shape and place of every tensor in it."""
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            # No header is larger than the file; a damaged size must not be believed.
            if size > min(length, MAX_HEADER_BYTES):
                raise ValueError("header too long")
            header = json.loads(stream.read(size))
        if not isinstance(header, dict):
            raise ValueError("the header is no mapping")
        header.pop("__metadata__", None)
        _check_entries(header, length - 8 - size)
    except FileNotFoundError:
        raise InputError(f"job.model: there is no file {file}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"job.model: {file}: is no safetensors file, or a damaged one ({error})") from error
    return 8 + size, header


def _check_entries(header: Mapping[str, Any], data_bytes: int) -> None:
    """Raise ValueError where a tensor is not within the data, or lies over another one."""
    places = []
    for name, entry in header.items():
        sound = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
        sound = sound and _whole_numbers(entry.get("shape")) and _whole_numbers(entry.get("data_offsets"))
        if not sound or len(entry["data_offsets"]) != 2 or len(entry["shape"]) > MAX_DIMENSIONS:
            raise ValueError(f"the entry of {shown(name)} is none")
        places.append((*entry["data_offsets"], name))
    before = 0
    for begin, end, name in sorted(places):
        if not before <= begin <= end <= data_bytes:
            raise ValueError(f"{shown(name)} is not within the file, or lies over another tensor")
        before = end


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def model_fingerprint(directory: Path) -> str:
    """sha256 over the configuration and every weight file: equal for two copies of one base model."""
    digest = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
