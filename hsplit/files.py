"""Atomic writes of files and folders, files of tensors, and the SHA-256 of a file."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_text_atomically(path: str | Path, text: str, durable: bool = True) -> None:
    """Write ``text`` as UTF-8 with its line ends unchanged, like :func:`write_bytes_atomically`."""
    write_bytes_atomically(path, text.encode(), durable)


def write_bytes_atomically(path: str | Path, content: bytes, durable: bool = True) -> None:
    """Write ``content`` into a file beside ``path`` and rename it to ``path``.

    At any moment ``path`` holds the whole old content or the whole new one; if ``durable``, also after a loss of power.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
    """
    path = Path(path)
    # One for each thread that writes the same path.
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        # Created new, so that no link of that name is followed.
        beside.unlink(missing_ok=True)
        with beside.open("xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


@contextmanager
def directory_written_atomically(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which replaces ``path`` when the block ends without an error.

    The whole old folder stays until then. One process at a time may write ``path``. If ``durable``, the new files
    survive a loss of power.

    Raises:
        OSError: it cannot be written; ``path`` is unchanged.
    """
    partial, old = path.with_name(f".partial-{path.name}"), path.with_name(f".partial-old-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if durable:
            for file in (*partial.iterdir(), partial):
                sync(file)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.replace(old)
        try:
            partial.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if durable:
        sync(path.parent)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write ``tensors`` to ``file`` with the usual mode of a new file.

    safetensors alone would leave a file that only the owner can read, whatever the umask is.

    Args:
        tensors: by name; no two share memory.
        file: to write; an existing one is replaced and its mode kept.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # A new file shows the umask, which could be read only by setting it for all threads.
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # It has the system's reason in its text only.
        raise OSError(f"{error}: {file}") from error
    if stat.S_IMODE(file.stat().st_mode) != mode:
        file.chmod(mode)


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk; does nothing on Windows, which opens no directories.

    Raises:
        OSError: the system refuses it.
    """
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
