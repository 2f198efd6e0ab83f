"""Reading single tensors of a safetensors checkpoint, so that a holder reads only what it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from hsplit.errors import InputError


class CheckpointReader:
    """Tensors by name from a model directory (one ``model.safetensors`` or shards with an index).

    Names are those of the causal-LM class; checkpoints saved from the bare model (without the ``model.`` or
    ``transformer.`` prefix, as GPT-2's own) are understood too.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            files = [directory / shard for shard in sorted(shards)]
        else:
            files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise InputError(f"job.model: {directory}: holds no *.safetensors file")
        self._file_of: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self._file_of.update({name: file for name in tensors.keys()})  # noqa: SIM118 (not a dict)

    def _stored_name(self, name: str) -> str | None:
        bare = name.partition(".")[2]
        return next((n for n in (name, bare) if n in self._file_of), None)

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) is not None

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in the checkpoint's own dtype and layout.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise InputError(f"job.model: {self.directory}: the checkpoint has no tensor {name}")
        with safe_open(self._file_of[stored], framework="pt") as tensors:
            return tensors.get_tensor(stored)


def model_fingerprint(directory: Path) -> str:
    """sha256 over the configuration and every weight file: equal for two copies of one base model."""
    digest = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
