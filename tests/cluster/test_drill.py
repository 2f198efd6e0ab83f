"""Fire drill on real Ray: whatever dies, hangs or sends nonsense, the run is complete and its model lawful.

Each test records the final perplexity, so that ``pytest -m drill --junitxml FILE`` leaves a table.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import hsplit
from hsplit.config import SCHEDULER, SERVER
from hsplit.run.coordinator import Coordinator
from tests.cluster.killing import Drill, Happening, Kill, KillingExecutor, RandomKills, drill, without_wall_time
from tests.in_process import holders_of

pytestmark = [pytest.mark.drill, pytest.mark.usefixtures("ray_cluster")]

Record = Callable[[str, object], None]

# By phase the call that it is, and which of them is in the second round (4 local steps a round).
PHASES = {
    "forward": ("forward", 6),
    "backward": ("backward", 6),
    "aggregation": ("collect", 2),
    "restart": ("restart", 3),
    "validation": ("validation_forward", 3),
    "checkpoint": ("state", 3),
    "importance": ("take_scores", 2),
}
# Of the 28 that the server takes in three rounds.
GROUP_OF_ROUND_2 = 13


@pytest.fixture(scope="module")
def faultless(ray_cluster: None, cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    return drill(cluster_file, tmp_path_factory.mktemp("faultless"))


def check(run: Drill, faultless: Drill, record: Record) -> None:
    """The run is complete, and as good as the one without faults."""
    record("final_ppl", round(run.final_ppl, 4))
    record("faultless_ppl", round(faultless.final_ppl, 4))
    assert run.complete
    assert run.final_ppl == pytest.approx(faultless.final_ppl, rel=0.05)
    assert [row["round"] for row in run.metrics] == [0, 1, 2, 3]


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_killed_in_any_phase(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record, phase: str
) -> None:
    method, nth = PHASES[phase]
    run = drill(cluster_file, tmp_path, Kill("large-0", "large-0", method, nth))
    check(run, faultless, record_property)
    lost, returned = run.events_of("lost", "returned")
    assert lost["client"] == returned["client"] == "large-0" and lost["kind"] == "died"
    assert lost["round"] == 2
    assert run.metrics[-1]["available_clients"] == 3


@pytest.mark.parametrize(
    ("actor", "method"), [("large-0", "probe_forward"), ("large-0", "probe_backward"), (SERVER, "probe")]
)
def test_a_kill_in_a_probe(
    cluster_file: Path,
    tmp_path: Path,
    faultless: Drill,
    record_property: Record,
    monkeypatch: pytest.MonkeyPatch,
    actor: str,
    method: str,
) -> None:
    """As where no training step has scored every weight."""
    monkeypatch.setattr(Coordinator, "_watches", False)
    run = drill(cluster_file, tmp_path, Kill(actor, actor, method, 1))
    check(run, faultless, record_property)
    assert [event.get("client", event.get("actor")) for event in run.events_of("lost", "repeated")] == [actor]
    assert run.metrics[-1]["available_clients"] == 3


def test_a_client_killed_while_the_server_computes(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    run = drill(cluster_file, tmp_path, Kill("small", SERVER, "train_step", GROUP_OF_ROUND_2))
    check(run, faultless, record_property)
    assert [(event["client"], event["round"]) for event in run.events_of("lost")] == [("small", 2)]


def test_a_client_killed_while_the_server_aggregates(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    run = drill(cluster_file, tmp_path, Kill("small", SERVER, "aggregate", 2))
    check(run, faultless, record_property)
    assert [event["client"] for event in run.events_of("lost")] == ["small"]


@pytest.mark.parametrize(
    ("actor", "method", "nth"),
    [
        (SERVER, "configure", 1),
        (SERVER, "train_step", GROUP_OF_ROUND_2),
        (SERVER, "end_step", GROUP_OF_ROUND_2),
        (SERVER, "aggregate", 2),
        (SERVER, "evaluate", 4),
        (SERVER, "take_scores", 1),
        (SERVER, "state", 3),
        (SERVER, "reconfigure", 1),
        (SCHEDULER, "first", 1),
        (SCHEDULER, "review", 1),
        (SCHEDULER, "review", 2),
        ("large-1", "configure", 1),
    ],
)
def test_what_is_rolled_back_changes_no_number(
    cluster_file: Path,
    tmp_path: Path,
    faultless: Drill,
    record_property: Record,
    actor: str,
    method: str,
    nth: int,
) -> None:
    run = drill(cluster_file, tmp_path, Kill(actor, actor, method, nth))
    check(run, faultless, record_property)
    assert run.metrics == faultless.metrics
    (repeated,) = run.events_of("repeated")
    assert repeated["actor"] == actor
    if nth == GROUP_OF_ROUND_2:
        assert repeated["round"] == 2


def test_twenty_random_kills(cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record) -> None:
    overrides = {"rounds": 30, "faults.max_failures": 20}
    whole = drill(cluster_file, tmp_path / "whole", overrides=overrides)
    kills = RandomKills(1, 20, ["small", "large-0", "large-1", "large-0", "large-1", SERVER, SCHEDULER])
    run = drill(cluster_file, tmp_path / "killed", overrides=overrides, beside=kills)
    record_property("killed", ", ".join(kills.killed))
    record_property("final_ppl", round(run.final_ppl, 4))
    record_property("faultless_ppl", round(whole.final_ppl, 4))
    assert len(kills.killed) == 20, "the run is long enough for all of them"
    assert run.complete
    assert run.final_ppl == pytest.approx(whole.final_ppl, rel=0.05)


def test_ten_random_kills_repeated_change_no_number(cluster_file: Path, tmp_path: Path) -> None:
    """metrics.csv to the last byte, but for the column of the wall's clock."""
    overrides = {"rounds": 12, "faults.recovery": "repeat", "faults.max_failures": 10, "policy.replan.measured": False}
    whole = drill(cluster_file, tmp_path / "whole", overrides=overrides)
    kills = RandomKills(2, 10, ["small", "large-0", "large-1", SERVER, SCHEDULER])
    run = drill(cluster_file, tmp_path / "killed", overrides=overrides, beside=kills)
    assert len(kills.killed) == 10 and run.events_of("repeated")
    assert without_wall_time(run.path / "metrics.csv") == without_wall_time(whole.path / "metrics.csv")


