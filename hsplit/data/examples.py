"""The unit of fine-tuning data: a prompt, which may be a meaning representation, and the response; and its tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Adjacent parts match no common characters, so that a long line is read once, without backtracking.
_BRACKETED = re.compile(r"([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")
_PIPED = re.compile(r"([^:|]+):([^|]*)(?:\||$)")


def meaning_text(slots: Mapping[str, str]) -> str:
    """Write the slots as one line, ``name[The Copper Heron], food[Greek]``, in their own order."""
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items())


def parse_meaning(text: str) -> dict[str, str] | None:
    """Parse the slots of a meaning representation; None if the text is none.

    Two spellings are read: ``name[The Copper Heron], food[Greek]``, and ``name : The Copper Heron | food :
    Greek`` (at least two slots, because a single colon is ordinary prose).
    """
    slots = _parse(_BRACKETED, text)
    if slots is None and "|" in text:
        slots = _parse(_PIPED, text)
    return slots


def _parse(pattern: re.Pattern[str], text: str) -> dict[str, str] | None:
    text = text.strip()
    slots: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None or not match[1].strip():
            return None
        slots[match[1].strip()] = match[2].strip()
        position = match.end()
    return slots or None


@dataclass(frozen=True)
class Example:
    """One prompt with its response.

    The model sees the tokens of the prompt, of the response as it follows them, and the eos; the loss is on the
    response and the eos only. Both texts are final: separators and leading spaces are already in them.

    Attributes:
        prompt: input of the model.
        response: the answer to learn.
        label: the class for a Dirichlet partition, or None if the data has none.
        turns: for a chat, the SHA-256 of the turns from which its template has made the prompt; None for other data.
        unsupervised: parts of the response that are not learned, ``(first character, end)``: in a conversation the
            turns between two answers. If the last one ends where the response does, the eos is not learned either.
        text: a text that is learned whole, in pieces of ``job.max_length`` tokens.
    """

    prompt: str
    response: str
    label: str | None
    turns: str | None = field(default=None, compare=False)
    unsupervised: tuple[tuple[int, int], ...] = ()
    text: bool = False

    @property
    def input_key(self) -> str:
        """Identity of the input, by which references of one input are grouped and parts of the data are drawn.

        It depends on the file's content alone: a template may write today's date into the prompt.
        """
        return self.prompt if self.turns is None else self.turns


@dataclass(frozen=True)
class TokenizedExample:
    """One example in tokens.

    Attributes:
        ids: ids of the prompt (with bos, if the tokenizer adds one), of the response, and the eos, if there
            is one.
        prompt_length: number of prompt tokens; the model is trained to predict the others.
        unsupervised: except these, ``(first, end)``, beyond the prompt and in order.
    """

    ids: tuple[int, ...]
    prompt_length: int
    unsupervised: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self) -> int:
        """Number of tokens that the model is trained to predict; with an empty prompt nothing predicts the first."""
        first = max(self.prompt_length, 1)
        left_out = sum(max(0, stop - max(start, first)) for start, stop in self.unsupervised)
        return max(0, len(self.ids) - first - left_out)

    def cut(self, length: int) -> TokenizedExample:
        """Its first ``length`` tokens."""
        spans = tuple((start, min(stop, length)) for start, stop in self.unsupervised if start < length)
        return TokenizedExample(self.ids[:length], min(self.prompt_length, length), spans)
