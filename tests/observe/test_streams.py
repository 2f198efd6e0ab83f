"""What is shown decides nothing: no output, encoding, terminal or reader ends a command or shows a traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hsplit.observe.displays import LiveDisplay, display_for
from hsplit.observe.events import EventLog
from hsplit.planning.plan import Plan
from hsplit.streams import encodable, is_terminal
from tests.errors import error_lines
from tests.finished_run import finished_run
from tests.observe.conftest import metrics_row

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-P", "-c", "from hsplit.cli import run; run()"]


def _started(
    arguments: list[str], redirect: str = "", code: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command of a shell that has ``redirect`` behind it."""
    command = COMMAND if code is None else [sys.executable, "-P", "-c", code]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", *command, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _gone() -> int:
    """A descriptor of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    finished = finished_run(tmp_path_factory.mktemp("runs"), models["llama"], base="fp32", rounds=1)
    EventLog(finished.directory.events).write("finished", "the run is complete")
    return finished.directory.path


@pytest.fixture(scope="module")
def commands(run: Path, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> list[list[str]]:
    cluster = tmp_path_factory.mktemp("cluster") / "c.yaml"
    cluster.write_text(
        f"server: {{memory_gb: 1}}\nclients: [{{name: small, memory_gb: 0.1}}]\njob: {{model: {models['llama']}}}\n"
    )
    return [
        ["--help"],
        ["launch", "--help"],
        ["--version"],
        ["runs", "--runs-dir", str(run.parent)],
        ["watch", str(run)],
        # These import much; see HEAVY.
        ["report", str(run)],
        ["plan", "--cluster", str(cluster)],
    ]


WAYS = {
    "closed": ">&-",
    "everything closed": "<&- >&- 2>&-",
    "errors closed": "2>&-",
    "errors full": "2>/dev/full",
    "ascii": "",
    "C": "",
    "latin": "",
    "utf-16": "",
    "narrow": "",
    "one column": "",
    "no column": "",
    "no terminal": "",
}
HEAVY = ("everything closed", "ascii", "one column")
ENVIRONMENT = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "utf-16": {"PYTHONIOENCODING": "utf-16"},
    "narrow": {"COLUMNS": "20"},
    "one column": {"COLUMNS": "1", "LINES": "1"},
    "no column": {"COLUMNS": "0", "LINES": "0"},
    "no terminal": {"TERM": "nothing", "COLUMNS": "many"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_command_ends_well_whatever_takes_its_output(commands: list[list[str]], way: str) -> None:
    for command in commands[: None if way in HEAVY else -2]:
        done = subprocess.run(
            ["bash", "-c", f'"$@" {WAYS[way]}', "bash", *COMMAND, *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | ENVIRONMENT.get(way, {}),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, error_lines(done.stderr.decode())) == (0, []), command


def test_a_refusal_without_an_output_keeps_its_exit_code() -> None:
    for redirect in ("2>&-", "2>/dev/full", ">&- 2>&-"):
        assert _started(["plan", "--cluster", "no-such-file"], redirect).returncode == 2


def test_a_reader_that_goes_away_is_no_error(commands: list[list[str]]) -> None:
    for command in commands[1:-2]:
        done = subprocess.run(
            [*COMMAND, *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=(gone := _gone()),
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(gone)
        assert (done.returncode, done.stderr) == (0, b""), command


def test_what_a_full_disk_does_not_take_is_said(commands: list[list[str]]) -> None:
    for command in commands[1:-2]:
        done = _started(command, ">/dev/full")
        assert done.returncode == 1
        assert done.stderr == "error: standard output could not be written: No space left on device\n"


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", "| true"])
def test_a_runs_exit_code_is_the_runs(tmp_path: Path, redirect: str) -> None:
    # The middle of the command line's `launch`, without a run.
    code = f"""
import sys
from unittest.mock import Mock
import hsplit.cli, hsplit.api
def launch(*_, **__):
    for line in range(10_000):
        print("line", line, flush=True)
    open({str(tmp_path / "ended")!r}, "w").close()
    return Mock(complete=True)
hsplit.api.launch = launch
hsplit.cli.run()
"""
    done = _started(["launch", "--cluster", "c"], f"{redirect}; exit ${{PIPESTATUS[0]}}", code)
    assert (tmp_path / "ended").exists() and done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: standard output could" if "full" in redirect else "")


def test_a_run_goes_on_behind_a_reader_that_has_stopped() -> None:
    code = """
import os, sys
import hsplit.streams as streams
streams.HELD_UP_S = 0.2
streams.outputs.protect(); streams.outputs.never_wait()
for line in range(20_000):
    print("line", line, flush=True)
print("ended", file=sys.stderr)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline() == "ended\n"
        assert process.wait() == 0
        # What was there before it stopped is whole.
        assert process.stdout.readline() == "line 0\n"


def test_a_command_that_is_no_run_waits_for_its_reader() -> None:
    code = "from hsplit.streams import outputs; outputs.protect(); print('x' * 3_000_000)"
    assert len(_started([], "| (sleep 1; cat)", code).stdout) == 3_000_001


def test_no_file_gets_the_number_of_a_closed_output(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = f"""
from hsplit.streams import outputs; outputs.protect()
import os
opened = open({str(file)!r}, "w")
print("shown"); os.system("echo shown; echo shown >&2")
opened.write("kept")
"""
    assert _started([], ">&- 2>&- <&-", code).returncode == 0
    assert file.read_text() == "kept"


def test_output_to_a_descriptor_that_does_not_wait_is_whole() -> None:
    protected = "from hsplit.streams import outputs; outputs.protect()"
    code = f"import os; os.set_blocking(1, False); {protected}; print('x' * 500_000)"
    assert len(_started([], "| (sleep 0.5; cat)", code).stdout) == 500_001


@given(st.text(), st.sampled_from(["ascii", "latin-1", "utf-8", "cp437", "koi8-r"]))
def test_any_text_has_a_form_in_any_encoding(text: str, encoding: str) -> None:
    shown = encodable(text, encoding)
    shown.encode(encoding)
    if text.isascii():
        assert shown == text


def test_what_an_encoding_lacks_is_told_in_ascii() -> None:
    assert encodable("1–8 (Σ 112) → 3 … é", "ascii") == "1-8 (sum 112) -> 3 ... ?"
    assert encodable("\udcff", "utf-8") == "?"


def test_a_stream_that_is_not_there_shows_nothing(plan: Plan) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        assert not is_terminal(stream)
        with display_for(stream) as display:
            display.started("name", ["line"])
            display.plan(plan)


@pytest.mark.parametrize(("width", "height"), [(20, 24), (20, 2), (5, 5), (1, 1)])
def test_a_live_table_in_the_least_terminal(plan: Plan, width: int, height: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    with LiveDisplay(console=console) as display:
        display.started("name", ["a line that is longer than the terminal is wide"])
        display.plan(plan)
        display.step(1, 2, 1, 4, {name.name: 1.5 for name in plan.clients}, {})
        display.round_done(metrics_row(1), [], [])
        display.note("a note that is longer than the terminal is wide")
        display.finished(["done"])
