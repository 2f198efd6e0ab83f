"""Hold-out: both sides served, no prompt on both, nothing lost but what the cap cuts off."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.data.examples import Example
from hsplit.data.holdout import hold_out
from hsplit.errors import InputError


def grouped(prompts: list[int]) -> list[Example]:
    return [Example(f"p{prompt}", f"r{index}", None) for index, prompt in enumerate(prompts)]


@given(
    prompts=st.lists(st.integers(0, 8), min_size=2, max_size=60),
    share=st.floats(0.001, 0.999),
    cap=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_sides(prompts: list[int], share: float, cap: int, seed: int) -> None:
    examples = grouped(prompts)
    train, validation = hold_out(examples, share, cap, seed)
    assert (train, validation) == hold_out(examples, share, cap, seed)
    assert train and validation and len(validation) <= cap
    both = train + validation
    assert len(set(both)) == len(both) and set(both) <= set(examples)
    assert [example for example in examples if example in validation] == validation
    if len(set(prompts)) > 1:
        assert not {example.prompt for example in train} & {example.prompt for example in validation}
    smallest = min(Counter(prompts).values())
    if smallest <= cap or len(set(prompts)) == 1:
        assert len(both) == len(examples)


def test_the_share_is_met_where_prompts_allow() -> None:
    train, validation = hold_out(grouped(list(range(100))), 0.1, 64, 0)
    assert (len(train), len(validation)) == (90, 10)
    assert len(hold_out(grouped(list(range(100))), 0.9, 64, 0)[1]) == 64


def test_a_cap_below_every_prompt_leaves_the_surplus_out() -> None:
    train, validation = hold_out(grouped([0] * 50 + [1] * 40), 0.1, 5, 0)
    assert {example.prompt for example in validation} == {"p1"} and len(validation) == 5
    assert len(train) == 50


@pytest.mark.parametrize(
    ("count", "share", "cap", "line"),
    [
        (1, 0.1, 5, "data: 1 examples are too few to hold one out, at least 2 are needed"),
        (9, 0.0, 5, "validation share: 0.0 is not allowed; must be above 0 and below 1"),
        (9, 1.0, 5, "validation share: 1.0 is not allowed; must be above 0 and below 1"),
        (9, 0.1, 0, "validation examples: 0 is too few, at least 1 is needed"),
    ],
)
def test_refusals(count: int, share: float, cap: int, line: str) -> None:
    with pytest.raises(InputError) as refused:
        hold_out(grouped([0] * count), share, cap, 0)
    assert str(refused.value) == line