def test_a_straggler_is_left_out_of_steps_and_not_of_the_round(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    def stop_for_a_while(executor: KillingExecutor) -> None:
        pid = executor.pid("large-1")
        os.kill(pid, signal.SIGSTOP)
        # Until steps have gone on without it.
        thread = threading.Timer(8.0, os.kill, (pid, signal.SIGCONT))
        thread.start()

    happening = Happening("large-1", "forward", 6, stop_for_a_while)
    run = drill(cluster_file, tmp_path, happening, overrides={"faults.deadline": 8.0})
    check(run, faultless, record_property)
    assert {event["client"] for event in run.events_of("left_out")} == {"large-1"}
    assert not run.events_of("lost", "repeated")


TEN = """
  - {name: small, count: 4, memory_gb: 0.00113, tflops: 0.001, num_cpus: 0.5}
  - {name: large, count: 6, memory_gb: 0.0014, tflops: 0.01, num_cpus: 0.5}
"""
# The stop lasts for so many seconds and steps of the others, but on a fast machine not until the round's end.
STOPPED_S, STEPS_MEANWHILE, MOST_MEANWHILE, LOCAL_STEPS = 5.0, 10, 60, 100


def test_nine_clients_go_on_while_the_tenth_is_stopped(
    cluster_file: Path, tmp_path: Path, record_property: Record
) -> None:
    """It is alone in its turn of the step; continued, it takes part again."""
    head, _, rest = cluster_file.read_text().partition("clients:")
    file = tmp_path / "ten.yaml"
    file.write_text(head + "clients:" + TEN + rest[rest.index("job:") :])
    overrides = {
        "policy.pace.periods": "planned",
        "policy.pace.batch_size": "planned",
        # The plan is then known before the data.
        "policy.pace.embedding": "whole",
        "rounds": 1,
        "local_steps": LOCAL_STEPS,
        "faults.deadline": 8.0,
        "faults.patience_s": 60,
    }
    clients = hsplit.plan(file, None, overrides).clients
    groups = [client.group for client in clients]
    tenth = next(client.name for client in clients if client.kind == "client" and groups.count(client.group) == 1)
    ends: list[float] = []
    stopped: dict[str, float] = {}

    def stop(executor: KillingExecutor) -> None:
        stopped.update(pid=executor.pid(tenth), at=time.monotonic(), step=len(ends))
        os.kill(int(stopped["pid"]), signal.SIGSTOP)

    def go_on(step: int) -> None:
        ends.append(time.monotonic())
        meanwhile = len(ends) - stopped.get("step", len(ends))
        enough = meanwhile >= STEPS_MEANWHILE and ends[-1] >= stopped["at"] + STOPPED_S
        if "until" not in stopped and (enough or meanwhile >= MOST_MEANWHILE):
            stopped["until"] = len(ends)
            os.kill(int(stopped["pid"]), signal.SIGCONT)

    happening = Happening(tenth, "forward", 20, stop)
    run = drill(file, tmp_path, happening, overrides=overrides, after_step=go_on)
    assert [client.group for client in run.coordinator.context.plan.clients] == groups
    assert run.complete and not run.events_of("lost", "repeated")
    begun, until = int(stopped["step"]), int(stopped["until"])
    gaps = [later - earlier for earlier, later in pairwise(ends[begun - 1 : until])]
    record_property("longest_step_s", round(max(gaps), 2))
    record_property("steps_while_stopped", until - begun)
    left_out = [event["step"] for event in run.events_of("left_out")]
    assert {event["client"] for event in run.events_of("left_out")} == {tenth}
    # It missed the steps in which it was stopped, perhaps some more for what it had to catch up with, and no others.
    every = run.coordinator.context.plan.client(tenth).every
    assert left_out == [*range(left_out[0], left_out[-1] + 1, every)]
    assert left_out[0] > begun and int(stopped["until"]) < left_out[-1] + every <= LOCAL_STEPS + every - 1


def test_a_client_that_sends_nan_is_refused_by_name(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    happening = Happening("large-0", "begin_round", 2, lambda executor: executor.within("large-0", _poisoned))
    run = drill(cluster_file, tmp_path, happening)
    check(run, faultless, record_property)
    (lost,) = run.events_of("lost")
    assert lost["client"] == "large-0" and "values that are no numbers" in lost["text"]


def _poisoned(client: Any) -> None:
    with torch.no_grad():
        client.holder.adapters.flat.fill_(float("nan"))


def test_a_client_out_of_memory_gets_a_smaller_plan(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    happening = Happening("large-0", "begin_round", 2, lambda executor: executor.within("large-0", _starved))
    run = drill(cluster_file, tmp_path, happening)
    check(run, faultless, record_property)
    (lost,) = run.events_of("lost")
    assert lost["client"] == "large-0" and lost["kind"] == "memory"
    assert any("large-0 ran out of memory" in event["text"] for event in run.events_of("replanned"))
    parts = {row["round"]: row for row in holders_of(run.coordinator) if row["name"] == "large-0"}
    assert parts[3]["predicted_bytes"] < parts[2]["predicted_bytes"]


def _starved(client: Any) -> None:
    """From now on its process gets no more memory than it has, and it wants more."""
    import numpy as np

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
    front = type(client)._front

    def hungry(*arguments: Any, **settings: Any) -> Any:
        client.kept = [np.ones(1 << 24, dtype=np.uint8) for _ in range(64)]
        return front(client, *arguments, **settings)

    client._front = hungry


def test_a_full_disk_is_one_clear_line_and_the_last_checkpoint_is_used(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record
) -> None:
    from hsplit.errors import RunError
    from tests.in_process import Recorder

    # More than a checkpoint's files may have; what Ray writes is written by other processes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int) -> None:
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))

    try:
        with pytest.raises(RunError, match=r"round 2: a file could not be written: .*hsplit resume .*full") as error:
            hsplit.launch(cluster_file, runs_dir=tmp_path, name="full", display=Recorder(after_step=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["round-0000", "round-0001"], "nothing half-written stays"
    run = hsplit.resume(tmp_path / "full", display=Recorder())
    assert run.complete
    record_property("final_ppl", round(float(run.metrics["val_ppl"].iloc[-1]), 4))
    assert run.metrics["val_ppl"].tolist() == [row["val_ppl"] for row in faultless.metrics]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(
    cluster_file: Path, tmp_path: Path, faultless: Drill, record_property: Record, damage: str
) -> None:
    """The server dies when its last checkpoint is damaged: the round before is repeated too."""

    def spoil(executor: KillingExecutor) -> None:
        file = tmp_path / "drill" / "checkpoints" / "round-0002" / "server.safetensors"
        content = bytearray(file.read_bytes())
        if damage == "truncated":
            del content[len(content) // 2 :]
        else:
            content[len(content) // 2] ^= 4
        file.write_bytes(content)

    run = drill(
        cluster_file,
        tmp_path,
        Happening(SERVER, "aggregate", 3, spoil),
        Kill(SERVER, SERVER, "aggregate", 3),
    )
    check(run, faultless, record_property)
    assert run.metrics == faultless.metrics
    (damaged,) = run.events_of("damaged")
    assert "checkpoint round-0002 is damaged (server.safetensors does not match its checksum)" in damaged["text"]
