"""The unit of fine-tuning data: a prompt, which may be a meaning representation, and the response to learn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# No two parts that follow one another match the same characters: a long line is read once, not again and again.
_BRACKETED = re.compile(r"([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")
_PIPED = re.compile(r"([^:|]+):([^|]*)(?:\||$)")


def meaning_text(slots: Mapping[str, str]) -> str:
    """The slots as one line, ``name[The Copper Heron], food[Greek]``, in their own order."""
    return ", ".join(f"{slot}[{value}]" for slot, value in slots.items())


def parse_meaning(text: str) -> dict[str, str] | None:
    """The slots of a meaning representation, or None if the text is none.

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
        prompt: what the model is given.
        response: what it learns to answer.
        label: the class by which a Dirichlet partition tells examples apart, or None if the data has none.
        turns: for a chat, the SHA-256 of the turns that its template has made the prompt of; None for other data.
    """

    prompt: str
    response: str
    label: str | None
    turns: str | None = field(default=None, compare=False)

    @property
    def input_key(self) -> str:
        """Identity of the input, by which references of one input find together and parts of the data are drawn.

        It depends on what the file holds alone: a template may write today's date into the prompt.
        """
        return self.prompt if self.turns is None else self.turns
