"""pydantic's validation errors put into the project's words: ``key: what is wrong / what is right``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hsplit.config.section import REFUSED, shown
from hsplit.errors import InputError

KeyPath = tuple[str | int, ...]

_PLAIN_KEY = re.compile(r"[\w-]+")

# pydantic names Python types; a YAML file has none, so these say what to write instead
_WORDS = {
    "missing": "is required",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "string_unicode": "must be valid Unicode text",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of keys",
    "dataclass_type": "must be a mapping of keys",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of keys",
    "bool_type": "must be true or false",
    "unexpected_keyword_argument": "is no key here",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
}


@dataclass(frozen=True)
class Refusal:
    """One thing that is wrong: the key it is at, from the top of the document, and the reason."""

    at: KeyPath
    reason: str


def refusals(error: ValidationError) -> list[Refusal]:
    """What ``error`` holds, in its order."""
    return [_refusal(details) for details in error.errors(include_url=False)]


def _refusal(details: ErrorDetails) -> Refusal:
    # "<...>" are tags of union branches, which are no keys of the file
    at = tuple(part for part in details["loc"] if not (isinstance(part, str) and part.startswith("<")))
    context = details.get("ctx", {})
    if details["type"] == REFUSED:
        return Refusal(at + tuple(context["at"]), context["reason"])
    words = _WORDS.get(details["type"])
    reason = words.format(**context) if words else details["msg"].replace("Input should be", "must be", 1)
    return Refusal(at, reason if details["type"] == "missing" else f"{reason} (got {shown(details['input'])})")


def written(path: KeyPath) -> str:
    """A key path as errors show it: ``clients[0].memory_gb``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _PLAIN_KEY.fullmatch(part) else shown(part))
    return text


def input_error(place: str, refused: Refusal, more: int = 0) -> InputError:
    """The one line for ``refused``, found in ``place`` (a file or an option) with ``more`` others."""
    key = f"{written(refused.at)}: " if refused.at else ""
    rest = f" (and {more} more)" if more else ""
    return InputError(f"{place}: {key}{' '.join(refused.reason.split())}{rest}")


def first_of(place: str, found: Sequence[Refusal]) -> InputError:
    """The error for everything ``found`` in one place."""
    return input_error(place, found[0], len(found) - 1)
