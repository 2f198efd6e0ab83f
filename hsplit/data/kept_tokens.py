"""Tokens of many examples, kept in the user's cache directory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from hsplit.data.examples import Example, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hsplit.kept import KeptTensors

MANY = 5_000
"""Fewer examples are tokenized in a second."""
# Format of kept tokens and way of tokenizing: with a new number all are tokenized again.
FORMAT_VERSION = 1


@cache
def _versions() -> str:
    return " ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))


def kept_tokens(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, how: str) -> KeptTokens | None:
    """Find where the tokens of ``examples`` are kept, by their texts and the tokenizer's content.

    Args:
        examples: to be tokenized.
        tokenizer: the model's.
        how: what else the tokens depend on.

    Returns:
        The place, or ``None`` where they are fewer than :data:`MANY`, or the tokenizer's content is not known.
    """
    if len(examples) < MANY or not getattr(tokenizer, "is_fast", False):
        return None
    content: Any = tokenizer
    key = hashlib.sha256(f"{FORMAT_VERSION} {_versions()} {how}\n".encode())
    key.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}\n{content.backend_tokenizer.to_str()}\n".encode())
    for one in examples:
        # A label changes no token; lengths keep apart what else would run together.
        key.update(
            f"{len(one.prompt)} {len(one.response)} {one.turns is None} {one.text} {one.unsupervised}\n".encode()
        )
        key.update(one.prompt.encode())
        key.update(one.response.encode())
    return KeptTokens(key.digest())


class KeptTokens:
    """Tokens of many examples in a file.

    Args:
        key: SHA-256 of all that they depend on.
    """

    def __init__(self, key: bytes) -> None:
        from hsplit.kept import KeptTensors

        self._kept: KeptTensors = KeptTensors("tokens", "tokens", key)

    def get(self) -> tuple[list[TokenizedExample], int] | None:
        """Return the examples, and how many were left out; ``None`` where they are not kept."""
        tensors = self._kept.get()
        if tensors is None:
            return None
        ids, ends, prompts, left_out = (tensors[name].tolist() for name in ("ids", "ends", "prompts", "left_out"))
        spans: dict[int, list[tuple[int, int]]] = {}
        for place, start, stop in tensors["unsupervised"].tolist():
            spans.setdefault(place, []).append((start, stop))
        starts = [0, *ends[:-1]]
        found = [
            TokenizedExample(tuple(ids[start:end]), prompt, tuple(spans.get(place, ())))
            for place, (start, end, prompt) in enumerate(zip(starts, ends, prompts, strict=True))
        ]
        return found, left_out[0]

    def put(self, examples: Sequence[TokenizedExample], left_out: int) -> None:
        """Keep the examples, at least one, where the directory has room."""
        import torch

        if not examples:
            return
        spans = [(place, *span) for place, one in enumerate(examples) for span in one.unsupervised]
        lengths = torch.tensor([len(one.ids) for one in examples])
        self._kept.put(
            {
                "ids": torch.tensor([token for one in examples for token in one.ids], dtype=torch.int32),
                "ends": lengths.cumsum(0),
                "prompts": torch.tensor([one.prompt_length for one in examples], dtype=torch.int32),
                "unsupervised": torch.tensor(spans, dtype=torch.int32).view(-1, 3),
                "left_out": torch.tensor([left_out]),
            }
        )
