"""Clients that join, leave, are lost or away, and clients drawn for a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsplit.actors.executor import InProcess
from hsplit.api import join, leave
from hsplit.config import ClientConfig, Job, Policy, RunConfig
from hsplit.errors import InputError
from hsplit.lora.holder import Holder
from hsplit.models.spec import ModelSpec
from hsplit.observe.events import read_events
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import Plan
from hsplit.run.coordinator import Coordinator
from hsplit.run.inbox import post_budget
from hsplit.run.state import Status
from hsplit.run_directory import RunDirectory
from tests.faulty import Fault, FaultyInProcess
from tests.in_process import Recorder, planned_run, random_examples, reached_by, rows_of
from tests.run.test_adaptation import JOB, a_run, bytes_for, part, plans_by_round, saved, shares

EQUAL = Policy.model_validate({"importance": {"metric": "equal"}})


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["llama"]


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("".join(f"{e.prompt}||{e.response.strip()}\n" for e in random_examples(12, seed=9, longest=4)))
    return path


def newcomer(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    memory_gb = bytes_for(model, 2, 16) * 1.001 / 1e9
    return {"name": "tablet", "memory_gb": memory_gb, "tflops": 1.0, "data": str(data), **changes}


def asking(run: RunConfig, model: Path, directory: RunDirectory, asks: dict[int, Any]) -> tuple[Coordinator, Recorder]:
    """A run in which ``asks[step]()`` is called after that step, once."""
    recorder, left = Recorder(), dict(asks)
    recorder.after_step = lambda step: left.pop(step, lambda: None)()
    return planned_run(run, model, directory, shares(run), recorder), recorder


def events(directory: RunDirectory, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(directory.events) if event["event"] in kinds]


# -- joining and leaving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["hsplitlora", "fedlora"])
def test_a_client_joins_and_trains_from_the_next_round_on(
    model: Path, tmp_path: Path, own_data: Path, policy: str
) -> None:
    whole = {"placement": "full", "ranks": "uniform", "aggregation": "fedavg", "init": "shared"}
    run = a_run(
        model, Policy.model_validate({"importance": {"metric": "equal"}} | (whole if policy == "fedlora" else {}))
    )
    if policy == "fedlora":
        roomy = tuple(client.changed({"memory_gb": 1.0}) for client in run.clients)
        run = run.model_copy(update={"clients": roomy})
    directory = saved(run, tmp_path)
    client = newcomer(model, own_data, memory_gb=1.0)
    going, recorder = asking(run, model, directory, {3: lambda: join(directory.path, client)})
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 3, 4, 4]
    assert part(plans_by_round(directory)[2], "tablet")["available"]
    assert "tablet" not in recorder.losses[3] and recorder.losses[4]["tablet"] > 0
    (joined,) = events(directory, "joined")
    assert (joined["client"], joined["round"]) == ("tablet", 2)
    # Its training is aggregated like any client's: it handed in adapters for its tokens.
    assert going._executor.actors["tablet"].holder.tokens.by_layer() == {}  # type: ignore[attr-defined]
    assert recorder.rows[-1].tokens > recorder.rows[0].tokens


def test_a_client_leaves_and_its_layers_go_to_the_server(model: Path, tmp_path: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)
    going, recorder = asking(run, model, directory, {1: lambda: leave(directory.path, "small")})
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 2, 2, 2]
    plan = plans_by_round(directory)[1]
    assert [client["name"] for client in plan["clients"]] == ["middle", "large"]
    assert "small" not in going._executor.actors  # type: ignore[attr-defined]
    assert [event["client"] for event in events(directory, "left")] == ["small"]


def test_who_has_left_comes_back_by_its_name(model: Path, tmp_path: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)
    asks = {1: lambda: leave(directory.path, "small"), 5: lambda: join(directory.path, "small")}
    going, recorder = asking(run, model, directory, asks)
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 2, 2, 3]
    assert part(plans_by_round(directory)[3], "small")["available"]


def test_a_group_joins_with_drawn_budgets(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)
    memory = bytes_for(model, 1, 1) / 1e9
    group = f"{{name: edge, count: 2, memory_gb: {{uniform: [{memory * 1.1}, {memory * 1.2}]}}, data: {own_data}}}"
    assert join(directory.path, group) == ("edge-0", "edge-1")
    going, recorder = asking(run, model, directory, {})
    assert going.run()
    # Taken at the first round's end, as any request.
    assert [row.available_clients for row in recorder.rows] == [3, 3, 5, 5, 5]


def test_a_run_broken_off_after_a_join_and_a_leave_goes_on_as_if_it_had_not(
    model: Path, tmp_path: Path, own_data: Path
) -> None:
    run = a_run(model)
    rows = []
    for name, stop in (("whole", False), ("broken", True)):
        (tmp_path / name).mkdir()
        directory = saved(run, tmp_path / name)

        def come_and_go(directory: RunDirectory = directory) -> None:
            join(directory.path, newcomer(model, own_data))
            leave(directory.path, "middle")

        def break_off(stop: bool = stop) -> None:
            if stop:
                raise KeyboardInterrupt

        going, recorder = asking(run, model, directory, {1: come_and_go, 5: break_off})
        if not stop:
            assert going.run()
            rows.append(recorder.rows)
            continue
        with pytest.raises(KeyboardInterrupt):
            going.run()
        # From before the requests were taken, with fresh processes: they are taken once more.
        again, seen = asking(run, model, directory, {})
        assert again.run(directory.checkpoints / "round-0001")
        rows.append(recorder.rows[:2] + seen.rows)
        assert {*again._executor.actors} == {"small", "large", "tablet", "server", "scheduler"}  # type: ignore[attr-defined]
    whole, broken = rows
    for column in ("val_loss", "train_loss", "virtual_time_s", "bytes_up", "bytes_down", "available_clients"):
        assert [getattr(r, column) for r in broken] == [getattr(r, column) for r in whole], column


@pytest.mark.parametrize("actor", ["server", "scheduler", "tablet", "large"])
def test_a_round_is_repeated_with_and_without_those_who_came_and_went(
    model: Path, tmp_path: Path, own_data: Path, actor: str
) -> None:
    """A failure right after the requests were taken: back to a checkpoint from before them."""
    run = a_run(model)
    run = run.model_copy(update={"job": Job.model_validate({**run.job.model_dump(), "faults": {"recovery": "repeat"}})})
    rows = []
    for name in ("whole", "disturbed"):
        (tmp_path / name).mkdir()
        directory = saved(run, tmp_path / name)

        def come_and_go(directory: RunDirectory = directory) -> None:
            join(directory.path, newcomer(model, own_data))
            leave(directory.path, "middle")

        going, _ = asking(run, model, directory, {3: come_and_go})
        if name == "disturbed":
            method = {"server": "train_step", "scheduler": "review"}.get(actor, "collect")
            nth = {"server": 6, "scheduler": 2, "tablet": 1, "large": 3}[actor]
            faulty = FaultyInProcess(going._executor, [Fault(actor, method, nth)])  # type: ignore[arg-type]
            going = reached_by(faulty, going)
        assert going.run()
        if name == "disturbed":
            assert len(events(directory, "repeated")) == 1
        assert {*going._executor.actors} == {"small", "large", "tablet", "server", "scheduler"}  # type: ignore[attr-defined]
        rows.append([{k: v for k, v in row.items() if not k.endswith("wall_time_s")} for row in rows_of(going)])
    assert rows[0] == rows[1]


def test_a_run_is_resumed_with_those_who_had_joined(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model)
    (tmp_path / "whole").mkdir()
    whole_dir = saved(run, tmp_path / "whole")
    going, whole = asking(run, model, whole_dir, {1: lambda: join(whole_dir.path, newcomer(model, own_data))})
    assert going.run()
    directory = saved(run, tmp_path)
    going, before = asking(run, model, directory, {1: lambda: join(directory.path, newcomer(model, own_data))})
    before.after_step = lambda step, ask=before.after_step: (ask(step), setattr(going, "stopping", step == 5))
    assert not going.run()
    (checkpoint,) = directory.checkpoints.glob("round-0002-step-*")
    again, after = asking(run, model, directory, {})
    assert again.run(checkpoint)
    rows = before.rows + after.rows
    assert [row.val_loss for row in rows] == [row.val_loss for row in whole.rows]
    assert [row.available_clients for row in rows] == [3, 3, 4, 4, 4]


def test_data_that_cannot_be_read_keeps_its_client_out_and_not_the_run(model: Path, tmp_path: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)
    client = newcomer(model, tmp_path / "nothing.csv")
    going, recorder = asking(run, model, directory, {1: lambda: join(directory.path, client)})
    assert going.run()
    assert {row.available_clients for row in recorder.rows} == {3}
    (note,) = [note for note in recorder.notes if "cannot join" in note]
    assert note.startswith("inbox: tablet cannot join: ") and "nothing.csv" in note


def test_a_name_that_was_refused_may_be_asked_for_anew(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)
    asks = {
        1: lambda: join(directory.path, newcomer(model, tmp_path / "typo.csv")),
        3: lambda: join(directory.path, newcomer(model, own_data)),
    }
    going, recorder = asking(run, model, directory, asks)
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 3, 4, 4]


def test_one_client_too_many_for_the_server_is_refused_and_the_run_goes_on(
    model: Path, tmp_path: Path, own_data: Path
) -> None:
    run = a_run(model, EQUAL)
    cost = CostModel(ModelSpec.read(model), JOB)
    ranks = {w.name: 1 for w in cost.model.weights if w.layer >= 1}
    full = cost.server_bytes([1, 1, 1], ranks) * 1.0001 / 1e9
    run = run.model_copy(update={"server": run.server.changed({"memory_gb": full})})
    directory = saved(run, tmp_path)
    going, recorder = asking(run, model, directory, {1: lambda: join(directory.path, newcomer(model, own_data))})
    assert going.run()
    assert {row.available_clients for row in recorder.rows} == {3}
    (note,) = [note for note in recorder.notes if "cannot join" in note]
    assert "tablet cannot join: server: memory_gb:" in note and "4 clients" in note
    assert "tablet" not in going._executor.actors  # type: ignore[attr-defined]


def test_a_budget_of_the_same_boundary_counts_for_who_joins(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model, EQUAL)
    cost = CostModel(ModelSpec.read(model), JOB)
    full = cost.server_bytes([1, 1, 1], {w.name: 1 for w in cost.model.weights if w.layer >= 1}) * 1.0001 / 1e9
    run = run.model_copy(update={"server": run.server.changed({"memory_gb": full})})
    directory = saved(run, tmp_path)

    def more() -> None:
        join(directory.path, newcomer(model, own_data))
        post_budget(directory, "server", {"memory_gb": 1.0})

    going, recorder = asking(run, model, directory, {1: more})
    assert going.run()
    assert recorder.rows[-1].available_clients == 4


@pytest.mark.parametrize("probing", [True, False])
def test_who_leaves_and_comes_back_at_once_begins_anew(model: Path, tmp_path: Path, probing: bool) -> None:
    run = a_run(model) if probing else a_run(model, EQUAL)
    directory = saved(run, tmp_path)

    def there_and_back() -> None:
        leave(directory.path, "middle")
        join(directory.path, "middle")

    going, recorder = asking(run, model, directory, {3: there_and_back})
    assert going.run()
    assert not events(directory, "lost", "repeated")
    assert {row.available_clients for row in recorder.rows} == {3}
    _same_weights(going, "large", "middle")


def test_a_plan_is_made_for_who_comes_whatever_min_rounds_says(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model, Policy.model_validate({"importance": {"metric": "equal"}, "replan": {"min_rounds": 10}}))
    directory = saved(run, tmp_path)
    going, recorder = asking(run, model, directory, {1: lambda: join(directory.path, newcomer(model, own_data))})
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [3, 3, 4, 4, 4]


def _same_weights(run: Coordinator, one: str, other: str) -> None:
    """Two clients continue from the same weight where both hold it: directions beyond a small rank are frozen."""
    actors = run._executor.actors  # type: ignore[attr-defined]  # in-process by construction
    ours, theirs = (_learned(actors[name].holder) for name in (one, other))
    both = ours.keys() & theirs.keys()
    assert any(ours[name].any() for name in both)
    for name in both:
        assert torch.dist(ours[name], theirs[name]) <= 1e-6 * ours[name].norm(), name


def _learned(holder: Holder) -> dict[str, Tensor]:
    """Sum of residual, directions frozen beside the adapter, and adapter, by weight; in fp64."""
    learned = {}
    for name in holder.adapters.names:
        residual = holder.segment.linears[name]._residual
        live = holder.adapters.live(name).to(torch.float64).dense()
        learned[name] = live if residual is None else live + residual.to(torch.float64).dense()
    return learned


# -- away -----------------------------------------------------------------------------------------------------------


class Homeless(InProcess):
    """Actors of which some have no node until they are let in."""

    def __init__(self, inside: InProcess, homeless: set[str]) -> None:
        rest = {name: actor for name, actor in inside.actors.items() if name not in homeless}
        super().__init__(rest, inside._make)
        self.homeless = homeless

    def away(self) -> list[str]:
        return sorted(self.homeless)

    def restart(self, actor: str) -> bool:
        return actor not in self.homeless and super().restart(actor)


def homeless(
    run: RunConfig, model: Path, directory: RunDirectory, who: set[str], asks: dict[int, Any]
) -> tuple[Coordinator, Recorder]:
    here, recorder = asking(run, model, directory, asks)
    executor = Homeless(here._executor, who)  # type: ignore[arg-type]
    return reached_by(executor, here), recorder


def test_a_late_client_takes_part_when_there_is_a_place(model: Path, tmp_path: Path) -> None:
    run = a_run(model)
    directory, who = saved(run, tmp_path), {"middle"}
    going, recorder = homeless(run, model, directory, who, {3: who.clear})
    assert going.run()
    assert [row.available_clients for row in recorder.rows] == [2, 2, 2, 3, 3] or [
        row.available_clients for row in recorder.rows
    ] == [2, 2, 3, 3, 3]
    assert [event["client"] for event in events(directory, "away")] == ["middle"]
    _same_weights(going, "large", "middle")


def test_a_late_client_without_a_part_is_not_called_when_it_gets_one(model: Path, tmp_path: Path) -> None:
    run = a_run(model)
    small = run.clients[1].changed({"memory_gb": 1e-6})
    run = run.model_copy(update={"clients": (run.clients[0], small, run.clients[2])})
    directory, who = saved(run, tmp_path), {"middle"}
    roomy = {"memory_gb": bytes_for(model, 2, 16) * 1.001 / 1e9}
    asks = {1: lambda: post_budget(directory, "middle", roomy), 5: who.clear}
    going, recorder = homeless(run, model, directory, who, asks)
    assert going.run()
    assert [row.available_clients for row in recorder.rows][:3] == [2, 2, 2]
    assert recorder.rows[-1].available_clients == 3
    assert not events(directory, "repeated")


def test_with_nobody_there_nothing_begins(model: Path, tmp_path: Path) -> None:
    run = a_run(model)
    going, _ = homeless(run, model, saved(run, tmp_path), {"small", "middle", "large"}, {})
    with pytest.raises(InputError, match=r"none that fits is there to begin with \(away: large, middle, small\)"):
        going.run()


def test_who_joins_without_a_place_takes_part_when_there_is_one(model: Path, tmp_path: Path, own_data: Path) -> None:
    run = a_run(model)
    directory, who = saved(run, tmp_path), {"tablet"}
    asks = {1: lambda: join(directory.path, newcomer(model, own_data)), 5: who.clear}
    here, recorder = asking(run, model, directory, asks)
    executor = Homeless(here._executor, who)  # type: ignore[arg-type]
    executor.homeless, who_at_first = set(), executor.homeless
    going = reached_by(executor, here)
    executor.homeless = who_at_first
    assert going.run()
    assert [row.available_clients for row in recorder.rows][:3] == [3, 3, 3]
    assert recorder.rows[-1].available_clients == 4
    _same_weights(going, "large", "tablet")


def test_the_last_client_cannot_leave(model: Path, tmp_path: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)

    def all_leave() -> None:
        for name in ("small", "middle", "large"):
            leave(directory.path, name)

    going, recorder = asking(run, model, directory, {1: all_leave})
    assert going.run()
    assert recorder.rows[-1].available_clients == 1
    assert "inbox: large cannot leave: no other client is there" in recorder.notes


def test_joining_twice_and_leaving_twice_changes_nothing(model: Path, tmp_path: Path) -> None:
    run = a_run(model, EQUAL)
    directory = saved(run, tmp_path)

    def twice() -> None:
        join(directory.path, "small")
        leave(directory.path, "middle")
        leave(directory.path, "middle")

    going, recorder = asking(run, model, directory, {1: twice})
    assert going.run()
    assert recorder.rows[-1].available_clients == 2
    assert "inbox: small is asked to join, and is there already" in recorder.notes
    assert "inbox: middle is asked to leave, and is not there" in recorder.notes


def test_wrong_requests_are_refused_with_what_is_right(model: Path, tmp_path: Path, own_data: Path) -> None:
    directory = saved(a_run(model), tmp_path)
    for client, text in (
        ("nobody", "the run has no client 'nobody' to come back; it has: small, middle, large"),
        ({"name": "tablet", "memory_gb": 1}, "data: must be a file on its node"),
        ({"name": "tablet", "data": "x.csv"}, "memory_gb: "),
        (newcomer(model, own_data, name="small"), "small is a client of the run already"),
        (newcomer(model, own_data, name="server-1"), "is reserved"),
        (newcomer(model, own_data, colour="red"), "colour: unknown key"),
        ("[1, 2]", "must be a mapping such as"),
    ):
        with pytest.raises(InputError) as refused:
            join(directory.path, client)
        assert text in str(refused.value)
    with pytest.raises(InputError, match="has no client 'nobody'; it has: small, middle, large"):
        leave(directory.path, "nobody")
    assert list(directory.inbox.iterdir()) == []
    # A client that is to join may leave again, even before the run has read the request.
    join(directory.path, newcomer(model, own_data))
    leave(directory.path, "tablet")


@pytest.mark.parametrize("fixed", ["one node", "gloo"])
def test_nobody_joins_or_leaves_what_is_fixed(model: Path, tmp_path: Path, fixed: str) -> None:
    run = a_run(model)
    if fixed == "gloo":
        run = run.model_copy(update={"job": run.job.model_copy(update={"transport": "gloo"})})
    else:
        run = a_run(model, Policy.model_validate({"placement": "single", "aggregation": "none", "ranks": 4}))
    directory = saved(run, tmp_path)
    for ask in (lambda: join(directory.path, "small"), lambda: leave(directory.path, "small")):
        with pytest.raises(InputError, match="nobody joins or leaves"):
            ask()


# -- drawing ------------------------------------------------------------------------------------------------------


def drawing(model: Path, to: Path, count: int | None, **job: Any) -> tuple[Coordinator, Recorder, RunDirectory]:
    # All train, also those with slow links.
    run = a_run(model, EQUAL.model_copy(update={"freeze": "never"}))
    links = (1.0, 10.0, 100.0)
    clients = tuple(c.changed({"bandwidth_mbps": mbps}) for c, mbps in zip(run.clients, links, strict=True))
    run = run.model_copy(
        update={
            "clients": clients,
            "job": Job.model_validate({**run.job.model_dump(), "clients_per_round": count, **job}),
        }
    )
    recorder, directory = Recorder(), RunDirectory.create(to, None)
    return planned_run(run, model, directory, shares(run), recorder), recorder, directory


def test_so_many_clients_train_in_a_round_and_all_follow(model: Path, tmp_path: Path) -> None:
    going, recorder, directory = drawing(model, tmp_path, 2, rounds=6)
    trained: list[set[str]] = []
    step = going.context.training.step

    def watched(plan: Plan, number: int, clients: list[str]) -> Any:
        trained.append({*clients})
        return step(plan, number, clients)

    going.context.training.step = watched  # type: ignore[method-assign]
    assert going.run()
    assert {len(clients) for clients in trained} == {2}
    # The same in all of a round's steps, and others in other rounds; each client has a turn.
    assert all(one == two for one, two in zip(trained[::2], trained[1::2], strict=True))
    assert len({frozenset(clients) for clients in trained}) > 1 and set().union(*trained) == {
        "small",
        "middle",
        "large",
    }
    cohorts = [set(event["clients"]) for event in events(directory, "cohort")]
    assert cohorts == trained[::2]
    assert {row.available_clients for row in recorder.rows} == {3}
    # All compute with the same weights at the end.
    _same_weights(going, "small", "middle")
    _same_weights(going, "middle", "large")


def test_the_draw_depends_on_seed_and_round_alone(model: Path, tmp_path: Path) -> None:
    draws = []
    for seed in (0, 0, 1):
        going, _, directory = drawing(model, tmp_path, 1, seed=seed, rounds=8, local_steps=1)
        assert going.run()
        draws.append([event["clients"] for event in events(directory, "cohort")])
    assert draws[0] == draws[1] != draws[2]


def test_a_round_of_few_takes_their_virtual_time(model: Path, tmp_path: Path) -> None:
    going, recorder, directory = drawing(model, tmp_path, 1, rounds=6)
    assert going.run()
    plan = going.context.plan
    alone = {c: going.context.clock.steps_s(plan, [c])[-1] for c in ("small", "middle", "large")}
    assert len(set(alone.values())) > 1
    drawn = [event["clients"][0] for event in events(directory, "cohort")]
    spent = [b.virtual_time_s - a.virtual_time_s for a, b in zip(recorder.rows, recorder.rows[1:], strict=False)]
    # Rounds of the same client take equally long, and no less than its steps.
    for client, seconds in zip(drawn, spent, strict=True):
        assert seconds > 2 * alone[client]


def test_a_lost_clients_place_is_taken_by_the_next_in_the_draw(model: Path, tmp_path: Path) -> None:
    going, _, _ = drawing(model, tmp_path, 2)
    going.start()
    state = going.state
    drawn = state.cohort(0, 1, 2)
    (idle,) = {*state.present} - {*drawn}
    state.member(drawn[0]).status = Status.LOST
    assert {*state.cohort(0, 1, 2)} == {drawn[1], idle}


def test_client(model: Path) -> None:
    """The newcomer of these tests is a client that a cluster file could have."""
    assert ClientConfig.model_validate({**newcomer(model, Path("/x.csv")), "kind": "tablet"}).data == "/x.csv"
