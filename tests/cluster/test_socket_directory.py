"""Sockets get a directory whose path leaves room for theirs, whatever TMPDIR is."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from hsplit.cluster.cleanup import CleanupProcess
from hsplit.cluster.fork_server import ForkServer
from hsplit.cluster.socket_directory import LONGEST, socket_directory
from hsplit.errors import InputError

RAYS = "session_2026-11-22_09-54-12_123456_4194304/sockets"


def _temporary(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", directory)


@pytest.mark.parametrize("name", [28, 49, 90, "with a space", "ünïcode"])
def test_a_socket_of_rays_fits_whatever_the_temporary_directory(
    name: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    below = str(tmp_path / name) if isinstance(name, str) else f"{tmp_path}/".ljust(name, "x")
    _temporary(monkeypatch, below)
    with CleanupProcess() as cleanup, ForkServer(modules=[], within=None) as fork_server:
        sockets = cleanup.root / RAYS
        sockets.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(sockets / "dash_MetricsHead"))
        assert " " not in str(cleanup.root) and fork_server.path.isascii()


def test_a_short_one_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as short:
        assert len(short) <= LONGEST
        monkeypatch.setattr(tempfile, "tempdir", short)
        assert socket_directory() == short


def test_where_no_other_can_be_written_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _temporary(monkeypatch, str(tmp_path / ("x" * 90)))
    with pytest.raises(InputError, match=rf"^TMPDIR: .* at most {LONGEST} of letters.*give a shorter one$"):
        socket_directory(others=("/proc/nothing",))


def test_no_temporary_directory_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InputError, match=r"^TMPDIR: No usable temporary directory"):
        socket_directory()
