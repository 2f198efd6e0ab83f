"""A tokenizer that has to be converted names the packages that it really needs."""

from __future__ import annotations

import base64
import inspect
import json
import re
from pathlib import Path

import pytest
from transformers.convert_slow_tokenizer import SentencePieceExtractor, TikTokenConverter

from hsplit.errors import InputError
from hsplit.models import tokenizer
from hsplit.models.tokenizer import load_tokenizer, needed_packages, vocabulary_file
from tests.tiny import tiny_config, tiny_tokenizer

# One piece "<unk>" of the type UNKNOWN, as a protocol buffer.
SENTENCEPIECE = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
TIKTOKEN = b"".join(base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model's directory without a tokenizer."""
    tiny_config("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "installed", "needs"),
    [
        ("tokenizer.model", SENTENCEPIECE, set(), "sentencepiece and protobuf: pip install sentencepiece protobuf"),
        ("tokenizer.model", SENTENCEPIECE, {"protobuf", "tiktoken"}, "sentencepiece: pip install sentencepiece"),
        ("spiece.model", SENTENCEPIECE, {"sentencepiece"}, "protobuf: pip install protobuf"),
        ("sentencepiece.bpe.model", SENTENCEPIECE, {"protobuf"}, "sentencepiece: pip install sentencepiece"),
        ("source.spm", SENTENCEPIECE, {"protobuf"}, "sentencepiece: pip install sentencepiece"),
        ("tokenizer.model", TIKTOKEN, {"sentencepiece", "protobuf"}, "tiktoken: pip install tiktoken"),
        ("qwen.tiktoken", TIKTOKEN, set(), "tiktoken: pip install tiktoken"),
    ],
)
def test_the_package_that_is_lacking_is_named(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    installed: set[str],
    needs: str,
) -> None:
    (directory / name).write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setattr(tokenizer, "_is_installed", lambda package: package in installed)
    with pytest.raises(InputError) as refused:
        load_tokenizer(directory)
    assert str(refused.value) == f"job.model: {directory}: {name}, its tokenizer, needs {needs} (on every node)"
    assert capfd.readouterr().err == ""


def test_what_transformers_asks_for_is_what_is_named(directory: Path) -> None:
    (directory / "tokenizer.model").write_bytes(SENTENCEPIECE)
    asked = re.findall(r'requires_backends\(self, "(\w+)"\)', inspect.getsource(SentencePieceExtractor.__init__))
    assert needed_packages(directory / "tokenizer.model") == tuple(asked)
    (directory / "tokenizer.model").write_bytes(TIKTOKEN)
    assert f"`{needed_packages(directory / 'tokenizer.model')[0]}` is required" in inspect.getsource(TikTokenConverter)


def test_a_tokenizer_that_is_made_already_needs_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(SENTENCEPIECE)
    monkeypatch.setattr(tokenizer, "_is_installed", lambda package: False)
    assert vocabulary_file(directory) is None and len(load_tokenizer(directory)) == 96


def test_a_directory_without_a_tokenizer_says_so(directory: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json, nor anything that one can be made of; put"):
        load_tokenizer(directory)
