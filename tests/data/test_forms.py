"""Forms that people's data have, each against a few independent lines, and what is left out of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hsplit import kept
from hsplit.config import DataSpec, load_run_config
from hsplit.config.job import MixturePart
from hsplit.data import Reading, collate, kept_tokens, partition, read_data, read_source, template_of, tokenize, tokens
from hsplit.data.examples import Example
from hsplit.data.forms import FORMS
from hsplit.data.rows import source_sha256
from hsplit.errors import InputError
from tests.data.learned import learned
from tests.fuzz.harness import examples

SHARED = Path(__file__).parents[3] / "shared" / "data"
PAIR = {"prompt": "p", "response": "r"}
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}<eos>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> Any:
    tokenizer.chat_template = template
    return template_of(tokenizer)


def written(path: Path, rows: Any) -> str:
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return str(path)


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.json", lambda raw: raw),
        ("a.json.gz", gzip.compress),
        ("a.json.bz2", bz2.compress),
        ("A.JSON.XZ", lzma.compress),
    ],
)
def test_packed_files_are_read_as_they_are(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(json.dumps([PAIR, PAIR]).encode()))
    assert read_source(str(tmp_path / name)).examples == [Example("p\n", "r", None)] * 2


def test_tables_are_read_with_all_their_types(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    table = pyarrow.table({"messages": [turns, turns], "score": [1, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "stream.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        with pytest.raises(InputError, match=r"needs? a model with a chat template"):
            read_source(str(tmp_path / name))
        columns = DataSpec(columns={"text": "score"})
        with pytest.raises(InputError, match=r"row 1: text is 1; must be a text"):
            read_source(str(tmp_path / name), columns)


def test_folders_and_patterns_are_their_files_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.csv", "x"), ("a.csv", "y"), ("c.md", "z")):
        (tmp_path / name).write_text(f"prompt,response\np,{text}\n")
    for source in (tmp_path, tmp_path / "*.csv", tmp_path / "[ab].csv"):
        assert [example.response for example in read_source(str(source)).examples] == ["y", "x"]
    before = source_sha256(str(tmp_path))
    assert before == source_sha256(f"{tmp_path}/*.csv") != source_sha256(f"{tmp_path}/a.csv")
    (tmp_path / "a.csv").write_text("prompt,response\np,w\n")
    assert source_sha256(str(tmp_path)) != before
    with pytest.raises(InputError, match="no file has such a name"):
        read_source(f"{tmp_path}/*.tsv")


def test_a_hub_that_is_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str, split: str) -> Any:
        assert (name, split) == ("org/set", "train[:5%]")
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError) as refused:
        read_source("org/set:train[:5%]")
    wrong = "is no file here, and the hub does not give it: no network here"
    assert str(refused.value) == f"data.source: org/set:train[:5%]: {wrong}"
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [PAIR])
    assert read_source("org/set").examples == [Example("p\n", "r", None)]


@pytest.mark.parametrize("content", ['prompt;response\n"a;b";r\n', '\ufeffprompt;response\r\n"a;b";r\r\n'])
def test_semicolons_and_tabs_separate_too(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content, newline="")
    (tmp_path / "a.tsv").write_text(content.replace("a;b", "a\tb").replace(";", "\t"), newline="")
    assert read_source(str(tmp_path / "a.csv")).examples[0].prompt == "a;b\n"
    assert read_source(str(tmp_path / "a.tsv")).examples[0].prompt == "a\tb\n"


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt-completion", ("p\n", "c")),
        ({"question": "q", "answer": "a", "id": 3}, "question-answer", ("q\n", "a")),
        ({"context": "x", "completion": "c"}, "context-completion", ("x\n", "c")),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", ("i\n", "o")),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", ("i\nx\n", "o")),
        ({"instruction": "i", "output": "o", "system": "s", "history": [["a", "b"]]}, "alpaca", ("s\na\nb\ni\n", "o")),
        ({"text": "t"}, "text", ("", "t")),
        ({"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]}, "segments", ("a", "b")),
    ],
)
def test_texts(tmp_path: Path, row: dict[str, Any], form: str, expected: tuple[str, str]) -> None:
    found = read_source(written(tmp_path / "a.jsonl", [row]))
    assert found.form == form
    assert [(example.prompt, example.response) for example in found.examples] == [expected]


def test_columns_that_nothing_is_taken_from_are_said(tmp_path: Path) -> None:
    found = read_source(written(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "id": 3, "ward": "x"}]))
    assert found.unused == ("id", "ward")
    assert read_source(str(tmp_path / "a.jsonl"), DataSpec(label="ward")).unused == ("id",)


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    found = read_source(str(path))
    assert (found.form, [example.response for example in found.examples]) == ("text", ["one", "two"])
    path.write_text("one||two\nthree\n")
    found = read_source(str(path))
    assert (found.form, len(found.examples), found.skipped["no single ||"].count) == ("pairs", 1, 1)


def test_columns_of_other_names(tmp_path: Path) -> None:
    row = {"frage": "q", "antwort": "a", "prompt": "unused"}
    source = written(tmp_path / "a.jsonl", [row])
    with pytest.raises(InputError, match=r"has frage, antwort, prompt; needs .* or name them by data\.columns"):
        read_source(source)
    data = DataSpec(columns={"prompt": "frage", "response": "antwort"})
    assert read_source(source, data).examples == [Example("q\n", "a", None)]
    with pytest.raises(InputError, match=r"data\.columns: no row has answer; there are frage, antwort, prompt"):
        read_source(source, DataSpec(columns={"prompt": "frage", "response": "answer"}))


def test_what_may_be_read_in_two_ways_is_refused_until_it_is_named(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"text": "t", **PAIR}])
    with pytest.raises(InputError, match=r"may be read as prompt and response .* or plain text \(data\.form: text\)"):
        read_source(source)
    assert read_source(source, DataSpec(form="text")).examples == [Example("", "t", None, text=True)]
    with pytest.raises(InputError, match="line 1 has text, prompt, response; needs messages"):
        read_source(source, DataSpec(form="messages"))


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "x"}}'},
        {"from": "observation", "value": "dark"},
        {"from": "gpt", "value": "It is dark."},
    ],
    "system": "s",
    "tools": '[{"name": "look"}]',
}
LOOK = '<call>{"name": "look", "arguments": {"at": "x"}}'
AS_TEXT = f'<tools>[{{"name": "look"}}]<eos><system>s<eos>\n<user>hi<eos>\n<assistant>{LOOK}<eos>\n<tool>dark<eos>\n'


def test_sharegpt_with_tools(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(chat_tokenizer, TEMPLATE)
    source = written(tmp_path / "a.json", [SHAREGPT])
    (last,) = read_source(source, chat=chat).examples
    assert (last.prompt, learned(last)) == (f"{AS_TEXT}<assistant>", ["It is dark.<eos>"])
    (every,) = read_source(source, DataSpec(train_on="all"), chat=chat).examples
    assert every.prompt + every.response == last.prompt + last.response
    assert learned(every) == [f"{LOOK}<eos>", "It is dark.<eos>"]


def test_openai_calls_results_and_parts(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same conversation as OpenAI has it: a call without content, arguments as text, texts in parts."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "x"}'}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "text", "value": "h"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "dark", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "Dark."}]},
    ]
    chat = with_template(chat_tokenizer, TEMPLATE)
    rows = [{"messages": messages, "tools": [{"name": "look"}]}]
    (found,) = read_source(written(tmp_path / "a.json", rows), chat=chat).examples
    assert (found.prompt, found.response) == (f"{AS_TEXT}<assistant>", "<think>hm</think>Dark.<eos>")


@pytest.mark.parametrize("template", [TEMPLATE, MARKING])
def test_what_is_learned_of_a_conversation_by_both_ways(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """A template's own marks give what rendering turn by turn gives."""
    chat = with_template(chat_tokenizer, template)
    roles = ["user", "assistant", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"w{i}"} for i, role in enumerate(roles)]
    messages[3]["weight"] = 0  # type: ignore[assignment]
    source = written(tmp_path / "a.json", [{"messages": messages}])
    (found,) = read_source(source, DataSpec(train_on="all"), chat=chat).examples
    assert found.prompt == "<user>w0<eos>\n<assistant>"
    assert learned(found) == ["w1<eos>", "w5<eos>"]


