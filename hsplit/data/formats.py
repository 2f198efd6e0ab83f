"""The file formats of examples: rows of CSV, JSON lines or ``a||b`` text."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsplit.config.reading import json_value
from hsplit.config.section import shown
from hsplit.data.chat import ChatTemplate, conversation_texts, refuse_other_keys, turns_sha256
from hsplit.data.text_files import is_unicode, listed, read_text
from hsplit.errors import InputError


@dataclass(frozen=True)
class Row:
    """One example as its file gives it.

    Attributes:
        where: file and row, for messages.
        prompt, response: the texts as in the file, not blank.
        style: ``meaning`` (``mr,ref`` columns and text lines: joined by `` =>``), ``plain`` (prompt and
            response: joined by a line end) or ``chat`` (the model's template has already joined them).
        fields: every column or key of the row, from which a label may be taken.
        turns: of a chat, :func:`~hsplit.data.chat.turns_sha256` of the prompt's turns.
    """

    where: str
    prompt: str
    response: str
    style: str
    fields: Mapping[str, Any]
    turns: str | None = None


def csv_rows(path: Path, chat: ChatTemplate | None = None) -> list[Row]:
    """Read a CSV file with columns ``mr`` and ``ref``, or ``prompt`` and ``response``; others may stand beside them.

    Row numbers in messages count the header as row 1, as a spreadsheet does.

    Raises:
        InputError: for a missing column, an empty or uneven row, a blank text, or CSV that cannot be parsed.
    """
    lines = _csv_lines(path)
    header = [name.strip() for name in next(lines)]
    if {"mr", "ref"} <= set(header):
        prompt_key, response_key, style = "mr", "ref", "meaning"
    elif {"prompt", "response"} <= set(header):
        prompt_key, response_key, style = "prompt", "response", "plain"
    else:
        # In a file without a header this line is its first example.
        needs = "needs mr and ref, or prompt and response"
        raise InputError(f"{path}: has columns {listed(header)}; {needs}", f"{path}: has other columns; {needs}")
    if len(set(header)) < len(header):
        raise InputError(
            f"{path}: has columns {listed(header)}; each name may stand there once only",
            f"{path}: has a column twice; each name may stand there once only",
        )
    rows = []
    for number, values in enumerate(lines, start=2):
        where = f"{path}: row {number}"
        if not any(value.strip() for value in values):
            raise InputError(f"{where} is empty; delete it or fill it in")
        if len(values) != len(header):
            counted = f"{where} has {len(values)} fields; the header has {len(header)}"
            raise InputError(f"{counted} ({listed(header)})", counted)
        fields = dict(zip(header, values, strict=True))
        rows.append(_row(where, fields, prompt_key, response_key, style))
    return rows


def jsonl_rows(path: Path, chat: ChatTemplate | None = None) -> list[Row]:
    """Read a JSON lines file: objects with ``prompt`` and ``response``, or with chat ``messages``.

    Raises:
        InputError: for a line that is no JSON object, lacks its keys, has a blank text, or is a chat without
            a template or with keys that the template would need.
    """
    rows = []
    for where, line in _lines(path):
        try:
            fields = json_value(line)
        except ValueError as error:
            raise InputError(f"{where} is not JSON: {error}; each line must be one object") from None
        if not isinstance(fields, dict):
            raise InputError(f"{where} is a JSON {type(fields).__name__}; each line must be one object")
        if "messages" in fields:
            refuse_other_keys(fields, where)
            messages = fields["messages"]
            prompt, response = conversation_texts(messages, chat, where)
            rows.append(Row(where, prompt, response, "chat", fields, turns_sha256(messages[:-1])))
        elif {"prompt", "response"} <= fields.keys():
            rows.append(_row(where, fields, "prompt", "response", "plain"))
        else:
            needs = "needs prompt and response, or messages"
            raise InputError(f"{where} has keys {listed(fields)}; {needs}", f"{where} has other keys; {needs}")
    return rows


def text_rows(path: Path, chat: ChatTemplate | None = None) -> list[Row]:
    """Read a text file with one ``prompt||response`` a line.

    Raises:
        InputError: for an empty line, a blank side, or a line without exactly one ``||``.
    """
    rows = []
    for where, line in _lines(path):
        sides = line.split("||")
        if len(sides) != 2:
            raise InputError(f"{where} has {len(sides) - 1} separators ||; needs exactly one, as in prompt||response")
        fields = {"the prompt": sides[0], "the response": sides[1]}
        rows.append(_row(where, fields, "the prompt", "the response", "meaning"))
    return rows


Reader = Callable[[Path, ChatTemplate | None], list[Row]]
READERS: dict[str, Reader] = {".csv": csv_rows, ".jsonl": jsonl_rows, ".txt": text_rows}


def _row(where: str, fields: Mapping[str, Any], prompt_key: str, response_key: str, style: str) -> Row:
    for key in (prompt_key, response_key):
        text = fields[key]
        if not isinstance(text, str):
            raise InputError(f"{where}: {key} is {shown(text, 40)}; must be a text", f"{where}: {key} must be a text")
        if not text.strip():
            raise InputError(f"{where}: {key} is blank; must be a text")
        if not is_unicode(text):
            raise InputError(
                f"{where}: {key} holds half of a surrogate pair (\\ud800 to \\udfff); must be valid Unicode"
            )
    return Row(where, fields[prompt_key], fields[response_key], style, fields)


def _csv_lines(path: Path) -> Iterator[list[str]]:
    # StringIO(newline="") keeps quoted line ends; the whole file is in memory anyway, as are the examples.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: is not CSV: {error}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path}: line {number}"
        if not line.strip():
            raise InputError(f"{where} is empty; delete it or fill it in")
        yield where, line
