"""Meaning representations: lists of slots with values, the prompts of data-to-text sets such as E2E."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
