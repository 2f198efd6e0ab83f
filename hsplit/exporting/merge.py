"""Export of one merged model: the learned update, cut to fewer directions on request, added to base weights.

Weights are written tensor by tensor. Errors are relative Frobenius norms, by weight and of all weights together.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hsplit.errors import InputError
from hsplit.files import save_tensors
from hsplit.lora.low_rank import spectral
from hsplit.models.factors import LowRank
from hsplit.models.spec import ModelSpec
from hsplit.models.tokenizer import load_tokenizer
from hsplit.models.weights import freeze


@dataclass(frozen=True)
class RelativeError:
    """``||error||_F / ||reference||_F`` over a set of weights.

    Attributes:
        total: over all weights as one vector.
        worst: of the weight where it is largest.
        weight: that weight's name.
    """

    total: float
    worst: float
    weight: str

    @staticmethod
    def of(norms: Mapping[str, tuple[float, float]]) -> RelativeError | None:
        """Make it from Frobenius norms of error and reference by weight; ``None`` if all references are zero."""
        relative = {name: error / reference for name, (error, reference) in norms.items() if reference}
        if not relative:
            return None
        worst = max(relative, key=lambda name: relative[name])
        error = math.sqrt(math.fsum(error**2 for error, _ in norms.values()))
        reference = math.sqrt(math.fsum(reference**2 for _, reference in norms.values()))
        return RelativeError(error / reference, relative[worst], worst)

    def __str__(self) -> str:
        return f"{self.total:.3e} over all weights, at worst {self.worst:.3e} ({self.weight})"


def truncated(terms: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], RelativeError | None]:
    """Cut each term to its ``rank`` leading singular directions, the best of that rank (Eckart and Young 1936).

    A term of at most ``rank`` directions is unchanged.

    Args:
        terms: ``(d_out, d_in)`` matrices as factors, by weight name.
        rank: at least 1.

    Returns:
        The terms, and their relative Frobenius error; ``None`` if nothing was learned.
    """
    cut: dict[str, LowRank] = {}
    norms: dict[str, tuple[float, float]] = {}
    for name, term in terms.items():
        if term.rank == 0:
            cut[name] = term
            continue
        parts = spectral(term)
        cut[name] = term if term.rank <= rank else parts.part(0, rank, term.A.dtype)
        norms[name] = (parts.norm_beyond(rank) if term.rank > rank else 0.0, float(parts.S.norm()))
    return cut, RelativeError.of(norms)


SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class MergeErrors:
    """Differences of a merged model from the run.

    Attributes:
        base: difference of the run's base from the merged one, relative to the latter; ``None`` if they are the same.
        rounding: difference of the update in the file (the written weight less the rounded base) from the learned
            update; ``None`` for fp32 files and if nothing was learned.
    """

    base: RelativeError | None
    rounding: RelativeError | None


class _Merge:
    """Forms the tensors of the merged model one at a time."""

    def __init__(
        self,
        model: ModelSpec,
        run_base: str,
        original: bool,
        learned: Mapping[str, LowRank],
        trained: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        self._reader, self._family = model.open_checkpoint(), model.family
        self._skeleton = model.skeleton
        self._linears = {f"{shape.name}.weight": shape.name for shape in model.linears}
        self._run_base, self._original = run_base, original
        self._learned, self._trained, self._dtype = learned, trained, dtype
        self.base_norms: dict[str, tuple[float, float]] = {}
        self.rounding_norms: dict[str, tuple[float, float]] = {}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that the checkpoint has, such as corrections of experts' scores."""
        known = {name for name, _ in self._skeleton.named_parameters(remove_duplicate=False)}
        state = self._skeleton.state_dict()
        return {name: value for name, value in state.items() if name not in known and name in self._reader}

    def tensor(self, name: str) -> Tensor:
        """The parameter ``name`` for the file, in the checkpoint's layout."""
        if name in self._trained:
            return self._trained[name].to(self._dtype).contiguous()
        if name in self._linears:
            merged = self._linear(name, self._linears[name])
            return (merged.T if self._family.transposed else merged).contiguous()
        return self._reader.read(name, self._dtype)

    def _linear(self, parameter: str, name: str) -> Tensor:
        """``W_0`` of the chosen base plus what was learned, ``(d_out, d_in)``; summed in fp32."""
        read = partial(self._reader.read, parameter, transposed=self._family.transposed)
        base = "fp32" if self._original else self._run_base
        values = freeze(read, base, torch.float32, quantized=False).dense(torch.float32)
        if self._original and self._run_base != "fp32":
            other = freeze(read, self._run_base, torch.float32, quantized=False).dense(torch.float32)
            self.base_norms[name] = (float((other - values).norm()), float(values.norm()))
        term = self._learned.get(name)
        if term is None or term.rank == 0:
            return values.to(self._dtype)
        update = term.to(torch.float32).dense()
        written = (values + update).to(self._dtype)
        if self._dtype != torch.float32:
            kept = written.float().sub_(values.to(self._dtype).float())
            self.rounding_norms[name] = (float((kept - update).norm()), float(update.norm()))
        return written


def export_merged(
    model: ModelSpec,
    base: str,
    learned: Mapping[str, LowRank],
    to: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    original: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> MergeErrors:
    """Write config, tokenizer and safetensors for ``AutoModelForCausalLM.from_pretrained``.

    The tensors of one shard and one more weight with its update are in memory at once.

    Args:
        model: the run's base model.
        base: ``job.base``: the values of ``W_0``.
        learned: ``(d_out, d_in)`` by weight name; a weight without an update may be absent.
        to: an existing directory.
        trained: weights that replace the base's, by parameter name in the causal LM.
        original: add to the checkpoint's own values instead of ``base``'s.
        dtype: of every tensor in the files, fp32 or bf16.
        shard_bytes: most bytes of one file, unless one tensor alone is larger.

    Raises:
        InputError: the model has no parameter of a trained weight's name.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    parameters: dict[str, Tensor] = dict(model.skeleton.named_parameters())
    if model.config.tie_word_embeddings:
        # The tensor of embedding and head is written once, and tied again when it is loaded.
        parameters.pop(model.family.head_weight, None)
    unknown = sorted(set(trained or {}) - parameters.keys())
    if unknown:
        raise InputError(
            f"{model.directory}: the model has no parameter {unknown[0]}, which the checkpoint has trained"
        )
    merge = _Merge(model, base, original, learned, trained or {}, dtype)
    parameters |= merge.buffers()
    shapes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in parameters.items()}
    split = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        save_tensors({name: merge.tensor(name) for name in names}, to / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _save_settings(model, to, dtype)
    return MergeErrors(RelativeError.of(merge.base_norms), RelativeError.of(merge.rounding_norms))


def _save_settings(model: ModelSpec, to: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model.skeleton).__name__], dtype
    config.save_pretrained(to)
    load_tokenizer(model.directory).save_pretrained(to)
    generation = model.directory / "generation_config.json"
    if generation.is_file():
        (to / generation.name).write_bytes(generation.read_bytes())
