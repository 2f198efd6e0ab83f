"""TensorBoard and Weights & Biases, read back with their own libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.config import RunConfig, load_run_config
from hsplit.errors import InputError
from hsplit.observe.logs import MOST_HOLDERS, check_logs, logs_of, round_figures
from hsplit.observe.observer import Observer, Observers
from hsplit.observe.tables import plan_rows
from hsplit.planning.plan import Plan
from hsplit.run_directory import RunDirectory
from tests.in_process import Recorder
from tests.observe.conftest import metrics_row

STEPS = 3


def logged_run(library: str) -> RunConfig:
    return load_run_config("hetero", overrides={"log": [library], "rounds": 2, "local_steps": STEPS})


def play(display: Observer, plan: Plan, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of a run, each with its own number as its loss, and the rounds that end there."""
    display.started("one", ["model    tiny"])
    display.plan(plan)
    if first == 1:
        display.round_done(metrics_row(0, step=0), plan_rows(0, plan), [])
    steps(display, plan, first, last)


def steps(display: Observer, plan: Plan, first: int, last: int) -> None:
    for step in range(first, last + 1):
        display.step(1 + (step - 1) // STEPS, 2, step, 2 * STEPS, {"phone-0": float(step), "laptop": -float(step)}, {})
        if step % STEPS == 0:
            done = step // STEPS
            rows = plan_rows(done, plan, {"phone-0": 123_000_000}, {"server": 0.75})
            display.round_done(metrics_row(done, step=step), rows, [])


def tensorboard_scalars(directory: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(directory.tensorboard), size_guidance={accumulator.SCALARS: 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_has_the_steps_and_the_rounds(tmp_path: Path, plan: Plan) -> None:
    pytest.importorskip("tensorboard")
    directory = RunDirectory.create(tmp_path, "one")
    with Observers(Recorder(), *logs_of(logged_run("tensorboard"), directory, 0)) as display:
        play(display, plan, 1, 6)
        display.note("laptop was late")
    found = tensorboard_scalars(directory)
    assert found["loss/phone-0"] == [(step, float(step)) for step in range(1, 7)]
    expected = [(0, 21.75), (3, 10.875), (6, 7.25)]
    assert found["validation/perplexity"] == expected
    assert found["memory_measured_bytes/phone-0"] == [(3, 123_000_000), (6, 123_000_000)]
    assert found["step_time_measured_s/server"] == [(3, 0.75), (6, 0.75)]
    assert found["split/laptop"] == [(0, 3), (3, 3), (6, 3)] and "split/watch" not in found


def test_a_resumed_run_goes_on_in_the_same_tensorboard_log(tmp_path: Path, plan: Plan) -> None:
    pytest.importorskip("tensorboard")
    directory, run = RunDirectory.create(tmp_path, "one"), logged_run("tensorboard")
    with Observers(Recorder(), *logs_of(run, directory, 0)) as display:
        play(display, plan, 1, 5)
        # Two steps after its last checkpoint the driver is killed.
    with Observers(Recorder(), *logs_of(run, directory, 3)) as display:
        play(display, plan, 4, 6)
    found = tensorboard_scalars(directory)
    assert [step for step, _ in found["loss/phone-0"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["validation/loss"]] == [0, 3, 6]


def test_a_repeated_round_takes_the_place_of_its_first_try(tmp_path: Path, plan: Plan) -> None:
    pytest.importorskip("tensorboard")
    directory = RunDirectory.create(tmp_path, "one")
    with Observers(Recorder(), *logs_of(logged_run("tensorboard"), directory, 0)) as display:
        play(display, plan, 1, 5)
        steps(display, plan, 4, 6)
    assert [step for step, _ in tensorboard_scalars(directory)["loss/laptop"]] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The library as at the start of a process that has none of its variables."""
    library = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    library.teardown()
    yield library
    library.teardown()


def wandb_records(directory: RunDirectory) -> tuple[list[str], list[dict[str, Any]]]:
    """The ids of the runs, and the rows of their histories, in the order of their files."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, rows = [], []
    for file in sorted(directory.wandb.glob("offline-run-*/run-*.wandb")):
        for data in _log_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return ids, rows


def _log_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's own header of seven bytes."""
    block, header, record = 32768, 7, b""
    at = header
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_works_offline_and_a_resumed_run_is_the_same_one_of_theirs(
    tmp_path: Path, plan: Plan, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory, run = RunDirectory.create(tmp_path, "one"), logged_run("wandb")
    check_logs(run)
    shown = Recorder()
    with Observers(shown, *logs_of(run, directory, 0)) as display:
        play(display, plan, 1, 3)
    with Observers(shown, *logs_of(run, directory, 3)) as display:
        play(display, plan, 4, 6)
    assert not shown.notes
    # Its service writes in a process of its own, which ends with this.
    wandb.teardown()
    ids, rows = wandb_records(directory)
    assert len(set(ids)) == 1
    losses = [(row["step"], row["loss/phone-0"]) for row in rows if "loss/phone-0" in row]
    assert losses == [(step, float(step)) for step in range(1, 7)]
    perplexities = [(row["step"], row["validation/perplexity"]) for row in rows if "validation/perplexity" in row]
    assert perplexities == [(0, 21.75), (3, 10.875), (6, 7.25)]


def test_wandb_that_nobody_is_signed_in_to_is_refused_before_anything_starts(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    said = "job.log: wandb has no API key; run `wandb login`, or set WANDB_MODE=offline"
    with pytest.raises(InputError, match=re.escape(said)):
        check_logs(logged_run("wandb"))
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check_logs(logged_run("wandb"))


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == library else real(name, *a))
    arguments = ["launch", "--cluster", "hetero", "--set", f"log=[{library}]", "--runs-dir", str(tmp_path / "runs")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    expected = f"error: job.log: {library} is not installed; run: pip install 'hsplit[{library}]', or leave it out\n"
    assert result.output == expected
    assert not (tmp_path / "runs").exists()


def test_a_library_is_not_taken_for_there_because_of_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_such_library").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    run = logged_run("wandb")
    job = run.job.model_copy(update={"log": ("no_such_library",)})
    with pytest.raises(InputError, match="no_such_library is not installed"):
        check_logs(run.model_copy(update={"job": job}))


@pytest.mark.parametrize("given", ["[tensorbord]", "tensorboard", "[wandb, wandb]"])
def test_what_log_may_be_is_said(given: str) -> None:
    with pytest.raises(InputError, match=r"--set log: .*(tensorboard|once)"):
        load_run_config("hetero", overrides=[f"log={given}"])


def test_many_holders_have_no_figures_of_their_own(plan: Plan) -> None:
    rows = plan_rows(1, plan) * MOST_HOLDERS
    assert "split/laptop" in round_figures(metrics_row(1), plan_rows(1, plan))
    assert "split/laptop" not in round_figures(metrics_row(1), rows)
