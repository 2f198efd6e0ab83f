"""Taking the result away: everything that a run keeps of what it learned, as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hsplit.files import save_tensors
from hsplit.lora.adapters import initial_A
from hsplit.lora.low_rank import concatenate, empty
from hsplit.lora.weight_holder import WEIGHT
from hsplit.models.factors import LowRank
from hsplit.models.segment import LinearShape
from hsplit.streams import quieten_bitsandbytes

PREFIX = "base_model.model."
# What one rank for all modules may add to an adapter's file, however small that is.
MOST_PADDING_BYTES = 1 << 30
_FP32_BYTES = 4


@dataclass(frozen=True)
class LearnedTerm:
    """What one weight had learned at the last aggregation, part by part, as holders compute with it.

    Attributes:
        residual: ``R_w`` as factors, or ``None``.
        matrix: ``R_w`` as one matrix ``(d_out, d_in)``, where factors would be larger, or ``None``.
        common: what the live adapters restarted with, scale folded in, or ``None``.
    """

    residual: LowRank | None = None
    matrix: Tensor | None = None
    common: LowRank | None = None

    def whole(self) -> LowRank:
        """The exact sum of the parts as one pair of factors."""
        matrix = None if self.matrix is None else _as_factors(self.matrix)
        return concatenate([part for part in (self.residual, matrix, self.common) if part is not None])


def learned_parts(server_state: Mapping[str, Tensor]) -> dict[str, LearnedTerm]:
    """What the model had learned at the last aggregation, by weight; a weight that learned nothing is absent.

    Args:
        server_state: the server's tensors of a checkpoint: ``residual.W.B`` and ``.A`` (or ``residual.W.matrix``),
            ``common.W.B`` and ``.A``.
    """
    parts: dict[str, LearnedTerm] = {}
    for key, tensor in server_state.items():
        kind, _, rest = key.partition(".")
        name, _, factor = rest.rpartition(".")
        if kind not in ("residual", "common") or factor not in ("matrix", "B"):
            continue
        before = parts.get(name, LearnedTerm())
        if factor == "matrix":
            parts[name] = replace(before, matrix=tensor)
        else:
            factors = LowRank(tensor, server_state[f"{kind}.{name}.A"])
            parts[name] = replace(before, residual=factors) if kind == "residual" else replace(before, common=factors)
    return parts


def learned(server_state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What the model had learned at the last aggregation, by weight: the residual and what adapters restarted with.

    Args:
        server_state: as :func:`learned_parts` takes it.
    """
    return {name: term.whole() for name, term in learned_parts(server_state).items()}


def trained_weights(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of a run that trains every weight (policy ``ft``), by parameter name in the causal LM.

    Args:
        tensors: a checkpoint's tensors by holder; such a run keeps ``weight.PARAMETER`` among one holder's.

    Returns:
        Dense fp32 tensors; empty for a run that trains adapters.
    """
    return {
        key.removeprefix(WEIGHT): tensor
        for own in tensors.values()
        for key, tensor in own.items()
        if key.startswith(WEIGHT)
    }


def _as_factors(matrix: Tensor) -> LowRank:
    """A matrix as trivially exact factors, identity on the smaller side."""
    d_out, d_in = matrix.shape
    if d_out <= d_in:
        return LowRank(torch.eye(d_out, dtype=matrix.dtype), matrix)
    return LowRank(matrix, torch.eye(d_in, dtype=matrix.dtype))


def export_peft(
    terms: Mapping[str, LowRank],
    shapes: Sequence[LinearShape],
    base: str,
    fan_in_fan_out: bool,
    to: Path,
) -> float | None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``.

    Scales are folded into the factors, in fp32, and ``lora_alpha`` is ``r``. All modules get one rank, the largest:
    then PEFT, and tools that know one ``lora_alpha`` and divide by ``r`` or by the rank that they find in a tensor,
    scale every module by 1. What is added are rows of ``A`` as a new adapter has them and zeros in ``B``, so that the
    product stays and further training moves every direction. Directions whose product is zero give way to such.

    Where one rank would add more than :data:`MOST_PADDING_BYTES` and more than double the file, modules keep their own
    ranks, and PEFT's rank and alpha patterns carry them, by each module's whole name.

    Args:
        terms: ``R_w`` plus the common live part by weight name; a weight that learned nothing may be absent.
        shapes: the adapted weights.
        base: what to write as the adapter's base model: a hub id or a directory.
        fan_in_fan_out: the family stores linears transposed (GPT-2).
        to: directory, made if needed.

    Returns:
        ``None`` if all modules have one rank; else how many times as large that would have made the file.
    """
    quieten_bitsandbytes()
    from peft import LoraConfig

    to.mkdir(parents=True, exist_ok=True)
    whole = {s.name: _without_zeros(terms.get(s.name, empty(s.d_out, s.d_in))) for s in shapes}
    # PEFT has no rank 0.
    own = {name: max(term.rank, 1) for name, term in whole.items()}
    largest = max(own.values())
    own_bytes = sum(_FP32_BYTES * own[s.name] * (s.d_out + s.d_in) for s in shapes)
    padded_bytes = sum(_FP32_BYTES * largest * (s.d_out + s.d_in) for s in shapes)
    one_rank = padded_bytes - own_bytes <= max(MOST_PADDING_BYTES, own_bytes)
    ranks = dict.fromkeys(own, largest) if one_rank else own
    tensors = {}
    for name, rank in ranks.items():
        padded = _padded(whole.pop(name), rank, name)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = padded.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = padded.B
    # A whole name is matched by itself alone: its dots stand for one character each, so it fits no longer number.
    pattern = {name: rank for name, rank in ranks.items() if rank != largest}
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
        fan_in_fan_out=fan_in_fan_out,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(to))
    save_tensors(tensors, to / "adapter_model.safetensors")
    return None if one_rank else padded_bytes / own_bytes


def _without_zeros(term: LowRank) -> LowRank:
    """``term`` in fp32 without the directions whose product is zero: some of them would never learn."""
    B, A = term.B.float(), term.A.float()
    kept = (B != 0).any(dim=0) & (A != 0).any(dim=1)
    return LowRank(B[:, kept], A[kept])


def _padded(term: LowRank, rank: int, name: str) -> LowRank:
    """The same matrix with ``rank`` directions; the same bytes whenever it is exported."""
    missing = rank - term.rank
    if missing == 0:
        return term
    d_out, d_in = term.B.shape[0], term.A.shape[1]
    return concatenate([term, LowRank(torch.zeros(d_out, missing), initial_A(missing, d_in, f"export|{name}"))])
