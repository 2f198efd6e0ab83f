"""A run's directory of any content is read or refused in one line, and nothing around the run is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.config import ClientConfig, Importance, Job, Policy, RunConfig
from hsplit.errors import InputError
from hsplit.exporting.export import export
from hsplit.files import sha256_of, write_text_atomically
from hsplit.observe.events import read_events
from hsplit.observe.run_list import list_runs, runs_table
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, read_rows
from hsplit.report.report import write_report
from hsplit.report.run_record import load_run
from hsplit.run import inbox
from hsplit.run.checkpoint import MANIFEST, STATE, latest_checkpoint, read_checkpoint
from hsplit.run_directory import RunDirectory
from tests.finished_run import FinishedRun
from tests.fuzz.harness import NASTY, as_json, damaged, examples, mangled, mangled_head, read_or_refused, tree
from tests.in_process import Recorder, planned_run, random_examples

TABLES: dict[str, Any] = {"metrics.csv": MetricsRow, "plan.csv": PlanRow, "timing.csv": TimingRow}
CELLS = (
    *(b",", b'"', b"\n", b"\0", b"nan", b"inf", b"-1", b"1e400", b"9" * 30, b"9" * 5000, b"True", b"\xff"),
    *(b"x" * 200_000, b"999999999999", b"10000000", b"\x1b[2J"),
)


class Scratch:
    """A copy of the run to damage, restored before every input."""

    def __init__(self, run: FinishedRun, folder: Path) -> None:
        self.around = folder
        self.path = Path(shutil.copytree(run.path, folder / "runs" / "tiny"))
        (folder / "precious.txt").write_text("keep me")
        self._whole = {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}
        self.outside = self._outside()

    def _outside(self) -> dict[str, bytes | None]:
        return {name: content for name, content in tree(self.around).items() if not name.startswith("runs/tiny/")}

    def restore(self) -> None:
        for path in list(self.path.rglob("*")):
            if path.is_file() and path not in self._whole:
                path.unlink()
        for path, content in self._whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def untouched(self) -> bool:
        return self._outside() == self.outside


@pytest.fixture(scope="module")
def scratch(pristine: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    return Scratch(pristine, tmp_path_factory.mktemp("around"))


def _sign(checkpoint: Path) -> None:
    """Valid checksums, as an attacker would write them."""
    files = [file for file in sorted(checkpoint.iterdir()) if file.name != MANIFEST]
    (checkpoint / MANIFEST).write_text(json.dumps({file.name: sha256_of(file) for file in files}))


def _documents(whole: bytes) -> st.SearchStrategy[bytes]:
    return damaged(json.loads(whole)).map(as_json) | mangled(whole, (b"[" * 3000, b"NaN", b"9" * 5000, b"1e999"))


# -- checkpoints --------------------------------------------------------------------------------------------------


@examples(60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_passed_over(scratch: Scratch, data: st.DataObject) -> None:
    scratch.restore()
    newest, _ = latest_checkpoint(scratch.path / "checkpoints")
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    whole = file.read_bytes()
    content = data.draw(mangled(whole) | (_documents(whole) if file.suffix == ".json" else st.binary(max_size=40)))
    file.write_bytes(content)
    path, passed = latest_checkpoint(scratch.path / "checkpoints")
    read_checkpoint(path)
    # A list of checksums may differ in its blanks, and be the same list.
    assert path == newest or (len(passed) == 1 and newest.name in passed[0])
    assert path != newest or content == whole or file.name == MANIFEST


@examples(50)
@given(data=st.data())
def test_a_forged_checkpoint_is_read_or_refused(scratch: Scratch, data: st.DataObject) -> None:
    scratch.restore()
    newest, _ = latest_checkpoint(scratch.path / "checkpoints")
    file = data.draw(st.sampled_from([newest / STATE, newest / STATE, *sorted(newest.glob("*.safetensors"))]))
    whole = file.read_bytes()
    file.write_bytes(data.draw(_documents(whole) if file.name == STATE else mangled_head(whole, 2000)))
    _sign(newest)
    path, _ = latest_checkpoint(scratch.path / "checkpoints")
    assert path == newest
    if read_or_refused(lambda: read_checkpoint(newest), newest.name) is not None:
        read_or_refused(lambda: export(scratch.path))
    assert scratch.untouched()


@dataclass(frozen=True)
class Halfway:
    """A run with a real scheduler's plans, and the state of the first of its two rounds."""

    run: RunConfig
    directory: RunDirectory
    model: Path
    state: Path
    whole: bytes

    def resume(self) -> bool:
        checkpoint, _ = latest_checkpoint(self.directory.checkpoints)
        shares = {client.name: random_examples(12, seed) for seed, client in enumerate(self.run.clients)}
        return planned_run(self.run, self.model, self.directory, shares, Recorder()).run(checkpoint)

    def forge(self, content: bytes) -> None:
        for later in self.directory.checkpoints.glob("round-*"):
            if later.name > self.state.parent.name:
                shutil.rmtree(later)
        self.state.write_bytes(content)
        _sign(self.state.parent)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Halfway:
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=0.05, tflops=1.0) for name in ("c0", "c1"))
    job = Job(dtype="fp32", wire="fp32", rounds=2, local_steps=1, max_length=24, rank_set=(1, 2))
    run = RunConfig(clients=clients, job=job, policy=Policy(importance=Importance(metric="equal")))
    directory = RunDirectory.create(tmp_path_factory.mktemp("halfway"))
    made = Halfway(run, directory, models["llama"], directory.checkpoints / "round-0001" / STATE, b"")
    shares = {client.name: random_examples(12, seed) for seed, client in enumerate(run.clients)}
    assert planned_run(run, made.model, directory, shares, Recorder()).run()
    return dataclasses.replace(made, whole=made.state.read_bytes())


