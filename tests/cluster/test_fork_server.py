"""Worker processes forked from one that has the imports done."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsplit.cluster.fork_server import ForkServer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

PROGRAM = """
import json, os, sys
own = [os.environ["OF_ITS_OWN"], os.getcwd()]
print(json.dumps([sys.argv[1:], os.getpid(), os.getpgrp(), "colorsys" in sys.modules, *own]))
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(["colorsys"]) as running:
        yield running


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def _started(command: str, program: Path, **settings: object) -> tuple[subprocess.Popen[str], list[object]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OF_ITS_OWN": "yes"}
    process = subprocess.Popen(
        [*shlex.split(command), str(program), "an argument"], cwd=program.parent, env=environment, **pipes
    )  # type: ignore[call-overload]
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def _ends(pid: int) -> bool:
    """Wait up to half a minute for process ``pid``, no child of this one, to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor) as ended:
        return bool(select.select([ended], [], [], 30)[0])


def test_a_program_has_the_imports_and_is_otherwise_its_own(server: ForkServer, program: Path) -> None:
    process, (arguments, pid, group, imported, own, directory) = _started(server.worker_command, program)
    assert arguments == ["an argument"] and own == "yes" and directory == str(program.parent)
    assert imported and pid != process.pid
    # Ray ends a worker with its process group, which must not have others in it.
    assert group == pid
    # The process that asked for it stays as long as it does.
    assert process.poll() is None
    process.communicate("")
    assert process.wait(30) == 0


def test_who_kills_the_asking_process_kills_the_program(server: ForkServer, program: Path) -> None:
    process, (_, pid, *_) = _started(server.worker_command, program)
    process.send_signal(signal.SIGKILL)
    # Its end of the output is closed when it is gone.
    assert process.stdout is not None and process.stdout.read() == ""
    assert isinstance(pid, int) and _ends(pid)


def test_a_killed_program_ends_the_asking_process(server: ForkServer, program: Path) -> None:
    process, (_, pid, *_) = _started(server.worker_command, program)
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    process.wait(30)


def test_without_a_server_the_program_runs_all_the_same(server: ForkServer, program: Path) -> None:
    command = server.worker_command.replace(server.path, str(program.parent / "nothing"))
    process, (arguments, pid, _, imported, *_) = _started(command, program)
    assert arguments == ["an argument"] and pid == process.pid and not imported
    process.communicate("")


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = """
import os
from hsplit.cluster.fork_server import ForkServer
server = ForkServer([])
print(server._process.pid, server.path, flush=True)
os.kill(os.getpid(), 9)
"""
    started = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    # Its output is inherited: run() returned because the server has ended as well.
    pid, path = started.stdout.split()
    assert _ends(int(pid)) and not Path(path).parent.exists()
