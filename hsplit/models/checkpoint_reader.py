"""Reading single tensors of a safetensors checkpoint, so that a holder reads only what it holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.config.reading import read_json
from hsplit.config.section import STRICT, shown
from hsplit.errors import InputError
from hsplit.files import sha256_of

# Bytes read and converted at once.
CHUNK_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_DIMENSIONS = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# As transformers writes a model that several processes hold; it reads these before any other file.
_DISTRIBUTED = "shard-{0}-model-{0}-of-{0}.safetensors".format("[0-9]" * 5)


def weight_files(directory: Path) -> list[Path]:
    """Find the files of a model's weights, as transformers does: ``model.safetensors``, else those of the index.

    Other ``*.safetensors`` files beside them are not read; nor is an index beside ``model.safetensors``.

    Raises:
        InputError: the directory has neither, an index that names no files beside it, or a distributed checkpoint.
    """
    if (distributed := min(directory.glob(_DISTRIBUTED), default=None)) is not None:
        raise InputError(
            f"job.model: {directory}: {distributed.name} is of a distributed checkpoint, which is not read; "
            "save_pretrained without distributed_checkpoint, or remove it"
        )
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        return [directory / shard for shard in _shards(directory / INDEX)]
    named = sorted(file.name for file in directory.glob("*.safetensors"))
    if not named and (pickled := sorted(file.name for file in directory.glob("pytorch_model*.bin"))):
        raise InputError(
            f"job.model: {directory}: has pickled weights alone ({pickled[0]}), which can run code when they are read;"
            " if you trust them, write safetensors once: AutoModelForCausalLM.from_pretrained(DIRECTORY)"
            ".save_pretrained(DIRECTORY)"
        )
    others = f"; weights under other names are not read: {', '.join(named)[:100]}" if named else ""
    raise InputError(f"job.model: {directory}: has no weights: neither {WEIGHTS} nor {INDEX}{others}")


def has_weights(names: Collection[str]) -> bool:
    """True if a directory with files of these names holds a model's weights."""
    return WEIGHTS in names or INDEX in names


