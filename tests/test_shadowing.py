"""A file with the name of one of Python's own modules on the import path is named before it does harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.shadowing import UNUSED, shadowing_file

OWN = os.path.dirname(os.__file__)
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("entry", ["random.py", "queue.py", "statistics.py", "json/__init__.py", "select.py"])
@pytest.mark.parametrize("command", [["--help"], ["launch", "--cluster", "hetero"]])
def test_one_line_names_the_file(tmp_path: Path, entry: str, command: list[str]) -> None:
    (tmp_path / entry).parent.mkdir(exist_ok=True)
    (tmp_path / entry).write_text("x = 1\n")
    # Loaded as a program does that imports as little as Python itself, so that the name is free until then.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from hsplit.cli import run; run()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    file = str(tmp_path / entry).removesuffix("/__init__.py")
    assert done.stderr.startswith(f"error: PYTHONPATH: {file} would be imported instead of")
    assert done.stderr.count("\n") == 1


@given(st.sampled_from(sorted(UNUSED | {"os", "sys", "math_tools", "restaurants", "test"})))
def test_what_nobody_imports_and_what_cannot_be_shadowed_is_let_be(tmp_path_factory: object, name: str) -> None:
    directory = tmp_path_factory.mktemp("own")  # type: ignore[attr-defined]
    (directory / f"{name}.py").write_text("x = 1\n")
    assert shadowing_file([str(directory), OWN]) is None


def test_a_folder_without_code_and_whatever_comes_later_shadow_nothing(tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    assert shadowing_file([str(tmp_path), OWN]) is None
    (tmp_path / "random.py").write_text("")
    assert shadowing_file([OWN, str(tmp_path)]) is None
    assert shadowing_file([str(tmp_path), OWN]) == str(tmp_path / "random.py")
    assert shadowing_file(["/nowhere", str(tmp_path / "random.py"), OWN]) is None
