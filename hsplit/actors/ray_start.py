"""The start of a local Ray: the reason in its own words where it fails, and no waiting for what has failed already."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# The last line of a traceback, and what ends one of Ray's processes that are not in Python.
_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Exit)\b.*|.*\bCheck failed\b.*)$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = b"Traceback (most recent call last)"
# The causes first.
_LOGS = (
    "dashboard.err",
    "dashboard_*.err",
    "*.err",
    "dashboard.log",
    "dashboard_*.log",
    "raylet.out",
    "gcs_server.out",
)
_DASHBOARD = "dashboard/dashboard.py"
_MOST_BYTES = 1 << 16
_MOST_WORDS = 4
_LONGEST = 300
_LOOK_S = 0.5
# So long after its last word a dashboard that has failed is taken to have said all.
_LOOKS_UNCHANGED = 4


def last_words(error: BaseException, root: Path | None) -> str:
    """Why Ray did not start, in one line: what it raised, and the errors in its logs.

    Args:
        error: that was raised.
        root: where Ray keeps its files, if it is known.
    """
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    raised = [line for line in lines if _ERROR.match(line)]
    if not raised:
        # Where Ray quotes a log, it says so in a line of its own.
        said = [line for line in lines if not line.startswith("The last ")]
        raised = [f"{type(error).__name__}: {' '.join(said)}" if said else type(error).__name__]
    words = list(dict.fromkeys([*_errors_in_logs(root), *raised] if root is not None else raised))
    if len(words) > _MOST_WORDS:
        # Causes come first, and what was raised last.
        words = [*words[: _MOST_WORDS - 1], words[-1]]
    return "; ".join(word if len(word) <= _LONGEST else word[: _LONGEST - 3] + "..." for word in words)


def _errors_in_logs(root: Path) -> Sequence[str]:
    logs = root / "session_latest" / "logs"
    files = dict.fromkeys(file for pattern in _LOGS for file in sorted(logs.glob(pattern)))
    found: dict[str, None] = {}
    for file in files:
        with suppress(OSError):
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - _MOST_BYTES))
                text = opened.read().decode(errors="replace")
            found |= dict.fromkeys(line.strip() for line in text.splitlines() if _ERROR.match(line.strip()))
    return list(found)


@contextmanager
def no_waiting_for_a_failed_dashboard(root: Path | None) -> Iterator[None]:
    """End a dashboard that has failed but does not end by itself: Ray would wait for it until its time is up.

    Args:
        root: where Ray keeps its files; nothing is done without.
    """
    if root is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(root, ended), name="watches Ray's start", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(root: Path, ended: threading.Event) -> None:
    said, unchanged = b"", 0
    while not ended.wait(_LOOK_S):
        try:
            now = (root / "session_latest" / "logs" / "dashboard.err").read_bytes()
        except OSError:
            continue
        unchanged = unchanged + 1 if now == said else 0
        said = now
        if _TRACEBACK in said and unchanged >= _LOOKS_UNCHANGED:
            _end_dashboard(root)
            return


def _end_dashboard(root: Path) -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if _DASHBOARD in command and str(root) in command:
                process.kill()