def test_a_template_that_opens_a_thought_is_separated_before_it(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    opening = TEMPLATE.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")
    source = written(tmp_path / "a.json", [SHAREGPT])
    (found,) = read_source(source, chat=with_template(chat_tokenizer, opening)).examples
    assert (found.prompt, found.response) == (f"{AS_TEXT}<assistant>", "It is dark.<eos>")


def test_a_template_that_drops_earlier_thoughts_learns_the_last_answer_alone(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    dropping = TEMPLATE.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
    thought = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "b"}]
    messages = [
        {"role": role, "content": thought if role == "assistant" else "a"} for role in ("user", "assistant") * 2
    ]
    source = written(tmp_path / "a.json", [{"messages": messages}])
    chat = with_template(chat_tokenizer, dropping)
    (found,) = read_source(source, chat=chat).examples
    assert found.response == "<think>hm</think>b<eos>"
    with pytest.raises(InputError, match=r"renders earlier answers in another way: use data\.train_on: last"):
        read_source(source, DataSpec(train_on="all"), chat=chat)


def test_alternation_that_a_template_demands_is_said(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    demanding = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}<{{ m.role }}>{{ m.content }}<eos>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": [turns[0], *turns]}]
    found = read_source(written(tmp_path / "a.json", rows), chat=with_template(chat_tokenizer, demanding))
    assert len(found.examples) == 1
    fault = found.skipped["refused by the template"]
    assert fault.count == 1 and fault.first == (f"{tmp_path}/a.json: item 2",)
    with pytest.raises(InputError, match="refuses these messages: roles must alternate user/assistant"):
        read_source(str(tmp_path / "a.json"), DataSpec(strict=True), chat=template_of(chat_tokenizer))


