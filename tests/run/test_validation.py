"""Validations at some rounds only, and the times with and without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsplit.config import Job
from hsplit.observe.events import read_events
from hsplit.observe.run_list import run_state
from hsplit.observe.tables import MetricsRow, PlanRow, read_rows
from hsplit.report.report import outcome_text
from hsplit.report.run_record import load_run
from hsplit.run.checkpoint import latest_checkpoint
from hsplit.run.coordinator import Coordinator
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples, rows_of

ROUNDS = 5


def a_run(model: Path, to: Path, recorder: Recorder, directory: RunDirectory | None = None, **job: Any) -> Coordinator:
    plan = fixed_plan(model, Job(), [1, 2], [2, 4], 4)
    shares = {"c0": random_examples(12, 0), "c1": random_examples(12, 1)}
    return coordinator(model, to, plan, shares, recorder, directory=directory, rounds=ROUNDS, local_steps=2, **job)


def without_validation(run: Coordinator) -> list[dict[str, Any]]:
    other = (
        "val_loss",
        "val_ppl",
        "worst_ppl",
        "wall_time_s",
        "virtual_time_s",
        "train_wall_time_s",
        "bytes_up",
        "bytes_down",
    )
    return [{key: value for key, value in row.items() if key not in other} for row in rows_of(run)]


@pytest.mark.parametrize(("every", "validated"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])])
def test_rounds_in_between_are_not_validated(
    models: dict[str, Path], tmp_path: Path, every: int, validated: list[int]
) -> None:
    always = a_run(models["llama"], tmp_path / "always", Recorder())
    assert always.run()
    recorder = Recorder()
    run = a_run(models["llama"], tmp_path / "some", recorder, validation={"every": every})
    assert run.run()
    assert [row.round for row in recorder.rows if row.val_ppl is not None] == validated
    # Training, and its virtual time, do not know of validations.
    assert without_validation(run) == without_validation(always)
    assert [row.val_loss for row in recorder.rows if row.round in validated] == [
        row.val_loss for row in always.rows if row.round in validated
    ]
    own = {(row.round, row.name): row.val_ppl for row in read_rows(run.context.directory.plan, PlanRow)}
    for row in recorder.rows:
        of_clients = [own[row.round, name] for name in ("c0", "c1")]
        if row.val_ppl is None:
            assert of_clients == [None, None] and row.worst_ppl is None
        else:
            assert row.worst_ppl == max(of_clients) > row.val_ppl > min(of_clients)
        assert own[row.round, "server"] is None
        done = sum(round_ <= row.round for round_ in validated)
        # Half a second each, by the test's clock.
        assert row.train_virtual_time_s == row.virtual_time_s - 0.5 * done
        assert row.train_wall_time_s is not None and 0 < row.train_wall_time_s < row.wall_time_s


def test_everybody_who_reads_the_table_copes(models: dict[str, Path], tmp_path: Path) -> None:
    recorder = Recorder()
    run = a_run(models["llama"], tmp_path, recorder, validation={"every": 4})
    recorder.after_step = lambda step: setattr(run, "stopping", step == 2 * 3 + 1)
    assert not run.run()
    rows, directory = recorder.rows, run.context.directory
    assert [row.val_ppl for row in rows[1:]] == [None] * 3
    assert read_rows(directory.metrics, MetricsRow) == rows
    texts = [event["text"] for event in read_events(directory.events) if event["event"] == "round"]
    assert texts[1:] == [f"round {round_}: not validated" for round_ in (1, 2, 3)]
    run.context.declared.save(directory.config)
    assert run_state(directory).val_ppl == rows[0].val_ppl
    assert "Validation perplexity stayed at" in outcome_text(load_run(directory.path))
    # Resumed, it validates in the rounds in which the whole run would have.
    path, _ = latest_checkpoint(directory.checkpoints)
    resumed = a_run(models["llama"], tmp_path, Recorder(), directory, validation={"every": 4})
    assert resumed.run(path)
    whole = a_run(models["llama"], tmp_path / "whole", Recorder(), validation={"every": 4})
    assert whole.run()
    for one, other in zip(rows_of(resumed), rows_of(whole), strict=True):
        assert {k: v for k, v in one.items() if not k.endswith("wall_time_s")} == {
            k: v for k, v in other.items() if not k.endswith("wall_time_s")
        }
