"""Free memory: what control groups leave of it, and what each holder gets."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from hsplit.measuring.free_memory import HEADROOM, Location, cgroup_free_bytes, free_bytes, shared_out


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
    assert 0 < free_bytes(torch.device("cpu")) < psutil.virtual_memory().total
    monkeypatch.setattr("hsplit.measuring.free_memory.cgroup_free_bytes", lambda: 12345)
    assert free_bytes(torch.device("cpu")) == 12345
    # Nothing left is a limit, too.
    monkeypatch.setattr("hsplit.measuring.free_memory.cgroup_free_bytes", lambda: 0)
    assert free_bytes(torch.device("cpu")) == 0


def test_a_host_is_shared_equally_and_a_gpu_by_what_is_reserved() -> None:
    places = {
        "a": Location("one", 0.0),
        "b": Location("one", 0.0),
        "c": Location("two", 0.0),
        "d": Location("one", 0.25),
        "e": Location("one", 0.25),
        "server": Location("one", 2.0),
    }
    shares = shared_out(dict.fromkeys(places, 1000), places)
    parts = {name: share / 1000 / (1 - HEADROOM) for name, share in shares.items()}
    assert parts == pytest.approx({"a": 0.5, "b": 0.5, "c": 1.0, "d": 0.25, "e": 0.25, "server": 1.0})
