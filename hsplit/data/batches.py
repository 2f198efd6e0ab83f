"""Batches: right-padded ids with targets already shifted, the order of examples in them, and the probe batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hsplit.data.examples import TokenizedExample

if TYPE_CHECKING:
    from torch import Tensor


IGNORED = -100  # cross_entropy's own default for a target that carries no loss
PADDING = 0
"""Id of padded positions, by default."""


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Batch:
    """A batch of ``b`` examples, padded on the right to its longest, ``T`` tokens.

    Attributes:
        ids: ``(b, T)``, int64.
        targets: ``(b, T)``, int64: ``targets[i, t]`` is the id that position ``t`` must predict, ``ids[i, t +
            1]``, where that one belongs to the response or is its eos, and -100 elsewhere. The shift is done
            here, once, so that a loss compares ``logits[i, t]`` with ``targets[i, t]``.
        lengths: the number of tokens of each example, without padding.
    """

    ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of positions that carry loss: METHOD's ``n_i``, counted after the shift."""
        return int((self.targets != IGNORED).sum())

    def padded(self) -> Batch:
        """The same batch with its padding as ordinary tokens without targets."""
        return Batch(self.ids, self.targets, (self.ids.shape[1],) * len(self.lengths))


def collate(examples: Sequence[TokenizedExample], padding: int = PADDING) -> Batch:
    """Make one batch of these examples, in their order.

    Args:
        examples: at least one.
        padding: the id of padded positions (see `padding_id`); no result depends on it.
    """
    import torch

    if not examples:
        raise ValueError("a batch needs at least one example")
    lengths = tuple(len(example.ids) for example in examples)
    ids = torch.full((len(examples), max(lengths)), padding, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids, dtype=torch.int64)
        ids[row, : len(tokens)] = tokens
        # Position t predicts token t + 1; with an empty prompt no position predicts the first token.
        first = max(example.prompt_length, 1)
        targets[row, first - 1 : len(tokens) - 1] = tokens[first:]
        for start, stop in example.unsupervised:
            targets[row, max(start, first) - 1 : stop - 1] = IGNORED
    return Batch(ids, targets, lengths)


def validation_batches(examples: Sequence[TokenizedExample], batch_size: int, padding: int = PADDING) -> list[Batch]:
    """Batches with every example once, shortest first so that little is padded; the last may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    ordered = sorted(examples, key=lambda example: len(example.ids))
    return [collate(ordered[start : start + batch_size], padding) for start in range(0, len(ordered), batch_size)]


class ExampleSampler:
    """Selects the examples of a batch, as a pure function of seed, name and place.

    Epochs, each a permutation of all examples, follow one another endlessly, and a batch may span two of them.

    Args:
        count: the number of examples, at least 1.
        seed: the run's.
        name: the client's, so that clients draw independently.
    """

    def __init__(self, count: int, seed: int, name: str) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        self.count = count
        self.seed = seed
        self.name = name
        self._cached: tuple[int, list[int]] = (-1, [])

    def indices(self, first: int, count: int) -> tuple[int, ...]:
        """Indices of the examples at the ``count`` places from ``first`` on, counted from 0 over all epochs."""
        if first < 0 or count < 1:
            raise ValueError(f"first must be at least 0 and count at least 1, not {first} and {count}")
        places = (divmod(place, self.count) for place in range(first, first + count))
        return tuple(self._permutation(epoch)[position] for epoch, position in places)

    def _permutation(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:
            self._cached = (epoch, self._shuffle(epoch))
        return self._cached[1]

    def _shuffle(self, epoch: int) -> list[int]:
        import numpy as np

        key = f"{self.seed}:{epoch}:{self.name}".encode()
        digest = int.from_bytes(hashlib.sha256(key).digest(), "big")
        order: list[int] = np.random.default_rng(digest).permutation(self.count).tolist()
        return order


def probe_batch(examples: Sequence[TokenizedExample], tokens: int, batch_size: int, seed: int) -> Batch:
    """Draw examples without replacement until ``tokens`` of their positions carry loss.

    The sum of ``|W G|`` shrinks as more tokens are averaged, so every client is scored on the same number of them:
    surplus positions of the last example lose their targets. A probe is one batch, never several: it may have fewer
    supervised tokens than wanted, where ``batch_size`` examples have no more.

    Args:
        examples: at least one: the training examples, drawn in another order than for training.
        tokens: supervised tokens wanted, at least 1.
        batch_size: most examples, for which a plan reserves memory.
        seed: alone decides the draw.

    Returns:
        A batch with ``tokens`` supervised positions, or all that the drawn examples have.
    """
    import numpy as np

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
