"""Clients that only compute forward are a step ahead: only the order of calls changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsplit.config import Importance, Job, Policy
from hsplit.observe.events import read_events
from hsplit.run.coordinator import Coordinator
from tests.faulty import Fault, FaultyInProcess
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples, reached_by, rows_of

SETTINGS: dict[str, Any] = {"base": "fp32", "rounds": 2, "local_steps": 4, "lr": 1e-2, "batch_size": 2}
SETTINGS["pipeline"] = {"ahead": True}
POLICY = Policy(name="hsplitlora", init="shared", importance=Importance(metric="equal"))


def made(model: Path, to: Path, **job: Any) -> Coordinator:
    """A run of three clients, the first of which only computes forward."""
    to.mkdir()
    settings = SETTINGS | job
    plan = fixed_plan(model, Job.model_validate(settings), [2, 1, 2], [0, 2, 2], 2)
    assert plan.forward_only == {"c0"}
    shares = {f"c{i}": random_examples(24, seed=i) for i in range(3)}
    return coordinator(model, to, plan, shares, Recorder(), POLICY, **settings)


def metrics(run: Coordinator) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("wall_time_s")} for row in rows_of(run)]


MORE = {"pipeline": {"microbatches": 2, "ahead": True}, "grad_accumulation": 2, "dropout": 0.1}


@pytest.mark.parametrize("job", [{}, MORE])
def test_what_is_learned_and_sent_does_not_change(models: dict[str, Path], tmp_path: Path, job: dict[str, Any]) -> None:
    ahead = made(models["llama"], tmp_path / "ahead", **job)
    pipeline = {**job.get("pipeline", {}), "ahead": False}
    in_turn = made(models["llama"], tmp_path / "in-turn", **{**job, "pipeline": pipeline})
    assert ahead.run() and in_turn.run()
    assert metrics(ahead) == metrics(in_turn)
    assert rows_of(ahead)[-1]["val_loss"] < rows_of(ahead)[0]["val_loss"]


def _asked(run: Coordinator, steps: int) -> list[tuple[str, str, int]]:
    asked: list[tuple[str, str, int]] = []
    executor = run._executor
    perform = executor.perform  # type: ignore[attr-defined]  # in-process by construction

    def watched(actor: str, method: str, *arguments: Any) -> Any:
        asked.append((actor, method, arguments[0]))
        return perform(actor, method, *arguments)

    run.start()
    run.begin_round()
    executor.perform = watched  # type: ignore[attr-defined]
    for step in range(steps):
        run.local_step(step)
    return asked


def test_the_next_front_is_asked_for_before_the_server_computes(models: dict[str, Path], tmp_path: Path) -> None:
    asked = _asked(made(models["llama"], tmp_path / "run"), 4)
    steps = range(4)
    # Its own calls have the order of any client's.
    own = [(method, step) for actor, method, step in asked if actor == "c0"]
    assert own == [(method, step) for step in steps for method in ("forward", "backward")]
    assert own == [(method, step) for actor, method, step in asked if actor == "c1"]
    for step in steps:
        server = asked.index(("server", "train_step", step))
        # The round's last step is as far as it goes.
        assert (("c0", "forward", step + 1) in asked[:server]) == (step < 3)
        assert ("c1", "forward", step + 1) not in asked[:server]


def test_with_labels_at_home_it_waits_for_its_tail(models: dict[str, Path], tmp_path: Path) -> None:
    asked = _asked(made(models["llama"], tmp_path / "run", privacy={"labels": "client"}), 2)
    own = [(method, step) for actor, method, step in asked if actor == "c0"]
    assert own == [(method, step) for step in range(2) for method in ("forward", "tail", "backward")]


@pytest.mark.parametrize(("method", "nth"), [("forward", 3), ("forward", 4), ("forward", 7), ("backward", 2)])
@pytest.mark.parametrize("kind", ["died", "hang", "memory", "refused"])
def test_a_failure_ahead_of_the_others_is_found_in_its_step(
    models: dict[str, Path], tmp_path: Path, method: str, nth: int, kind: str
) -> None:
    inside = made(models["llama"], tmp_path / "run", rounds=3)
    fault = Fault("c0", method, nth, kind)
    run = reached_by(FaultyInProcess(inside._executor, [fault]), inside)  # type: ignore[arg-type]
    assert run.run()
    assert run._executor.happened == [fault]  # type: ignore[attr-defined]
    events = [e for e in read_events(run.context.directory.events) if e["event"] in ("lost", "left_out")]
    # Without enough measurements for a deadline, a late client is waited for.
    assert len(events) <= 1 and (events or kind == "hang")
    assert all(event["client"] == "c0" for event in events)
    assert [row["available_clients"] for row in rows_of(run)][-1] == 3
    actor = run._executor.actors["c0"]  # type: ignore[attr-defined]
    assert not actor._sent and not actor.data._begun
