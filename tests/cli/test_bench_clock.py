"""Parts of ``hsplit bench clock``, without quotas and without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.clock import (
    QUICK,
    Budgets,
    Experiment,
    HolderRow,
    Row,
    Scale,
    Setting,
    holder_table,
    plot,
    predicted,
    shares_of,
)
from benchmarks.clock import table as clock_table
from benchmarks.cpu_quota import PERIOD_US, CpuQuotas
from hsplit.errors import InputError
from hsplit.models.lookup import find_model
from hsplit.run.in_process import local_run
from hsplit.run.inputs import read_inputs
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder

TINY = replace(QUICK, hidden=32, batch=2, length=16, rounds=3)


def test_shares_have_their_mean_and_spread_with_heterogeneity() -> None:
    scale = Scale()
    levels = [shares_of(scale, variation, 1) for variation in scale.heterogeneity]
    for shares in levels:
        assert mean(shares.values()) == pytest.approx(scale.mean_share)
        assert sum(shares.values()) + scale.server_share < 2
    assert set(levels[0].values()) == {scale.mean_share}
    spreads = [max(shares.values()) - min(shares.values()) for shares in levels]
    assert spreads == sorted(spreads) and spreads[1] > 0
    assert shares_of(scale, 0.6, 1) == levels[1] != shares_of(scale, 0.6, 2)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize(("parts", "paced"), [(1, False), (2, False), (1, True)])
def test_what_is_predicted_from_the_file_is_what_a_run_accounts(
    tmp_path: Path, labels: str, parts: int, paced: bool
) -> None:
    setting = Setting(0.3, parts, labels, paced)
    experiment = Experiment(tmp_path, TINY, 1.0, None)
    budgets = Budgets({"client-0": 2e8, "client-1": 1e8, "server": 5e8}, 1e-3, 1e8)
    run = experiment.configured(budgets, setting)
    model = find_model(run.job.model)
    round_s, step_s = predicted(run, model.directory)
    assert 0 < TINY.steps * step_s < round_s
    recorder = Recorder()
    directory = RunDirectory.create(tmp_path, "run")
    local_run(run, model.spec, directory, read_inputs(run, model), recorder).run()
    virtual = [row.virtual_time_s for row in recorder.rows]
    # All examples have the tokens that plans reckon with, so a late round is what was predicted: the residual is at its
    # cap. Nothing is scored for a plan in the last one.
    assert virtual[-2] - virtual[-3] == pytest.approx(round_s, rel=1e-6)
    emulated = experiment.configured(budgets, setting, emulated=True)
    assert predicted(emulated, model.directory) == (round_s, step_s)


def test_tables_and_figure_have_every_setting(tmp_path: Path) -> None:
    ways = [(0.3, 1, "server", True), (0.3, 2, "server", False)]
    rows = [Row(*way, "1 2", "3 1", 4.0, 4.0, 4.4, 4.2, 1.0, 1.1, 1.0, 0.97, 2) for way in ways]
    columns, cells = clock_table(rows)
    assert len(columns) == len(cells[0]) and cells[1][-4:] == ["1.10", "1.05", "0.95", "0.97"]
    holders = [HolderRow(*way, "client-0", 0.2, 10.0, 1, 0.5, 0.5, 0.45) for way in ways]
    columns, cells = holder_table(holders)
    assert len(cells) == 1 and len(cells[0]) == len(columns)
    plot(rows, tmp_path / "clock.svg")
    assert (tmp_path / "clock.svg").stat().st_size > 0


def _first_hierarchy(root: Path) -> Path:
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    return root / "cpu"


def _second_hierarchy(root: Path) -> Path:
    (root / "cgroup.subtree_control").write_text("cpuset cpu memory")
    return root


@pytest.mark.parametrize(
    ("make", "quota"),
    [(_first_hierarchy, ("cpu.cfs_quota_us", "5000")), (_second_hierarchy, ("cpu.max", f"5000 {PERIOD_US}"))],
)
def test_a_share_of_a_core_is_a_quota_of_its_period(tmp_path: Path, make: Any, quota: tuple[str, str]) -> None:
    parent = make(tmp_path)
    quotas = CpuQuotas(tmp_path)
    # Directories of control groups go with their files, which those of a test do not.
    quotas._remove = lambda group: None  # type: ignore[method-assign]
    with quotas.applied({123: 0.25}):
        (group,) = [path for path in parent.iterdir() if path.name.endswith("-123")]
        assert (group / "cgroup.procs").read_text() == "123"
        name, value = quota
        assert (group / name).read_text() == value


def test_without_control_groups_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no control group of CPU time"):
        CpuQuotas(tmp_path)