# -- masks ------------------------------------------------------------------------------------------------------------


def test_targets_are_the_tokens_of_what_is_learned(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat = with_template(chat_tokenizer, "{% for m in messages %}{{ m.content }} <eos> {% endfor %}")
    roles = ["user", "assistant", "user", "assistant"]
    words = [["a", "b"], ["c"], ["d"], ["e", "f"]]
    messages = [{"role": role, "content": " ".join(own)} for role, own in zip(roles, words, strict=True)]
    source = written(tmp_path / "a.json", [{"messages": messages}])
    (example,) = read_source(source, DataSpec(train_on="all"), chat=chat).examples
    (made,), _ = tokenize([example], chat_tokenizer, 100)
    assert chat_tokenizer.convert_ids_to_tokens(list(made.ids)) == [*words[0], "<eos>", *words[1], "<eos>", *words[2],
                                                                    "<eos>", *words[3], "<eos>"]  # fmt: skip
    targets = collate([made]).targets[0]
    shown = [chat_tokenizer.convert_ids_to_tokens(int(t)) if t >= 0 else "" for t in targets]
    assert shown == ["", "", "c", "<eos>", "", "", "e", "f", "<eos>", ""]
    assert made.supervised == 5 == collate([made]).supervised
    cut = made.cut(7)
    assert cut.supervised == 2 and collate([cut]).supervised == cut.supervised


def test_the_eos_of_a_pair_is_learned_unless_ends_of_turns_are_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = written(tmp_path / "a.json", [{"prompt": "a", "response": "b c"}])

    def found(**how: Any) -> tuple[list[str], int]:
        (example,) = read_source(source, DataSpec(**how)).examples
        (made,), _ = tokenize([example], tokenizer, 10)
        targets = [int(target) for target in collate([made]).targets[0] if target >= 0]
        return tokenizer.convert_ids_to_tokens(targets), len(made.ids)

    assert found() == (["b", "c", "<eos>"], 4)
    assert found(end_of_turn=False) == (["b", "c"], 4)


def test_long_examples_are_left_out_or_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    long = Example("w2 w3 w4", " w5 w6 w7", None)
    assert tokenize([long], tokenizer, 5) == ([], 1)
    ((cut,), left) = tokenize([long], tokenizer, 5, "cut")
    assert (len(cut.ids), cut.prompt_length, cut.supervised, left) == (5, 3, 2, 0)
    # Cut within its prompt nothing would be learned.
    assert tokenize([long], tokenizer, 3, "cut") == ([], 1)


def test_a_text_is_learned_in_pieces(tokenizer: PreTrainedTokenizerFast) -> None:
    words = " ".join(f"w{i}" for i in range(2, 13))
    pieces, left = tokenize([Example("", words, None, text=True)], tokenizer, 5)
    assert left == 0 and [len(piece.ids) for piece in pieces] == [5, 5, 2]
    assert [token for piece in pieces for token in piece.ids][:-1] == tokenizer(words)["input_ids"]
    assert pieces[-1].ids[-1] == tokenizer.eos_token_id
    assert [piece.supervised for piece in pieces] == [4, 4, 1]


# -- rows that nothing is learned from --------------------------------------------------------------------------------


def test_unusable_rows_are_counted_by_reason_with_their_places(tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "p", "response": " "}, {"q": 1}, {"prompt": 3, "response": "r"}, PAIR, {"response": "r"}]
    rows += [{"prompt": "p", "response": ""}] * 4
    source = written(tmp_path / "a.jsonl", rows)
    found = read_source(source)
    assert len(found.examples) == 2 and found.left_out == 8
    assert {reason: own.count for reason, own in found.skipped.items()} == {
        "blank response": 5, "other keys": 2, "no text": 1,
    }  # fmt: skip
    assert found.skipped["blank response"].first == tuple(f"{source}: line {n}" for n in (2, 7, 8))
    blank = f"5 blank response: {source}: line 2, line 7, line 8, …; 2 other keys: {source}: line 3, line 6; "
    assert str(found).startswith(f"read as prompt and response: 2 examples, 8 rows skipped ({blank}")
    with pytest.raises(InputError, match="line 2: response is blank; must be a text"):
        read_source(source, DataSpec(strict=True))


