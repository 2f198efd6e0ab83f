"""Looking over a GGUF file before it is read: the gguf package believes every count and length in it."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from hsplit.models.checkpoint_reader import MAX_DIMENSIONS

MAGIC = b"GGUF"
# Of values in a file's header: the reader makes several objects of each. Vocabularies have some hundred thousand.
MAX_VALUES = 20_000_000
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# By the number of a value's type.
_SCALARS: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_gguf(path: Path) -> None:
    """Walk over the header without reading any value, and compare what it promises with what the file has.

    Raises:
        ValueError: it is no GGUF file, or its counts, lengths or offsets lead out of it.
    """
    with path.open("rb") as stream:
        _Header(stream, path.stat().st_size).check()


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self._values = stream, size, 0

    def check(self) -> None:
        if self._stream.read(4) != MAGIC:
            raise ValueError("it is no GGUF file")
        (version,) = self._numbers("<I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} is not known")
        tensors, pairs = self._numbers("<QQ")
        for _ in self._counted(pairs, "keys"):
            self._skip_string()
            self._skip_value(*self._numbers("<I"))
        places = [self._tensor() for _ in self._counted(tensors, "tensors")]
        # Where the data begins is padded, so an offset may be that much too small to be noticed: never too large.
        data = self._size - self._stream.tell()
        if any(begin + size > data for begin, size in places):
            raise ValueError("a tensor is not within the file")

    def _left(self) -> int:
        return self._size - self._stream.tell()

    def _counted(self, count: int, what: str) -> range:
        self._values += count
        # Each has a byte at least.
        if count > self._left() or self._values > MAX_VALUES:
            raise ValueError(f"it cannot have {count} {what}")
        return range(count)

    def _numbers(self, form: str) -> tuple[int, ...]:
        wanted = struct.calcsize(form)
        raw = self._stream.read(wanted)
        if len(raw) < wanted:
            raise ValueError("it ends within its header")
        return struct.unpack(form, raw)

    def _skip(self, count: int) -> None:
        if count > self._left():
            raise ValueError("it ends within its header")
        self._stream.seek(count, 1)

    def _skip_string(self) -> None:
        self._skip(*self._numbers("<Q"))

    def _skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY:
            inner, count = self._numbers("<IQ")
            items = self._counted(count, "values of a list")
            if inner in _SCALARS:
                self._skip(count * _SCALARS[inner])
            elif inner == _STRING:
                for _ in items:
                    self._skip_string()
            else:
                raise ValueError("a list of lists is not known")
        else:
            raise ValueError(f"values of type {kind} are not known")

    def _tensor(self) -> tuple[int, int]:
        """Where a tensor begins in the data, and how many bytes it has."""
        from gguf.constants import GGML_QUANT_SIZES

        self._skip_string()
        (dimensions,) = self._numbers("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor cannot have {dimensions} dimensions")
        shape = self._numbers(f"<{dimensions}Q")
        kind, begin = self._numbers("<IQ")
        block = {type_.value: sizes for type_, sizes in GGML_QUANT_SIZES.items()}.get(kind)
        if block is None:
            raise ValueError(f"tensors of type {kind} are not known")
        entries, bytes_ = block
        return begin, math.prod(shape) // entries * bytes_
