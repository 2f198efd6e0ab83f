"""Vocabulary of the generated restaurants: values of the slots, and phrases for each fact.

Everything here was written for this project. Names, places and landmarks are invented.
"""

from __future__ import annotations

from collections.abc import Sequence

SLOTS = ("name", "eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")

NAME_QUALITIES = (
    "Copper", "Velvet", "Crooked", "Silver", "Quiet", "Amber", "Wandering", "Painted", "Hollow", "Scarlet",
    "Drowsy", "Lucky", "Ivory", "Rusty", "Laughing", "Smoky", "Humble", "Twisted", "Marble", "Midnight",
    "Speckled", "Woolly",
)  # fmt: skip
NAME_THINGS = (
    "Heron", "Fig", "Lantern", "Kettle", "Otter", "Pepper", "Anchor", "Thistle", "Walnut", "Badger", "Ladle",
    "Orchard", "Compass", "Magpie", "Skillet", "Almond", "Tortoise", "Barrel", "Quince", "Sparrow", "Hearth",
    "Saffron",
)  # fmt: skip

_FOODS = (
    "Italian", "Greek", "Japanese", "Indian", "Mexican", "Thai", "Turkish", "Ethiopian", "Korean",
    "Peruvian",
)  # fmt: skip
_LANDMARKS = (
    "Lantern Bridge", "Foxglove Park", "Harrow Hall", "Marlowe Station", "Juniper Gardens", "Pepper Wharf",
    "Tallow Court", "Cobbler's Lane", "Windmill Green", "Saltmarsh Pier", "Bellweather College",
    "Orla Chapel",
)  # fmt: skip

VALUES: dict[str, tuple[str, ...]] = {
    "eatType": ("restaurant", "bistro", "pub", "coffee house", "wine bar", "tea room", "diner", "canteen"),
    "food": _FOODS,
    "priceRange": ("cheap", "moderate", "expensive", "under 15 euros", "15 to 30 euros", "over 30 euros"),
    "customer rating": ("low", "average", "high", "2 out of 5", "4 out of 5", "5 out of 5"),
    "area": ("old town", "harbour", "market square", "university quarter", "suburbs", "north end"),
    "familyFriendly": ("yes", "no"),
    "near": _LANDMARKS,
}

AREA_PLACES: dict[str, tuple[str, ...]] = {
    "old town": ("in the old town",),
    "harbour": ("by the harbour", "at the harbour"),
    "market square": ("on the market square", "at the market square"),
    "university quarter": ("in the university quarter",),
    "suburbs": ("in the suburbs", "out in the suburbs"),
    "north end": ("in the north end", "at the north end of town"),
}
NEAR_PLACES = ("near {}", "close to {}", "not far from {}", "a short walk from {}")

# Adjectives that can stand before a noun. Slot values without one have other phrases; a low
# rating has none on purpose, since openings such as "If you want a …" would recommend it.
ADJECTIVES: dict[tuple[str, str], tuple[str, ...]] = {
    ("priceRange", "cheap"): ("cheap", "inexpensive", "low-priced"),
    ("priceRange", "moderate"): ("moderately priced", "mid-priced"),
    ("priceRange", "expensive"): ("expensive", "high-priced"),
    ("customer rating", "high"): ("highly rated",),
    ("familyFriendly", "yes"): ("family-friendly", "child-friendly"),
}

# Noun phrases that can follow "with" or "has".
POSSESSIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("priceRange", "cheap"): ("low prices", "a cheap menu"),
    ("priceRange", "moderate"): ("moderate prices", "a moderately priced menu"),
    ("priceRange", "expensive"): ("high prices", "an expensive menu"),
    ("priceRange", "under 15 euros"): ("meals for under 15 euros", "meals for less than 15 euros"),
    ("priceRange", "15 to 30 euros"): ("meals for 15 to 30 euros", "meals between 15 and 30 euros"),
    ("priceRange", "over 30 euros"): ("meals for over 30 euros", "meals for more than 30 euros"),
    ("customer rating", "low"): ("a low customer rating", "low customer ratings"),
    ("customer rating", "average"): ("an average customer rating", "average customer ratings"),
    ("customer rating", "high"): ("a high customer rating", "high customer ratings"),
    ("customer rating", "2 out of 5"): (
        "a customer rating of 2 out of 5",
        "a rating of 2 out of 5 from customers",
    ),
    ("customer rating", "4 out of 5"): (
        "a customer rating of 4 out of 5",
        "a rating of 4 out of 5 from customers",
    ),
    ("customer rating", "5 out of 5"): (
        "a customer rating of 5 out of 5",
        "a rating of 5 out of 5 from customers",
    ),
}

