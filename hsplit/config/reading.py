"""Reading YAML and JSON files and finding the presets that come with hsplit."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from hsplit.config.section import STRICT, allowed_instead, shown, validation_error
from hsplit.errors import InputError

MAX_DEPTH = 20
"""Most levels of nesting in a document; hsplit's own files need six."""
MAX_NODES = 200_000
"""Most values in a document, aliases expanded."""
MAX_BYTES = 8_000_000
"""Largest size of a file; the resolved configuration of ten thousand clients has about half of it."""
MAX_DIGITS = 100
"""Most characters of a number: forms such as 1:30:00 take time that grows faster than their length."""

_PACKAGE = Path(__file__).resolve().parents[1]

PresetKind = Literal["cluster", "policies"]
Value = TypeVar("Value")

# YAML 1.1, which PyYAML reads, takes 1e-3 for text, since it has no point; a learning rate is a number.
_EXPONENT = (re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))

_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys, keys that are not text, and documents made to blow up."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._check(node, {}, ())
        return self.construct_document(node)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            # PyYAML raises these for a month 13, `!!int x`, `!!bool maybe` and the like.
            raise _refused(node, f"{shown(getattr(node, 'value', ''))} is no valid {node.tag[-20:]}") from None

    def _check(self, node: yaml.Node, sizes: dict[int, int], above: tuple[int, ...]) -> int:
        """Count the values under ``node``, aliases expanded; each node is walked once."""
        if id(node) in above:
            raise _refused(node, "an alias refers to what it is part of")
        if len(above) >= MAX_DEPTH:
            raise _refused(node, f"more than {MAX_DEPTH} levels of nesting")
        if id(node) not in sizes:
            below = (*above, id(node))
            size = 1
            if isinstance(node, yaml.ScalarNode):
                if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
                    raise _refused(node, f"a number of more than {MAX_DIGITS} characters")
            elif isinstance(node, yaml.SequenceNode):
                size += sum(self._check(child, sizes, below) for child in node.value)
            elif isinstance(node, yaml.MappingNode):
                _check_keys(node)
                size += sum(self._check(value, sizes, below) for _, value in node.value)
            if size > MAX_NODES:
                raise _refused(node, f"more than {MAX_NODES} values once aliases are written out")
            sizes[id(node)] = size
        return sizes[id(node)]


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes all text that ``_Loader`` would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only in double quotes does PyYAML escape U+0085 and the like, which it would read back as a space.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", *_EXPONENT)


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[Hashable, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise _refused(key, f"a key must be plain text (got {shown(key.value)})")
        if key.value in lines:
            raise _refused(key, f"key {shown(key.value)} is repeated (first on line {lines[key.value]})")
        lines[key.value] = key.start_mark.line + 1


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises:
        InputError: ``text`` is not valid YAML; the line is ``where:LINE: what is wrong``.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise _not_yaml(f"{where}{line}", error.problem or error.context) from None
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise _not_yaml(f"{where}:{number}", f"character {_character(error)} is not allowed") from None
    except RecursionError:
        raise _not_yaml(where, "it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as "\UFFFFFFFF", no code point
        raise _not_yaml(where, str(error)) from None


def _character(error: yaml.reader.ReaderError) -> str:
    return shown(chr(error.character) if isinstance(error.character, int) else error.character)


def _not_yaml(where: str, problem: str | None) -> InputError:
    return InputError(f"{where}: not valid YAML: {' '.join((problem or 'it cannot be parsed').split())}")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in the YAML file ``path``.

    Raises:
        InputError: there is no such file, or it is not UTF-8, not YAML, empty, or not a mapping.
    """
    where = displayed(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise InputError(f"{where}: is larger than {MAX_BYTES // 10**6} MB, so it is no file of hsplit's")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{where}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: must be UTF-8 text (byte {error.start} is not)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    value = parse_yaml(text, where)
    if value is None:
        raise InputError(f"{where}: is empty; it must hold a mapping of keys")
    if not isinstance(value, dict):
        raise InputError(f"{where}: must hold a mapping of keys at its top (got {shown(value)})")
    return value


def json_value(text: str | bytes) -> Any:
    """Parse JSON of any type.

    Raises:
        ValueError: ``text`` is not JSON, or nested too deeply; the error's text is the reason.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} on line {error.lineno}" if "\n" in error.doc else error.msg
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:
        # Python reads no integer of more than a few thousand digits.
        reason = "a number is too long"
    raise ValueError(reason)


def from_json(text: str | bytes, type_: type[Value], where: str) -> Value:
    """Parse JSON as a type, such as a dataclass or ``dict[str, int]``.

    Nothing is converted: a number in quotes is text. For a dataclass this needs ``STRICT`` or ``EXACT`` as its
    ``__pydantic_config__``.

    Raises:
        InputError: ``text`` is not JSON, or not of the type; the line names the key.
    """
    try:
        value: Value = _validator(type_).validate_json(text)  # type: ignore[arg-type]  # types are hashable
        return value
    except ValidationError as error:
        found = validation_error(where, error)
    try:
        json_value(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    raise found


def from_plain(data: Any, type_: type[Value], where: str) -> Value:
    """Read plain data, part of a JSON document, as a type; see :func:`from_json`."""
    return from_json(json.dumps(data), type_, where)


@cache
def _validator(type_: Any) -> TypeAdapter[Any]:
    # These classes have their own configuration: a section takes lists for tuples.
    has_own = isinstance(type_, type) and (is_dataclass(type_) or issubclass(type_, BaseModel))
    return TypeAdapter(type_, config=None if has_own else STRICT)


def read_json(path: str | Path, type_: type[Value]) -> Value:
    """Read the JSON file ``path`` as a type; see :func:`from_json`.

    Raises:
        InputError: there is no such file, or it is not of the type.
    """
    return from_json(read_bytes(path), type_, displayed(path))


def read_bytes(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{displayed(path)}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{displayed(path)}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def to_yaml(value: Any) -> str:
    """``value`` (mappings, lists and plain values) as YAML that ``read_yaml`` reads back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def displayed(path: str | Path) -> str:
    """``path`` as messages show it: relative if it is under the working directory."""
    path = Path(path)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # OSError: the working directory is gone
        return str(path)


def preset_directory(kind: PresetKind) -> Path:
    """The folder of the presets: inside the package (a wheel) or beside it (a checkout)."""
    inside = _PACKAGE / "presets" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def tested_versions_file() -> Path:
    """The list of package versions that the tests pass with, inside the package or beside it."""
    inside = _PACKAGE / "presets" / "constraints.txt"
    return inside if inside.is_file() else _PACKAGE.parent / "constraints.txt"


def find_preset(kind: PresetKind, name: str | Path) -> Path:
    """Find a file by its path, or a preset by its name.

    Args:
        kind: of the presets, ``cluster`` or ``policies``.
        name: a path, or a preset's name, as ``hetero``, ``hetero.yaml`` or ``cluster/hetero.yaml``.

    Raises:
        InputError: it is neither; the text lists the presets.
    """
    path = Path(name)
    try:
        if path.exists() and not path.is_dir():
            return path
    except OSError:  # such as a name too long for the file system
        pass
    presets = {preset.stem: preset for preset in sorted(preset_directory(kind).glob("*.yaml"))}
    parts = path.parts[1:] if path.parts[:1] == (kind,) else path.parts
    if len(parts) == 1 and parts[0].removesuffix(".yaml") in presets:
        return presets[parts[0].removesuffix(".yaml")]
    what = "cluster file" if kind == "cluster" else "policy file"
    hint = allowed_instead(path.stem, presets).replace("allowed:", "presets:")
    every = "" if hint.startswith("presets") else f" presets: {', '.join(presets)}"
    raise InputError(f"{shown(str(name), 200)}: no such {what}, and no preset of that name ({hint}{every})")
