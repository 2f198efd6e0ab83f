"""Many clients on one machine: memory stays flat once a run has settled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.drill

ROOT = Path(__file__).parents[2]


def test_memory_stays_flat_with_many_clients(tmp_path: Path) -> None:
    arguments = ["--clients", "20", "--rounds", "12", "--steps", "1", "--to", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "benchmarks.clients", *arguments], check=True, cwd=ROOT)
    rounds = pd.read_csv(tmp_path / "clients.csv", comment="#").set_index("round")
    assert list(rounds.index) == list(range(1, 13))
    for name in ("driver_mb", "scheduler_mb", "server_mb"):
        # The residual is at its cap, and each round is the same.
        assert rounds.loc[12, name] <= 1.1 * rounds.loc[6, name] + 2.0, name
    assert (tmp_path / "clients.svg").stat().st_size > 0
