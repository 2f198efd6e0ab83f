"""The batch that weights are scored on: few examples with a fixed number of supervised tokens (METHOD 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsplit.data.batches import IGNORED, Batch, collate
from hsplit.data.tokens import TokenizedExample


def probe_batch(examples: Sequence[TokenizedExample], tokens: int, batch_size: int, seed: int) -> Batch:
    """Examples drawn without replacement until ``tokens`` of their positions carry loss.

    The sum of ``|W G|`` shrinks as more tokens are averaged, so every client is scored on the same number of them:
    what the last example has beyond it loses its targets. A probe is one batch, never several: where ``batch_size``
    examples have fewer supervised tokens than wanted, it has those.

    Args:
        examples: at least one; the same ones as are trained on, in an order of the probe's own.
        tokens: supervised tokens wanted, at least 1.
        batch_size: most examples: what a plan reserves memory for.
        seed: decides the draw, and nothing else does.

    Returns:
        A batch with ``min(tokens, what the drawn examples have)`` supervised positions.
    """
    if tokens < 1 or batch_size < 1:
        raise ValueError(f"tokens and batch_size must be at least 1, not {tokens} and {batch_size}")
    drawn = [examples[int(i)] for i in np.random.default_rng(seed).permutation(len(examples))[:batch_size]]
    batch = collate(drawn)
    carried = (batch.targets != IGNORED).sum(dim=1).cumsum(0)
    enough = int((carried < tokens).sum()) + 1
    batch = collate(drawn[:enough])
    supervised = batch.targets != IGNORED
    surplus = supervised & (supervised.flatten().cumsum(0).view_as(supervised) > tokens)
    return Batch(batch.ids, batch.targets.masked_fill(surplus, IGNORED), batch.lengths)
