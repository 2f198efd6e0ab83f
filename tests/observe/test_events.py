from __future__ import annotations

import json
import math
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from hsplit.observe.events import EventLog, EventReader, read_events


def test_lines_are_json_with_time_kind_and_sentence(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("failure", "phone-0 failed in round 3", actor="phone-0", round=3)
        lines = path.read_text().splitlines()  # flushed while the log is open
    (event,) = [json.loads(line) for line in lines]
    assert datetime.fromisoformat(event.pop("time")).utcoffset() == timedelta(0)
    assert event == {"event": "failure", "text": "phone-0 failed in round 3", "actor": "phone-0", "round": 3}


@pytest.mark.parametrize("half", [b'{"time": "2026', b'{"time": 1}', b"\x00" * 200_000])
@pytest.mark.parametrize("whole", [0, 1, 3])
def test_half_line_of_a_killed_process_is_taken_away(tmp_path: Path, whole: int, half: bytes) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for number in range(whole):
            log.write("data", f"event {number}")
    before = path.read_bytes()
    path.write_bytes(before + half)
    assert [event["text"] for event in read_events(path)] == [f"event {number}" for number in range(whole)]
    with EventLog(path) as log:
        assert path.read_bytes() == before
        log.write("resumed", "on it goes")
    assert [event["text"] for event in read_events(path)][-1] == "on it goes"
    assert len(read_events(path)) == whole + 1


def test_a_growing_log_is_read_once_and_by_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert reader.new() == []
    with EventLog(path) as log:
        log.write("data", "one")
        log.write("data", "two – with more bytes than characters")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [event["text"] for event in reader.new()] == ["one"]
    assert reader.new() == []
    path.write_bytes(whole + b"\x00\xff no event\n" + whole[:20])
    assert [event["text"] for event in reader.new()] == ["two – with more bytes than characters"]
    with EventLog(path) as log:  # takes the half line away
        log.write("data", "three")
    assert [event["text"] for event in reader.new()] == ["three"]


def test_what_json_has_no_word_for_is_text(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("loss", "odd \udc80 \n text", loss=math.nan, nested={"a": [math.inf]}, path=Path("x"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text(encoding="utf-8").splitlines()
    event = json.loads(line, parse_constant=refuse)
    assert (event["loss"], event["nested"], event["path"]) == ("nan", {"a": ["inf"]}, "x")
    assert event["text"] == "odd \udc80 \n text"


def test_reserved_fields_are_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log, pytest.raises(ValueError, match="'time'"):
        log.write("data", "x", time=3)


def test_no_file_is_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []
