"""Reading a data file: its checksum, its text, and one clear line for any fault of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hsplit.errors import InputError
from hsplit.files import sha256_of

_LOOKED_AT = 1 << 16


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal; `~` is expanded.

    Raises:
        InputError: if the file cannot be read.
    """
    path = Path(os.path.expanduser(path))
    try:
        _refuse_devices(path)
        return sha256_of(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        _refuse_devices(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def text_of(path: Path, raw: bytes) -> str:
    """Decode a UTF-8 file, with or without BOM: line ends as one character, none at the end.

    Raises:
        InputError: it is not UTF-8, or holds nothing.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        # Any bytes are latin-1; these are text in it.
        looks = " (it may be latin-1)" if raw[:_LOOKED_AT].decode("latin-1").replace("\n", "").isprintable() else ""
        byte = raw[error.start]
        raise InputError(
            f"{path}: line {line}: byte 0x{byte:02x} is not UTF-8{looks}; save the file as UTF-8"
        ) from None
    # Only the line ends of files: splitlines() would also break at the separators that texts may contain.
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    if not text.strip():
        raise InputError(f"{path}: the file is empty; at least one example is needed")
    return text


def _refuse_devices(path: Path) -> None:
    # Reading a pipe would block, and a device may never end.
    if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is no file that can be read twice; give the path of one on a disk")


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """Make the error for a file that cannot be opened: missing, a folder, not permitted, or no path at all."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path}: there is no such file")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path}: is a folder; give the path of a .csv, .jsonl or .txt file")
    return InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def is_unicode(text: str) -> bool:
    """True if ``text`` can be encoded: JSON may hold half of a surrogate pair, which no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def listed(names: object) -> str:
    """Join names for a message, ``a, b``, or ``none`` if there are none."""
    return ", ".join(map(str, names)) if isinstance(names, (list, tuple, dict)) and names else "none"
