"""Counts that are kept on disk: tracing a layer takes half a second, and says the same every time."""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hsplit.config.files import read_json
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.models.packaged import cache_root

_PACKAGE = Path(__file__).resolve().parents[2]
# Whose code a traced layer runs.
_TRACED = ("models", "lora", "planning/cost")
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")


class CountStore:
    """Lists of whole numbers by what they were counted on, in the user's cache directory.

    A count is found again only by the same code: this package's files and the versions of the libraries that it runs
    are in its name. A directory that cannot be written keeps nothing, and nothing is lost by that.
    """

    def __init__(self) -> None:
        self._folder = cache_root() / "counts"

    def get(self, *key: Any) -> list[int] | None:
        """What was kept for ``key``, or ``None``."""
        try:
            return read_json(self._path(key), list[int])
        except InputError:
            return None

    def put(self, counts: list[int], *key: Any) -> None:
        """Keep ``counts`` for ``key``."""
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Others may read, or write the same.
            write_text_atomically(path, json.dumps(counts), durable=False)
        except OSError:
            return

    def _path(self, key: tuple[Any, ...]) -> Path:
        digest = hashlib.sha256("\n".join([_code(), *map(str, key)]).encode())
        return self._folder / f"{digest.hexdigest()[:32]}.json"


@functools.cache
def _code() -> str:
    """What identifies the code that counts."""
    digest = hashlib.sha256()
    for name in _LIBRARIES:
        digest.update(f"{name} {version(name)}\n".encode())
    for folder in _TRACED:
        for file in sorted((_PACKAGE / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
