"""Rows of data as their files have them: CSV, JSON arrays and lines, Parquet, Arrow, lines of text, and hub data sets.

Nothing is converted on the way: a number in a CSV file is text, and a key that a JSON row lacks stays away. That is why
CSV and JSON are read by Python's own readers: those of the ``datasets`` library, which reads data sets of the hub, give
every row all keys of all others, and guess types. Tables are read by pyarrow, which comes with that library.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplit.config.job import BUILT_IN
from hsplit.config.reading import json_value
from hsplit.data.text_files import file_sha256, listed, read_bytes, text_of
from hsplit.errors import InputError, error_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+%\[\]:-]+)?")
"""A data set of the hub, with a split and a part of it where these are given: ``org/name:train[:5%]``."""
DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: file and row, for messages.
        fields: its values by column or key; a line of text is its only value, under :data:`LINE`.
    """

    where: str
    fields: Mapping[str, Any]


LINE = ""
"""Key of a line of text."""


def read_rows(source: str) -> tuple[list[Row], list[str]]:
    """Read all rows of a source.

    Args:
        source: a file, a directory (all files in it that can be read, by name), a pattern with ``*``, or a data set of
            the hub.

    Returns:
        The rows; and where empty ones stood, which are left out.

    Raises:
        InputError: there is no such source, a file cannot be parsed, or there are no rows.
    """
    rows, empty = list[Row](), list[str]()
    for path in find_files(source):
        if isinstance(path, str):
            rows += _hub_rows(path)
            continue
        for row in _reader_of(path)(path):
            if any(not _blank(value) for value in row.fields.values()):
                rows.append(row)
            else:
                empty.append(row.where)
    if not rows:
        raise InputError(f"{source}: has no rows; at least one example is needed")
    return rows, empty


def find_files(source: str) -> list[Path | str]:
    """List the files of a source in the order of their names, or the hub's id.

    Raises:
        InputError: there are none.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        found = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file) in READERS)
        if not found:
            raise InputError(f"{path}: is a folder without a file that ends in {listed(list(READERS))}")
        return list(found)
    if is_hub_id(source):
        return [source]
    if glob.has_magic(str(path)) and not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise InputError(f"{path}: no file has such a name")
        return list(found)
    return [path]


def absolute_source(source: str) -> str:
    """Return a source with the absolute path of its file, folder or pattern; others as they are."""
    if source == BUILT_IN:
        return source
    path = Path(os.path.expanduser(source))
    if path.exists():
        return str(path.resolve())
    return str(path.absolute()) if glob.has_magic(str(path)) and not is_hub_id(source) else source


def source_sha256(source: str) -> str:
    """SHA-256 of a source's files: of the only one, or of the names and checksums of several; empty without files.

    Raises:
        InputError: a file cannot be read.
    """
    files = [path for path in find_files(source) if isinstance(path, Path)] if source != BUILT_IN else []
    sums = [file_sha256(path) for path in files]
    if len(files) == 1:
        return sums[0]
    named = "".join(f"{path.name} {own}\n" for path, own in zip(files, sums, strict=True))
    return hashlib.sha256(named.encode()).hexdigest() if files else ""


def is_hub_id(source: str) -> bool:
    """True if ``source`` is no file here, and has the form of a hub data set's name."""
    path = Path(os.path.expanduser(source))
    return HUB_ID.fullmatch(source) is not None and not path.exists() and _suffix(path) not in READERS


def _suffix(path: Path) -> str:
    """What kind of file it is, without the ending of a compressed one."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def _reader_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    reader = READERS.get(_suffix(path))
    if reader is None:
        raise InputError(
            f"data.source: {str(path)!r} is unknown; give restaurants, a file or folder of files that end in"
            f" {listed(list(READERS))} (also with {listed(list(COMPRESSED))}), or org/name of a hub's data set"
        )
    return reader


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _unpacked(path: Path) -> bytes:
    """The file's bytes, decompressed where its name says so."""
    raw = read_bytes(path)
    unpack = next((unpack for ending, unpack in COMPRESSED.items() if path.name.lower().endswith(ending)), None)
    if unpack is None:
        return raw
    try:
        return unpack(raw)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be decompressed: {error_text(error)}") from None


