"""What a model is evaluated on: inputs, each with every reference that the data has for it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from hsplit.data import Example


@dataclass(frozen=True)
class TestInput:
    """One input with its references.

    Attributes:
        prompt: what the model is given, separator included.
        responses: each answer that the data has for it, as training takes them.
        turns: as `Example` has them.
    """

    # pytest would take the name for a test class.
    __test__ = False

    prompt: str
    responses: tuple[str, ...]
    turns: str | None = field(default=None, compare=False)

    @property
    def examples(self) -> list[Example]:
        """One example a response, as training has them."""
        return [Example(self.prompt, response, None, self.turns) for response in self.responses]

    def references(self, special_tokens: Iterable[str]) -> list[str]:
        """The responses as texts to compare with: without special tokens and surrounding blanks."""
        texts = []
        for text in self.responses:
            for token in special_tokens:
                text = text.replace(token, "")
            texts.append(text.strip())
        return texts


def grouped(examples: Iterable[Example]) -> list[TestInput]:
    """Examples of one prompt as one input, worded as in its first; prompts and responses in their given order."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.input_key, []).append(example)
    return [
        TestInput(group[0].prompt, tuple(example.response for example in group), group[0].turns)
        for group in groups.values()
    ]


def without(inputs: Sequence[TestInput], keys: Collection[str]) -> list[TestInput]:
    """The inputs whose ``input_key``, as `Example` has it, is none of ``keys``."""
    return [one for one in inputs if one.examples[0].input_key not in keys]


def limited(inputs: Sequence[TestInput], limit: int | None, seed: int) -> list[TestInput]:
    """At most ``limit`` inputs in their order, chosen by the seed from all of them, since files are often sorted."""
    if limit is None or limit >= len(inputs):
        return list(inputs)
    return [inputs[index] for index in sorted(random.Random(seed).sample(range(len(inputs)), limit))]
