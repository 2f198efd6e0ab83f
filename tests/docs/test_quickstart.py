"""The quick start, from the first plan to the adapter in plain transformers, as the page has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsplit.observe.run_list import list_runs
from tests.documents import DOCS, ROOT, blocks

pytestmark = pytest.mark.real


def test_the_quick_start(tmp_path: Path) -> None:
    """In an environment that is there already, so without the commands that install it."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "hsplit"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from hsplit.cli import run; run()' \"$@\"\n")
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    shells = {"bash": ["bash", "-euc"], "python": [sys.executable, "-c"]}
    page = [block for block in blocks(DOCS / "quickstart.md") if block.language in shells]
    assert [block.language for block in page] == ["bash"] * 5 + ["python"] * 2
    for block in page:
        done = subprocess.run(
            [*shells[block.language], block.text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.text}{done.stdout[-2000:]}{done.stderr[-3000:]}"
        if "generate" in block.text:
            assert "name[The Mill]" in done.stdout
    runs = list_runs(tmp_path / "runs")
    assert [run.state for run in runs] == ["complete"] * 2
    assert (tmp_path / "first.html").is_file() and (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
