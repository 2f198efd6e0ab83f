"""Tiny word-level tokenizers, built on the spot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ("<unk>", "<eos>", "<bos>", "<pad>", "a", "b", "c", "d", "e", "f", "g", "h")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def word_tokenizer(*, leading_bos: bool = False, **special: str) -> PreTrainedTokenizerFast:
    """One id for each of `WORDS`, by position; `leading_bos` puts a bos before every text, as Llama does."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if leading_bos:
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
        special.setdefault("bos_token", "<bos>")
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def make_tokenizer() -> MakeTokenizer:
    """`word_tokenizer`, for tests that need special tokens of their own."""
    return word_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """With an eos and no pad token, like GPT-2's."""
    return word_tokenizer(eos_token="<eos>")


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template whose turns end with the eos and a line end, like SmolLM2's."""
    made = word_tokenizer(eos_token="<eos>", bos_token="<bos>")
    made.chat_template = CHAT_TEMPLATE
    return made