def test_the_run_that_is_forged_below_can_be_resumed(halfway: Halfway) -> None:
    halfway.forge(halfway.whole)
    assert halfway.resume()


@examples(25)
@given(data=st.data())
def test_a_run_is_resumed_from_a_forged_checkpoint_or_refused(halfway: Halfway, data: st.DataObject) -> None:
    document = json.loads(halfway.whole)
    key = data.draw(st.sampled_from(sorted(document)))
    halfway.forge(
        as_json(document | data.draw(damaged({key: document[key]}).filter(lambda made: isinstance(made, dict))))
    )
    before = tree(halfway.directory.path.parent.parent)
    read_or_refused(halfway.resume)
    after = tree(halfway.directory.path.parent.parent)
    inside = f"{halfway.directory.path.relative_to(halfway.directory.path.parent.parent)}/"
    assert all(name.startswith(inside) for name in after.keys() ^ before.keys())


@pytest.mark.parametrize(
    "manifest", ["[]", "3", "{}", '{"../../config.yaml": "x"}', "[" * 100_000, '{"state.json": [1]}']
)
def test_a_list_of_checksums_that_is_none_is_damage(scratch: Scratch, manifest: str) -> None:
    scratch.restore()
    newest, _ = latest_checkpoint(scratch.path / "checkpoints")
    (newest / MANIFEST).write_text(manifest)
    path, passed = latest_checkpoint(scratch.path / "checkpoints")
    assert path != newest and newest.name in passed[0]


def test_a_file_that_no_checksum_covers_is_damage(scratch: Scratch) -> None:
    scratch.restore()
    newest, _ = latest_checkpoint(scratch.path / "checkpoints")
    shutil.copy(newest / "server.safetensors", newest / "stranger.safetensors")
    path, passed = latest_checkpoint(scratch.path / "checkpoints")
    assert path != newest and "stranger.safetensors does not match its checksum" in passed[0]


# -- the inbox ----------------------------------------------------------------------------------------------------

REQUESTS = (
    {"request": "budget", "holder": "c0", "values": {"memory_gb": 0.5, "latency_ms": 3}},
    {"request": "join", "client": {"name": "new", "kind": "new", "memory_gb": 1.0, "tflops": 1.0, "data": "/x.csv"}},
    {"request": "leave", "client": "c0"},
)


@examples(80)
@given(content=st.sampled_from(REQUESTS).flatmap(lambda r: _documents(as_json(r))) | st.binary(max_size=40))
def test_what_is_no_request_is_left_out(scratch: Scratch, content: bytes) -> None:
    scratch.restore()
    directory = RunDirectory(scratch.path)
    (directory.inbox / "00-1.json").write_bytes(content)
    (directory.inbox / "99-1.json").write_bytes(as_json(REQUESTS[2]))
    # A command that reads the inbox to post a request is not stopped by it either.
    read_or_refused(lambda: inbox.post_leave(RunDirectory.open(scratch.path), "c1"))
    requests, refused = inbox.take_requests(directory.inbox, 3)
    assert len(requests) + len(refused) == 3 and all("00-1.json" in text for text in refused)
    for text in refused:
        assert "\n" not in text
    shutil.rmtree(directory.inbox / "taken")
    assert scratch.untouched()


