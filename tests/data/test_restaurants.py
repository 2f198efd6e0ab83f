"""The generator: distinct, deterministic, grammatical, and true to its slots."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from hsplit.data.examples import parse_meaning
from hsplit.data.restaurant_phrases import AREA_PLACES, SLOTS, VALUES, joined, with_article
from hsplit.data.restaurants import Description, descriptions, restaurants
from hsplit.errors import InputError

COUNT = 5000

# What a text must contain to have told a value that it does not contain word for word.
TELLS = {
    ("priceRange", "cheap"): r"cheap|inexpensive|low-priced|low prices|Prices are low",
    ("priceRange", "moderate"): r"moderate|moderately priced|mid-priced",
    ("priceRange", "expensive"): r"\bexpensive|high-priced|high prices|Prices are high",
    ("priceRange", "under 15 euros"): r"(under|less than) 15 euros",
    ("priceRange", "15 to 30 euros"): r"15 (to|and) 30 euros",
    ("priceRange", "over 30 euros"): r"(over|more than) 30 euros",
    ("customer rating", "low"): r"low (customer )?rating|poorly rated",
    ("customer rating", "average"): r"average (customer )?rating|rated as average",
    ("customer rating", "high"): r"high (customer )?rating|highly rated",
    (
        "familyFriendly",
        "yes",
    ): r"family-friendly|child-friendly|welcomes families|for families|Families are welcome",
    (
        "familyFriendly",
        "no",
    ): r"not family-friendly|not cater to families|not suitable for children|not catered for",
}


@pytest.fixture(scope="module")
def made() -> list[Description]:
    return descriptions(COUNT, seed=0)


def test_all_are_distinct(made: list[Description]) -> None:
    assert len({(tuple(one.slots.items()), one.text) for one in made}) == COUNT


def test_a_seed_fixes_the_list_and_a_smaller_count_its_beginning(made: list[Description]) -> None:
    assert descriptions(300, seed=0) == made[:300]
    assert descriptions(300, seed=1) != made[:300]


def test_three_to_eight_slots_of_which_every_one_is_used(made: list[Description]) -> None:
    assert {len(one.slots) for one in made} == set(range(3, 9))
    assert {slot for one in made for slot in one.slots} == set(SLOTS)
    for slot, values in VALUES.items():
        assert {one.slots[slot] for one in made if slot in one.slots} == set(values)


def test_texts_tell_every_value_and_no_other(made: list[Description]) -> None:
    for one in made:
        for slot, value in one.slots.items():
            pattern = TELLS.get((slot, value), re.escape(value))
            assert re.search(pattern, one.text), (slot, value, one.text)
        for slot in set(VALUES) - set(one.slots) - {"eatType"}:
            for value in VALUES[slot]:
                text = one.text.replace(one.slots["name"], "")
                assert not re.search(TELLS.get((slot, value), rf"\b{re.escape(value)}\b"), text), (slot, text)


def test_areas_are_told_by_their_own_name() -> None:
    assert AREA_PLACES.keys() == set(VALUES["area"])
    assert all(area in place for area, places in AREA_PLACES.items() for place in places)


def test_texts_are_grammatical_on_the_surface(made: list[Description]) -> None:
    for one in made:
        assert re.fullmatch(r"[A-Z].*\.", one.text), one.text
        assert not re.search(r"  |,,| ,| \.|\.\.|,\.|\?\.|and and|, and|\b(\w+) \1\b", one.text), one.text
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiouAEIOU]", one.text), one.text
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=[.?]) ", one.text)), one.text


def test_one_restaurant_is_told_in_different_plans(made: list[Description]) -> None:
    texts = defaultdict(list)
    for one in made:
        texts[tuple(one.slots.items())].append(one.text)
    several = [group for group in texts.values() if len(group) > 1]
    assert len(several) > 0.9 * len(texts)
    openings = {re.sub(r"\b(The )?[A-Z]\w+ [A-Z]\w+", "X", text)[:6] for text in (one.text for one in made)}
    assert len(openings) > 20


def test_examples_carry_prompt_response_and_label() -> None:
    for example, one in zip(restaurants(200, seed=3), descriptions(200, seed=3), strict=True):
        assert example.prompt.endswith("] =>")
        assert parse_meaning(example.prompt.removesuffix(" =>")) == one.slots
        assert example.response == f" {one.text}"
        assert example.label == one.slots.get("food", "none")


def test_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.examples: 0 is too few"):
        restaurants(0, seed=0)


@pytest.mark.parametrize(("phrase", "expected"), [("Italian pub", "an Italian pub"), ("pub", "a pub")])
def test_article(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["is cheap"], "is cheap"),
        (["is cheap", "serves Thai food"], "is cheap and serves Thai food"),
        (["has low prices", "has a high rating"], "has low prices and a high rating"),
        (["is cheap", "is small", "is here"], "is cheap, is small and is here"),
    ],
)
def test_joined(parts: list[str], expected: str) -> None:
    assert joined(parts) == expected
