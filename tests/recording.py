"""Recording of all values that pass between actors, byte by byte, and search for token ids and texts in them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hsplit.actors.executor import InProcess
from tests.tiny import WORDS

# Number of consecutive ids that count as a leak; the tiny tokenizer's ids of words begin with 2.
WINDOW, FIRST_WORD = 6, 2
PACKED = ("uint8", "int16", "int32", "int64", ">i4", ">i8", "float16", "float32", "float64")
_TEXT = re.compile(rb"w\d+ +w\d+")
_WIDE_TEXT = re.compile(rb"w\0(\d\0)+( \0)+w\0(\d\0)+")


@dataclass(frozen=True)
class Passed:
    """A value that passed between actors.

    Attributes:
        actor, method: whose method.
        way: ``returned`` by it, or ``given`` to it.
        value: the value.
    """

    actor: str
    method: str
    way: str
    value: Any

    @property
    def blob(self) -> bytes:
        """Its serialized bytes, nested attributes and whole storages of tensors included."""
        return pickle.dumps(self.value, protocol=5)

    def leaves(self) -> list[Leaf]:
        """Every number, text and array in it."""
        return list(_leaves(self.value, ""))


@dataclass(frozen=True)
class Leaf:
    """A number, text or array in a value that passed: where in it, of which type."""

    path: str
    kind: str
    value: Any


def _leaves(value: Any, path: str) -> Iterator[Leaf]:
    if value is None:
        return
    if isinstance(value, Tensor):
        yield Leaf(path, f"tensor {str(value.dtype).removeprefix('torch.')}", value.detach().cpu())
    elif isinstance(value, np.ndarray):
        yield Leaf(path, f"array {value.dtype}", value)
    elif isinstance(value, (bool, int, float, str, bytes, Path, Enum, np.generic)):
        yield Leaf(path, type(value).__name__, value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield Leaf(f"{path}{{}}.key", type(key).__name__, key)
            yield from _leaves(inner, f"{path}{{}}")
    elif isinstance(value, (list, tuple, set, frozenset)):
        if value and all(isinstance(inner, int) for inner in value):
            # Looked at as one sequence.
            yield Leaf(f"{path}[]", "int", list(value))
            return
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, BaseException):
        yield Leaf(path, "error", f"{value} {vars(value)}")
    elif hasattr(value, "__dict__"):
        # Configuration sections.
        yield from _leaves(vars(value), path)
    else:
        raise TypeError(f"{path}: do not know how to look into a {type(value)}")


class Recording(InProcess):
    """Executor that keeps all arguments and results of actors."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passed: list[Passed] = []

    def perform(self, actor: str, method: str, *arguments: Any) -> Any:
        self.passed += [Passed(actor, method, "given", argument) for argument in arguments]
        value = super().perform(actor, method, *arguments)
        # As the values that Ray moves apart.
        values = value if isinstance(value, tuple) else (value,)
        self.passed += [Passed(actor, method, "returned", one) for one in values]
        return value


class Secrets:
    """The data of clients, to search for.

    Args:
        rows: the token ids of each example.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self.windows = {
            tuple(row[start : start + WINDOW])
            for row in rows
            for start in range(len(row) - WINDOW + 1)
            if min(row[start : start + WINDOW]) >= FIRST_WORD
        }
        assert len(self.windows) > 100

    def ids_in(self, value: Passed) -> bool:
        """True if a run of ids is in it: in an array, in a list of numbers, or anywhere in its bytes."""
        return any(self._in_leaf(leaf) for leaf in value.leaves()) or self.ids_in_bytes(value.blob)

    def ids_in_bytes(self, blob: bytes) -> bool:
        """True if a run of ids is anywhere in ``blob``, in any of :data:`PACKED`."""
        return any(
            self._in_array(np.frombuffer(blob, packed, (len(blob) - offset) // np.dtype(packed).itemsize, offset))
            for packed in PACKED
            for offset in range(np.dtype(packed).itemsize)
            if len(blob) >= offset + np.dtype(packed).itemsize
        )

    def _in_leaf(self, leaf: Leaf) -> bool:
        if isinstance(leaf.value, Tensor):
            array = leaf.value.double().numpy()
        elif isinstance(leaf.value, (np.ndarray, list)):
            array = np.asarray(leaf.value, dtype=np.float64)
        else:
            return False
        # Rows, and columns too.
        return self._in_array(array.ravel()) or self._in_array(array.T.ravel())

    def _in_array(self, values: np.ndarray) -> bool:
        if len(values) < WINDOW:
            return False
        with np.errstate(invalid="ignore"):
            words = (values >= FIRST_WORD) & (values < WORDS) & (values == np.floor(values))
        starts = len(values) - WINDOW + 1
        runs = np.logical_and.reduce([words[place : place + starts] for place in range(WINDOW)])
        return any(tuple(int(v) for v in values[at : at + WINDOW]) in self.windows for at in np.flatnonzero(runs))


def text_in(blob: bytes) -> bool:
    """True if two words of the tiny tokenizer follow each other in ``blob``, in UTF-8 or UTF-16."""
    return _TEXT.search(blob) is not None or _WIDE_TEXT.search(blob) is not None


def fields_of(passed: Iterable[Passed]) -> dict[str, set[str]]:
    """Fields of returned values by method, as ``Message.field: type``; a dictionary's content is under ``{}``."""
    found: dict[str, set[str]] = {}
    for value in passed:
        root = type(value.value).__name__
        found.setdefault(value.method, set()).update(f"{root}{leaf.path}: {leaf.kind}" for leaf in value.leaves())
    return {method: fields for method, fields in found.items() if fields}
