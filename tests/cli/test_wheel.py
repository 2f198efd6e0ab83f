"""A wheel, installed outside the checkout, finds its presets and its experiments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel of this checkout is installed."""
    to = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(to), str(ROOT)], check=True)
    return to


def hsplit(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed wheel in ``folder``; on stderr, where hsplit was imported from."""
    code = "import hsplit, sys; from hsplit.cli import main; print(hsplit.__file__, file=sys.stderr); main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site)},
        text=True,
        capture_output=True,
        check=True,
    )


def test_plan_from_an_installed_wheel(site: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    plan = ["plan", "--cluster", "hetero", "--policy", "splitlora", "--set", f"model={models['llama']}"]
    done = hsplit(site, tmp_path, *plan)
    assert str(site) in done.stderr
    assert "workstation" in done.stdout


def test_an_experiment_of_an_installed_wheel_writes_below_the_working_directory(site: Path, tmp_path: Path) -> None:
    # Not the experiments, although it has their name and is where one would import from.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise SystemExit('not these')\n")
    done = hsplit(site, tmp_path, "bench", "aggregation", "--quick", "--part", "size")
    assert str(site) in done.stderr
    results = tmp_path / "benchmarks" / "results" / "aggregation"
    assert {file.name for file in results.iterdir()} == {"size.csv", "size.md"}
