"""Tracebacks in a file, and their errors in one line."""

from __future__ import annotations

import os
import tempfile
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hsplit.errors import MAX_TEXT, RunError, os_reason


def unexpected(error: BaseException, folder: Path | None = None) -> RunError:
    """Reduce an unexpected error to one line; its traceback is appended to a file.

    Args:
        error: the error.
        folder: of ``traceback.log``; ``None``, or if that cannot be written: a new temporary file.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = os_reason(error) if isinstance(error, OSError) else lines[0] if lines else "no more is known"
    kept = keep_traceback(error, folder)
    where = f"the traceback is in {kept}" if kept is not None else "and no file could be written for the traceback"
    # The file is named even after a long reason.
    return RunError(f"{type(error).__name__}: {reason[: MAX_TEXT // 2]}; {where}")


def keep_traceback(error: BaseException, folder: Path | None = None) -> Path | None:
    """Append the traceback of ``error`` to a file that only its owner may read.

    Args:
        error: the error.
        folder: as for :func:`unexpected`.

    Returns:
        The file; ``None`` if none can be written.
    """
    text = "".join([f"{datetime.now().astimezone().isoformat()}\n", *traceback.format_exception(error), "\n"])
    content = text.encode("utf-8", "backslashreplace")
    if folder is not None:
        with suppress(OSError):
            return _append(folder / "traceback.log", content)
    # None is the system's folder for temporary files, which may be missing or full.
    for directory in (None, "/tmp", os.curdir):
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="hsplit-traceback-", suffix=".log", dir=directory)
            os.close(descriptor)
            return _append(Path(name), content)
    return None


def _append(path: Path, content: bytes) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "ab") as file:
        file.write(content)
    return path
