"""One client's own examples: its training and its validation part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hsplit.config import Job
from hsplit.data.batches import PADDING, ExampleSampler
from hsplit.data.examples import Example, TokenizedExample
from hsplit.data.holdout import hold_out
from hsplit.data.tokens import tokenize
from hsplit.errors import InputError
from hsplit.seeds import hash_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Examples tokenized at first where one that fits is enough; four times as many each time after.
_FIRST = 4


class LocalData:
    """Tokenized examples of one client; their order depends on run seed, client and step alone.

    Args:
        client: its name.
        examples: all of its examples.
        tokenizer: the model's.
        job: its validation share, batch size, longest example and seed.
        source: origin of the examples, for messages; the job's source by default.

    Attributes:
        client: its name.
        train: examples to train on.
        held_out: examples to validate on.
        too_long: examples over ``job.max_length`` tokens that are left out.

    Raises:
        InputError: there are fewer than two examples, or too few that fit ``job.max_length``.
    """

    def __init__(
        self,
        client: str,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        job: Job,
        source: str | None = None,
    ) -> None:
        self.client = client
        where = _where(client, source, job)
        train, held_out = _parts(client, examples, job, where)
        data = job.data
        self.train, too_long_train = tokenize(train, tokenizer, job.max_length, data.long, data.cache)
        self.held_out, too_long_held_out = tokenize(held_out, tokenizer, job.max_length, data.long, data.cache)
        for what, part, fitting in (("training", train, self.train), ("validation", held_out, self.held_out)):
            if not fitting:
                raise _none_fits(where, what, len(part), job)
        self.too_long = too_long_train + too_long_held_out
        self._sampler = ExampleSampler(len(self.train), job.seed, client)

    def token_ids(self, job: Job) -> set[int]:
        """Collect the distinct ids that any batch of these examples may have."""
        ids = {token for example in (*self.train, *self.held_out) for token in example.ids}
        # Without packing padding is embedded as any token is.
        return ids if job.fast.packed else ids | {PADDING}

    def draw(self, first: int, count: int) -> list[TokenizedExample]:
        """The ``count`` training examples from place ``first`` on, counted over the run."""
        return [self.train[index] for index in self._sampler.indices(first, count)]


def check_shares(shares: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase, job: Job) -> bool:
    """Check that every client can train and validate on its share, tokenizing as few examples as possible.

    Args:
        shares: examples by client.
        tokenizer: the model's.
        job: as for :class:`LocalData`.

    Returns:
        True if some client has a training example with a supervised token.

    Raises:
        InputError: as :class:`LocalData`.
    """
    supervised = False
    for client, examples in shares.items():
        where = _where(client, None, job)
        train, held_out = _parts(client, examples, job, where)
        for what, part in (("training", train), ("validation", held_out)):
            if not has_example(part, tokenizer, job.max_length, long=job.data.long):
                raise _none_fits(where, what, len(part), job)
        supervised = supervised or has_example(
            train, tokenizer, job.max_length, lambda example: example.supervised > 0, long=job.data.long
        )
    return supervised


def has_example(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    wanted: Callable[[TokenizedExample], bool] = lambda example: True,
    long: str = "skip",
) -> bool:
    """True if one of ``examples`` fits ``max_length`` tokens and is ``wanted``; stops at the first that is.

    Args:
        examples, tokenizer, max_length, long: as for :func:`~hsplit.data.tokens.tokenize`.
        wanted: of the tokens.
    """
    start, count = 0, _FIRST
    while start < len(examples):
        fitting, _ = tokenize(examples[start : start + count], tokenizer, max_length, long)
        if any(map(wanted, fitting)):
            return True
        start, count = start + count, 4 * count
    return False


def nothing_supervised(where: str, what: str, model: str, max_length: int | None = None) -> InputError:
    """Make the error for data without a token to learn or to measure on.

    Args:
        where: the data, as a user knows them.
        what: part of the data: ``training``, ``validation`` or ``test``.
        model: the model, as a user knows it.
        max_length: of the run, where longer examples are left out.
    """
    fitting = "" if max_length is None else f" of at most job.max_length = {max_length} tokens"
    return InputError(
        f"{where}: no {what} example{fitting} has a token to predict: to the tokenizer of {model} every response is"
        " empty, and it adds no eos; give responses in its words, or a tokenizer with an eos_token"
    )


def _where(client: str, source: str | None, job: Job) -> str:
    return f"client {client}: {source or f'job.data.{job.data.origin}'}"


def _parts(client: str, examples: Sequence[Example], job: Job, where: str) -> tuple[list[Example], list[Example]]:
    """Split the client's examples into training and validation."""
    if len(examples) < 2:
        has = "1 example" if examples else "no example"
        raise InputError(f"{where}: has {has}; at least 2 are needed, one to train on and one to validate on")
    return hold_out(
        examples,
        share=job.validation.share,
        max_examples=job.validation.max_examples,
        seed=hash_seed(job.seed, client),
    )


def _none_fits(where: str, what: str, count: int, job: Job) -> InputError:
    return InputError(
        f"{where}: none of its {count} {what} examples fits job.max_length = {job.max_length} tokens; raise"
        " job.max_length, or shorten the examples"
    )
