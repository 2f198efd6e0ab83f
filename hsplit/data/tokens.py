"""Examples as token ids, with the place where the response begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsplit.data.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedExample:
    """One example in tokens.

    Attributes:
        ids: ids of the prompt (with bos, if the tokenizer adds one), of the response, and the eos, if there
            is one.
        prompt_length: how many of them belong to the prompt; the model is trained to predict the others.
    """

    ids: tuple[int, ...]
    prompt_length: int


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[TokenizedExample], int]:
    """Tokenize, leaving out (never cutting) what is longer than `max_length` tokens.

    Prompt and response are tokenized apart, so that the prompt's tokens are the ones that generation starts
    from. No special token is added but the bos that the tokenizer puts before every text and the eos at the
    end, and neither where the text already has it, as chat templates do.

    Returns:
        The examples that fit, in their order, and the number of those that do not.
    """
    if not examples:
        return [], 0
    first = _leading_bos(tokenizer)
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    responses = _ids(tokenizer, [example.response for example in examples])
    last = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    fitting = []
    for prompt, response in zip(prompts, responses, strict=True):
        if first and prompt[:1] != first:
            prompt = first + prompt
        if last and response[-1:] != last:
            response = response + last
        if len(prompt) + len(response) <= max_length:
            fitting.append(TokenizedExample(tuple(prompt + response), len(prompt)))
    return fitting, len(examples) - len(fitting)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the pad token's, else the eos's, else 0.

    It does not matter to any result: the models are causal and padding stands on the right, so no real
    position ever looks at it, and no target is set there. A tokenizer without a pad token therefore works as
    it is.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos as a list of one if the tokenizer puts it before a text of its own accord, as Llama's does."""
    bos = tokenizer.bos_token_id
    return [int(bos)] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text beyond the model's context is left out by max_length, so the warning would
    # mislead.
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(ids) for ids in encoded]
