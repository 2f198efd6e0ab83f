"""Real files to damage: a complete run on disk, made once, and copied for every test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.finished_run import FinishedRun, finished_run


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> FinishedRun:
    return finished_run(tmp_path_factory.mktemp("pristine"), models["llama"])


@pytest.fixture
def run_copy(pristine: FinishedRun, tmp_path: Path) -> Path:
    """A copy of the run with files around it that must not be touched."""
    around = tmp_path / "around"
    around.mkdir()
    (around / "precious.txt").write_text("keep me")
    return Path(shutil.copytree(pristine.path, around / "runs" / "tiny"))
