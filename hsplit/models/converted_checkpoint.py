"""Checkpoints whose weights have other names or forms than the model's: renamed, merged, split or transposed.

transformers' own conversion mapping says how; it is applied to one weight at a time, so that a holder reads no more
than it holds and what is merged with that.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsplit.errors import InputError, error_text
from hsplit.models.checkpoint_reader import CheckpointReader


@dataclass(frozen=True, eq=False)
class _Conversion:
    """Stored tensors from which some of the model's are made.

    Attributes:
        converter: transformers' own.
        first: name of the first tensor that is made.
        sources: stored names by the converter's source pattern.
    """

    converter: Any
    first: str
    sources: Mapping[str, Sequence[str]]

    def made(self, read: Callable[[str], Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Make the model's tensors, by name, from the stored ones."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                # Read when the conversion begins.
                converter.add_tensor(self.first, name, pattern, partial(read, name))
        made = converter.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class ConvertedCheckpoint(CheckpointReader):
    """Tensors of a checkpoint by their names in the model.

    Args:
        directory: of the model.
        skeleton: the causal LM on the meta device.

    Raises:
        InputError: as :class:`CheckpointReader`; or a stored tensor cannot be converted.
    """

    def __init__(self, directory: Path, skeleton: nn.Module) -> None:
        super().__init__(directory, str(skeleton.base_model_prefix))
        self._skeleton = skeleton
        self._renamed: dict[str, str] = {}
        self._conversions: dict[str, _Conversion] = {}
        self._find_names()

    def _find_names(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        model: Any = self._skeleton
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        own = model.state_dict()
        found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        for stored in sorted(self._entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, own)
            if name not in own and stored in own:
                name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, own)
            if name not in own:
                continue
            if pattern is not None:
                sources = found.setdefault(name, (by_pattern[pattern], defaultdict(list)))[1]
                sources[pattern].append(stored)
            elif self._renamed.setdefault(name, stored) != stored:
                other = self._renamed[name]
                raise InputError(f"job.model: {self.directory}: has one weight under two names: {other} and {stored}")
        for first, (converter, sources) in found.items():
            conversion = _Conversion(converter, first, sources)
            for name in self._made(conversion, self._shape_of):
                self._conversions[name] = conversion

    def _made(self, conversion: _Conversion, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        try:
            return conversion.made(read, self._skeleton)
        except InputError:
            raise
        except Exception as error:  # an operation on tensors that do not fit raises anything
            stored = next(iter(conversion.sources.values()))[0]
            raise InputError(
                f"job.model: {self.directory}: {stored} cannot be converted to {conversion.first}: {error_text(error)}"
            ) from error

    def _shape_of(self, stored: str) -> Tensor:
        return torch.empty(self._entries[stored][2]["shape"], device="meta")

    def _stored_name(self, name: str) -> str | None:
        name = self._aliases.get(name, name)
        # Stored names are looked up too, by a conversion.
        return self._renamed.get(name) or (name if name in self._entries else None)

    def _conversion_of(self, name: str) -> _Conversion | None:
        return self._conversions.get(self._aliases.get(name, name))

    def __contains__(self, name: str) -> bool:
        return self._conversion_of(name) is not None or self._aliases.get(name, name) in self._renamed

    def same_values(self, name: str, other: str) -> bool:
        if self._conversion_of(name) is None and self._conversion_of(other) is None:
            return super().same_values(name, other)
        return torch.equal(self.read(name), self.read(other))

    def check(self, name: str, shape: Sequence[int]) -> None:
        conversion = self._conversion_of(name)
        if conversion is None:
            super().check(name, shape)
            return
        for names in conversion.sources.values():
            for stored in names:
                # Of a type that is read.
                self._entry(stored)
        made = self._made(conversion, self._shape_of)[self._aliases.get(name, name)]
        if tuple(made.shape) != tuple(shape):
            raise InputError(
                f"job.model: {self.directory}: {name} is made of tensors that give it the shape {list(made.shape)},"
                f" by config.json it is {list(shape)}"
            )

    def read(self, name: str, dtype: torch.dtype | None = None, transposed: bool = False) -> Tensor:
        conversion = self._conversion_of(name)
        if conversion is None:
            return super().read(name, dtype, transposed)
        value = self._made(conversion, super().read)[self._aliases.get(name, name)]
        value = value.T if transposed else value
        # In memory of its own, without what else was made.
        return value.to(dtype or value.dtype, copy=True).contiguous()

    def read_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self._conversion_of(name) is None:
            return super().read_rows(name, rows, dtype)
        return self.read(name)[torch.tensor(rows, dtype=torch.int64)].to(dtype)
