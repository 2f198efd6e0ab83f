"""Tracebacks that go into a file, and what is said of them in one line."""

from __future__ import annotations

import os
import tempfile
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hsplit.errors import MAX_TEXT, RunError, os_reason


def unexpected(error: BaseException, folder: Path | None = None) -> RunError:
    """One line in place of an error that nothing foresaw; its traceback is appended to a file.

    Args:
        error: what was raised.
        folder: where ``traceback.log`` is; ``None``, or where it cannot be written: a new file for temporary ones.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = os_reason(error) if isinstance(error, OSError) else lines[0] if lines else "no more is known"
    kept = keep_traceback(error, folder)
    where = f"the traceback is in {kept}" if kept is not None else "and no file could be written for the traceback"
    # The place of the file is said however long the reason is.
    return RunError(f"{type(error).__name__}: {reason[: MAX_TEXT // 2]}; {where}")


def keep_traceback(error: BaseException, folder: Path | None = None) -> Path | None:
    """Append the traceback of ``error`` to a file that its owner alone may read.

    Args:
        error: what was raised.
        folder: as for :func:`unexpected`.

    Returns:
        The file; ``None`` where none can be written.
    """
    text = "".join([f"{datetime.now().astimezone().isoformat()}\n", *traceback.format_exception(error), "\n"])
    content = text.encode("utf-8", "backslashreplace")
    if folder is not None:
        with suppress(OSError):
            return _append(folder / "traceback.log", content)
    # By default where temporary files go, and where that is gone or full, where everybody may write.
    for place in (None, "/tmp", os.curdir):
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(prefix="hsplit-traceback-", suffix=".log", dir=place)
            os.close(descriptor)
            return _append(Path(name), content)
    return None


def _append(path: Path, content: bytes) -> Path:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "ab") as file:
        file.write(content)
    return path
