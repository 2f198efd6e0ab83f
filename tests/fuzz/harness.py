"""Helpers of the fuzz tests: damaged documents and bytes, and the property of every reader.

``HSPLIT_FUZZ=100 pytest tests/fuzz`` tries a hundred times as many inputs as the default tier does.
"""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hsplit.errors import MAX_TEXT, HsplitError

SCALE = int(os.environ.get("HSPLIT_FUZZ", "1"))
# Far more than any input of the sizes made here takes on the slowest machine: a hang, not a slow reader.
HANGS_S = 120

NASTY = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 10**9, 10**18, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *("", " ", "\0", "..", "../../out", "/etc/passwd", "-rf", "CON", "nul.txt", "name.", "name ", "ｎ", "a/b"),
        *("~nobody-of-this-name/x", "\ud800", "\u202e", "\x1b[31m", "[/red]", "%s%n", "a" * 70, "a" * 300, "x" * 5000),
        *("os:system", "builtins:eval", "a.__class__:b", "tests:__loader__", "1e999", "nan", "restaurants"),
        *([], {}, [[]], [None] * 50, {"a": {"b": {"c": {}}}}, ["x"], {"": ""}, [10**30, -5]),
    ]
).map(copy.deepcopy)


def examples(count: int) -> settings:
    """Hypothesis settings for a number of inputs, times the scale, without memory of earlier runs."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count * SCALE, deadline=None, suppress_health_check=slow, database=None)


@st.composite
def damaged(draw: st.DrawFn, document: Any) -> Any:
    """``document`` (mappings, lists and plain values) with one to three of its values changed, lost or doubled."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        owner, key = draw(st.sampled_from(list(_places(changed)) or [(None, None)]))
        if owner is None:
            return draw(NASTY)
        what = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "copy", "rename"]))
        if what == "replace":
            owner[key] = draw(NASTY)
        elif what == "remove":
            del owner[key]
        elif what == "wrap":
            owner[key] = draw(st.sampled_from([[owner[key]], {"name": owner[key]}]))
        elif what == "copy":
            other, at = draw(st.sampled_from(list(_places(changed))))
            owner[key] = copy.deepcopy(other[at])
        elif isinstance(owner, dict):
            owner[draw(st.sampled_from(["", "x", "__class__", "../x", "name", str(key) + "x", "\x1b"]))] = owner.pop(
                key
            )
    return changed


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, inner in items:
        yield value, key
        yield from _places(inner)


@st.composite
def mangled(draw: st.DrawFn, content: bytes, tokens: tuple[bytes, ...] = ()) -> bytes:
    """``content`` with some of its bytes flipped, cut, doubled, or with a token put in."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        what = draw(st.sampled_from(["flip", "cut", "drop", "double", "insert", "token"]))
        length = draw(st.integers(1, 64))
        if what == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at]
        elif what == "drop":
            content = content[:at] + content[at + length :]
        elif what == "double":
            content = content[:at] + content[at : at + length] * draw(st.integers(2, 40)) + content[at + length :]
        elif what == "insert":
            content = content[:at] + draw(st.binary(max_size=16)) + content[at:]
        elif tokens:
            content = content[:at] + draw(st.sampled_from(tokens)) + content[at:]
    return content


def mangled_head(content: bytes, size: int) -> st.SearchStrategy[bytes]:
    """``content`` with its first ``size`` bytes mangled."""
    return mangled(content[:size]).map(lambda head: head + content[size:])


def as_json(document: Any) -> bytes:
    """``document`` as Python writes it, which is more than JSON allows: NaN, and halves of surrogate pairs escaped."""
    return json.dumps(document).encode()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below ``folder`` with its content; links and folders have none."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if plain else None
    return found


def read_or_refused(call: Callable[[], Any], *named: str) -> Any:
    """Result of ``call``, or ``None`` if it refuses its input with one line that has one of ``named`` in it."""
    try:
        with _alarm():
            return call()
    except HsplitError as error:
        text = str(error)
        assert text.strip() and len(text) <= MAX_TEXT
        assert text.isprintable(), text
        assert not named or any(name in text for name in named), text
        return None


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"the reader was still at it after {HANGS_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