class CheckpointReader:
    """Tensors by name from a model directory (:func:`weight_files`).

    Names are those of the causal-LM class. A checkpoint saved from the bare model has them without the prefix, and one
    may have it on the head too: as transformers does, the prefix is put on or taken off.

    Files are read, not mapped: a mapped file counts in full wherever memory is measured, and a tensor over it would be
    missing from the allocated bytes.

    Args:
        directory: of the model.
        prefix: of the bare model in the causal LM.

    Raises:
        InputError: the directory holds no weights, or a damaged file.
    """

    def __init__(self, directory: Path, prefix: str) -> None:
        self.directory = directory
        self._prefix = f"{prefix}."
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        self._aliases: dict[str, str] = {}
        for file in weight_files(directory):
            start, header = _header(file)
            self._entries.update({name: (file, start, entry) for name, entry in header.items()})

    def _stored_name(self, name: str) -> str | None:
        name = self._aliases.get(name, name)
        bare = name.removeprefix(self._prefix)
        found = [n for n in dict.fromkeys((name, bare, f"{self._prefix}{name}")) if n in self._entries]
        if len(found) > 1:
            raise InputError(f"job.model: {self.directory}: has one weight under two names: {' and '.join(found)}")
        return found[0] if found else None

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def tie(self, name: str, other: str) -> None:
        """If only one of two names has a tensor, let the other stand for it too."""
        for absent, there in ((name, other), (other, name)):
            if absent not in self and there in self:
                self._aliases[absent] = there

    def same_values(self, name: str, other: str) -> bool:
        """True if two tensors of the checkpoint are equal, byte by byte; stops at the first difference."""
        (_, file, start, entry), (_, other_file, other_start, other_entry) = map(self._entry, (name, other))
        if (entry["dtype"], entry["shape"]) != (other_entry["dtype"], other_entry["shape"]):
            return False
        return _same_bytes(_place(file, start, entry), _place(other_file, other_start, other_entry))

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a tensor ``name`` that is not there, or has another shape than the configuration gives it.

        Raises:
            InputError: one line with the file and the tensor.
        """
        stored, file, _, entry = self._entry(name)
        if tuple(entry["shape"]) != tuple(shape):
            raise InputError(
                f"job.model: {file}: {stored} has the shape {entry['shape']}, by config.json it is {list(shape)}"
            )

    def read(self, name: str, dtype: torch.dtype | None = None, transposed: bool = False) -> Tensor:
        """Read the tensor ``name``, contiguous, in memory of its own.

        Beside the result only one chunk of the file is in memory at a time, also when converting.

        Args:
            dtype: of the result; the checkpoint's own by default.
            transposed: return a matrix stored ``(m, n)`` as ``(n, m)``.

        Raises:
            InputError: the checkpoint has no such tensor, or ends before it does.
        """
        place = self._tensor(name)
        shape = place.shape
        result = torch.empty(shape[::-1] if transposed else shape, dtype=dtype or place.dtype)
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.begin)
            place.fill((result.T if transposed else result).view(shape or [1]), stream)
        return result

    def read_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Read rows of the matrix ``name`` alone, as :meth:`read`: ``(n, d)``.

        Args:
            rows: their indices, increasing, ``n`` of them.
            dtype: of the result.

        Raises:
            InputError: as :meth:`read`.
        """
        place = self._tensor(name)
        count, width = place.shape
        if rows and rows[-1] >= count:
            raise IndexError(f"row {rows[-1]} of {name}, which has {count}")
        result = torch.empty(len(rows), width, dtype=dtype)
        with place.file.open("rb", buffering=0) as stream:
            start = 0
            for end in range(1, len(rows) + 1):
                # Rows that follow one another are read together.
                if end == len(rows) or rows[end] != rows[end - 1] + 1:
                    stream.seek(place.begin + rows[start] * width * place.dtype.itemsize)
                    place.fill(result[start:end], stream)
                    start = end
        return result

    def _tensor(self, name: str) -> _StoredTensor:
        stored, file, start, entry = self._entry(name)
        dtype = _DTYPES[entry["dtype"]]
        # A damaged shape must not be believed: no more than these bytes can be read.
        begin, end = entry["data_offsets"]
        if math.prod(entry["shape"]) * dtype.itemsize != end - begin:
            raise InputError(f"job.model: {file}: {stored}: its shape and its place in the file do not agree")
        return _StoredTensor(stored, file, start + begin, dtype, entry["shape"])

    def _entry(self, name: str) -> tuple[str, Path, int, dict[str, Any]]:
        """The stored name of ``name``, its file, the offset of the data there, and the header's entry."""
        stored = self._stored_name(name)
        if stored is None:
            raise InputError(f"job.model: {self.directory}: the checkpoint has no tensor {name}")
        file, start, entry = self._entries[stored]
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"job.model: {file}: {stored} has the type {entry['dtype']}, and only {', '.join(_DTYPES)} are read: "
                "take the original model, and job.base to quantize it"
            )
        return stored, file, start, entry


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in a file: its name there, the place of its first byte, type and shape."""

    name: str
    file: Path
    begin: int
    dtype: torch.dtype
    shape: list[int]

    def fill(self, rows: Tensor, stream: FileIO) -> None:
        """Read ``rows``, the first dimension of all or a part of it, from where ``stream`` is."""
        at_once = max(1, CHUNK_BYTES // max(1, rows[:1].numel() * self.dtype.itemsize))
        for part in rows.split(at_once):
            as_stored = part.dtype == self.dtype and part.is_contiguous()
            chunk = part if as_stored else torch.empty(part.shape, dtype=self.dtype)
            buffer: memoryview = chunk.view(-1).view(torch.uint8).numpy().data
            while buffer:
                count = stream.readinto(buffer)
                if not count:
                    raise InputError(f"job.model: {self.file}: ends within tensor {self.name}; it is damaged")
                buffer = buffer[count:]
            if not as_stored:
                part.copy_(chunk)


@dataclass(frozen=True)
class _Place:
    """Bytes ``[begin, end)`` of a file that was last written at ``changed_ns``."""

    file: Path
    begin: int
    end: int
    changed_ns: int


def _place(file: Path, start: int, entry: Mapping[str, Any]) -> _Place:
    begin, end = entry["data_offsets"]
    return _Place(file, start + begin, start + end, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _same_bytes(place: _Place, other: _Place) -> bool:
    """True if the bytes at two places of one length are equal; asked for every configuration that is read."""
    with place.file.open("rb", buffering=0) as one, other.file.open("rb", buffering=0) as two:
        one.seek(place.begin)
        two.seek(other.begin)
        for start in range(place.begin, place.end, CHUNK_BYTES):
            size = min(CHUNK_BYTES, place.end - start)
            if one.read(size) != two.read(size):
                return False
    return True


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    __pydantic_config__ = STRICT


def _shards(index: Path) -> list[str]:
    """Read the file names of an index; the files must lie beside it, where the fingerprint covers them."""
    try:
        places = read_json(index, _Index).weight_map
    except InputError as error:
        raise InputError(f"job.model: {error}") from None
    if not places:
        raise InputError(f"job.model: {index}: weight_map: names no file")
    for name in set(places.values()):
        if "/" in name or "\0" in name or not name.endswith(".safetensors"):
            raise InputError(f"job.model: {index}: {shown(name)} is no *.safetensors file beside it")
    return sorted(set(places.values()))


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read a safetensors file's header: the offset of the data, and dtype, shape and place of every tensor."""
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            # A damaged size must not be believed: no header is larger than the file.
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
    """SHA-256 over the configuration and every file of the weights: equal for two copies of one base model."""
    digest = hashlib.sha256()
    for file in [directory / "config.json", *weight_files(directory)]:
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()
