"""A seeded generator of restaurant descriptions: the built-in data-to-text task, which needs no download.

The task is that of the E2E set (arXiv 1706.09254): a meaning representation in, English out. Values, names
and texts are this project's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from hsplit.data.examples import Example, meaning_text
from hsplit.data.restaurant_phrases import NAME_QUALITIES, NAME_THINGS, SLOTS, VALUES
from hsplit.data.restaurant_plans import plans_for, tell
from hsplit.errors import InputError

NO_LABEL = "none"


@dataclass(frozen=True)
class Description:
    """One restaurant in one wording: its slots in the order of `SLOTS`, and the text."""

    slots: dict[str, str]
    text: str


def descriptions(count: int, seed: int) -> list[Description]:
    """Generate `count` descriptions, no two with both the same slots and the same text.

    Each restaurant has two to four descriptions in a row, by different sentence plans. The same seed gives the same
    list, and a smaller count its beginning.

    Raises:
        InputError: if `count` is below 1.
    """
    if count < 1:
        raise InputError(f"data.examples: {count} is too few, at least 1 is needed")
    rng = random.Random(seed)
    made: list[Description] = []
    seen: set[str] = set()
    while len(made) < count:
        slots = _draw_slots(rng)
        meaning = meaning_text(slots)
        plans = plans_for(slots)
        chosen = rng.sample(plans, rng.randint(2, 4))
        texts = [tell(slots, plan, rng) for plan in chosen]
        if meaning in seen:
            continue
        seen.add(meaning)
        made.extend(Description(slots, text) for text in dict.fromkeys(texts))
    return made[:count]


def restaurants(count: int, seed: int) -> list[Example]:
    """Generate `count` examples: prompt ``name[…], food[…] =>``, response a space and the text, label the food."""
    return [
        Example(f"{meaning_text(made.slots)} =>", f" {made.text}", made.slots.get("food", NO_LABEL))
        for made in descriptions(count, seed)
    ]


def _draw_slots(rng: random.Random) -> dict[str, str]:
    article = "The " if rng.random() < 0.5 else ""
    values = {"name": f"{article}{rng.choice(NAME_QUALITIES)} {rng.choice(NAME_THINGS)}"}
    values |= {slot: rng.choice(VALUES[slot]) for slot in SLOTS[1:]}
    # The name is always there, and one of kind and food, without which the place has no noun.
    # Food, which is the label, is more frequent than the rest.
    first = rng.choices((("eatType", "food"), ("eatType",), ("food",)), weights=(6, 2, 2))[0]
    others = [slot for slot in SLOTS[1:] if slot not in first]
    present = {"name", *first, *rng.sample(others, rng.randint(2 - len(first), len(others)))}
    return {slot: values[slot] for slot in SLOTS if slot in present}