# Further verb phrases in the third person, beside "has" and a possession.
_PREDICATES: dict[tuple[str, str], tuple[str, ...]] = {
    ("priceRange", "cheap"): ("is cheap", "is inexpensive", "charges low prices"),
    ("priceRange", "moderate"): ("is moderately priced", "charges moderate prices"),
    ("priceRange", "expensive"): ("is expensive", "charges high prices"),
    ("priceRange", "under 15 euros"): (
        "charges less than 15 euros a meal",
        "offers meals for under 15 euros",
    ),
    ("priceRange", "15 to 30 euros"): ("charges 15 to 30 euros a meal", "offers meals for 15 to 30 euros"),
    ("priceRange", "over 30 euros"): ("charges more than 30 euros a meal", "charges over 30 euros a meal"),
    ("customer rating", "low"): ("is poorly rated by customers", "gets low ratings from its customers"),
    ("customer rating", "average"): (
        "is rated as average by customers",
        "gets average ratings from its customers",
    ),
    ("customer rating", "high"): ("is highly rated by customers", "gets high ratings from its customers"),
    ("customer rating", "2 out of 5"): (
        "is rated 2 out of 5 by customers",
        "scores only 2 out of 5 with customers",
    ),
    ("customer rating", "4 out of 5"): (
        "is rated 4 out of 5 by customers",
        "scores 4 out of 5 with customers",
    ),
    ("customer rating", "5 out of 5"): (
        "is rated 5 out of 5 by customers",
        "scores a full 5 out of 5 with customers",
    ),
    ("familyFriendly", "yes"): ("is family-friendly", "welcomes families", "is a good choice for families"),
    ("familyFriendly", "no"): (
        "is not family-friendly",
        "does not cater to families",
        "is not suitable for children",
    ),
}
_FOOD_PREDICATES = ("serves {} food", "offers {} dishes", "specialises in {} cooking", "cooks {} food")

_GOOD = {"customer rating": {"high", "4 out of 5", "5 out of 5"}, "familyFriendly": {"yes"}}
_BAD = {"customer rating": {"low", "2 out of 5"}, "familyFriendly": {"no"}}


def predicates(slot: str, value: str) -> tuple[str, ...]:
    """Verb phrases that express this slot: ``is cheap``, ``serves Greek food``."""
    if slot == "food":
        return tuple(form.format(value) for form in _FOOD_PREDICATES)
    if slot == "area":
        return tuple(f"is {place}" for place in AREA_PLACES[value])
    if slot == "near":
        return tuple(f"is {form.format(value)}" for form in NEAR_PLACES)
    owned = tuple(f"has {thing}" for thing in POSSESSIONS.get((slot, value), ()))
    return owned + _PREDICATES[slot, value]


def polarity(slot: str, value: str) -> int:
    """1 for praise, -1 for the opposite, 0 for a plain fact: decides between "and" and "but"."""
    return int(value in _GOOD.get(slot, ())) - int(value in _BAD.get(slot, ()))


def with_article(noun_phrase: str) -> str:
    """Put "a" or "an" before the phrase; every word of this vocabulary sounds as it is spelled."""
    return ("an " if noun_phrase[0].lower() in "aeiou" else "a ") + noun_phrase


def joined(parts: Sequence[str]) -> str:
    """Join to ``a``, ``a and b``, ``a, b and c``; two possessions share their verb: ``has a and b``."""
    if len(parts) == 2 and all(part.startswith("has ") for part in parts):
        return f"{parts[0]} and {parts[1].removeprefix('has ')}"
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
