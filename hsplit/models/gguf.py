"""Conversion of a GGUF file into a directory that every ``from_pretrained`` reads.

The file's header is checked first: the gguf package believes every count and length in it.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hsplit.files import save_tensors
from hsplit.models.checkpoint_reader import MAX_DIMENSIONS
from hsplit.streams import quieten_bitsandbytes
from hsplit.waiting import Stage

if TYPE_CHECKING:
    import torch


MAGIC = b"GGUF"
# Most values in a file's header: the reader makes several objects of each. Vocabularies have some hundred thousand.
MAX_VALUES = 20_000_000
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Bytes of a value by the number of its type.
_SCALARS: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_gguf(path: Path) -> dict[str, str]:
    """Check the header's counts, lengths and offsets against the file's size; return its text values by their keys.

    Raises:
        ValueError: it is no GGUF file, or its counts, lengths or offsets lead out of it.
    """
    with path.open("rb") as stream:
        return _Header(stream, path.stat().st_size).check()


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size, self._values = stream, size, 0

    def check(self) -> dict[str, str]:
        if self._stream.read(4) != MAGIC:
            raise ValueError("it is no GGUF file")
        (version,) = self._numbers("<I")
        if version not in _VERSIONS:
            raise ValueError(f"GGUF version {version} is not known")
        tensors, pairs = self._numbers("<QQ")
        texts: dict[str, str] = {}
        for _ in self._counted(pairs, "keys"):
            key = self._string()
            (kind,) = self._numbers("<I")
            if kind == _STRING:
                texts[key] = self._string()
            else:
                self._skip_value(kind)
        places = [self._tensor() for _ in self._counted(tensors, "tensors")]
        # Padding before the data is not known here: an offset that is too large by less than that is not noticed.
        data = self._size - self._stream.tell()
        if any(begin + size > data for begin, size in places):
            raise ValueError("a tensor is not within the file")
        return texts

    def _left(self) -> int:
        return self._size - self._stream.tell()

    def _counted(self, count: int, what: str) -> range:
        self._values += count
        # Each takes at least one byte.
        if count > self._left() or self._values > MAX_VALUES:
            raise ValueError(f"it cannot have {count} {what}")
        return range(count)

    def _numbers(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(form)
        raw = self._stream.read(size)
        if len(raw) < size:
            raise ValueError("it ends within its header")
        return struct.unpack(form, raw)

    def _skip(self, count: int) -> None:
        if count > self._left():
            raise ValueError("it ends within its header")
        self._stream.seek(count, 1)

    def _string(self) -> str:
        (length,) = self._numbers("<Q")
        if length > self._left():
            raise ValueError("it ends within its header")
        return self._stream.read(length).decode(errors="replace")

    def _skip_string(self) -> None:
        self._skip(*self._numbers("<Q"))

    def _skip_value(self, kind: int) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _ARRAY:
            inner, count = self._numbers("<IQ")
            items = self._counted(count, "values of a list")
            if inner in _SCALARS:
                self._skip(count * _SCALARS[inner])
            elif inner == _STRING:
                for _ in items:
                    self._skip_string()
            else:
                raise ValueError("a list of lists is not known")
        else:
            raise ValueError(f"values of type {kind} are not known")

    def _tensor(self) -> tuple[int, int]:
        """Read a tensor's entry: its offset in the data, and its bytes."""
        from gguf.constants import GGML_QUANT_SIZES

        self._skip_string()
        (dimensions,) = self._numbers("<I")
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor cannot have {dimensions} dimensions")
        shape = self._numbers(f"<{dimensions}Q")
        kind, begin = self._numbers("<IQ")
        block = {type_.value: sizes for type_, sizes in GGML_QUANT_SIZES.items()}.get(kind)
        if block is None:
            raise ValueError(f"tensors of type {kind} are not known")
        entries, bytes_ = block
        return begin, math.prod(shape) // entries * bytes_


# Written by transformers' GGUF reader, but wrong once the weights are plain: the first would make from_pretrained look
# for packed weights, the second is the title inside the file and no place to load from.
_GGUF_ONLY_KEYS = ("quantization_config", "_model_name_or_path")


def convert_gguf(gguf: Path, directory: Path, stage: Stage) -> None:
    """Write ``model.safetensors``, ``config.json`` and the tokenizer of ``gguf`` into ``directory``.

    Weights are dequantized and stored in bf16, the dtype of the original checkpoints that such files are made from.
    Since the rounding happens here, a later quantization to int8 or NF4 starts from the same values whatever dtype a
    holder loads the model in. A tied head is stored once. The same GGUF gives the same bytes, so that nodes which
    convert it independently hold the same base.

    Args:
        gguf: the file, of an architecture that transformers can read from GGUF.
        directory: an existing directory; files in it are overwritten.
        stage: see :func:`hsplit.waiting.stages`.

    Raises:
        Exception: of any class: transformers and gguf raise their own for a file that they cannot read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    texts = check_gguf(gguf)
    with _silence():
        with stage(f"converting {gguf.name} to bf16"):
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                trust_remote_code=False,
                quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            if texts.get("tokenizer.ggml.pre") == "smollm":
                _restore_digit_splitting(tokenizer)
        with stage("saving safetensors and tokenizer"):
            save_tensors(distinct_tensors(model), directory / "model.safetensors")
            _write_config(model, directory)
            model.generation_config.save_pretrained(directory)
            positions = getattr(model.config, "max_position_embeddings", None)
            if positions is not None:
                tokenizer.model_max_length = positions
            tokenizer.save_pretrained(directory)


def distinct_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Collect ``model``'s state by name, floats as bf16, without the second name of a shared tensor.

    The first name in module order stays, which for a tied head is the embedding's, as ``from_pretrained`` expects.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        tensors[name] = (tensor.bfloat16() if tensor.is_floating_point() else tensor).contiguous()
    return tensors


def _write_config(model: Any, directory: Path) -> None:
    """Write the ``config.json`` of a plain bf16 checkpoint."""
    config = json.loads(model.config.to_json_string())
    for key in _GGUF_ONLY_KEYS:
        config.pop(key, None)
    config.update(architectures=[type(model).__name__], dtype="bfloat16")
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _restore_digit_splitting(tokenizer: Any) -> None:
    """Restore the rule of SmolLM's tokenizer that each digit is a piece of its own.

    GGUF only names the rule (``tokenizer.ggml.pre = smollm``), and transformers 5.23 does not know that name. Without
    it, white space before a number is split in another way than in the model's training.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the warnings and bars of transformers and bitsandbytes off stderr: a conversion shows stages.

    A console that looks up ``sys.stderr`` at each write is silenced as well.
    """
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Permanently, as everywhere.
    quieten_bitsandbytes()
    try:
        # transformers' GGUF reader draws one bar with bare tqdm, which no setting of either reaches.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
