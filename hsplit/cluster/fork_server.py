"""The process from which worker processes are forked: see :mod:`hsplit.cluster.forked_workers`.

A forked process cannot use CUDA once its parent has looked for it, so this is not for clusters with GPUs. On a machine
with a GPU these processes do not see it: autograd would look for it, and fail in a forked process.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsplit.cluster import forked_workers
from hsplit.cluster.socket_directory import socket_directory

# Imports of clients, servers and scheduler, and the slowest ones of Ray itself.
MODULES = (
    # Before anything else imports bitsandbytes.
    "hsplit.models.quiet_bitsandbytes",
    "hsplit.actors.client",
    "hsplit.actors.whole_client",
    "hsplit.actors.server",
    "hsplit.planning.scheduler",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "google.protobuf.json_format",
    "jsonschema",
    "msgpack",
    "requests",
)


# Read by OpenMP when it is loaded. A server and clients compute at the same time; threads that spin while they wait for
# one another would take the cores from other processes.
PASSIVE_THREADS = {"OMP_WAIT_POLICY": "passive"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


class ForkServer:
    """Starts the server, which ends with the ``with`` block, or with the process that started it.

    Args:
        modules: modules to import. Ray must not be among them: workers that are forked after its import do not start.
        within: parent of the folder for its socket; by default a temporary directory with a short path.
    """

    def __init__(self, modules: Sequence[str] = MODULES, within: Path | None = None) -> None:
        # Short, since a socket's path may have about a hundred bytes, and readable by this user alone.
        self._folder = tempfile.TemporaryDirectory(prefix="hsplit-", dir=within or socket_directory())
        self.path = str(Path(self._folder.name) / "fork")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(self.path)
        listening.listen(64)
        # Modules come from this process's path, not from the working directory.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve;"
            f" serve({listening.fileno()}, {list(modules)!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            env={**PASSIVE_THREADS, **os.environ, **NO_GPU},
            # A Ctrl-C in the terminal is for the run to handle.
            start_new_session=True,
        )
        listening.close()

    @property
    def worker_command(self) -> str:
        """Command with which Ray starts a worker's Python program (``py_executable`` of a runtime environment)."""
        return shlex.join([sys.executable, "-S", "-E", str(Path(forked_workers.__file__)), self.path])

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *error: object) -> None:
        """End the server; its workers live on until Ray ends them."""
        # Killed, since after wrong input it may still be importing.
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._folder.cleanup()


def serve(listening: int, modules: Sequence[str]) -> None:
    """Import ``modules``, then fork a worker for each connection to socket ``listening``, until stdin ends."""
    for module in modules:
        importlib.import_module(module)
    # Otherwise the collector would copy shared pages in every child.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(fileno=listening)
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            # The process that started this is gone and cannot clean up.
            shutil.rmtree(Path(server.getsockname()).parent, ignore_errors=True)
            return
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            _work(connection)
        connection.close()


def _work(connection: socket.socket) -> None:
    """Become the requested worker; runs in the child."""
    # Ray ends a worker with its process group.
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, descriptors = _received(connection)
    for standard, received in enumerate(descriptors):
        os.dup2(received, standard)
        os.close(received)
    os.environ.clear()
    os.environ.update(request["environment"] | NO_GPU)
    os.chdir(request["directory"])
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    program, *arguments = request["command"]
    sys.argv = [program, *arguments]
    sys.path.insert(0, os.path.dirname(program))
    runpy.run_path(program, run_name="__main__")
    os._exit(0)


def _received(connection: socket.socket) -> tuple[Mapping[str, Any], list[int]]:
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        body += connection.recv(size - len(body))
    return json.loads(body), descriptors


def _end_with(connection: socket.socket) -> None:
    """Kill this process when the one that requested it is gone."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