def test_empty_rows_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\np,r\n\n,\np,r\n")
    found = read_source(str(tmp_path / "a.csv"))
    assert len(found.examples) == 2 and found.skipped["empty"].count == 2


def test_nothing_left_is_refused_with_the_first_fault(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"prompt": "secret", "response": -4711}, {"prompt": "p", "response": 8}])
    with pytest.raises(InputError) as refused:
        read_source(source)
    said = "line 1: response is -4711; must be a text (none of 2 rows can be learned from; the first)"
    assert str(refused.value) == f"{source}: {said}"
    assert "-4711" not in refused.value.discreet and "response must be a text" in refused.value.discreet


# -- files that people have -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the data are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "form", "examples"),
    [
        ("formats/alpaca.json", "alpaca", 60),
        ("formats/plain.txt", "text", 2),
        ("formats/reasoning_tools.jsonl", "messages", 25),
        ("formats/segments.jsonl", "messages", 30),
        ("formats/sharegpt_tools.json", "sharegpt", 60),
        ("formats/text.jsonl", "text", 30),
        ("gsm8k/train.jsonl", "question-answer", 7473),
        ("dart/valid.jsonl", "context-completion", 6980),
        ("e2e/devset.csv", "e2e", 4672),
    ],
)
def test_files_that_people_have(chat_tokenizer: PreTrainedTokenizerFast, name: str, form: str, examples: int) -> None:
    chat = with_template(chat_tokenizer, TEMPLATE)
    found: Reading = read_source(str(SHARED / name), chat=chat)
    assert (found.form, len(found.examples), found.left_out) == (form, examples, 0)
    if form in ("messages", "sharegpt"):
        every = read_source(str(SHARED / name), DataSpec(train_on="all"), chat=chat).examples
        rows = json.loads((SHARED / name).read_text()) if name.endswith(".json") else [
            json.loads(line) for line in (SHARED / name).read_text().splitlines()
        ]  # fmt: skip
        for row, example in zip(rows, every, strict=True):
            turns = row.get("messages") or row["conversations"]
            answers = [t for t in turns if t.get("role", t.get("from")) in ("assistant", "gpt", "function_call")]
            assert len(learned(example)) == len(answers)


