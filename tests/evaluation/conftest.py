"""One finished run for each family, shared by tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.finished_run import FinishedRun, finished_run


@pytest.fixture(scope="session")
def runs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """Complete runs of both families, on an NF4 base with labels at the server; copy one to change it."""
    return {family: finished_run(tmp_path_factory.mktemp("run"), model, base="nf4") for family, model in models.items()}