@examples(40)
@given(
    holder=st.sampled_from(["c0", "server"]) | NASTY,
    values=damaged({"memory_gb": 1.0}),
    client=damaged(REQUESTS[1]["client"]),
)
def test_whatever_is_asked_of_a_run_is_written_into_its_inbox_or_refused(
    scratch: Scratch, holder: Any, values: Any, client: Any
) -> None:
    scratch.restore()
    directory = RunDirectory.open(scratch.path)
    if isinstance(values, dict):
        read_or_refused(lambda: inbox.post_budget(directory, holder, values))
    if isinstance(client, dict):
        read_or_refused(lambda: inbox.post_join(directory, client))
    read_or_refused(lambda: inbox.post_leave(directory, holder))
    assert scratch.untouched()
    assert {path.parent for path in scratch.path.rglob("*.json") if path.name[0].isdigit()} <= {directory.inbox}


def test_a_request_named_like_a_pattern_takes_no_other_with_it(tmp_path: Path) -> None:
    for name in ("*.json", "1.json"):
        (tmp_path / name).write_bytes(as_json(REQUESTS[2]))
    inbox.take_requests(tmp_path, 1)
    inbox.refuse_request(tmp_path, "*.json")
    assert {path.name for path in (tmp_path / "taken" / "round-0001").iterdir()} == {"1.json"}


# -- tables, events and reports -----------------------------------------------------------------------------------


@examples(80)
@given(data=st.data())
def test_a_damaged_table(scratch: Scratch, data: st.DataObject) -> None:
    scratch.restore()
    name = data.draw(st.sampled_from(sorted(TABLES)))
    file = scratch.path / name
    file.write_bytes(data.draw(mangled(file.read_bytes(), CELLS)))
    read_or_refused(lambda: read_rows(file, TABLES[name]), name)
    read_or_refused(lambda: load_run(scratch.path), name)
    read_or_refused(lambda: list_runs(scratch.path.parent))


def _events(whole: bytes) -> st.SearchStrategy[bytes]:
    lines = [json.loads(line) for line in whole.splitlines()]
    rows = st.lists(st.sampled_from(lines).flatmap(damaged), min_size=1, max_size=4)
    kept = [json.dumps(line).encode() for line in lines]
    return rows.map(lambda bad: b"\n".join([*kept, *map(as_json, bad)]))


@examples(60)
@given(data=st.data())
def test_damaged_events(scratch: Scratch, data: st.DataObject) -> None:
    scratch.restore()
    file = scratch.path / "events.jsonl"
    whole = file.read_bytes()
    file.write_bytes(data.draw(_events(whole) | mangled(whole, (b"[" * 3000, b"\n", b"9" * 5000, b"\\ud800"))))
    assert isinstance(read_events(file), list)
    load_run(scratch.path)
    (run,) = list_runs(scratch.path.parent)
    json.dumps(run.to_json())
    _drawn(list_runs(scratch.path.parent))


def _drawn(runs: Any) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115  # closed with the process
    console.print(runs_table(runs))
    return console.export_text()


@examples(6)
@given(data=st.data())
def test_a_report_of_damaged_files_is_written_or_refused(scratch: Scratch, data: st.DataObject) -> None:
    scratch.restore()
    events = scratch.path / "events.jsonl"
    events.write_bytes(data.draw(_events(events.read_bytes())))
    for name in TABLES:
        lines = (scratch.path / name).read_text().splitlines()
        # Figures that pass for figures, wherever they stand.
        cells = st.sampled_from(["0", "-1", "1", "3", "9223372036854775807", "1e308", "inf", "nan", "", "True", "c0"])
        for _ in range(data.draw(st.integers(0, 2))):
            row = data.draw(st.integers(1, len(lines) - 1))
            values = lines[row].split(",")
            values[data.draw(st.integers(0, len(values) - 1))] = data.draw(cells)
            lines[row] = ",".join(values)
        (scratch.path / name).write_text("\n".join(lines) + "\n")
    report = scratch.path / "report.html"
    read_or_refused(lambda: write_report([scratch.path], report))
    assert scratch.untouched()


