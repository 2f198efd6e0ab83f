"""What is trained on is what generation sees: tokens against the tokenizer's and the chat template's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from hsplit.data import Example, TokenizedExample, check_ids, check_special_tokens, padding_id, tokenize
from hsplit.data.chat import Conversation, rendered, template_of, turns_sha256
from hsplit.errors import InputError
from tests.data.real_tokenizers import KINDS, TEMPLATES, byte_level

TOKENIZERS = {(kind, template): make(template) for kind, make in KINDS.items() for template in TEMPLATES}
LONG = 10**9
# Texts that merge over a border, and others.
TEXTS = st.text(alphabet=" \nabis.:Y\u00e9\u4e2d=>", min_size=1, max_size=12)
WRITTEN = TEXTS.filter(str.strip)


def tokens_of(example: Example, tokenizer: Any) -> TokenizedExample:
    (made,), _ = tokenize([example], tokenizer, LONG)
    return made


def plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(kind=st.sampled_from(sorted(KINDS)), prompt=WRITTEN, response=WRITTEN)
def test_a_response_follows_the_prompt_as_generation_would_write_it(kind: str, prompt: str, response: str) -> None:
    tokenizer = TOKENIZERS[kind, "no bos"]
    made = tokens_of(Example(prompt, response, None), tokenizer)
    start = list(tokenizer(prompt)["input_ids"])
    assert list(made.ids[: made.prompt_length]) == start
    # A model that writes these tokens has written the text, and nothing before it.
    assert made.ids[-1] == tokenizer.eos_token_id
    answered = plain(tokenizer, prompt) + list(made.ids[made.prompt_length : -1])
    whole = plain(tokenizer, prompt + response)
    assert tokenizer.decode(answered) == tokenizer.decode(whole)
    if whole[: len(plain(tokenizer, prompt))] == plain(tokenizer, prompt):
        assert answered == whole


@given(
    kind=st.sampled_from(sorted(KINDS)),
    template=st.sampled_from(sorted(TEMPLATES)),
    questions=st.lists(WRITTEN, min_size=1, max_size=3),
    # Answers are no continuation of the header's last token: those that are have a law of their own above.
    answer=WRITTEN.filter(lambda text: text == text.lstrip()),
)
def test_a_chat_has_the_template_s_own_tokens(kind: str, template: str, questions: list[str], answer: str) -> None:
    tokenizer = TOKENIZERS[kind, template]
    turns = [
        {"role": role, "content": text} for text in questions for role, text in (("user", text), ("assistant", "b"))
    ]
    turns[-1] = {"role": "assistant", "content": answer}
    conversation = Conversation(tuple(turns), (None,) * len(turns))
    text = rendered(conversation, template_of(tokenizer), "last", "here")
    assert text.turns == turns_sha256(turns[:-1])
    made = tokens_of(Example(text.prompt, text.response, None, text.turns), tokenizer)
    start = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert list(made.ids[: made.prompt_length]) == list(start)
    # To the end of the turn; what the template writes behind it is not trained on.
    assert list(made.ids) == list(whole[: len(made.ids)])
    assert made.ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in whole[len(made.ids) :]
    assert made.ids.count(tokenizer.bos_token_id) == (template != "no bos")


@pytest.mark.parametrize("kind", ["prepend", "metaspace"])
def test_no_space_is_put_before_an_answer(kind: str) -> None:
    tokenizer = TOKENIZERS[kind, "no bos"]
    for prompt, expected in (("Say\n", ["Y", "e", "s", "</s>"]), ("Say:", ["Y", "e", "s", "</s>"])):
        made = tokens_of(Example(prompt, "Yes", None), tokenizer)
        assert tokenizer.convert_ids_to_tokens(made.ids[made.prompt_length :]) == expected
    # Behind a space of the prompt's own, which would be one token with the letter.
    made = tokens_of(Example("Say: ", "Yes", None), tokenizer)
    assert tokenizer.convert_ids_to_tokens(made.ids)[-5:] == ["\u2581", "Y", "e", "s", "</s>"]


def extended() -> Any:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<tool>", special=True)]})
    return tokenizer


def test_an_id_beyond_the_model_is_named_with_its_token_and_the_limit() -> None:
    tokenizer = extended()
    size = len(tokenizer) - 1
    secret = "a private text"
    fitting, _ = tokenize([Example("p", secret, None), Example("q", f"{secret}<tool>", None)], tokenizer, LONG)
    check_ids(fitting, tokenizer, size + 1, "here")
    check_ids(fitting[:1], tokenizer, size, "here")
    with pytest.raises(InputError) as refused:
        check_ids(fitting, tokenizer, size, "client a: its data")
    for text in (str(refused.value), refused.value.discreet):
        assert text.startswith("client a: its data: ") and f"'<tool>' (id {size})" in text
        assert f"vocab_size {size}" in text and secret not in text


def test_special_tokens_beyond_the_model_are_refused_and_a_pad_token_is_not_needed() -> None:
    tokenizer = extended()
    size = len(tokenizer) - 1
    check_special_tokens(tokenizer, size)
    tokenizer.pad_token = "<tool>"
    assert padding_id(tokenizer, size + 1) == size and padding_id(tokenizer, size) == tokenizer.eos_token_id
    tokenizer.eos_token = "<tool>"
    assert padding_id(tokenizer, size) == 0
    with pytest.raises(InputError, match=rf"its tokenizer's eos token '<tool>' \(id {size}\) .* vocab_size {size}"):
        check_special_tokens(tokenizer, size)
    leading = KINDS["prepend"]()
    check_special_tokens(leading, 3)
    with pytest.raises(InputError, match=r"eos token '</s>' \(id 2\)"):
        check_special_tokens(leading, 2)
