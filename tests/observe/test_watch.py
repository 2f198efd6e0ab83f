"""``hsplit watch``: a run as its directory tells it, while it goes on and afterwards."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

import hsplit
from hsplit.cli import main
from hsplit.config import load_run_config
from hsplit.config.reading import from_plain
from hsplit.observe import watch as watching
from hsplit.observe.displays import LiveDisplay
from hsplit.observe.events import EventLog, finite
from hsplit.observe.progress_file import ProgressFile, StepRecord, read_step_record
from hsplit.observe.tables import MetricsRow, MetricsTable, PlanRow, plan_rows
from hsplit.planning.plan import Plan
from hsplit.run_directory import Driver, RunDirectory
from tests.observe.conftest import metrics_row
from tests.observe.test_displays import recorded, written

ROUNDS, STEPS = 2, 4


class Ticking:
    """The driver's clock."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    ticking = Ticking()
    now = Mock(now=lambda zone: datetime.fromtimestamp(ticking.now, zone))
    monkeypatch.setattr("hsplit.observe.events.datetime", now)
    return ticking


class Driven:
    """A run whose driver writes what the coordinator and the launcher write, a piece at a time."""

    def __init__(self, runs: Path, clock: Ticking, plan: Plan, other: Plan | None = None) -> None:
        self.directory = RunDirectory.create(runs, "one")
        load_run_config("hetero").save(self.directory.config)
        self.clock, self._plan, self._other = clock, plan, other
        self._rows = MetricsTable(self.directory.metrics, MetricsRow)
        self._plans = MetricsTable(self.directory.plan, PlanRow)

    def goes_on(self, until: int = ROUNDS * STEPS) -> Iterator[None]:
        with EventLog(self.directory.events) as log, ProgressFile(self.directory.progress, self.clock) as file:
            file.started("one", ["model    tiny"])
            yield
            log.write("planned", "plan by nothing", round=0, plan=self._plan.to_json())
            self._round(log, file, 0)
            log.write("training", "training begins with step 1", step=1)
            yield
            for step in range(1, until + 1):
                self.clock.now += 3.0
                file.step(1 + (step - 1) // STEPS, ROUNDS, step, ROUNDS * STEPS, {"laptop": 9.0 - step}, {})
                log.write("left_out", f"step {step}: phone-0 is late", client="phone-0", step=step)
                yield
                if step % STEPS == 0:
                    self._round(log, file, step // STEPS)
                    if step == STEPS and self._other is not None:
                        log.write("planned", "plan by nothing", round=1, plan=self._other.to_json())
                    yield

    def _round(self, log: EventLog, file: ProgressFile, done: int) -> None:
        row = metrics_row(done, step=done * STEPS)
        self._rows.append(row)
        self._plans.append(*plan_rows(done, self._plan))
        log.write("round", f"round {done}", **asdict(row), client_tokens={"laptop": row.tokens})
        file.round_done(row, [], [])


@pytest.fixture
def between_looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[None]], None]:
    """Have something happen in place of each pause of the watcher."""

    def have(happenings: Iterator[None]) -> None:
        monkeypatch.setattr(watching.time, "sleep", lambda _: next(happenings, None))

    return have


