"""JSON becomes a value of its type, or an error line that names the key; in one way everywhere."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.config.cluster import ClientConfig, ScheduledChange
from hsplit.config.reading import from_json, from_plain, read_json
from hsplit.config.section import EXACT, Whole
from hsplit.errors import InputError
from hsplit.evaluation import targets
from hsplit.exporting import model_card
from hsplit.models import checkpoint_reader, packaged
from hsplit.observe.progress_file import StepRecord
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.planning_state import PlanningState
from hsplit.report import run_record as record
from hsplit.run import inbox
from hsplit.run.state import Member, RunState
from hsplit.run_directory import Driver

ROOT = Path(__file__).parents[2]
# Text that is more or less than strict JSON, or of others: events with halves of surrogate pairs, messages of a process
# to its own child, the header within a safetensors file, and what transformers writes of a configuration.
OTHER_READERS = {
    "hsplit/config/reading.py",
    "hsplit/observe/events.py",
    "hsplit/cluster/fork_server.py",
    "hsplit/cluster/cleanup.py",
    "hsplit/models/checkpoint_reader.py",
    "hsplit/models/gguf.py",
}


@dataclass(frozen=True)
class Part:
    name: str
    sizes: dict[str, Whole] = field(default_factory=dict)
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class Document:
    parts: tuple[Part, ...]
    seconds: float
    last: Part | None = None
    __pydantic_config__ = EXACT


parts = st.builds(Part, st.text(max_size=9), st.dictionaries(st.text(max_size=5), st.integers(0, 2**63 - 1)))
wholes = st.builds(Document, st.lists(parts, max_size=3).map(tuple), st.floats(allow_nan=False), st.none() | parts)


@given(wholes)
def test_a_value_survives_its_json(value: Document) -> None:
    assert from_json(json.dumps(asdict(value)), Document, "here") == value
    assert from_plain(asdict(value), Document, "here") == value


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seconds": "1"}, "here: seconds: must be a number (got '1')"),
        ({"seconds": True}, "here: seconds: must be a number (got true)"),
        ({"parts": 3}, "here: parts: must be a list (got 3)"),
        ({"parts": [{"name": "a"}, {}]}, "here: parts[1].name: is required"),
        ({"parts": [{"name": "a", "size": 1}]}, "here: parts[0].size: is no key here (got 1)"),
        ({"parts": [{"name": "a", "sizes": {"b": -1}}]}, "here: parts[0].sizes.b: must be at least 0 (got -1)"),
        ({"parts": [[]]}, "here: parts[0]: must be a mapping of keys (got [])"),
        ({"more": None}, "here: more: is no key here (got null)"),
    ],
)
def test_what_is_no_such_value_is_one_line_with_the_key(change: dict[str, Any], text: str) -> None:
    whole: dict[str, Any] = {"parts": [], "seconds": 1.5, **change}
    with pytest.raises(InputError) as refused:
        from_plain(whole, Document, "here")
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "Expecting property name enclosed in double quotes"),
        (b"{\n", "Expecting property name enclosed in double quotes on line 2"),
        (b"\xff", "it is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"9" * 5000, "a number is too long"),
    ],
)
def test_what_is_no_json_says_why(text: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InputError, match=f"a.json: not valid JSON: {reason}$"):
        read_json(tmp_path / "a.json", Document)


def test_a_file_that_is_not_there_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in (("none.json", "there is no such file"), (".", "cannot be read"), ("a\0", "cannot be read")):
        with pytest.raises(InputError, match=reason):
            read_json(tmp_path / path, Document)


def test_sections_in_a_document_take_lists_as_in_a_configuration() -> None:
    client = ClientConfig(name="c0", kind="c0", memory_gb=1, tflops=1, schedule=(ScheduledChange(round=2, tflops=2.0),))
    assert from_plain([client.model_dump()], list[ClientConfig], "here") == [client]
    with pytest.raises(InputError, match=re.escape("here: [0].tflops: must be a number (got '1')")):
        from_plain([{**client.model_dump(), "tflops": "1"}], list[ClientConfig], "here")
    with pytest.raises(InputError, match=re.escape("here: a: must be a whole number (got '1')")):
        from_plain({"a": "1"}, dict[str, int], "here")


def test_nothing_that_is_read_from_json_is_converted() -> None:
    """All dataclasses that a document, or a part of one, is read as."""
    read: list[Any] = [
        MetricsRow,
        PlanRow,
        TimingRow,
        HolderPlan,
        Plan,
        RunState,
        Member,
        PlanningState,
        StepRecord,
        Driver,
    ]
    read += [inbox._Budget, inbox._Join, inbox._Leave, model_card._Evaluation, record._State]
    read += [packaged._Marker, checkpoint_reader._Index, targets._AdapterConfig]
    assert [one for one in read if not one.__pydantic_config__["strict"]] == []


def _calls(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_json_is_read_in_one_place() -> None:
    files = [*(ROOT / "hsplit").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    reads = {file for file in files if {"json.loads", "json.load"} & set(_calls(file.read_text()))}
    assert {file.relative_to(ROOT).as_posix() for file in reads} == OTHER_READERS