def _zstd(raw: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(raw), "zstd").read())


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}
"""Endings of compressed files."""


# -- formats ----------------------------------------------------------------------------------------------------------


def csv_rows(path: Path) -> Iterator[Row]:
    """Read a CSV file with a header, separated by commas, semicolons or tabs.

    Row numbers in messages count the header as row 1, as a spreadsheet does.
    """
    # StringIO(newline="") keeps quoted line ends; the whole file is in memory anyway, as are the examples.
    csv.field_size_limit(2**31 - 1)
    text = text_of(path, _unpacked(path))
    first = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=lambda sign: first.count(sign))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) < len(header):
            raise InputError(
                f"{path}: has columns {listed(header)}; each name may stand there once only",
                f"{path}: has a column twice; each name may stand there once only",
            )
        for number, values in enumerate(reader, start=2):
            where = f"{path}: row {number}"
            if values and len(values) != len(header):
                counted = f"{where} has {len(values)} fields; the header has {len(header)}"
                raise InputError(f"{counted} ({listed(header)})", counted)
            yield Row(where, dict(zip(header, values, strict=False)))
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: is not CSV: {error}") from None


def json_rows(path: Path) -> Iterator[Row]:
    """Read JSON lines, or one JSON array of objects."""
    text = text_of(path, _unpacked(path))
    if text.lstrip().startswith("[") and _suffix(path) == ".json":
        yield from _array(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            yield Row(where, {})
            continue
        try:
            value = json_value(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}; each line must be one object") from None
        yield _object(where, value, "line")


def _array(path: Path, text: str) -> Iterator[Row]:
    try:
        values = json_value(text)
    except ValueError as error:
        raise InputError(f"{path}: is not JSON: {error}; must be a list of objects") from None
    for number, value in enumerate(values, start=1):
        yield _object(f"{path}: item {number}", value, "item")


def _object(where: str, value: Any, kind: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where} is a JSON {type(value).__name__}; each {kind} must be one object")
    return Row(where, value)


def text_rows(path: Path) -> Iterator[Row]:
    """Read the lines of a text file."""
    for number, line in enumerate(text_of(path, _unpacked(path)).split("\n"), start=1):
        yield Row(f"{path}: line {number}", {LINE: line})


def parquet_rows(path: Path) -> Iterator[Row]:
    """Read a Parquet file."""

    def read(raw: bytes) -> Any:
        import pyarrow
        import pyarrow.parquet

        return pyarrow.parquet.read_table(pyarrow.BufferReader(raw))

    return _columns(path, read)


def arrow_rows(path: Path) -> Iterator[Row]:
    """Read an Arrow file, as a file (Feather) or a stream (as the ``datasets`` library writes them)."""

    def read(raw: bytes) -> Any:
        import pyarrow

        open_ = pyarrow.ipc.open_file if raw.startswith(b"ARROW1") else pyarrow.ipc.open_stream
        return open_(pyarrow.BufferReader(raw)).read_all()

    return _columns(path, read)


def _columns(path: Path, read: Callable[[bytes], Any]) -> Iterator[Row]:
    raw = _unpacked(path)
    try:
        records = read(raw).to_pylist()
    except ImportError:
        raise InputError(f"{path}: takes the package datasets (pip install datasets)") from None
    except Exception as error:  # pyarrow raises anything on a file that is none
        wrong = f"{path}: cannot be read"
        raise InputError(f"{wrong}: {error_text(error)}", wrong) from None
    for number, record in enumerate(records, start=1):
        yield Row(f"{path}: row {number}", record)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".json": json_rows,
    ".jsonl": json_rows,
    ".txt": text_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
"""Readers by the ending of a file's name."""


def _hub_rows(source: str) -> list[Row]:
    """Read a data set of the hub, from the local cache where the hub is out of reach."""
    name, _, split = source.partition(":")
    try:
        import datasets
    except ImportError:
        raise InputError(f"data.source: {source}: takes the package datasets (pip install datasets)") from None
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of any kind: no network, no such data set, no such split, a script
        raise InputError(
            f"data.source: {source}: is no file here, and the hub does not give it: {error_text(error)[:300]}"
        ) from None
    return [Row(f"{source}: row {number}", dict(record)) for number, record in enumerate(found, start=1)]
