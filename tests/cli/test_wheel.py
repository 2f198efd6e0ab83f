"""A wheel, installed outside the checkout, finds its presets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_plan_from_an_installed_wheel(tmp_path: Path, models: dict[str, Path]) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(ROOT)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import hsplit, sys; from hsplit.cli import main; print(hsplit.__file__, file=sys.stderr); main()"
    plan = ["plan", "--cluster", "hetero", "--policy", "splitlora", "--set", f"model={models['llama']}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *plan],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        text=True,
        capture_output=True,
        check=True,
    )
    assert str(tmp_path / "site") in done.stderr
    assert "workstation" in done.stdout
