"""One client's own examples: what it trains on, and what it holds out to validate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hsplit.config import Job
from hsplit.data.batches import BatchSampler
from hsplit.data.examples import Example
from hsplit.data.holdout import hold_out
from hsplit.data.tokens import TokenizedExample, tokenize
from hsplit.errors import InputError
from hsplit.seeds import hash_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LocalData:
    """Tokenized examples of one client; which of them stand where depends on run seed, client and step alone.

    Args:
        client: whose.
        examples: at least two.
        tokenizer: the model's.
        job: its validation share, batch size, longest example and seed.

    Attributes:
        client: whose.
        train: examples to train on.
        held_out: examples to validate on.
        too_long: examples over ``job.max_length`` tokens, left out whole.

    Raises:
        InputError: too little of the data fits ``job.max_length``.
    """

    def __init__(self, client: str, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, job: Job) -> None:
        self.client = client
        train, held_out = hold_out(
            examples,
            share=job.validation.share,
            max_examples=job.validation.max_examples,
            seed=hash_seed(job.seed, client),
        )
        self.train, too_long_train = tokenize(train, tokenizer, job.max_length)
        self.held_out, too_long_held_out = tokenize(held_out, tokenizer, job.max_length)
        if not self.train or not self.held_out:
            raise InputError(
                f"client {client}: no example for training and validation fits job.max_length = "
                f"{job.max_length} tokens; raise it or shorten the data"
            )
        self.too_long = too_long_train + too_long_held_out
        self._sampler = BatchSampler(len(self.train), job.batch_size, job.seed, client)

    def draw(self, batch: int) -> list[TokenizedExample]:
        """The training examples of batch ``batch``, counted over the run."""
        return [self.train[index] for index in self._sampler.indices(batch)]
