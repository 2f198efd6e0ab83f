"""The driver's connection to Ray: an existing cluster, or a local one that is started for the run.

Where a local Ray does not start, its own errors are reported, without waiting for a part that has failed.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from hsplit.actors.executor import LOCALHOST
from hsplit.cluster.fork_server import PASSIVE_THREADS, ForkServer
from hsplit.cluster.tls import check_tls
from hsplit.errors import InputError, RunError, os_reason

# The last line of a traceback, and of the log of one of Ray's processes that are not in Python.
_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Exit)\b.*|.*\bCheck failed\b.*)$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK = b"Traceback (most recent call last)"
# Those with the causes first.
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
_MOST_ERRORS = 4
_LONGEST = 300
_LOOK_S = 0.5
# After so many looks without a change, a failed dashboard's log is taken to be complete.
_LOOKS_UNCHANGED = 4


def start_failure(error: BaseException, root: Path | None) -> str:
    """Describe in one line why Ray did not start: the errors in its logs, and the one that it raised.

    Args:
        error: raised by Ray.
        root: Ray's directory, if it is known.
    """
    lines = [line.strip() for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    raised = [line for line in lines if _ERROR.match(line)]
    if not raised:
        # Where Ray quotes a log, a line of its own announces it.
        text = " ".join(line for line in lines if not line.startswith("The last "))
        raised = [f"{type(error).__name__}: {text}" if text else type(error).__name__]
    errors = list(dict.fromkeys([*_errors_in_logs(root), *raised] if root is not None else raised))
    if len(errors) > _MOST_ERRORS:
        # Causes come first, and the raised error last.
        errors = [*errors[: _MOST_ERRORS - 1], errors[-1]]
    return "; ".join(line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..." for line in errors)


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
def ending_failed_dashboard(root: Path | None) -> Iterator[None]:
    """Kill a dashboard that has failed without exiting: Ray would wait for it until its timeout.

    Args:
        root: Ray's directory; ``None``: do nothing.
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
    log, unchanged = b"", 0
    while not ended.wait(_LOOK_S):
        try:
            read = (root / "session_latest" / "logs" / "dashboard.err").read_bytes()
        except OSError:
            continue
        unchanged = unchanged + 1 if read == log else 0
        log = read
        if _TRACEBACK in log and unchanged >= _LOOKS_UNCHANGED:
            _end_dashboard(root)
            return


def _end_dashboard(root: Path) -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if _DASHBOARD in command and str(root) in command:
                process.kill()


# Read by worker processes when they start, so it must be set before Ray starts.
WORKER_ENVIRONMENT = {
    # Imports dominate an actor's start; idle workers have them done. None of these may look for GPUs: Ray chooses those
    # that an actor sees only once the worker is there, and CUDA keeps to what it has seen first. bitsandbytes looks.
    "RAY_preload_python_modules": "torch,transformers.modeling_utils,accelerate",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A call that waits for a dead actor's result fails too; the coordinator has already reported the cause.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # That of whoever started the run. At Ray's own of 15, workers starve beside any other program.
    "RAY_worker_niceness": "0",
    **PASSIVE_THREADS,
}
ANSWERED_WITHIN_S = 10.0
# Workers that Ray starts in advance are not forked.
NOT_BEFOREHAND = {"RAY_prestart_worker_first_driver": "0"}


def connect(
    address: str | None,
    cpus: float,
    dashboard: bool = True,
    root: Path | None = None,
    fork_server: ForkServer | None = None,
    dashboard_host: str = LOCALHOST,
) -> str | None:
    """Join the Ray cluster at ``address``, or start a local one with at least ``cpus`` logical CPUs.

    Args:
        address: of a running cluster.
        cpus: least number of logical CPUs of a local one.
        dashboard: whether a local one has a dashboard.
        root: directory of a local one's files.
        fork_server: forks the worker processes of a local one.
        dashboard_host: address where a local one's dashboard listens.

    Returns:
        The dashboard's URL, or ``None``.

    Raises:
        InputError: nothing answers at ``address``; ``dashboard_host`` is no address, or is given with ``address``.
        RunError: no local one could be started.
    """
    _check_dashboard_host(dashboard_host, address)
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        # Actors wait most of the time, so a laptop may have more of them than cores.
        logical = max(os.cpu_count() or 1, math.ceil(cpus))
        if root is not None:
            quiet["_temp_dir"] = str(root)
        if fork_server is not None:
            quiet["runtime_env"] = {"py_executable": fork_server.worker_command}
            os.environ |= NOT_BEFOREHAND
        try:
            with ending_failed_dashboard(root):
                context = ray.init(
                    address="local",
                    num_cpus=logical,
                    include_dashboard=dashboard,
                    dashboard_host=dashboard_host,
                    **quiet,
                )
        except Exception as error:  # Ray raises errors of any class, some with the last lines of a log
            raise RunError(
                f"no Ray could be started on this machine: {start_failure(error, root)}; if it only has too much to do,"
                " try again, or start one with `ray start --head` and give --address auto"
            ) from error
        finally:
            _keep_token()
    else:
        _check_answers(address)
        try:
            context = ray.init(address=address, **quiet)
        except Exception as error:  # likewise
            raise InputError(
                f"--address {address}: no Ray cluster could be reached: {start_failure(error, None)}"
            ) from error
    return context.dashboard_url or None


def _check_answers(address: str) -> None:
    """Refuse a ``HOST:PORT`` where nothing listens, or not with this process's certificates.

    Ray would try for minutes and print lines of its own.
    """
    found = address
    if address == "auto":
        with suppress(Exception):  # Ray names the cause if there is no cluster
            found = ray._private.services.canonicalize_bootstrap_address("auto") or address
    host, _, port = found.rpartition(":")
    if not host or "://" in address or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERED_WITHIN_S) as connection:
            check_tls(address, connection, ANSWERED_WITHIN_S)
    except (OSError, OverflowError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else str(error)
        raise InputError(
            f"--address {address}: nothing answers there ({reason}); give HOST:PORT as `ray start --head` has"
            " printed it, or auto on a machine of the cluster"
        ) from error


def _check_dashboard_host(host: str, address: str | None) -> None:
    if address is not None and host != LOCALHOST:
        raise InputError(
            f"--dashboard-host {host}: the Ray cluster at {address} has its dashboard already: leave it out"
        )
    try:
        ipaddress.ip_address(host)
    except ValueError:
        raise InputError(
            f"--dashboard-host {host}: must be an IP address of this machine, or 0.0.0.0 for all of them"
        ) from None


def _keep_token() -> None:
    """Make Ray's token in the user's home readable by its owner alone: it allows to run code."""
    token = Path.home() / ".ray" / "auth_token"
    with suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)
