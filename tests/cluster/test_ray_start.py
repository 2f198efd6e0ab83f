"""A Ray that does not start says why, in the words of its own logs, and is not waited for once it has failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from hsplit.cluster.connection import connect, ending_failed_dashboard, start_failure
from hsplit.errors import RunError

# As Ray quotes its dashboard's log, with the cause in another file.
QUOTED = """
The last 20 lines of /tmp/x/dashboard.log (it contains the error message from the dashboard):
  File "popen_forkserver.py", line 59, in _launch
    self.pid = forkserver.read_signed(self.sentinel)
EOFError: unexpected EOF"""
CAUSE = """Traceback (most recent call last):
  File "tempfile.py", line 45, in <module>
    from random import Random as _Random
ImportError: cannot import name 'Random' from 'random' (/home/x/random.py)
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "session_latest" / "logs"
    folder.mkdir(parents=True)
    return folder


def test_the_cause_in_its_logs_comes_before_what_was_raised(tmp_path: Path, logs: Path) -> None:
    (logs / "dashboard.err").write_text(CAUSE)
    words = start_failure(Exception(QUOTED), tmp_path)
    assert words == (
        "ImportError: cannot import name 'Random' from 'random' (/home/x/random.py); EOFError: unexpected EOF"
    )


def test_all_lines_of_what_was_raised_are_told() -> None:
    error = RuntimeError("Failed to set up runtime environment.\nPackage size 600 MiB exceeds the limit of 512 MiB.\n")
    assert start_failure(error, None) == (
        "RuntimeError: Failed to set up runtime environment. Package size 600 MiB exceeds the limit of 512 MiB."
    )
    assert start_failure(TimeoutError(), None) == "TimeoutError"


def test_many_and_long_words_stay_one_line(tmp_path: Path, logs: Path) -> None:
    (logs / "raylet.out").write_text("[2026 C 1 1] file.cc:1: Check failed: " + "x" * 10_000 + "\n")
    (logs / "agent.err").write_text("".join(f"ValueError: number {n}\n" for n in range(50)))
    (logs / "unreadable.err").mkdir()
    words = start_failure(Exception("\x1b[31mRuntimeError: the last\x1b[0m"), tmp_path)
    assert "\n" not in words and "\x1b" not in words and len(words) < 1500
    assert words.startswith("ValueError: number 0; ") and words.endswith("; RuntimeError: the last")


def test_connecting_tells_them(tmp_path: Path, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (logs / "dashboard.err").write_text(CAUSE)
    monkeypatch.setattr("ray.init", Mock(side_effect=Exception(QUOTED)))
    with pytest.raises(RunError, match=r"^no Ray could be started on this machine: ImportError: .*random\.py\); EOF"):
        connect(None, 1, root=tmp_path)


@pytest.mark.parametrize("failed", [True, False])
def test_a_dashboard_that_has_failed_is_ended_and_no_other(tmp_path: Path, logs: Path, failed: bool) -> None:
    program = tmp_path / "dashboard" / "dashboard.py"
    program.parent.mkdir()
    program.write_text("import sys; sys.stdin.read()")
    (logs / "dashboard.err").write_text(CAUSE if failed else "a warning\n")
    command = [sys.executable, str(program), f"--temp-dir={tmp_path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with ending_failed_dashboard(tmp_path):
            if failed:
                assert process.wait(timeout=60) < 0
            else:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=4)
        assert process.stdin is not None
        process.stdin.close()
