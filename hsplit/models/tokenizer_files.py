"""A tokenizer's files, and the packages that transformers needs to read them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

# With any of these transformers makes a tokenizer by itself.
_COMPLETE = ("tokenizer.json", "vocab.json", "vocab.txt")
# Vocabularies that have to be converted; the first names are the usual ones.
_VOCABULARIES = ("tokenizer.model", "*.model", "*.spm", "*.tiktoken")
# A token in base64 and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# By package of an index the module that it has.
_MODULES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}


def vocabulary_file(directory: Path) -> Path | None:
    """The vocabulary that a tokenizer has to be converted from; ``None`` where there is none, or no need to."""
    if any((directory / name).is_file() for name in _COMPLETE):
        return None
    found = (path for pattern in _VOCABULARIES for path in sorted(directory.glob(pattern)) if path.is_file())
    return next(found, None)


def needed_packages(vocabulary: Path) -> tuple[str, ...]:
    """The packages that convert ``vocabulary``: of tiktoken's text, or of SentencePiece's protocol buffer.

    Raises:
        OSError: it cannot be read.
    """
    with vocabulary.open("rb") as file:
        is_text = _TIKTOKEN_LINE.match(file.read(4096)) is not None
    return ("tiktoken",) if is_text else ("sentencepiece", "protobuf")


def missing_packages(vocabulary: Path) -> list[str]:
    """Those of :func:`needed_packages` that are not installed."""
    return [package for package in needed_packages(vocabulary) if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(_MODULES[package]) is not None
    except ModuleNotFoundError:  # of the package around a module
        return False