def test_a_run_is_followed_to_its_end(
    tmp_path: Path, clock: Ticking, plan: Plan, other_plan: Plan, between_looks: Callable[[Iterator[None]], None]
) -> None:
    run = Driven(tmp_path, clock, plan, other_plan)

    def happenings() -> Iterator[None]:
        with run.directory.driven():
            yield
            yield from run.goes_on()
            with EventLog(run.directory.events) as log:
                log.write("finished", "all rounds are done")
            yield

    going_on = happenings()
    next(going_on)  # it is driven before anybody watches
    between_looks(going_on)
    result = CliRunner().invoke(main, ["watch", str(run.directory.path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:2] == ["run one", "  model    tiny"]
    order = ["plan:", "round 0 done", "round 1/2 step 1/8", "round 1 done", "new plan:", "round 2/2 step 5/8"]
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in [*order, "round 2 done"]]
    assert places == sorted(places)
    assert "note: step 1: phone-0 is late" in lines and "note: step 2: phone-0 is late" not in lines
    assert "round 2/2 step 5/8, loss laptop 4.000 (62%, 15 s elapsed, about 9.000 s left)" in lines
    assert lines[-2:] == [
        f"adapter  {run.directory.path}/adapter",
        f"report   {run.directory.path}/report.html",
    ]


def test_what_launch_shows_is_what_watch_shows_on_a_terminal(tmp_path: Path, clock: Ticking, plan: Plan) -> None:
    run = Driven(tmp_path, clock, plan)
    for _ in run.goes_on():
        pass
    with EventLog(run.directory.events) as log:
        log.write("finished", "all rounds are done")
    console = recorded()
    state = hsplit.watch(run.directory.path, display=LiveDisplay(console=console))
    assert (state.state, state.round) == ("complete", 2)
    last = written(console).rpartition("┏")[2]
    laptop = next(line for line in last.splitlines() if "laptop" in line)
    assert "3 of 6" in laptop and "1.000" in laptop
    assert "round 2/2, step 8/8: 100%" in last
    assert "validation perplexity 21.75 (round 0) → 10.88 (round 1) → 7.250 (round 2)" in last


@pytest.mark.parametrize(
    ("ending", "checkpoint", "said"),
    [
        ("failed", True, ["failed: it has failed", "go on from the last checkpoint with: hsplit resume"]),
        (
            "failed",
            False,
            ["failed: it has failed", "there is no checkpoint yet; begin it again from round 0 with: hsplit"],
        ),
        ("stopped", True, ["note: it has stopped", "go on from the last checkpoint with: hsplit resume"]),
        ("", True, ["interrupted after round 1: whoever drove it is gone", "go on from the last checkpoint with:"]),
    ],
)
def test_a_run_that_has_ended_says_how_to_go_on(
    tmp_path: Path, clock: Ticking, plan: Plan, ending: str, checkpoint: bool, said: list[str]
) -> None:
    run = Driven(tmp_path, clock, plan)
    for _ in run.goes_on(until=STEPS + 1):
        pass
    if ending:
        with EventLog(run.directory.events) as log:
            log.write(ending, f"it has {ending}")
    if checkpoint:
        (run.directory.checkpoints / "round-0001").mkdir()
    result = CliRunner().invoke(main, ["watch", str(run.directory.path)])
    assert result.exit_code == 1
    assert [line[: len(start)] for line, start in zip(result.output.splitlines()[-2:], said, strict=True)] == said


def test_torn_and_strange_files_do_no_harm(tmp_path: Path, clock: Ticking, plan: Plan) -> None:
    run = Driven(tmp_path, clock, plan)
    for _ in run.goes_on():
        pass
    whole = {path: path.read_bytes() for path in (run.directory.events, run.directory.progress, run.directory.plan)}
    for path, content in whole.items():
        for keep in (0, 1, len(content) // 3, len(content) - 1):
            path.write_bytes(content[:keep])
            assert hsplit.watch(run.directory.path, display=LiveDisplay(console=recorded())).state == "interrupted"
        path.write_bytes(b"[1]\n\xff\x00" + content[::-1])
        assert hsplit.watch(run.directory.path, display=LiveDisplay(console=recorded())).state == "interrupted"
        path.write_bytes(content)


def test_a_resumed_run_is_not_shown_by_what_its_first_driver_left(
    tmp_path: Path,
    clock: Ticking,
    plan: Plan,
    between_looks: Callable[[Iterator[None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Driven(tmp_path, clock, plan)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "first-host")
        for _ in run.goes_on(until=STEPS + 1):
            pass
        with EventLog(run.directory.events) as log:
            log.write("failed", "the first driver has failed")

    def happenings() -> Iterator[None]:
        with run.directory.driven():
            yield
            yield
            with ProgressFile(run.directory.progress, clock) as file:
                file.started("one", ["model    tiny, resumed"])
                with EventLog(run.directory.events) as log:
                    log.write("resumed", "resumed from round-0001")
            yield

    going_on = happenings()
    next(going_on)
    between_looks(going_on)
    result = CliRunner().invoke(main, ["watch", str(run.directory.path)])
    assert "model    tiny, resumed" in result.output and "model    tiny\n" not in result.output
    assert "note: resumed from round-0001" in result.output
    assert "the first driver has failed" not in result.output
    assert result.exit_code == 1 and "interrupted after round 1" in result.output


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["watch", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
    assert "there is no such directory; give a run, as runs/NAME" in result.output


def test_steps_are_on_the_disk_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    path, clock = tmp_path / "progress.json", Ticking()
    begun = clock.now

    def step() -> int:
        found = read_step_record(path)
        return -1 if found is None else found.step

    with ProgressFile(path, clock) as file:
        file.started("one", ["model"])
        assert step() == 0
        on_disk = []
        for number in range(5, 10):
            clock.now += 0.5
            file.step(1, 2, number, 20, {f"c{number}": float("nan")}, {"c5": "training"})
            on_disk.append(step())
        assert on_disk == [0, 6, 6, 8, 8]
        file.round_done(metrics_row(1), [], [])
        assert step() == 9
        file.step(1, 2, 10, 20, {}, {"c5": "waiting"})
    found = read_step_record(path)
    assert found is not None and found.losses.keys() == {f"c{number}" for number in range(5, 10)}
    assert (found.driver, found.begun, found.lines, found.step) == (Driver.here(), begun, ("model",), 10)
    assert (found.first_step, found.first_time, found.time) == (5, begun + 0.5, begun + 2.5)
    assert found.states == {"c5": "waiting"}
    assert from_plain(finite(asdict(found)), StepRecord, "here").states == found.states
