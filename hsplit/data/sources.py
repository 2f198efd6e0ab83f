"""Reading a data source, the built-in generator or a file, into examples ready for the tokenizer."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from hsplit.data.chat import ChatTemplate
from hsplit.data.examples import Example, meaning_text, parse_meaning
from hsplit.data.formats import READERS, Row
from hsplit.data.restaurants import NO_LABEL, descriptions
from hsplit.data.text_files import listed
from hsplit.errors import InputError

BUILT_IN = "restaurants"
_SEPARATORS = {"meaning": " =>", "plain": "\n"}
_DEFAULT_FILE_SLOT = "name"
_DEFAULT_BUILT_IN_SLOT = "food"


def read_examples(
    source: str,
    *,
    examples: int,
    seed: int,
    label: str | None,
    separator: str | None,
    limit: int | None,
    chat: ChatTemplate | None = None,
) -> list[Example]:
    """Read the examples of a source, in its order.

    Args:
        source: ``restaurants``, or the path (``~`` is expanded) of a ``.csv`` file (columns ``mr,ref`` or
            ``prompt,response``), a ``.jsonl`` file (``prompt`` and ``response``, or chat ``messages``) or a
            ``.txt`` file (``prompt||response`` lines).
        examples: number of restaurants to generate; of a file all rows are read.
        seed: of the generator, and of the draw for `limit`.
        label: a column, a key, or a slot of the meaning representation. None: the slot ``food`` of
            restaurants, the slot ``name`` of a file's meaning representations, no label for other data.
        separator: text between prompt and response. None: `` =>`` for meaning representations,
            ``mr,ref`` and text lines, whose responses then begin with one space; a line end for prompt and
            response, whose responses are kept as they are. Chats have their template instead.
        limit: read at most this many, chosen by the seed from the whole source, since files are often sorted.
        chat: the model's chat template (see `conversation_texts`), needed for ``messages`` only.

    Raises:
        InputError: naming the file, the row or line, and what would be right.
    """
    if limit is not None and limit < 1:
        raise InputError(f"data.limit: {limit} is too few, at least 1 is needed")
    if source == BUILT_IN:
        made = descriptions(examples, seed)
        rows = [Row(BUILT_IN, meaning_text(one.slots), one.text, "meaning", {}) for one in made]
    else:
        rows = _file_rows(source, chat)
    labels = _labels(rows, source, label)
    chosen: Sequence[int] = range(len(rows))
    if limit is not None and limit < len(rows):
        chosen = sorted(random.Random(seed).sample(chosen, limit))
    return [_example(rows[index], labels[index], separator) for index in chosen]


def _file_rows(source: str, chat: ChatTemplate | None) -> list[Row]:
    path = Path(os.path.expanduser(source))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"data.source: {source!r} is unknown; give {BUILT_IN}, or a file that ends in {listed(READERS)}"
        )
    rows = reader(path, chat)
    if not rows:
        raise InputError(f"{path}: has a header but no rows; at least one example is needed")
    return rows


def _example(row: Row, label: str | None, separator: str | None) -> Example:
    if row.style == "chat":
        return Example(row.prompt, row.response, label, row.turns)
    if row.style == "meaning":
        prompt, response = row.prompt.strip(), f" {row.response.strip()}"
    else:
        prompt, response = row.prompt, row.response
    return Example(prompt + (_SEPARATORS[row.style] if separator is None else separator), response, label)


def _labels(rows: list[Row], source: str, label: str | None) -> list[str | None]:
    """Find the label of each row: its field of that name, else the slot of that name in its meaning representation.

    A slot that a row lacks is a class of its own; a field that a row lacks or leaves blank is no label. If no row has
    the default slot, there are no labels, which matters only to a partition by label.
    """
    name = label or (_DEFAULT_BUILT_IN_SLOT if source == BUILT_IN else _DEFAULT_FILE_SLOT)
    if label is not None and any(label in row.fields for row in rows):
        return [_field_label(row, label) for row in rows]
    meanings = [parse_meaning(row.prompt) for row in rows]
    if any(slots and name in slots for slots in meanings):
        return [None if slots is None else slots.get(name, NO_LABEL) for slots in meanings]
    if label is None:
        return [None] * len(rows)
    there = listed([*rows[0].fields, *(meanings[0] or ())])
    wrong = f"data.label: {label!r} is no column, key or slot of {source}"
    raise InputError(f"{wrong}; its first example has {there}", wrong)


def _field_label(row: Row, label: str) -> str | None:
    value = row.fields.get(label)
    if isinstance(value, (dict, list)):
        raise InputError(f"{row.where}: {label}, the data.label, is a {type(value).__name__}; must be a single value")
    return None if value is None else str(value).strip() or None
