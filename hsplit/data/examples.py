"""The unit of fine-tuning data: a prompt and the response that the model learns to give."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Example:
    """One prompt with its response.

    The model sees the tokens of the prompt, of the response as it follows them, and the eos; the loss is on the
    response and the eos only. Both texts are final: separators and leading spaces are already in them.

    Attributes:
        prompt: what the model is given.
        response: what it learns to answer.
        label: the class by which a Dirichlet partition tells examples apart, or None if the data has none.
        turns: for a chat, the SHA-256 of the turns that its template has made the prompt of; None for other data.
    """

    prompt: str
    response: str
    label: str | None
    turns: str | None = field(default=None, compare=False)

    @property
    def input_key(self) -> str:
        """Identity of the input, by which references of one input find together and parts of the data are drawn.

        It depends on what the file holds alone: a template may write today's date into the prompt.
        """
        return self.prompt if self.turns is None else self.turns