def test_every_form_has_its_name_in_the_configuration() -> None:
    from typing import get_args

    from hsplit.config.job import DataForm

    assert set(FORMS) == set(get_args(DataForm))


def test_a_column_that_is_named_stands_beside_the_rows_own(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", [{"question_en": "p", "response": "r", "id": 1}])
    (found,) = read_source(source, DataSpec(columns={"prompt": "question_en"})).examples
    assert (found.prompt, found.response) == ("p\n", "r")
    # Named columns that are a form decide, whatever else the rows have.
    rows = [{"a": "x", "b": "y", "messages": [], "text": "t"}]
    both = DataSpec(columns={"prompt": "a", "response": "b"})
    assert read_source(written(tmp_path / "b.jsonl", rows), both).form == "prompt-response"


SECRET = "s3cret"
_KEYS = ["role", "content", "from", "value", "weight", "train", "type", "text", "tool_calls", "function", "name"]
_VALUES = st.recursive(
    st.sampled_from([None, True, 4711, 0.4711, SECRET, "", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*_KEYS, "arguments", "label", SECRET]), inner, max_size=4)
    ),
    max_leaves=10,
)


_FORM_KEYS = sorted({key for form in FORMS.values() for keys in form.keys for key in keys})
_ROWS = st.dictionaries(
    st.sampled_from([*_FORM_KEYS, "input", "system", "history", "tools", SECRET]), _VALUES, min_size=1
)


@examples(300)
@given(row=_ROWS, form=st.none() | st.sampled_from(sorted(set(FORMS) - {"pairs"})))
def test_no_fault_of_a_row_says_in_its_discreet_form_what_the_row_holds(
    tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any], form: Any
) -> None:
    def refusing(messages: list[dict[str, Any]], add_generation_prompt: bool, **beside: Any) -> str:
        raise ValueError(str(messages))

    source = written(tmp_path_factory.getbasetemp() / "private.jsonl", [row])
    for template in (refusing, lambda messages, *_, **__: "".join(str(turn["content"]) for turn in messages)):
        try:
            found = read_source(source, DataSpec(form=form, strict=True), chat=template)
        except InputError as error:
            assert SECRET not in error.discreet and "4711" not in error.discreet
        else:
            assert SECRET not in str(found)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def mixed(folder: Path, *parts: dict[str, Any], **more: Any) -> Reading:
    written(folder / "many.jsonl", [{"prompt": f"m{n}", "response": "r", "ward": str(n % 2)} for n in range(40)])
    written(folder / "few.json", [{"instruction": f"f{n}", "output": "r"} for n in range(10)])
    sources = ("many.jsonl", "few.json")
    own = [MixturePart(source=str(folder / name), **part) for name, part in zip(sources, parts, strict=True)]
    return read_data(DataSpec(mixture=tuple(own), **more))


def test_a_mixture_has_every_example_with_its_source_as_label(tmp_path: Path) -> None:
    found = mixed(tmp_path, {}, {})
    assert Counter(one.label for one in found.examples) == {"many.jsonl": 40, "few.json": 10}
    assert str(found).startswith("read as a mixture (many.jsonl as prompt and response, few.json as Alpaca): 50")
    shares = partition(found.examples, 2, "label", 0)
    assert [{found.examples[i].label for i in share} for share in shares] == [{"many.jsonl"}, {"few.json"}]


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (10, 10)), ((4, 1), (40, 10)), ((9, 1), (40, 4)), ((1, 2), (5, 10))]
)
def test_weights_are_parts_of_what_is_used_and_nothing_is_used_twice(
    tmp_path: Path, weights: tuple[float, float], counts: tuple[int, int]
) -> None:
    found = mixed(tmp_path, *({"weight": float(own)} for own in weights))
    assert Counter(one.label for one in found.examples) == dict(zip(("many.jsonl", "few.json"), counts, strict=True))
    assert len({one.prompt for one in found.examples}) == sum(counts)


