"""Perplexity over the supervised tokens, those of the training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsplit.data import TokenizedExample, padding_id, validation_batches
from hsplit.data.batches import IGNORED


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of a model over examples.

    Attributes:
        total: summed over supervised tokens, nats.
        tokens: supervised tokens: those of the responses, with their eos.
    """

    total: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the mean; infinite if a double cannot hold it."""
        mean = self.total / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def cross_entropy(model: Any, tokenizer: Any, examples: Sequence[TokenizedExample], batch_size: int) -> CrossEntropy:
    """Cross-entropy with log-softmax in fp32 (fp64 for an fp64 model), with equal weight of all supervised tokens.

    Args:
        model: a causal LM in eval mode.
        tokenizer: for the padding id, which does not affect the result.
        examples: tokenized as for training.
        batch_size: examples at once.
    """
    total, count = 0.0, 0
    padding = padding_id(tokenizer, model.config.vocab_size)
    for batch in validation_batches(examples, batch_size, padding):
        mask = torch.arange(batch.ids.shape[1])[None, :] < torch.tensor(batch.lengths)[:, None]
        ids, at = batch.ids.to(model.device), batch.targets != IGNORED
        logits = model(input_ids=ids, attention_mask=mask.long().to(model.device), use_cache=False).logits
        rows = logits[at.to(model.device)]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        targets = batch.targets[at].to(model.device)
        total += float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum"))
        count += len(targets)
    return CrossEntropy(total, count)
