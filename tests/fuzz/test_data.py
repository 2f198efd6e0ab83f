"""A data file of any content gives examples or is refused in one line that names it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.config import DataSpec
from hsplit.data import file_sha256, read_source
from hsplit.data.examples import parse_meaning
from hsplit.errors import InputError
from tests.fuzz.harness import as_json, damaged, examples, mangled, read_or_refused

CSV = (
    b'mr,ref,ward\n"name[The Copper Heron], food[Greek]",A Greek place.,3\n"name : Blue | food : Thai",Thai food.,4\n'
    b'"two ""quoted"" words","over\ntwo lines",5\n'
)
CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}], "ward": 3}
LINE = {"prompt": "name[Blue], food[Thai]", "response": "It is Thai.", "ward": [1, {"a": None}]}
ALPACA = {"instruction": "Say", "input": "", "output": "Yes.", "history": [["a", "b"]], "ward": 3}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Hello?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
        {"from": "observation", "value": "dark"},
        {"from": "gpt", "value": "Yes.", "weight": 1},
    ],
    "tools": "[]",
}
ROWS = [ALPACA, ALPACA]
TEXT = b"name[Blue], food[Thai]||It is Thai.\nprompt||response\n"
TOKENS = (
    *(
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
        b"\r",
        b'"',
        b'""',
        b"||",
        b",",
        b"\n\n",
        b"\xe2\x80\xa8",
        b"\x1b[2J",
        b"\xed\xa0\x80",
    ),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"9" * 5000,
        b"NaN",
        b"\\ud800",
        b"mr",
        b"prompt",
        b" " * 3000,
        b"x" * 200_000,
        b"[,",
    ),
)
FILES = {
    ".csv": mangled(CSV, TOKENS),
    ".json": mangled(as_json(ROWS), TOKENS) | st.lists(damaged(ALPACA) | damaged(SHAREGPT), max_size=3).map(as_json),
    ".jsonl": mangled(as_json(LINE) + b"\n" + as_json(CHAT), TOKENS)
    | st.lists(damaged(LINE) | damaged(CHAT), max_size=3).map(lambda rows: b"\n".join(map(as_json, rows))),
    ".txt": mangled(TEXT, TOKENS),
}
CONTENTS = st.sampled_from(sorted(FILES)).flatmap(
    lambda suffix: st.tuples(st.just(suffix), FILES[suffix] | st.binary(max_size=100))
)


def _chat(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    text = "".join(f"<{turn['role']}>{turn['content']}\n" for turn in messages)
    return text + "<assistant>" if add_generation_prompt else text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@examples(200)
@given(
    content=CONTENTS,
    label=st.sampled_from([None, "ward", "name", "food", "\x1b"]),
    train_on=st.sampled_from(["last", "all", "none-but-flagged"]),
    strict=st.booleans(),
)
def test_a_damaged_data_file(
    folder: Path, content: tuple[str, bytes], label: str | None, train_on: Any, strict: bool
) -> None:
    suffix, raw = content
    path = folder / f"notes{suffix}"
    path.write_bytes(raw)
    data = DataSpec(label=label, limit=2, train_on=train_on, strict=strict)
    found = read_or_refused(lambda: read_source(str(path), data, chat=_chat), path.name)
    for example in () if found is None else found.examples:
        # The tokenizer gets encodable, non-empty text; a text has no prompt.
        assert example.prompt.encode() or example.text
        assert example.response.strip().encode()
        assert all(0 < start < stop < len(example.response) for start, stop in example.unsupervised)


@examples(100)
@given(text=st.text(alphabet="[],|: ab\n", max_size=60))
def test_any_text_is_a_meaning_or_none(text: str) -> None:
    slots = parse_meaning(text)
    assert slots is None or all(slot == slot.strip() and slot for slot in slots)


@pytest.mark.parametrize(
    "text",
    [
        "a" + " " * 1_000_000 + "b",
        "a[b]," + " " * 1_000_000 + "b",
        "a[" + " " * 1_000_000 + "b",
        "a[b]" + " " * 1_000_000 + "b",
        "a" + " " * 1_000_000 + "| b",
        "a :" + " " * 1_000_000 + "b | c",
        "a : b |" * 100_000,
    ],
    ids=lambda text: text[:6] + text[-4:],
)
def test_a_long_line_is_read_once(text: str) -> None:
    read_or_refused(lambda: parse_meaning(text))


def test_rows_that_nest_deeply_or_count_far_are_refused_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    for line, reason in (
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 10_000 + "}", "number is too long"),
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(InputError, match=rf"deep\.jsonl: line 1 is not JSON: .*{reason}"):
            read_source(str(path))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_instead_of_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.csv"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    for read in (
        file_sha256,
        lambda p: read_source(str(p)),
    ):
        with pytest.raises(InputError, match=r"data\.csv: is no file that can be read twice"):
            read(path)