def test_a_run_s_name_is_no_markup_and_steers_no_terminal(run_copy: Path) -> None:
    strange = run_copy.rename(run_copy.with_name("[red]\x1b[2Jx"))
    log = strange / "events.jsonl"
    event = {"time": "2026-01-01T00:00:00+00:00", "event": "failed", "text": "no\x1b[2J [/b]"}
    log.write_bytes(log.read_bytes() + as_json(event))
    drawn = _drawn(list_runs(run_copy.parent))
    assert "[red]" in drawn and "\x1b" not in drawn


@pytest.mark.parametrize(
    "time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00", 3, None]
)
def test_a_time_that_is_none_is_no_event(run_copy: Path, time: Any) -> None:
    log = run_copy / "events.jsonl"
    log.write_bytes(log.read_bytes() + as_json({"time": time, "event": "failed", "text": "x"}))
    (run,) = list_runs(run_copy.parent)
    assert json.dumps(run.to_json()) and _drawn([run])


# -- ways out -----------------------------------------------------------------------------------------------------

COMMANDS = {
    "resume": lambda run: RunDirectory.open(run),
    "export": export,
    "report": lambda run: write_report([run], run / "report.html"),
    "leave": lambda run: inbox.post_leave(RunDirectory.open(run), "c0"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "entry",
    ["events.jsonl", "inbox", "checkpoints", "inbox/taken", "adapter", "metrics.csv", "x/y", "wandb", "wandb/id"],
)
def test_a_link_out_of_a_run_is_refused_and_nothing_is_written_there(run_copy: Path, entry: str, command: str) -> None:
    outside = run_copy.parent.parent
    link = run_copy / entry
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    is_file = "." in entry or entry.endswith("id")
    target = outside / ("precious.txt" if is_file else "folder")
    if not is_file:
        target.mkdir()
    link.symlink_to(target)
    before = tree(outside)
    with pytest.raises(InputError, match=rf"{entry} is a link to .*, outside of the run"):
        COMMANDS[command](run_copy)
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["../x", "..", "/abs", "a/b", "a\0", "a" * 65, "-x", "x.", "NUL", "x\ny", ""])
def test_a_run_cannot_have_a_name_that_is_no_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^--name: must be"):
        RunDirectory.create(tmp_path / "runs", name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_links_within_a_run_and_to_a_run_are_as_good_as_files(run_copy: Path) -> None:
    (run_copy / "newest").symlink_to(sorted((run_copy / "checkpoints").iterdir())[-1])
    (run_copy / "self").symlink_to("self")
    # Weights & Biases links the logs of its runs to its own cache.
    logs = run_copy / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/elsewhere/core-debug.log")
    elsewhere = run_copy.parent.parent / "link-to-run"
    elsewhere.symlink_to(run_copy)
    assert load_run(elsewhere).name == "tiny"


def test_a_file_that_is_gone_meanwhile_is_in_nobody_s_way(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = os.walk

    def as_it_was(path: Path) -> Any:
        for folder, folders, files in walk(path):
            yield folder, [*folders, ".partial-round-0009"], [*files, ".metrics.csv.7.tmp"]

    monkeypatch.setattr(os, "walk", as_it_was)
    assert RunDirectory.open(run_copy).name == "tiny"


def test_a_pipe_in_a_run_is_refused_instead_of_waited_for(run_copy: Path) -> None:
    os.mkfifo(run_copy / "inbox" / "1.json")
    with pytest.raises(InputError, match=r"inbox/1\.json is no plain file: remove it"):
        RunDirectory.open(run_copy)
    (run,) = list_runs(run_copy.parent)
    assert run.state == "unreadable" and "no plain file" in run.reason


def test_a_link_in_the_place_of_a_file_half_written_is_not_followed(run_copy: Path) -> None:
    precious = run_copy.parent.parent / "precious.txt"
    for name in ("report.html", "config.yaml"):
        (run_copy / f".{name}.{os.getpid()}-{threading.get_ident()}.tmp").symlink_to(precious)
    write_text_atomically(run_copy / "report.html", "a report")
    RunConfig.load(run_copy / "config.yaml").save(run_copy / "config.yaml")
    assert precious.read_text() == "keep me"
    assert (run_copy / "report.html").read_text() == "a report"
