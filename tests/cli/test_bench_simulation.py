"""`hsplit bench simulation`: its tables, and the speeds of its clusters."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import common
from benchmarks import simulation as bench
from hsplit.models.spec import ModelSpec
from hsplit.planning.scheduler import Scheduler
from hsplit.simulation.rounds import simulated


def test_the_table_says_how_far_off_a_simulation_is() -> None:
    columns, cells = bench.checked_table([bench.Checked(5, "round", 10.0, 9.5, -0.05)])
    assert cells == [["5", "round", "10.00", "9.50", "-5.0%"]]
    assert len(columns) == len(cells[0])
    assert bench.cost_table([bench.Cost(10_000, 20, 12.34, 567.8)])[1] == [["10,000", "20", "12.3", "568"]]


def test_a_simulation_tells_its_own_peak_memory() -> None:
    # What waiting for a process tells of its memory is never less than its parent's.
    ballast = b"x" * 1_500_000_000
    cost = bench._cost(10, 2, Console(quiet=True))
    assert 100 < cost.peak_mb < len(ballast) / 1e6 and cost.wall_s > 0


def test_its_clusters_take_as_long_as_wanted(tmp_path: Path) -> None:
    model, data = common.tiny_model(tmp_path / "model"), common.texts(tmp_path / "texts.csv", 100)
    run = bench._configured(tmp_path, model, data, 5, 2)
    told = simulated(run, Scheduler(run, ModelSpec.read(model)), 2).rounds[-1]
    client_s, server_s = bench.SECONDS[5]
    # Drawn speeds only make the slowest faster than its group's slowest may be.
    assert told.step_s < 1.6 * client_s + server_s
    assert told.step_s * told.server_share == pytest.approx(server_s, rel=1e-3)
