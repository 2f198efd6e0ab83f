"""Taking the result away: the exact sum of everything learned as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hsplit.lora.low_rank import LowRank, concatenate, empty
from hsplit.models.segment import LinearShape

PREFIX = "base_model.model."


def learned(server_state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """What the model had learned at the last aggregation, by weight: the residual and what adapters restarted with.

    Args:
        server_state: the server's tensors of a checkpoint: ``residual.W.B`` and ``.A`` (or ``residual.W.matrix``),
            ``common.W.B`` and ``.A``.
    """
    parts: dict[str, list[LowRank]] = {}
    for key, tensor in server_state.items():
        kind, _, rest = key.partition(".")
        name, _, factor = rest.rpartition(".")
        if kind not in ("residual", "common"):
            continue
        if factor == "matrix":
            parts.setdefault(name, []).append(_as_factors(tensor))
        elif factor == "B":
            parts.setdefault(name, []).append(LowRank(tensor, server_state[f"{kind}.{name}.A"]))
    return {name: concatenate(terms) for name, terms in parts.items()}


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
    from peft import LoraConfig
    from safetensors.torch import save_file

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
    save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to
