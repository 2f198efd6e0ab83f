"""Taking the result away: the exact sum of everything learned as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hsplit.dependency_messages import quieten_bitsandbytes
from hsplit.lora.low_rank import LowRank, concatenate, empty
from hsplit.lora.weight_holder import WEIGHT
from hsplit.models.segment import LinearShape
from hsplit.tensor_files import save_tensors

PREFIX = "base_model.model."


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
    terms: Mapping[str, LowRank], shapes: Sequence[LinearShape], base: str, fan_in_fan_out: bool, to: Path
) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for ``PeftModel.from_pretrained``.

    Ranks differ by weight, so PEFT's rank and alpha patterns carry them; each alpha equals its rank, which makes every
    scale 1: the factors already have theirs folded in, in fp32.

    Args:
        terms: ``R_w`` plus the common live part by weight name; a weight that learned nothing may be absent.
        shapes: the adapted weights.
        base: what to write as the adapter's base model: a hub id or a directory.
        fan_in_fan_out: the family stores linears transposed (GPT-2).
        to: directory, made if needed.
    """
    quieten_bitsandbytes()
    from peft import LoraConfig

    to.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for shape in shapes:
        # PEFT has no rank 0; a weight without a term gets one zero direction.
        term = terms.get(shape.name, empty(shape.d_out, shape.d_in))
        if term.rank == 0:
            term = LowRank(torch.zeros(shape.d_out, 1), torch.zeros(1, shape.d_in))
        ranks[shape.name] = term.rank
        tensors[f"{PREFIX}{shape.name}.lora_A.weight"] = term.A.float().contiguous()
        tensors[f"{PREFIX}{shape.name}.lora_B.weight"] = term.B.float().contiguous()
    default = max(ranks.values())
    pattern = {name: rank for name, rank in ranks.items() if rank != default}
    config = LoraConfig(
        r=default,
        lora_alpha=default,
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
    return to
