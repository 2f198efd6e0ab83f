"""Conversations through the templates of ten families are what the template gives, and only answers are learned."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.data import collate, template_of, tokenize
from hsplit.data.chat import Conversation, Unusable, rendered
from hsplit.data.examples import Example
from tests.data.families import FAMILIES

TEXTS = st.text(st.sampled_from("abc XYZ.,é"), min_size=1, max_size=12).map(str.strip).filter(bool)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}


def conversation(texts: list[str], system: str | None = None) -> list[dict[str, Any]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def example_of(
    name: str, turns: list[dict[str, Any]], train_on: Any, end: bool = True, **beside: Any
) -> tuple[Example, Any]:
    tokenizer = FAMILIES[name].tokenizer()
    spoken = Conversation(tuple(turns), (None,) * len(turns), beside)
    made = rendered(spoken, template_of(tokenizer), train_on, "a.json: item 1", end)
    return Example(made.prompt, made.response, None, made.turns, made.unsupervised), tokenizer


def learned_text(example: Example, tokenizer: Any) -> list[str]:
    """What the targets of a batch say, run by run."""
    (tokens,), _ = tokenize([example], tokenizer, 10_000)
    runs, before = list[list[int]](), False
    for target in collate([tokens]).targets[0].tolist():
        if target >= 0 and not before:
            runs.append([])
        if target >= 0:
            runs[-1].append(target)
        before = target >= 0
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", FAMILIES)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3).map(lambda own: [*own, *own]), system=st.none() | TEXTS)
def test_tokens_are_those_of_the_template(name: str, texts: list[str], system: str | None) -> None:
    """Token by token those of ``apply_chat_template``, but for what stands behind the last answer's end."""
    family = FAMILIES[name]
    turns = conversation(texts, system if family.system else None)
    example, tokenizer = example_of(name, turns, "last")
    (tokens,), _ = tokenize([example], tokenizer, 10_000)
    whole = list(tokenizer.apply_chat_template(turns, return_dict=False))
    rest = whole[len(tokens.ids) :]
    assert list(tokens.ids) == whole[: len(tokens.ids)]
    assert tokenizer.decode(rest).strip() == "" and tokens.ids[-1] == tokenizer.eos_token_id
    # Generation starts where training says that the answer begins.
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
    assert asked.startswith(example.prompt)


@pytest.mark.parametrize("name", FAMILIES)
@given(answers=st.lists(TEXTS, min_size=1, max_size=3), system=st.none() | TEXTS)
def test_answers_are_learned_with_their_ends_and_nothing_else(
    name: str, answers: list[str], system: str | None
) -> None:
    family = FAMILIES[name]
    texts = [text for answer in answers for text in ("QQ", answer)]
    turns = conversation(texts, system if family.system else None)
    if not family.every and len(answers) > 1:
        with pytest.raises(Unusable, match="earlier answers in another way"):
            example_of(name, turns, "all")
        return
    # What an answer with its end is in this family, by a few lines of its own.
    lead = {"Llama 2": " ", "Mistral": " ", "Qwen 3": "<think>\n\n</think>\n\n"}.get(name, "")
    end = {"Llama 2": " </s>", "Phi 3": "<|end|>"}.get(name, family.eos)
    expected = [f"{lead}{answer}{end}" for answer in answers]
    if name == "Phi 3":
        expected[-1] += "\n<|endoftext|>"
    every, tokenizer = example_of(name, turns, "all")
    assert learned_text(every, tokenizer) == expected
    assert learned_text(*example_of(name, turns, "last")) == expected[-1:]
    without, _ = example_of(name, turns, "all", end=False)
    tail = " " if name == "Llama 2" else ""
    assert learned_text(without, tokenizer) == [f"{lead}{answer}{tail}" for answer in answers]
    assert tokenize([without], tokenizer, 10_000)[0][0].ids == tokenize([every], tokenizer, 10_000)[0][0].ids


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_calls_of_tools_are_learned_where_the_template_shows_them(name: str) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "where"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "dark"},
        {"role": "assistant", "content": "It is dark."},
    ]
    example, tokenizer = example_of(name, turns, "last", tools=TOOLS)
    shown = tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    assert shown.startswith(example.prompt + example.response) and "look" in example.prompt
    assert learned_text(example, tokenizer)[-1].endswith(f"It is dark.{tokenizer.eos_token}")


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.tools])
def test_tools_that_a_template_does_not_show_are_no_prompt(name: str) -> None:
    with pytest.raises(Unusable, match="does not show tools"):
        example_of(name, conversation(["a", "b"]), "last", tools=TOOLS)


@pytest.mark.parametrize("name", ["Gemma", "Mistral"])
def test_a_family_without_system_turns_says_so(name: str) -> None:
    with pytest.raises(Unusable, match=r"refuses these messages: .*(System|Only user)"):
        example_of(name, conversation(["a", "b"], "s"), "last")


@pytest.mark.parametrize("name", ["Llama 2", "Gemma"])
def test_a_family_that_demands_alternation_says_so(name: str) -> None:
    turns = [{"role": "user", "content": "a"}, *conversation(["a", "b"])]
    with pytest.raises(Unusable, match="roles must alternate"):
        example_of(name, turns, "last")


def test_a_thought_is_learned_where_the_template_keeps_it() -> None:
    turns = conversation(["a", "b"])
    turns[1]["reasoning_content"] = "hm"
    example, tokenizer = example_of("Qwen 3", turns, "last")
    assert learned_text(example, tokenizer) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