def test_each_part_of_a_mixture_is_read_in_its_own_way(tmp_path: Path) -> None:
    found = mixed(tmp_path, {"label": "ward"}, {"columns": {"text": "output"}}, limit=20)
    assert len(found.examples) == 20
    assert {one.label for one in found.examples if not one.text} == {"0", "1"}
    assert {one.label for one in found.examples if one.text} == {"few.json"}


def test_a_mixture_counts_what_it_leaves_out_of_each_part(tmp_path: Path) -> None:
    bad = [{"prompt": "p", "response": ""}, PAIR]
    parts = tuple(MixturePart(source=written(tmp_path / name, bad)) for name in ("a.jsonl", "b.jsonl"))
    skipped = read_data(DataSpec(mixture=parts)).skipped["blank response"]
    assert skipped.count == 2 and skipped.first == tuple(
        f"{tmp_path}/{name}: line 1" for name in ("a.jsonl", "b.jsonl")
    )


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"source": "a.csv", "mixture": ({"source": "b.csv"},)}, "source: must be left out beside mixture"),
        (
            {"mixture": ({"source": "a.csv", "weight": 1.0}, {"source": "b.csv"})},
            "[1].weight: is required, since another source has one",
        ),
        ({"mixture": ({"source": "restaurants"}, {"source": "restaurants"})}, "must have restaurants once only"),
        ({"mixture": ({"source": "a.csv", "weight": 0.0},)}, "weight: must be"),
    ],
)
def test_a_mixture_that_is_none_is_refused(given: Any, wrong: str) -> None:
    with pytest.raises(InputError) as refused:
        load_run_config(
            "hetero", None, {f"job.data.{key}": value for key, value in json.loads(json.dumps(given)).items()}
        )
    assert wrong in str(refused.value)


# -- many rows --------------------------------------------------------------------------------------------------------


def test_kept_tokens_are_those_of_tokenizing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_tokens, "MANY", 3)
    monkeypatch.setattr(kept, "LEFT_FREE_BYTES", 0)
    examples = [
        Example("a b", " c d e", None, "turns", ((0, 2),)),
        Example("a", " b", None),
        Example("a", " b c d e f g h", None),
        Example("", "a b c", None, text=True),
    ]

    def made(examples: list[Example] = examples, length: int = 7, **how: Any) -> Any:
        return tokenize(examples, tokenizer, length, cache=True, **how)

    folder, expected = tmp_path / "cache" / "tokens", tokenize(examples, tokenizer, 7)
    assert expected[1] == 1 and expected[0][0].unsupervised
    assert made() == expected and len(list(folder.iterdir())) == 1
    with monkeypatch.context() as nothing_new:
        nothing_new.setattr(tokens, "_ids", None)
        assert made() == expected
    # Whatever the tokens depend on makes another file.
    *before, last = examples
    others = (
        [*before, replace(last, response="a b d")],
        [*before, replace(last, text=False)],
        [replace(examples[0], unsupervised=()), *examples[1:]],
        examples[::-1],
    )
    for number, other in enumerate(others, start=2):
        assert made(other) == tokenize(other, tokenizer, 7) and len(list(folder.iterdir())) == number
    assert made(length=8) == tokenize(examples, tokenizer, 8) and made(long="cut")[1] == 0
    files = len(list(folder.iterdir()))
    tokenizer.eos_token = "h"
    assert made() == tokenize(examples, tokenizer, 7) and len(list(folder.iterdir())) == files + 1
    # Fewer, and those that are not to be kept, are not.
    made(examples[:2])
    tokenize(examples[::2] * 2, tokenizer, 7)
    assert len(list(folder.iterdir())) == files + 1
