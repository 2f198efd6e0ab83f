"""Loading a model's tokenizer, with the packages that transformers needs to read its files."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hsplit.errors import InputError, error_text

# With any of these transformers makes a tokenizer by itself.
_COMPLETE = ("tokenizer.json", "vocab.json", "vocab.txt")
# Vocabularies that have to be converted; the first names are the usual ones.
_VOCABULARIES = ("tokenizer.model", "*.model", "*.spm", "*.tiktoken")
# A token in base64 and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# The module of each package of an index.
_MODULES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of the model in ``directory``.

    Raises:
        InputError: there is none that transformers can read without running code that comes with it, or a package
            that it needs for that is not installed.
    """
    from transformers import AutoTokenizer

    vocabulary = vocabulary_file(directory)
    try:
        # Checked before transformers tries, which takes any vocabulary that it cannot read for one of tiktoken.
        missing = [] if vocabulary is None else [p for p in needed_packages(vocabulary) if not _is_installed(p)]
        if vocabulary is not None and missing:
            raise InputError(
                f"job.model: {directory}: {vocabulary.name}, its tokenizer, needs {' and '.join(missing)}: pip install"
                f" {' '.join(missing)} (on every node)"
            )
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except InputError:
        raise
    except Exception as error:  # transformers' and tokenizers' readers raise anything on files that they do not know
        if "instantiate the backend tokenizer" in str(error):
            raise InputError(
                f"job.model: {directory}: has no tokenizer.json, nor anything that one can be made of; put the"
                " tokenizer's files beside config.json"
            ) from error
        raise InputError(f"job.model: {directory}: its tokenizer cannot be read: {error_text(error)}") from error


def vocabulary_file(directory: Path) -> Path | None:
    """Return the vocabulary that a tokenizer has to be converted from; ``None`` if there is none, or no need to."""
    if any((directory / name).is_file() for name in _COMPLETE):
        return None
    found = (path for pattern in _VOCABULARIES for path in sorted(directory.glob(pattern)) if path.is_file())
    return next(found, None)


def needed_packages(vocabulary: Path) -> tuple[str, ...]:
    """Packages that convert ``vocabulary``: of tiktoken's text, or of SentencePiece's protocol buffer.

    Raises:
        OSError: it cannot be read.
    """
    with vocabulary.open("rb") as file:
        is_text = _TIKTOKEN_LINE.match(file.read(4096)) is not None
    return ("tiktoken",) if is_text else ("sentencepiece", "protobuf")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(_MODULES[package]) is not None
    except ModuleNotFoundError:  # of the package around a module
        return False
