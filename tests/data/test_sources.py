"""Every file format as it should be, and every refusal with its line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hsplit.config import DataSpec
from hsplit.data import hold_out, split_off_test
from hsplit.data.examples import Example, parse_meaning
from hsplit.data.restaurants import restaurants
from hsplit.data.sources import read_source
from hsplit.data.text_files import file_sha256
from hsplit.errors import InputError
from hsplit.evaluation.evaluate import grouped
from tests.data.learned import learned

E2E = Path(__file__).parents[3] / "shared" / "data" / "e2e" / "devset.csv"


def read(source: Path | str, **options: Any) -> list[Example]:
    """Read strictly, so that every fault is seen."""
    seed, chat = options.pop("seed", 0), options.pop("chat", None)
    return read_source(str(source), DataSpec(**{"examples": 10, "strict": True} | options), seed, chat).examples


def test_restaurants_are_the_generator_s() -> None:
    assert read("restaurants") == restaurants(10, seed=0)
    assert [example.label for example in read("restaurants", label="eatType")] == [
        (parse_meaning(example.prompt.removesuffix(" =>")) or {}).get("eatType", "none")
        for example in restaurants(10, seed=0)
    ]
    assert all(example.prompt.endswith("] |") for example in read("restaurants", separator=" |"))


NEEDS = (
    "needs mr and ref, or prompt and response, or prompt and completion, or context and completion, or question and"
    " answer, or instruction and output, or messages, or conversations or conversation, or segments, or text or ; or"
    " name them by data.columns"
)
ONE = Example("name[A b], food[Thai] =>", " A b is Thai.", "A b")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b'mr,ref\n"name[A b], food[Thai]",A b is Thai.\n', [ONE]),
        ("bom.csv", b'\xef\xbb\xbfmr,ref\n"name[A b], food[Thai]",A b is Thai.\n', [ONE]),
        ("crlf.CSV", b'mr,ref\r\n"name[A b], food[Thai]", A b is Thai. \r\n\r\n', [ONE]),
        ("more.csv", b'id, ref, mr\n7,A b is Thai.,"name[A b], food[Thai]"', [ONE]),
        (
            "quoted.csv",
            b'prompt,response\n"a ""b""\r\nc","d\n\ne"\n',
            [Example('a "b"\nc\n', "d\n\ne", None)],
        ),
        ("a.txt", b"name[A b], food[Thai]||A b is Thai.\n", [ONE]),
        (
            "piped.txt",
            b"name : A | food : Thai||A is Thai .\r\n",
            [Example("name : A | food : Thai =>", " A is Thai .", "A")],
        ),
        ("prose.txt", b"q: one||two", [Example("q: one =>", " two", None)]),
        (
            "utf8.txt",
            "caf\u00e9\u2028x||th\u00e9".encode(),
            [Example("caf\u00e9\u2028x =>", " th\u00e9", None)],
        ),
        ("a.jsonl", b'{"prompt": "p", "response": " r "}\n\n', [Example("p\n", " r ", None)]),
        (
            "bom.jsonl",
            b'\xef\xbb\xbf{"prompt": "p", "response": "r", "n": [1]}\r\n',
            [Example("p\n", "r", None)],
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, content: bytes, expected: list[Example]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert read(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("no.csv", None, "PATH: there is no such file"),
        (
            "folder.csv",
            "folder",
            "PATH: is a folder without a file that ends in .csv, .tsv, .json, .jsonl, .txt, .parquet, .arrow",
        ),
        (
            "a.xlsx",
            b"x",
            "data.source: 'PATH' is unknown; give restaurants, a file or folder of files that end in .csv, .tsv, .json,"
            " .jsonl, .txt, .parquet, .arrow (also with .gz, .bz2, .xz, .zst), or org/name of a hub's data set",
        ),
        ("a.csv", b"", "PATH: the file is empty; at least one example is needed"),
        ("a.csv", b"mr,ref\n", "PATH: has no rows; at least one example is needed"),
        ("a.csv", b"mr,txt\na,b\n", f"PATH: has mr, txt; {NEEDS}"),
        ("a.csv", b"mr|ref\na|b\n", f"PATH: has mr|ref; {NEEDS}"),
        (
            "a.csv",
            b"prompt,response,text\na,b,c\n",
            "PATH: may be read as prompt and response (data.form: prompt-response) or plain text (data.form: text); say"
            " which",
        ),
        (
            "a.csv",
            b"mr,ref,x,x\na,b,1,2\n",
            "PATH: has columns mr, ref, x, x; each name may stand there once only",
        ),
        ("a.csv", b"mr,ref\na,b\n\n\nc,d\n", "PATH: row 3 is empty; delete it or fill it in"),
        ("a.csv", b"mr,ref\na,b\n,\n", "PATH: row 3 is empty; delete it or fill it in"),
        ("a.csv", b"mr,ref\na,b,c\n", "PATH: row 2 has 3 fields; the header has 2 (mr, ref)"),
        ("a.csv", b"mr,ref\na,b\n ,c\n", "PATH: row 3: mr is blank; must be a text"),
        ("a.csv", b'prompt,response\na," "\n', "PATH: row 2: response is blank; must be a text"),
        ("a.csv", b'mr,ref\na,"b\nc,d\n', "PATH: line 3: is not CSV: unexpected end of data"),
        (
            "a.csv",
            b"mr,ref\na,b\nc,\xe9\n",
            "PATH: line 3: byte 0xe9 is not UTF-8 (it may be latin-1); save the file as UTF-8",
        ),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n{"prompt"\n',
            "PATH: line 2 is not JSON: Expecting ':' delimiter; each line must be one object",
        ),
        ("a.jsonl", b"[1]\n", "PATH: line 1 is a JSON list; each line must be one object"),
        (
            "a.jsonl",
            b"[" * 100_000,
            "PATH: line 1 is not JSON: nested too deeply; each line must be one object",
        ),
        ("a.jsonl", b'{"q": "p"}\n', f"PATH: has q; {NEEDS}"),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n{"q": 1}\n',
            "PATH: line 2 has q; needs prompt and response",
        ),
        (
            "a.json",
            b'[{"prompt": "p", "response": "r"}, 3]',
            "PATH: item 2 is a JSON int; each item must be one object",
        ),
        (
            "a.json",
            b"[{",
            "PATH: is not JSON: Expecting property name enclosed in double quotes; must be a list of objects",
        ),
        ("a.csv.gz", b"mr,ref", "PATH: cannot be decompressed: Not a gzipped file (b'mr')"),
        ("a.parquet", b"x", "PATH: cannot be read: "),
        ("a.jsonl", b'{"prompt": 3, "response": "r"}', "PATH: line 1: prompt is 3; must be a text"),
        ("a.jsonl", b'{"prompt": "p", "response": ""}', "PATH: line 1: response is blank; must be a text"),
        (
            "a.jsonl",
            b'{"prompt": "\\ud800", "response": "r"}',
            "PATH: line 1: prompt holds half of a surrogate pair (\\ud800 to \\udfff); must be valid Unicode",
        ),
        (
            "a.jsonl",
            b'{"prompt": "p", "response": "r"}\n \n{}',
            "PATH: line 2 is empty; delete it or fill it in",
        ),
        ("a.txt", b"a||b\nc d\n", "PATH: line 2 has 0 separators ||; needs exactly one, as in prompt||response"),
        (
            "a.txt",
            b"a||b||c\n",
            "PATH: line 1 has 2 separators ||; needs exactly one, as in prompt||response",
        ),
        ("a.txt", b"a|| \n", "PATH: line 1: the response is blank; must be a text"),
        ("a.txt", b"a||b\n\nc||d\n", "PATH: line 2 is empty; delete it or fill it in"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes | str | None, line: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(InputError) as refused:
        read(path)
    assert str(refused.value).startswith(line.replace("PATH", str(path)))


@pytest.mark.parametrize(
    ("label", "expected"),
    [(None, ["A", "B"]), ("food", ["Thai", "none"]), ("site", ["north", None]), ("name", ["A", "B"])],
)
def test_labels_of_a_csv(tmp_path: Path, label: str | None, expected: list[str | None]) -> None:
    path = tmp_path / "a.csv"
    path.write_text('mr,ref,site\n"name[A], food[Thai]",x,north\nname[B],y,\n')
    assert [example.label for example in read(path, label=label)] == expected


def test_labels_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [{"ward": 3}, {"ward": None}, {}, {"ward": "x"}]
    path.write_text("\n".join(json.dumps({"prompt": "p", "response": "r"} | row) for row in rows))
    assert [example.label for example in read(path, label="ward")] == ["3", None, None, "x"]
    with pytest.raises(InputError, match=r"'room' is no column, key or slot of .* has prompt, response, ward"):
        read(path, label="room")
    path.write_text(json.dumps({"prompt": "p", "response": "r", "ward": [1]}))
    with pytest.raises(InputError, match=r"line 1: ward, the data\.label, is a list; must be a single value"):
        read(path, label="ward")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "prompt,response\np,r\n", "p ->"),
        ("a.csv", "mr,ref\np,r\n", "p ->"),
        ("a.txt", "p||r", "p ->"),
        ("a.jsonl", '{"prompt": "p", "response": "r"}', "p ->"),
    ],
)
def test_separator(tmp_path: Path, name: str, content: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert read(path, separator=" ->")[0].prompt == expected
    assert read(path, separator="")[0].prompt == "p"


def test_limit_is_a_seeded_choice_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"p{n:03}||r" for n in range(200)))
    whole = read(path)
    some = read(path, limit=20)
    assert len(some) == 20 and some == [example for example in whole if example in some]
    assert some == read(path, limit=20) != read(path, limit=20, seed=1)
    assert read(path, limit=500) == whole


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("p||r")
    assert read("~/a.txt") == [Example("p =>", " r", None)]
    assert file_sha256("~/a.txt") == hashlib.sha256(b"p||r").hexdigest()
    with pytest.raises(InputError, match="there is no such file"):
        file_sha256(tmp_path / "b.txt")


def chat_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    def chat(messages: list[dict[str, str]], add_generation_prompt: bool, **beside: Any) -> str:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **beside
        )
        assert isinstance(text, str)
        return text

    return chat


def conversation(*turns: tuple[str, str], **others: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]} | others)


def test_chat(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(
        conversation(("user", "a"), ("assistant", "b"))
        + "\n"
        + conversation(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), t="x")
    )
    first, second = read(path, chat=chat_of(chat_tokenizer), separator="unused", label="t")
    assert first == Example("<bos>user\na<eos>\n<bos>assistant\n", "b<eos>", None)
    assert second.prompt.endswith("<bos>user\nc<eos>\n<bos>assistant\n")
    assert (second.response, second.label) == ("d<eos>", "x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": "hi"}', "messages must be a list of turns"),
        ('{"messages": []}', "messages must be a list of turns"),
        ('{"messages": [{"role": "user"}, {}]}', 'messages: turn 1 must be {"role": text, "content": text}'),
        ('{"messages": [3, 4]}', 'messages: turn 1 must be {"role": text, "content": text}'),
        (conversation(("poet", "a"), ("assistant", "b")), "messages: turn 1: its role must be one of ai, assistant,"),
        (conversation(("user", "a")), "its last answer is flagged not to be trained on, or there is none"),
        (conversation(("user", "a"), ("assistant", " ")), "messages: turn 2, an answer to learn, is blank"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}',
            "messages: turn 1: a part of its content is 'image_url', not text",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
            "messages: turn 1: weight must be 0 or 1 (got 0.5)",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": false}]}',
            "messages: turn 1: its flags contradict each other",
        ),
    ],
)
def test_chat_refusals(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, line: str, message: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(line)
    with pytest.raises(InputError) as refused:
        read(path, chat=chat_of(chat_tokenizer))
    assert str(refused.value).startswith(f"{path}: line 1: {message}")


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
SHOWING = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_reach_a_template_that_shows_them(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, key: str
) -> None:
    path = tmp_path / "chat.jsonl"
    row = json.loads(conversation(("user", "a"), ("assistant", "b")))
    path.write_text("\n".join(json.dumps(row | {key: value}) for value in (None, [], json.dumps(TOOLS), TOOLS)))
    with pytest.raises(InputError, match=r"line 3: the model's chat template does not show tools"):
        read(path, chat=chat_of(chat_tokenizer))
    assert len(read(path, chat=chat_of(chat_tokenizer), strict=False)) == 2
    chat_tokenizer.chat_template = SHOWING
    plain, _, *with_tools = read(path, chat=chat_of(chat_tokenizer))
    assert plain.prompt == "<user>a<eos><assistant>" and plain.response == "b<eos>"
    assert {example.prompt for example in with_tools} == {f"<tools>{json.dumps(TOOLS)}{plain.prompt}"}


FLAGS: list[dict[str, Any]] = [{"weight": 0}, {"train": False}, {"loss": False}, {"masked": True}, {"loss_weight": 0.0}]


@pytest.mark.parametrize("flag", FLAGS)
def test_turns_are_learned_as_the_row_and_train_on_say(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, flag: dict[str, Any]
) -> None:
    path = tmp_path / "chat.jsonl"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = json.loads(conversation(*turns))
    path.write_text(json.dumps(row))

    def found(train_on: str) -> list[str]:
        (example,) = read(path, chat=chat_of(chat_tokenizer), train_on=train_on)
        return learned(example)

    assert (found("last"), found("all")) == (["d<eos>"], ["b<eos>", "d<eos>"])
    with pytest.raises(InputError, match="no answer is flagged"):
        found("none-but-flagged")
    (key,) = flag
    row["messages"][1][key] = not flag[key]
    path.write_text(json.dumps(row))
    assert (found("last"), found("all"), found("none-but-flagged")) == (["d<eos>"], ["b<eos>", "d<eos>"], ["b<eos>"])
    row["messages"][1] |= flag
    row["messages"][0] |= flag
    path.write_text(json.dumps(row))
    assert (found("last"), found("all")) == (["d<eos>"], ["d<eos>"])
    row["messages"][3] |= flag
    path.write_text(json.dumps(row))
    for train_on in ("last", "all"):
        with pytest.raises(InputError, match="there is no turn to train on"):
            found(train_on)


def test_parts_of_a_dated_chat_are_the_same_on_every_day(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [(("user", f"a{n % 30} "), ("assistant", f"b{n}")) for n in range(60)]
    path.write_text("\n".join(conversation(*turns) for turns in rows))

    def parts(clock: Iterator[int]) -> Any:
        def dated(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
            date = f"<{next(clock)}>"
            body = "".join(f"{turn['role']}: {turn['content'].strip()}\n" for turn in messages)
            return date + body + ("assistant: " if add_generation_prompt else "")

        examples = read(path, chat=dated)
        rest, test = split_off_test(examples, 0.2, seed=1)
        sides = (test, *hold_out(rest, 0.2, 64, seed=2))
        assert [len(one.responses) for one in grouped(test)] == [2] * 6
        return [[example.response for example in side] for side in sides]

    assert parts(repeat(1)) == parts(repeat(2))
    # A clock that goes on while the file is read: the two references of a question still stand on one side.
    assert parts(repeat(1)) == parts(n // 7 for n in count())


def test_chat_needs_a_template_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(conversation(("user", "a"), ("assistant", "b")))

    def refusing(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        raise ValueError("roles must\nalternate")

    with pytest.raises(InputError, match="line 1: messages need a model with a chat template; this one has none"):
        read(path)
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        read(path, chat=refusing)
    with pytest.raises(InputError, match="does not put the answer behind the prompt"):
        read(path, chat=lambda messages, add_generation_prompt: f"{add_generation_prompt}")


@pytest.mark.skipif(not E2E.exists(), reason="the E2E development set is not beside the checkout")
def test_the_real_e2e_set() -> None:
    examples = read(E2E)
    assert len(examples) == 4672 and len({example.prompt for example in examples}) == 547
    assert examples[0].prompt == "name[Alimentum], area[city centre], familyFriendly[no] =>"
    assert examples[0].label == "Alimentum" and examples[0].response.startswith(" There is a place")
    assert all(example.label not in (None, "none") for example in examples)
    assert {example.label for example in read(E2E, label="familyFriendly")} == {"yes", "no", "none"}
