"""The other side of the laws: PEFT LoRA on the unsplit model, written as a user would write it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hsplit.data.batches import Batch
from hsplit.lora.adapters import initial_A
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import base_values


def keep_double(patch: pytest.MonkeyPatch) -> None:
    """Make transformers' Llama RMS norm stay in fp64, which it otherwise leaves for fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden.dtype)

    patch.setattr(LlamaRMSNorm, "forward", forward)


def peft_model(directory: Path, base: str, dtype: torch.dtype, rank: int, alpha: float, key: str) -> Any:
    """PEFT LoRA on all linears of the unsplit model, on the run's base values, with hsplit's A-init.

    Args:
        key: init key; ``{name}`` in it stands for the weight's name.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    spec = ModelSpec.read(directory)
    transposed, shapes = spec.family.transposed, spec.linears
    with torch.no_grad():
        for shape in shapes:
            weight = model.get_submodule(shape.name).weight
            values = weight.T if transposed else weight
            values = base_values(values.contiguous(), base, dtype)
            weight.copy_(values.T if transposed else values)
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=[s.name for s in shapes], fan_in_fan_out=transposed, bias="none"
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False).to(dtype)
    with torch.no_grad():
        for shape in shapes:
            A = lora_A(wrapped, shape.name)
            A.copy_(initial_A(rank, shape.d_in, key.format(name=shape.name), dtype))
    return wrapped.train()


def lora_A(model: Any, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight
    return weight


def lora_B(model: Any, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight
    return weight


def clip_each_weight(model: Any, names: Sequence[str], clip: float | None) -> int:
    """Clip the gradients of each weight's two factors, together, against ``clip`` times the root of the share of the
    adapters' entries that they are; returns how many weights that made a difference to.
    """
    if clip is None:
        return 0
    factors = {name: [lora_A(model, name), lora_B(model, name)] for name in names}
    entries = {name: sum(factor.numel() for factor in pair) for name, pair in factors.items()}
    total, clipped = sum(entries.values()), 0
    for name, pair in factors.items():
        limit = clip * (entries[name] / total) ** 0.5
        clipped += bool(torch.nn.utils.clip_grad_norm_(pair, limit) > limit)
    return clipped


def mean_loss(model: Any, batches: Iterable[Batch]) -> Tensor:
    """Mean cross-entropy over all supervised tokens of ``batches``.

    The logits are the model's own; their log-softmax is taken in fp64, since torch's fp32 kernel sums 49,152
    exponentials with a bias of 5e-6, half of what the law allows.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        columns = torch.arange(batch.ids.shape[1])
        mask = (columns[None, :] < torch.tensor(batch.lengths)[:, None]).long()
        logits = model(input_ids=batch.ids, attention_mask=mask).logits
        at = batch.targets != -100
        total = total + torch.nn.functional.cross_entropy(logits[at].double(), batch.targets[at], reduction="sum")
        count += int(at.sum())
    return total / max(count, 1)
