"""The lines of ``hsplit doctor``: what is wrong, and the remedy."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from hsplit import doctor, machine
from hsplit.cli import main
from hsplit.machine import Finding, Level


def lines(*arguments: str, code: int = 0) -> list[str]:
    done = CliRunner().invoke(main, ["doctor", *arguments])
    assert done.exit_code == code, done.output
    return done.output.splitlines()


def test_each_finding_is_one_line_however_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = lines("--cluster", "hetero")
    assert {line[:4].strip() for line in found} <= {"ok", "note"}
    every = ("memory", "cores", "open files", "disk", "ports", "versions", "token")
    assert all(any(line[6:].startswith(what) for line in found) for what in every)
    assert "GB declared for server, phone-0, phone-1 and 3 others" in next(line for line in found if "memory" in line)


def test_what_is_bad_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_most_open_files", lambda: 50)
    assert any(line.startswith("bad   open files     50 at most") for line in lines(code=1))
    found = json.loads("\n".join(lines("--json", code=1)))
    assert {"what": "open files", "level": "bad"}.items() <= next(one for one in found if one["level"] == "bad").items()


def test_a_launch_that_ray_could_not_start_is_refused_before_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_most_open_files", lambda: 50)
    done = CliRunner().invoke(main, ["launch", "--cluster", "hetero", "--runs-dir", str(tmp_path / "runs")])
    assert done.exit_code == 2 and done.output.startswith("error: this machine: open files: 50 at most in a process, ")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Installed versions, which may be changed; one and two are tested with 1.0."""
    (tmp_path / "constraints.txt").write_text("# tested\none==1.0\nT_wo==1.0\n")
    there = {"one": "1.0", "t-wo": "1.0+cpu"}
    monkeypatch.setattr(doctor, "tested_versions_file", lambda: tmp_path / "constraints.txt")
    monkeypatch.setattr(doctor, "requires", lambda name: ["one", "t.wo[all]>=1", "pip", 'more; extra == "dev"'])

    def version(name: str) -> str:
        if name not in there:
            raise doctor.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(doctor, "version", version)
    yield there


def test_versions_are_compared_with_the_tested_ones(installed: dict[str, str]) -> None:
    assert doctor.versions() == Finding("versions", Level.OK, "2 packages, as tested")
    installed["one"] = "1.1"
    found = doctor.versions()
    assert found.level is Level.NOTE and found.text.endswith("in brackets: one 1.1 (1.0)")
    del installed["one"]
    assert doctor.versions().text.startswith("not installed: one: pip install")


def test_the_tested_versions_are_found() -> None:
    assert "ray" in doctor._tested_versions()


def test_a_token_that_others_can_read_and_none_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert doctor.token().text == "the first run makes one"
    file.write_text("secret")
    file.chmod(0o644)
    assert doctor.token() == Finding("token", Level.NOTE, f"{file} can be read by others: chmod 600 {file}")
    file.chmod(0o600)
    assert doctor.token().level is Level.OK
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.token().text.startswith("RAY_AUTH_MODE is disabled: whoever reaches")


def test_a_port_that_cannot_be_reached_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(address: Sequence[object], timeout: float) -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(doctor.socket, "create_connection", refused)
    found = doctor.ports()
    assert found.level is Level.BAD and found.text.startswith("a port of 127.0.0.1 cannot be reached")


def test_a_disk_that_is_full_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("Usage", (), {"total": 10**12, "used": 96 * 10**10, "free": 4 * 10**10})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    found = doctor.disks(tmp_path / "runs" / "not" / "there")
    assert [one.level for one in found] == [Level.NOTE, Level.NOTE]
    assert found[1].text.startswith(f"40.0 GB free in {tmp_path} for runs: ")
