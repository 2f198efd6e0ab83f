from __future__ import annotations

import re
from pathlib import Path

import pytest

from hsplit.errors import InputError
from hsplit.run_directory import RunDirectory


def test_layout_is_the_documented_one(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "first")
    assert run.path == tmp_path / "runs" / "first"
    assert run.name == "first"
    names = [
        run.config,
        run.plan,
        run.metrics,
        run.events,
        run.checkpoints,
        run.adapter,
        run.report,
        run.inbox,
    ]
    expected = "config.yaml plan.csv metrics.csv events.jsonl checkpoints adapter report.html inbox"
    assert [path.relative_to(run.path).as_posix() for path in names] == expected.split()
    assert run.checkpoints.is_dir()
    assert run.inbox.is_dir()


def test_default_names_are_well_formed_and_differ(tmp_path: Path) -> None:
    names = [RunDirectory.create(tmp_path).name for _ in range(4)]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?", name) for name in names)


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "a/b", "-x", "x" * 65, "a b", "../up", "a\n", "é"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="--name: must be 1 to 64 letters") as refused:
        RunDirectory.create(tmp_path / "runs", name)
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "runs").iterdir()) == []


def test_taken_name_says_how_to_go_on(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path, "taken")
    with pytest.raises(InputError, match="exists already; choose another name"):
        RunDirectory.create(tmp_path, "taken")
    first.config.write_text("job: {}\n")
    with pytest.raises(InputError, match=r"`hsplit resume .*taken`, or choose another name"):
        RunDirectory.create(tmp_path, "taken")


def test_runs_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--runs-dir .*no run can be kept there"):
        RunDirectory.create(tmp_path / "file", "x")


def test_open_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such directory"):
        RunDirectory.open(tmp_path / "none")
    with pytest.raises(InputError, match=r"no config\.yaml"):
        RunDirectory.open(tmp_path)
    (tmp_path / "config.yaml").write_text("job: {}\n")
    assert RunDirectory.open(str(tmp_path)).path == tmp_path
