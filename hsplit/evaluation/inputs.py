"""What a model is evaluated on: inputs, each with every reference that the data has for it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hsplit.data import Example


@dataclass(frozen=True)
class TestInput:
    """One input with its references.

    Attributes:
        prompt: what the model is given, separator included.
        responses: each answer that the data has for it, as training takes them.
    """

    # pytest would take the name for a test class.
    __test__ = False

    prompt: str
    responses: tuple[str, ...]

    @property
    def examples(self) -> list[Example]:
        """One example a response, for perplexity."""
        return [Example(self.prompt, response, None) for response in self.responses]

    def references(self, special_tokens: Iterable[str]) -> list[str]:
        """The responses as texts to compare with: without special tokens and surrounding blanks."""
        texts = []
        for text in self.responses:
            for token in special_tokens:
                text = text.replace(token, "")
            texts.append(text.strip())
        return texts


def grouped(examples: Iterable[Example]) -> list[TestInput]:
    """Examples of one prompt as one input; prompts and responses in their given order."""
    responses: dict[str, list[str]] = {}
    for example in examples:
        responses.setdefault(example.prompt, []).append(example.response)
    return [TestInput(prompt, tuple(own)) for prompt, own in responses.items()]


def without(inputs: Sequence[TestInput], prompts: Collection[str]) -> list[TestInput]:
    """The inputs whose prompt is none of ``prompts``."""
    return [one for one in inputs if one.prompt not in prompts]


def limited(inputs: Sequence[TestInput], limit: int | None, seed: int) -> list[TestInput]:
    """At most ``limit`` inputs in their order, chosen by the seed from all of them, since files are often sorted."""
    if limit is None or limit >= len(inputs):
        return list(inputs)
    return [inputs[index] for index in sorted(random.Random(seed).sample(range(len(inputs)), limit))]
