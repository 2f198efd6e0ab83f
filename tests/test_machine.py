"""Findings about a machine: what control groups leave of its memory, and what a run would lack."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import psutil
import pytest

from hsplit.machine import Level, Machine, cgroup_free_bytes, free_host_bytes

AMPLE = Machine(free_bytes=10**10, reserve_bytes=10**9, cores=2, load=0.5, shared_bytes=10**10, open_files=20_000)
DECLARED = {"server": 8 * 10**8, "phone": 10**8}


def _group(folder: Path, files: dict[str, object], stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(stat)


def test_the_tightest_group_counts_and_file_cache_is_given_back(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    root = tmp_path / "cgroup"
    _group(root / "outer", {"memory.max": 1000, "memory.current": 900}, "anon 5\ninactive_file 150\n")
    _group(root / "outer" / "inner", {"memory.max": "max", "memory.current": 800}, "inactive_file 0\n")
    assert cgroup_free_bytes(root, own) == 250
    _group(root / "outer" / "inner", {"memory.max": 850, "memory.current": 800}, "inactive_file 10\n")
    assert cgroup_free_bytes(root, own) == 60


def test_version_1_in_a_container_that_sees_its_own_group_as_the_top(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("7:cpu,cpuacct:/host/path\n3:memory:/host/path\n")
    files = {"memory.limit_in_bytes": 500, "memory.usage_in_bytes": 200}
    _group(tmp_path / "cgroup" / "memory", files, "inactive_file 1\ntotal_inactive_file 50\n")
    assert cgroup_free_bytes(tmp_path / "cgroup", own) == 350


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    assert cgroup_free_bytes(tmp_path, tmp_path / "missing") is None
    own = tmp_path / "own"
    own.write_text("0::/\n")
    _group(tmp_path / "cgroup", {"memory.max": "max", "memory.current": 5}, "inactive_file 0\n")
    assert cgroup_free_bytes(tmp_path / "cgroup", own) is None


def test_a_host_has_no_more_than_its_group_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_host_bytes() < psutil.virtual_memory().total
    monkeypatch.setattr("hsplit.machine.cgroup_free_bytes", lambda: 12345)
    assert free_host_bytes() == 12345
    # Nothing left is a limit, too.
    monkeypatch.setattr("hsplit.machine.cgroup_free_bytes", lambda: 0)
    assert free_host_bytes() == 0


def worst(declared: dict[str, int] = DECLARED, **state: object) -> tuple[str, Level, str]:
    """The only finding that something is wrong."""
    found = dataclasses.replace(AMPLE, **state).findings(declared)  # type: ignore[arg-type]
    (one,) = [finding for finding in found if finding.level is not Level.OK]
    return one.what, one.level, one.text


def test_an_ample_machine_is_all_right() -> None:
    assert {finding.level for finding in AMPLE.findings(DECLARED)} == {Level.OK}
    unlimited = dataclasses.replace(AMPLE, shared_bytes=None, open_files=None)
    assert [finding.text for finding in unlimited.findings({})] == [
        "10.0 GB free",
        "2, of which 0.5 were in use in the last minute",
        "no limit",
    ]


def test_less_memory_than_declared_is_noted_and_names_the_holders() -> None:
    what, level, text = worst(free_bytes=5 * 10**8)
    assert (what, level) == ("memory", Level.NOTE)
    assert text.startswith("0.5 GB free, 0.9 GB declared for server, phone: ")
    # Ray would end actors before the memory is used up.
    assert worst(free_bytes=15 * 10**8)[2].endswith(
        "Ray ends actors where less than 1.0 GB are left; free some, or declare less (memory_gb)"
    )
    many = {f"phone-{i}": 10**10 for i in range(9)}
    assert "for phone-0, phone-1, phone-2 and 6 others: " in worst(many)[2]


def test_cores_that_others_use_and_too_many_actors_are_noted() -> None:
    assert worst(load=2.0) == (
        "cores",
        Level.NOTE,
        "2, of which 2.0 were in use in the last minute, for 2 actors: other work slows a run down",
    )
    what, level, text = worst({f"phone-{i}": 1 for i in range(100)})
    assert (what, level) == ("cores", Level.NOTE) and "for 100 actors: they wait for one another" in text


def test_open_files_that_ray_could_not_start_with_are_bad() -> None:
    what, level, text = worst(open_files=100)
    assert (what, level) == ("open files", Level.BAD) and text.startswith("100 at most in a process, Ray needs about ")


def test_a_small_dev_shm_is_noted_with_a_size_that_suffices() -> None:
    what, level, text = worst(shared_bytes=64 << 20)
    assert (what, level) == ("shared memory", Level.NOTE) and text.endswith("(in Docker --shm-size=3gb)")
    assert worst(shared_bytes=2 * 10**9)[0] == "shared memory"


def test_this_machine_can_be_looked_at() -> None:
    here = Machine.here()
    assert here.cores >= 1 and 0 < here.free_bytes < psutil.virtual_memory().total
