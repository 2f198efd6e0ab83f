"""Checks of this machine before a run: memory, cores, files, disks, ports, versions and Ray's token, a line each."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rich.text import Text

from hsplit.cluster.socket_directory import socket_directory
from hsplit.config import load_run_config
from hsplit.config.overrides import Overrides
from hsplit.config.reading import tested_versions_file
from hsplit.errors import InputError, os_reason
from hsplit.home import keep_ray_token, no_ray_token, ray_token_file
from hsplit.machine import Finding, Level, Machine

# Ray stops to spill objects to a disk that is fuller, and models and checkpoints need some room.
_FULL, _LEAST_FREE_BYTES = 0.95, 2e9
_DASHBOARD_PORT = 8265
_ANSWERED_WITHIN_S = 5.0
_REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*")
_MARKS = {Level.OK: ("ok", "green"), Level.NOTE: ("note", "yellow"), Level.BAD: ("bad", "bold red")}


def examine(
    cluster: str | Path | None = None,
    policy: str | Path | None = None,
    overrides: Overrides = (),
    *,
    cpu: bool = False,
    runs_dir: str | Path = "runs",
) -> list[Finding]:
    """Examine this machine.

    Args:
        cluster, policy, overrides, cpu: of a run to compare its memory and cores with, see :func:`hsplit.launch`.
        runs_dir: folder of the runs' directories.

    Raises:
        InputError: a file or an override is wrong.
    """
    declared = {} if cluster is None else load_run_config(cluster, policy, overrides, cpu=cpu).declared_bytes()
    found = Machine.here().findings(declared)
    return [*found, *disks(Path(runs_dir)), ports(), versions(), token()]


def disks(runs_dir: Path) -> list[Finding]:
    """Check the disks of the temporary files and of the runs."""
    try:
        temporary = socket_directory()
    except InputError as error:
        return [Finding("disk", Level.BAD, str(error))]
    folders = {"temporary files": Path(temporary), "runs": _first_there(runs_dir.absolute())}
    found = []
    for what, folder in folders.items():
        use = shutil.disk_usage(folder)
        text = f"{use.free / 1e9:.1f} GB free in {folder} for {what}"
        if not os.access(folder, os.W_OK | os.X_OK):
            found.append(Finding("disk", Level.BAD, f"{folder} cannot be written, for {what}"))
        elif use.free < _LEAST_FREE_BYTES or use.used > _FULL * use.total:
            found.append(Finding("disk", Level.NOTE, f"{text}: Ray and checkpoints may find no room; free some"))
        else:
            found.append(Finding("disk", Level.OK, text))
    return found


def _first_there(folder: Path) -> Path:
    return next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)


def ports() -> Finding:
    """Check that processes of this machine reach one another by the address that Ray takes for it."""
    address = _own_address()
    for host in dict.fromkeys(("127.0.0.1", address)):
        try:
            with socket.create_server((host, 0)) as listening:
                socket.create_connection(listening.getsockname(), timeout=_ANSWERED_WITHIN_S).close()
        except OSError as error:
            reason = os_reason(error)
            text = f"a port of {host} cannot be reached from this machine itself ({reason}): open it in the firewall"
            return Finding("ports", Level.BAD, text)
    text = f"{address} is reached from this machine"
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", _DASHBOARD_PORT), timeout=_ANSWERED_WITHIN_S).close()
        text += f"; {_DASHBOARD_PORT} is taken, so Ray's dashboard gets another port"
    return Finding("ports", Level.OK, text)


def _own_address() -> str:
    """Return the address of the interface with the default route; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("8.8.8.8", 53))
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def versions() -> Finding:
    """Compare the installed packages with those that the tests pass with."""
    tested = _tested_versions()
    required = _required()
    installed = {name: _installed(name) for name in required}
    if missing := [name for name, there in installed.items() if there is None]:
        remedy = "pip install -c constraints.txt -e ."
        return Finding("versions", Level.BAD, f"not installed: {', '.join(missing)}: {remedy}")
    others = [
        f"{name} {there} ({tested[name]})" for name, there in installed.items() if tested.get(name, there) != there
    ]
    if others:
        return Finding("versions", Level.NOTE, f"others than the tested ones, in brackets: {', '.join(others)}")
    if not tested:
        return Finding("versions", Level.OK, f"{len(installed)} packages are there")
    return Finding("versions", Level.OK, f"{len(installed)} packages, as tested")


def _tested_versions() -> Mapping[str, str]:
    try:
        lines = tested_versions_file().read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {_plain(name): tested for name, equal, tested in pairs if equal}


def _required() -> Sequence[str]:
    try:
        lines = [line for line in requires("hsplit") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # run from a checkout that is not installed
        lines = ["ray", "torch", "transformers"]
    found = (_REQUIREMENT.match(line) for line in lines)
    # Any pip is fine, see constraints.txt.
    return [name for match in found if match and (name := _plain(match[0])) != "pip"]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str | None:
    try:
        # The part after a plus names the device of the build.
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def token() -> Finding:
    """Check Ray's token, which allows to run code: whether Ray asks for it, and that only its owner reads it."""
    mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
    if mode != "token":
        text = f"RAY_AUTH_MODE is {mode}: whoever reaches Ray's ports can run code on this machine; unset it"
        return Finding("token", Level.NOTE, text)
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("token", Level.OK, "Ray asks for RAY_AUTH_TOKEN")
    try:
        keep_ray_token()
        file = ray_token_file()
        bits = file.stat().st_mode
    except FileNotFoundError:
        return Finding("token", Level.OK, "the first run makes one")
    except OSError as error:
        return Finding("token", Level.BAD, no_ray_token(error))
    if bits & 0o077:
        return Finding("token", Level.NOTE, f"{file} can be read by others: chmod 600 {file}")
    return Finding("token", Level.OK, f"Ray asks for the one in {file}")


def finding_line(finding: Finding) -> Text:
    """Lay a finding out in one line."""
    word, style = _MARKS[finding.level]
    return Text.assemble((f"{word:4}  ", style), f"{finding.what:13}  {finding.text}")
