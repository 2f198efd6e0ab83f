"""Users without a writable home directory get other folders, and still read existing caches."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hsplit import home

NOBODY = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An existing home directory that no user can write."""
    directory = tmp_path / "home"
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    writes = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not Path(path).is_relative_to(directory) and writes(path, mode)
    )
    return directory


def test_a_home_that_can_be_written_changes_nothing(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "USER": "somebody"}
    home.make_home_usable(environ)
    home.keep_ray_token(environ)
    assert environ == {"HOME": str(tmp_path), "USER": "somebody"}


@pytest.mark.parametrize("missing", ["/proc/nohome", "not/absolute"])
def test_a_home_that_is_not_there_is_another_one(temporary: Path, missing: str) -> None:
    environ = {"HOME": missing, "USER": "somebody"}
    home.make_home_usable(environ)
    made = Path(environ["HOME"])
    assert made.parent == temporary and stat.S_IMODE(made.stat().st_mode) == 0o700
    again = {"HOME": missing, "USER": "somebody"}
    home.make_home_usable(again)
    assert again == environ


def test_of_a_home_that_can_only_be_read_caches_go_elsewhere_and_are_read(temporary: Path, read_only: Path) -> None:
    environ = {"HOME": str(read_only), "USER": "somebody", "MPLCONFIGDIR": "/own"}
    home.make_home_usable(environ)
    assert environ["HOME"] == str(read_only) and environ["MPLCONFIGDIR"] == "/own"
    assert Path(environ["XDG_CACHE_HOME"]).is_relative_to(temporary)
    # Only existing caches are read there.
    assert environ["HF_HOME"] == str(read_only / ".cache" / "huggingface") and "HSPLIT_CACHE" not in environ


def test_rays_token_is_this_users_alone(temporary: Path, read_only: Path) -> None:
    environ = {"HOME": str(read_only)}
    home.keep_ray_token(environ)
    path = Path(environ["RAY_AUTH_TOKEN_PATH"])
    assert len(path.read_text()) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600
    for given in ({"RAY_AUTH_TOKEN": "t"}, {"RAY_AUTH_TOKEN_PATH": "/own"}):
        kept = {"HOME": str(read_only), **given}
        home.keep_ray_token(kept)
        assert kept == {"HOME": str(read_only), **given}


def test_somebody_elses_directory_is_not_used(temporary: Path) -> None:
    planted = temporary / f"hsplit-home-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    environ = {"HOME": "/proc/nohome", "USER": "somebody"}
    home.make_home_usable(environ)
    assert environ["HOME"] != str(planted)
    planted.rmdir()
    planted.symlink_to("/")
    home.make_home_usable(again := {"HOME": "/proc/nohome", "USER": "somebody"})
    assert again["HOME"] != str(planted)


def test_a_user_without_a_name_and_home_can_import_and_ask() -> None:
    if subprocess.run([*NOBODY, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    code = (
        "import hsplit, getpass, pathlib, os; print(getpass.getuser(), os.access(pathlib.Path.home(), os.W_OK));"
        "from hsplit.home import cache_root; cache_root().mkdir(parents=True, exist_ok=True)"
    )
    paths = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    for own in ({}, {"HOME": "/proc/nohome"}, {"HOME": "/"}):
        done = subprocess.run(
            [*NOBODY, sys.executable, "-c", code], env=paths | own, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), own
        if own != {"HOME": "/"}:
            assert done.stdout == "12345 True\n"


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home.cache_root() == tmp_path / "own"
    monkeypatch.delenv("HSPLIT_CACHE")
    assert home.cache_root() == tmp_path / "xdg" / "hsplit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home.cache_root() == tmp_path / ".cache" / "hsplit"
