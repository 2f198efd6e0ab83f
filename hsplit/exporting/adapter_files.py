"""The learned update of a run, from a checkpoint's tensors, and its export as a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hsplit.files import save_tensors
from hsplit.lora.adapters import initial_A
from hsplit.lora.low_rank import concatenate, empty
from hsplit.models.factors import LowRank
from hsplit.models.spec import LinearShape
from hsplit.streams import quieten_bitsandbytes

PREFIX = "base_model.model."
MOST_PADDING_BYTES = 1 << 30
"""Bytes that one rank for all modules may always add to an adapter's file."""
_FP32_BYTES = 4


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
    scale every module by 1. Padding is rows of ``A`` as in a new adapter and zeros in ``B``, so that the product stays
    and further training moves every direction. It also replaces directions whose product is zero.

    If one rank would add more than :data:`MOST_PADDING_BYTES` and more than double the file, modules keep their own
    ranks, in PEFT's rank and alpha patterns, by each module's whole name.

    Args:
        terms: ``R_w`` plus the common live part by weight name; a weight without an update may be absent.
        shapes: the adapted weights.
        base: the adapter's base model: a hub id or a directory.
        fan_in_fan_out: true if the family stores linears transposed (GPT-2).
        to: directory, made if needed.

    Returns:
        ``None`` if all modules have one rank; else the factor by which that would have enlarged the file.
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
    # As a pattern, a whole name matches itself alone: its dots stand for one character each.
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
    """``term`` in fp32 without the directions whose product is zero, some of which would never learn."""
    B, A = term.B.float(), term.A.float()
    kept = (B != 0).any(dim=0) & (A != 0).any(dim=1)
    return LowRank(B[:, kept], A[kept])


def _padded(term: LowRank, rank: int, name: str) -> LowRank:
    """The same matrix with ``rank`` directions, deterministic for ``name``."""
    missing = rank - term.rank
    if missing == 0:
        return term
    d_out, d_in = term.B.shape[0], term.A.shape[1]
    return concatenate([term, LowRank(torch.zeros(d_out, missing), initial_A(missing, d_in, f"export|{name}"))])
