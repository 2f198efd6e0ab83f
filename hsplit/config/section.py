"""Base of all sections of a configuration file: strict types, known keys, no later change, errors in one form.

pydantic's validation errors get the project's words here: ``key: what is wrong / what is right``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from hsplit.errors import InputError

KeyPath = tuple[str | int, ...]

_PLAIN_KEY = re.compile(r"[\w-]+")

# pydantic names Python types, which a YAML file does not have.
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
    """One error in a document: the path of its key from the top, and the reason."""

    at: KeyPath
    reason: str


def refusals(error: ValidationError) -> list[Refusal]:
    """The errors of a validation, in its order."""
    return [_refusal(details) for details in error.errors(include_url=False)]


def _refusal(details: ErrorDetails) -> Refusal:
    # "<...>" are tags of union branches, which are not keys of the file.
    at = tuple(part for part in details["loc"] if not (isinstance(part, str) and part.startswith("<")))
    context = details.get("ctx", {})
    if details["type"] == REFUSED:
        return Refusal(at + tuple(context["at"]), context["reason"])
    words = _WORDS.get(details["type"])
    reason = words.format(**context) if words else details["msg"].replace("Input should be", "must be", 1)
    return Refusal(at, reason if details["type"] == "missing" else f"{reason} (got {shown(details['input'])})")


def key_text(path: KeyPath) -> str:
    """A key path as errors show it: ``clients[0].memory_gb``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + (part if _PLAIN_KEY.fullmatch(part) else shown(part))
    return text


def input_error(where: str, refused: Refusal, more: int = 0) -> InputError:
    """The error line for ``refused``, found in ``where`` (a file or an option) with ``more`` others."""
    key = f"{key_text(refused.at)}: " if refused.at else ""
    rest = f" (and {more} more)" if more else ""
    return InputError(f"{where}: {key}{' '.join(refused.reason.split())}{rest}")


def validation_error(where: str, error: ValidationError) -> InputError:
    """The error line for a failed validation of ``where`` (a file or an option)."""
    found = refusals(error)
    return input_error(where, found[0], len(found) - 1)


REFUSED = "refused"
"""Type of the errors that ``refuse`` makes; their text is complete."""


def refuse(reason: str, *at: str | int) -> PydanticCustomError:
    """The error for a validator to raise: ``reason`` in words, ``at`` the key below the validated value."""
    return PydanticCustomError(REFUSED, "{reason}", {"reason": reason, "at": at})


def shown(value: object, limit: int = 60) -> str:
    """``value`` as an error quotes it: one line of at most ``limit`` characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        value = value.model_dump()
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of too many digits to print; a list that holds itself
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def allowed_instead(key: object, allowed: Iterable[str]) -> str:
    """Hint for an error on an unknown ``key``: the closest allowed one, else all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(key), names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(names)}"


class Section(BaseModel):
    """Base of all sections: frozen; wrong types, unknown keys and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, given: Any) -> Any:
        # pydantic's own extra="forbid" names the wrong key only, not the allowed ones.
        if isinstance(given, Mapping):
            for key in given:
                if key not in cls.model_fields:
                    raise refuse(f"unknown key ({allowed_instead(key, cls.model_fields)})", str(key))
        return given


class OneKey(Section):
    """A section that is a choice: exactly one of its keys is given, as in ``{dirichlet: 0.5}``."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.given()) != 1:
            names = ", ".join(type(self).model_fields)
            raise refuse(f"must have exactly one of: {names} (got {shown(self.given())})")
        return self

    @model_serializer
    def given(self) -> dict[str, Any]:
        """The one key with its value, as in a file."""
        return {key: value for key in type(self).model_fields if (value := getattr(self, key)) is not None}


def shape(value: Any) -> str:
    """Discriminate a mapping from anything else, in unions of a plain value and a ``OneKey`` section."""
    return "<mapping>" if isinstance(value, Mapping | BaseModel) else "<plain>"


def meaning(words: str) -> WrapValidator:
    """Replace pydantic's errors for a union of plain values by ``must be {words}``."""

    def validate(value: Any, inner: Any) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise refuse(f"must be {words} (got {shown(value)})") from None

    return WrapValidator(validate)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # Bytes of the command line that are not UTF-8 arrive as lone surrogates, which no file can hold.
        raise refuse(f"must be valid Unicode text (got {shown(text)})") from None
    return text


def _not_empty(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise refuse("must have at least 1 entry (got [])")
    return entries


NOT_EMPTY = AfterValidator(_not_empty)
"""For tuples, instead of pydantic's min_length, which also reports a tuple with a wrong entry."""
STRICT, EXACT = ConfigDict(strict=True), ConfigDict(strict=True, extra="forbid")
"""``__pydantic_config__`` of a dataclass that is read from JSON: nothing is converted; ``EXACT``: no other key."""
LIST = Field(strict=False)
"""For tuples: YAML has lists, which pydantic's strict mode would refuse."""

NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit, without '..'"
MAX_NAME = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# Files of such a name, with any ending, cannot be copied to Windows.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
MAX_PATH_BYTES, MAX_PART_BYTES = 4096, 255
"""Limits of file systems, for a path and for one name in it."""


def _well_formed(name: str) -> str:
    if not _NAME.fullmatch(name) or ".." in name:
        raise refuse(f"must be {NAME_RULE} (got {shown(name)})")
    if _DEVICE.fullmatch(name) or name.endswith("."):
        raise refuse(f"must be a name that files may have on every system (got {shown(name)})")
    return name


def _usable_path(path: str) -> str:
    size, parts = len(path.encode()), path.split("/")
    if "\0" in path or size > MAX_PATH_BYTES or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        raise refuse(f"is no path that a file can have (got {shown(path)})")
    if parts[0].startswith("~") and parts[0] != "~":
        raise refuse(f"must begin with ~/ or be written out: other users' homes are not looked up (got {shown(path)})")
    return path


# No part of it is private: names with two leading underscores are Python's own.
_IDENTIFIER = "[A-Za-z][A-Za-z0-9_]*"
REFERENCE = rf"^{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}$"
"""The form ``package.module:name`` of a user's own function."""


def is_reference(word: object) -> bool:
    """True if ``word`` has the form ``package.module:name``."""
    return isinstance(word, str) and re.fullmatch(REFERENCE, word) is not None


LARGEST = 1_000_000_000
"""Upper bound of every number in a configuration, so that no product of two of them overflows."""
MAX_LAYERS = 10_000
"""Decoder layers that a model's or a plan's file may name; no model is so deep."""

AnyText = Annotated[str, AfterValidator(_encodable)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_encodable)]
PathText = Annotated[Text, AfterValidator(_usable_path)]
Name = Annotated[str, AfterValidator(_well_formed)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
"""A count that fits 64 bits."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
