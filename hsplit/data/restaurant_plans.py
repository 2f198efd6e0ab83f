"""Sentence plans, which put one restaurant's facts into one to three English sentences.

A plan writes the opening and takes the facts that it uses from a `Telling`; `Telling.rest` adds the others. A new plan
is one function and one line in `PLANS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from hsplit.data.restaurant_phrases import (
    ADJECTIVES,
    AREA_PLACES,
    NEAR_PLACES,
    POSSESSIONS,
    joined,
    polarity,
    predicates,
    with_article,
)


class Telling:
    """The facts about one restaurant that no sentence has used yet, and the draws that word them."""

    def __init__(self, slots: Mapping[str, str], rng: random.Random) -> None:
        self._rng = rng
        self._left = dict(slots)
        self.name = self._left.pop("name")
        self._kind = self._left.pop("eatType", None)

    def has(self, slot: str) -> bool:
        """True if this slot has not been used yet."""
        return slot in self._left

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return self._rng.random() < probability

    def pick(self, *options: str) -> str:
        """Draw one of the wordings, each with equal probability."""
        return self._rng.choice(options)

    def noun_phrase(self, *, complement: bool = True) -> str:
        """``an inexpensive Greek bistro``; with `complement` also ``a bistro serving Greek food``."""
        adjectives: list[str] = []
        for slot in self._rng.sample(("priceRange", "customer rating", "familyFriendly"), 3):
            forms = ADJECTIVES.get((slot, self._left.get(slot, "")))
            # A second adjective of this sort reads well, a third one does not.
            if forms and len(adjectives) < 2 and self.chance(0.45 if not adjectives else 0.2):
                adjectives.append(self.pick(*forms))
                del self._left[slot]
        words = [", ".join(adjectives)] if adjectives else []
        tail = ""
        food = self._left.get("food")
        # Without a kind of venue the noun is a mere "place", which needs the food beside it.
        if food and (self._kind is None or self.chance(0.75)):
            if complement and self.chance(0.35):
                tail = self.pick(f" serving {food} food", f" with {food} dishes")
            else:
                words.append(food)
            del self._left["food"]
        # A bare "a place" says nothing; "an eatery" at least names its purpose.
        words.append(self._kind or (self.pick("place", "eatery") if words or tail else "eatery"))
        return with_article(" ".join(words)) + tail

    def place(self) -> str:
        """``by the harbour near Harrow Hall``, one of the two, or nothing if neither is left."""
        parts = []
        both = self.has("area") and self.has("near")
        only = self.pick("area", "near") if both and self.chance(0.3) else None
        if self.has("area") and only != "near":
            parts.append(self.pick(*AREA_PLACES[self._left.pop("area")]))
        if self.has("near") and only != "area":
            form = self.pick(*(NEAR_PLACES[:2] if parts else NEAR_PLACES))
            parts.append(form.format(self._left.pop("near")))
        self._rng.shuffle(parts)
        return " ".join(parts)

    def somewhere(self) -> str:
        """`place` after a space, to follow a noun phrase."""
        place = self.place()
        return f" {place}" if place else ""

    def possession(self) -> str:
        """``low prices``, ``a high customer rating``; the price or the rating must be left."""
        slot = self.pick(*(slot for slot in ("priceRange", "customer rating") if self.has(slot)))
        return self.pick(*POSSESSIONS[slot, self._left.pop(slot)])

    def value(self, slot: str) -> str:
        """Use up a slot; its bare value."""
        return self._left.pop(slot)

    def verb_phrases(self, most: int) -> str:
        """Up to `most` facts other than the place as one predicate: ``is cheap and cooks Thai food``."""
        slots = [slot for slot in self._left if slot not in ("area", "near")]
        return self._predicate(self._rng.sample(slots, min(len(slots), most)))

    def rest(self) -> str:
        """The remaining facts as zero to three sentences of at most three facts each, after a space."""
        text = ""
        while self._left:
            most = 3 if len(self._left) == 3 and self.chance(0.6) else 2
            chosen = self._rng.sample(sorted(self._left), min(most, len(self._left)))
            subject = "It" if text or not self._kind else self.pick("It", "It", f"The {self._kind}")
            predicate = self._predicate(chosen)
            if text and predicate.startswith("is ") and not predicate.startswith(("is not ", "is a ")):
                predicate = f"is also {predicate.removeprefix('is ')}"
            elif text and predicate.startswith("has "):
                predicate = f"also {predicate}"
            text += f" {subject} {predicate}."
        return text

    def _predicate(self, slots: list[str]) -> str:
        facts = [(slot, self._left.pop(slot)) for slot in slots]
        phrases = [self.pick(*predicates(slot, value)) for slot, value in facts]
        if len(facts) == 2 and polarity(*facts[0]) * polarity(*facts[1]) < 0:
            return f"{phrases[0]} but {phrases[1]}"
        return joined(phrases)


def _identity(t: Telling) -> str:
    return f"{t.name} is {t.noun_phrase()}{t.somewhere()}."


def _existence(t: Telling) -> str:
    return f"There is {t.noun_phrase(complement=False)} {t.pick('called', 'named')} {t.name}{t.somewhere()}."


def _place_first(t: Telling) -> str:
    place = _capital(t.place())
    if t.chance(0.5):
        return f"{place}, you will find {t.name}, {t.noun_phrase()}."
    return f"{place} {t.pick('is', 'there is')} {t.noun_phrase(complement=False)} called {t.name}."


def _located(t: Telling) -> str:
    return f"{t.pick('Located', 'Situated')} {t.place()}, {t.name} is {t.noun_phrase()}."


def _apposition(t: Telling) -> str:
    predicate = t.verb_phrases(1 if t.chance(0.5) else 2)
    return f"{t.name}, {t.noun_phrase()}{t.somewhere()}, {predicate}."


def _relative(t: Telling) -> str:
    predicate = t.verb_phrases(1 if t.chance(0.5) else 2)
    return f"{t.name} is {t.noun_phrase(complement=False)} that {predicate}."


def _advice(t: Telling) -> str:
    wish = t.pick("If you are looking for", "If you want", "If you would like")
    return f"{wish} {t.noun_phrase()}{t.somewhere()}, {t.pick('try', 'go to', 'consider')} {t.name}."


def _question(t: Telling) -> str:
    question = f"{t.pick('Looking for', 'Do you fancy', 'Do you need')} {t.noun_phrase()}{t.somewhere()}?"
    return f"{question} {t.pick(f'Try {t.name}.', f'{t.name} is one.', f'{t.name} fits the bill.')}"


def _possession_first(t: Telling) -> str:
    return f"With {t.possession()}, {t.name} is {t.noun_phrase()}{t.somewhere()}."


def _customers_first(t: Telling) -> str:
    rating = t.value("customer rating")
    score = rating if rating[0].isdigit() else f"{with_article(rating)} rating"
    return f"Customers give {score} to {t.name}, {t.noun_phrase()}{t.somewhere()}."


def _families_first(t: Telling) -> str:
    welcome = "are welcome" if t.value("familyFriendly") == "yes" else "are not catered for"
    return f"Families {welcome} at {t.name}, {t.noun_phrase()}{t.somewhere()}."


def _prices_first(t: Telling) -> str:
    price = t.value("priceRange")
    level = {"cheap": "low", "moderate": "moderate", "expensive": "high"}.get(price)
    opening = f"Prices are {level}" if level else f"A meal costs {price}"
    return f"{opening} at {t.name}, {t.noun_phrase()}{t.somewhere()}."


Plan = Callable[[Telling], str]

# Each plan with the slots of which it needs at least one.
PLANS: tuple[tuple[Plan, frozenset[str]], ...] = (
    (_identity, frozenset({"name"})),
    (_existence, frozenset({"name"})),
    (_advice, frozenset({"name"})),
    (_question, frozenset({"name"})),
    (_place_first, frozenset({"area", "near"})),
    (_located, frozenset({"area", "near"})),
    (_apposition, frozenset({"priceRange", "customer rating", "familyFriendly"})),
    (_relative, frozenset({"priceRange", "customer rating", "familyFriendly"})),
    (_possession_first, frozenset({"priceRange", "customer rating"})),
    (_customers_first, frozenset({"customer rating"})),
    (_families_first, frozenset({"familyFriendly"})),
    (_prices_first, frozenset({"priceRange"})),
)


def plans_for(slots: Mapping[str, str]) -> list[Plan]:
    """Select the plans that these slots allow; four of them are always possible."""
    return [plan for plan, needed in PLANS if needed & slots.keys()]


def tell(slots: Mapping[str, str], plan: Plan, rng: random.Random) -> str:
    """Describe the restaurant in English: the plan's opening, then the facts that it left.

    Args:
        slots: ``name`` and any others, of `restaurant_phrases.VALUES`; one of ``eatType`` and ``food`` at
            least.
        plan: one of `plans_for(slots)`.
        rng: draws the wording.
    """
    telling = Telling(slots, rng)
    return plan(telling) + telling.rest()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
