"""No error leaves the command line as a traceback: it is one line, exit code 1, and names a file with the traceback."""

from __future__ import annotations

import re
import stat
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hsplit.cli import main
from hsplit.errors import InputError, RunError
from hsplit.observe.events import EventLog, read_events
from hsplit.run_directory import RunDirectory
from hsplit.session import remove_if_refused, report_failures
from hsplit.tracebacks import unexpected

# Enough arguments for each command to begin.
ARGUMENTS: dict[str, list[str]] = {
    "launch": ["--cluster", "hetero"],
    "resume": ["RUN"],
    "runs": [],
    "watch": ["RUN"],
    "plan": ["--cluster", "hetero"],
    "simulate": ["--cluster", "hetero"],
    "probe": ["--cluster", "hetero", "--to", "found.yaml"],
    "budget": ["RUN", "server", "memory_gb=1"],
    "join": ["RUN", "--client", "tablet"],
    "leave": ["RUN", "tablet"],
    "report": ["RUN"],
    "eval": ["RUN"],
    "export": ["RUN"],
    "data": ["a.csv"],
    "doctor": [],
    "monitoring": ["--to", "there"],
}
BENCHES = list(main.commands["bench"].commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def kept(text: str) -> Path:
    """The file that a line names."""
    found = re.search(r"the traceback is in (.+?\.log)(;|$)", text)
    assert found is not None, text
    return Path(found[1])


@pytest.mark.parametrize("arguments", [*([n, *a] for n, a in ARGUMENTS.items()), *(["bench", n] for n in BENCHES)])
@pytest.mark.parametrize("error", [KeyError("weight"), OSError(28, "No space left on device", "x.csv"), MemoryError()])
def test_an_error_in_any_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: Exception
) -> None:
    assert {*ARGUMENTS, "bench"} == set(main.commands), "every command is here"

    def failing(self: click.Command, context: click.Context) -> NoReturn:
        raise error

    monkeypatch.setattr(click.Command, "invoke", failing)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: {type(error).__name__}: ") and result.stderr.count("\n") == 1
    log = kept(result.stderr.strip())
    assert "Traceback (most recent call last)" in log.read_text() and type(error).__name__ in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("command", [[], ["--help"], ["no-such-command"], ["launch"]])
def test_what_click_says_itself_stays(command: list[str]) -> None:
    result = CliRunner().invoke(main, command)
    assert result.exit_code in (0, 2) and "traceback" not in result.output


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), kind=st.sampled_from([ValueError, OSError, RuntimeError, UnicodeError]))
def test_whatever_an_error_says_it_is_one_line_with_the_place_of_the_file(
    text: str, kind: type[Exception], tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("run")
    line = str(unexpected(kind(text), folder))
    assert line.isprintable() and line.startswith(f"{kind.__name__}: ") and kept(line) == folder / "traceback.log"


def test_where_the_folder_cannot_be_written_it_is_a_temporary_file(temporary: Path) -> None:
    assert kept(str(unexpected(ValueError("x"), temporary / "nowhere"))).parent == temporary


def raise_in_a_run(directory: RunDirectory, error: BaseException) -> None:
    with remove_if_refused(directory), report_failures(directory):
        raise error


def test_a_run_that_ends_with_an_error_has_an_event_its_traceback_and_a_way_on(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "hit")
    (directory.checkpoints / "round-0001").mkdir()
    EventLog(directory.events).write("training", "training begins")
    with pytest.raises(RunError) as error:
        raise_in_a_run(directory, ZeroDivisionError("division by zero"))
    log = directory.path / "traceback.log"
    told = f"ZeroDivisionError: division by zero; the traceback is in {log}"
    way_on = f"go on from the last checkpoint with: hsplit resume {directory.path}"
    assert str(error.value) == f"{told}; {way_on}" and "ZeroDivisionError" in log.read_text()
    last = read_events(directory.events)[-1]
    assert (last["event"], last["text"]) == ("failed", told)
    # A second one is written behind the first.
    with pytest.raises(RunError):
        raise_in_a_run(directory, KeyError("other"))
    assert log.read_text().count("Traceback (most recent call last)") == 2


def test_a_run_that_ends_before_anything_of_it_was_begun_leaves_nothing(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "none")
    with pytest.raises(ZeroDivisionError):
        raise_in_a_run(directory, ZeroDivisionError())
    assert not directory.path.exists()


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), KeyboardInterrupt()])
def test_a_run_that_ends_before_its_first_checkpoint_is_resumed_from_its_start(
    tmp_path: Path, error: BaseException
) -> None:
    directory = RunDirectory.create(tmp_path, "early")
    directory.config.write_text("{}")
    EventLog(directory.events).write("planned", "plan by equal importance")
    with pytest.raises((RunError, KeyboardInterrupt)) as told:
        raise_in_a_run(directory, error)
    command = f"hsplit resume {directory.path}"
    assert str(told.value).endswith(f"there is no checkpoint yet; begin it again from round 0 with: {command}")
    with pytest.raises(InputError, match=rf"early exists already; continue that run with `{command}`"):
        RunDirectory.create(tmp_path, "early")


def test_a_run_that_is_refused_before_its_first_checkpoint_leaves_its_name(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "refused")
    EventLog(directory.events).write("planned", "plan by equal importance")
    with pytest.raises(InputError):
        raise_in_a_run(directory, InputError("client a: has 1 example"))
    directory = RunDirectory.create(tmp_path, "refused")
    EventLog(directory.events).write("planned", "plan by equal importance")
    (directory.checkpoints / "round-0000").mkdir()
    with pytest.raises(InputError, match="no space"):
        raise_in_a_run(directory, InputError("no space"))
    assert directory.checkpoints.is_dir()


def test_a_run_that_is_alive_keeps_its_name(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "alive")
    directory.config.write_text("{}")
    with directory.driven(), pytest.raises(InputError, match="alive exists already; it is running; choose another"):
        RunDirectory.create(tmp_path, "alive")
