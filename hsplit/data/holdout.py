"""Examples held out of training: a client's validation part, and the shared test part that no client sees."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence

from hsplit.data.examples import Example
from hsplit.errors import InputError


def hold_out(
    examples: Sequence[Example], share: float, max_examples: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split into training and validation examples, at least one of each, both in their given order.

    Examples with the same prompt are references of one input, so they go to one side together: the validation side
    takes whole prompts, drawn at random, as long as they fit. If not even the prompt with the fewest examples fits,
    that one is taken, and its examples above `max_examples` are left out of both sides. If all examples have the same
    prompt, they are split one by one.

    Args:
        examples: at least two.
        share: of the examples to hold out, between 0 and 1.
        max_examples: never hold out more than this many, at least 1.
        seed: the same arguments give the same split.

    Raises:
        InputError: if an argument is out of its range.
    """
    if not 0 < share < 1:
        raise InputError(f"validation share: {share} is not allowed; must be above 0 and below 1")
    if max_examples < 1:
        raise InputError(f"validation examples: {max_examples} is too few, at least 1 is needed")
    if len(examples) < 2:
        raise InputError(f"data: {len(examples)} examples are too few to hold one out, at least 2 are needed")
    target = min(max(1, round(share * len(examples))), max_examples, len(examples) - 1)
    groups = _by_prompt(examples)
    random.Random(seed).shuffle(groups)
    held: set[int] = set()
    for group in groups:
        if len(held) + len(group) <= target:
            held.update(group)
    left_out: set[int] = set()
    if not held:
        smallest = min(groups, key=len)
        held, left_out = set(smallest[:max_examples]), set(smallest[max_examples:])
    not_trained = held | left_out
    train = [example for index, example in enumerate(examples) if index not in not_trained]
    return train, [examples[index] for index in sorted(held)]


def _by_prompt(examples: Sequence[Example]) -> list[list[int]]:
    """Group the indices by prompt; each index alone if there is one prompt only."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.input_key].append(index)
    return list(groups.values()) if len(groups) > 1 else [[index] for index in range(len(examples))]


def split_off_test(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into the clients' examples and the test part, both in their given order.

    All examples of one prompt (the references of one input) go to one side. Test prompts are chosen by
    ``sha256(seed|input_key)`` alone, so that they depend neither on the order of the data, nor on Python's own
    generator, nor on the day on which a chat template renders the prompt.

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
