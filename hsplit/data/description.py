"""A look at a data source before training: its form, its lengths, what is learned of it, and who would get what."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hsplit.config import Job, Partition
from hsplit.data.chat import template_of
from hsplit.data.examples import Example, TokenizedExample
from hsplit.data.partition import partition
from hsplit.data.sources import Reading, read_data
from hsplit.data.tokens import tokenize
from hsplit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BINS = 10
RENDERED = 2
"""Examples that are shown as the model gets them."""
NAMED_LABELS = 32
"""Labels of a client that are counted one by one: a column may have another value in every row."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of examples.

    Attributes:
        least, median, most: of all.
        histogram: ``(fewest, most, examples)`` of each bin, equally wide.
    """

    least: int
    median: int
    most: int
    histogram: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(lengths: Sequence[int]) -> Lengths:
        """Count ``lengths``, at least one."""
        ordered = sorted(lengths)
        least, most = ordered[0], ordered[-1]
        width = max(1, -(-(most - least + 1) // BINS))
        counts = Counter((length - least) // width for length in ordered)
        bins = [(least + i * width, least + (i + 1) * width - 1, counts[i]) for i in range(max(counts) + 1)]
        return Lengths(least, ordered[(len(ordered) - 1) // 2], most, tuple(bins))


@dataclass(frozen=True)
class ClientShare:
    """One client's part of shared data.

    Attributes:
        examples: how many.
        characters: of the shortest prompt with its response, of the three that part them into quarters, of the longest.
        labels: examples of the :data:`NAMED_LABELS` most frequent labels; empty without labels.
    """

    examples: int
    characters: tuple[int, ...]
    labels: Mapping[str, int]

    @staticmethod
    def of(examples: Sequence[Example]) -> ClientShare:
        """Count ``examples``, at least one."""
        lengths = sorted(len(example.prompt) + len(example.response) for example in examples)
        labels = Counter(example.label for example in examples if example.label is not None)
        quarters = tuple(lengths[quarter * (len(lengths) - 1) // 4] for quarter in range(5))
        return ClientShare(len(examples), quarters, dict(labels.most_common(NAMED_LABELS)))


@dataclass(frozen=True)
class DataDescription:
    """A source as a run would use it.

    Attributes:
        reading: how it was read.
        lengths: tokens of each example, before any is left out or cut.
        too_long: examples over ``job.max_length`` tokens, which are left out, or cut (``job.data.long``).
        supervised: tokens to learn in the examples that fit.
        rendered: the first examples that fit as pieces of text, each with whether it is learned.
        clients: each client's part, by name, where a cluster was given.
        not_shared: why they cannot share it, if they cannot.
    """

    reading: Reading
    lengths: Lengths
    too_long: int
    supervised: int
    rendered: tuple[tuple[tuple[str, bool], ...], ...]
    clients: Mapping[str, ClientShare]
    not_shared: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the keys of ``hsplit data --json``."""
        return {
            "form": self.reading.form,
            "title": self.reading.title,
            "examples": len(self.reading.examples),
            "skipped": {reason: own.count for reason, own in self.reading.skipped.items()},
            "first_skipped": {reason: list(own.first) for reason, own in self.reading.skipped.items()},
            "unused": list(self.reading.unused),
            "lengths": asdict(self.lengths),
            "too_long": self.too_long,
            "supervised": self.supervised,
            "rendered": [[{"text": text, "learned": own} for text, own in example] for example in self.rendered],
            "clients": {name: asdict(own) for name, own in self.clients.items()},
            "not_shared": self.not_shared,
        }


def describe(job: Job, tokenizer: PreTrainedTokenizerBase, clients: Sequence[str] = ()) -> DataDescription:
    """Read the shared data of ``job`` as a run would, and partition it over ``clients``.

    Raises:
        InputError: as for :func:`~hsplit.data.sources.read_data`.
    """
    data = job.data
    reading = read_data(data, job.seed, template_of(tokenizer))
    whole = tokenize([_whole(example) for example in reading.examples], tokenizer, sys.maxsize, cache=data.cache)[0]
    fitting, left_out = tokenize(reading.examples, tokenizer, job.max_length, data.long, data.cache)
    cut = sum(len(one.ids) > job.max_length for one in whole) if data.long == "cut" else left_out
    shares, not_shared = dict[str, ClientShare](), ""
    if clients:
        how = data.partition.model_dump(exclude_none=True) if isinstance(data.partition, Partition) else data.partition
        try:
            parts = partition(reading.examples, len(clients), how, job.seed)
        except InputError as error:
            parts, not_shared = [], str(error)
        shares = {
            name: ClientShare.of([reading.examples[i] for i in part])
            for name, part in zip(clients, parts, strict=False)
        }
    return DataDescription(
        reading,
        Lengths.of([len(one.ids) for one in whole]),
        cut,
        sum(one.supervised for one in fitting),
        tuple(pieces(one, tokenizer) for one in fitting[:RENDERED]),
        shares,
        not_shared,
    )


def _whole(example: Example) -> Example:
    return example if not example.text else Example(example.prompt, example.response, example.label)


def pieces(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """Decode an example in pieces, each with whether its tokens are learned."""
    first = max(example.prompt_length, 1)
    learned = [at >= first and not any(start <= at < stop for start, stop in example.unsupervised)
               for at in range(len(example.ids))]  # fmt: skip
    found, begin = list[tuple[str, bool]](), 0
    for at in range(1, len(learned) + 1):
        if at == len(learned) or learned[at] != learned[begin]:
            ids = list(example.ids[begin:at])
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found.append((str(text), learned[begin]))
            begin = at
    return tuple(found)
