"""The unit of fine-tuning data: a prompt and the response that the model learns to give."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt with its response.

    The model sees ``tokens(prompt) + tokens(response) + eos``; the loss is on the response and the eos only.
    Both texts are final: separators and leading spaces are already in them.

    Attributes:
        prompt: what the model is given.
        response: what it learns to answer.
        label: the class by which a Dirichlet partition tells examples apart, or None if the data has none.
    """

    prompt: str
    response: str
    label: str | None
