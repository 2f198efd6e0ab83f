"""The test part: whole prompts of the shared data that no client ever sees, neither to train nor to validate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hsplit.data.examples import Example
from hsplit.errors import InputError


def split_off_test(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples for the clients and those of the test part, both in their given order.

    All examples of one prompt (the references of one input) go to one side. Which prompts are tested on is a matter
    of ``sha256(seed|input_key)`` alone, so it depends neither on the order of the data, nor on Python's own generator,
    nor on the day on which a chat template words the prompt.

    Args:
        examples: the shared data.
        share: of the distinct prompts to leave out, from 0 (none) to below 1; at least one, where it is above 0.
        seed: the run's.

    Raises:
        InputError: the share leaves no prompt to train on.
    """
    if share == 0:
        return list(examples), []
    prompts = dict.fromkeys(example.input_key for example in examples)
    count = max(1, round(share * len(prompts)))
    if count >= len(prompts):
        raise InputError(
            f"data.test: {share} of {len(prompts)} distinct prompts leaves none to train on; give a smaller share "
            "or more data"
        )
    drawn = set(sorted(prompts, key=lambda key: _digest(key, seed))[:count])
    rest = [example for example in examples if example.input_key not in drawn]
    return rest, [example for example in examples if example.input_key in drawn]


def _digest(input_key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}|{input_key}".encode()).digest()
