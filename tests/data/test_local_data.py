"""A client's own part of the data: what is too little of it, and what nothing can be learned from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.config import Job
from hsplit.data import Example
from hsplit.data.examples import TokenizedExample
from hsplit.data.local_data import LocalData, check_shares, has_example
from hsplit.errors import InputError
from tests.tiny import tiny_tokenizer, wordless_tokenizer

TINY, WORDLESS = tiny_tokenizer(), wordless_tokenizer()


def job(**changes: Any) -> Job:
    return Job.model_validate({"max_length": 8, "data": {"source": "d.csv"}, **changes})


def examples(*lengths: int, word: str = "w5") -> list[Example]:
    return [Example(f"w{n % 90 + 2}", f" {word}" * length, None) for n, length in enumerate(lengths)]


@pytest.mark.parametrize(("count", "has"), [(0, "no example"), (1, "1 example")])
def test_too_few_examples_name_the_client_and_its_file(count: int, has: str) -> None:
    needed = f"has {has}; at least 2 are needed, one to train on and one to validate on"
    with pytest.raises(InputError) as refused:
        LocalData("clinic", examples(*[1] * count), TINY, job(), "data /srv/notes.csv")
    assert str(refused.value) == f"client clinic: data /srv/notes.csv: {needed}"
    with pytest.raises(InputError) as refused:
        check_shares({"clinic": examples(*[1] * count)}, TINY, job())
    assert str(refused.value) == f"client clinic: job.data.source d.csv: {needed}"


def test_examples_that_are_all_too_long_name_the_length_that_may_be_raised() -> None:
    said = (
        r"^client a: job\.data\.source d\.csv: none of its 9 training examples fits job\.max_length = 8 tokens; raise"
    )
    with pytest.raises(InputError, match=said):
        LocalData("a", examples(*[20] * 10), TINY, job())
    LocalData("a", examples(*[20] * 10), TINY, job(max_length=32))


@settings(max_examples=60, deadline=None)
@given(
    shares=st.lists(st.lists(st.integers(1, 12), max_size=30), min_size=1, max_size=4),
    silent=st.booleans(),
    long=st.sampled_from(["skip", "cut"]),
)
def test_what_the_driver_refuses_is_what_a_client_would(shares: list[list[int]], silent: bool, long: str) -> None:
    own_job = job(data={"source": "d.csv", "long": long})
    tokenizer = WORDLESS if silent else TINY
    given_ = {f"c{i}": examples(*lengths, word="zz" if silent else "w5") for i, lengths in enumerate(shares)}

    def refusals() -> list[str]:
        found = []
        for client, own in given_.items():
            try:
                LocalData(client, own, tokenizer, own_job)
            except InputError as error:
                found.append(str(error))
        return found

    clients = refusals()
    try:
        supervised = check_shares(given_, tokenizer, own_job)
    except InputError as error:
        assert clients and str(error) == clients[0]
    else:
        assert not clients and supervised is not silent


@given(st.integers(0, 12), st.integers(0, 12))
def test_supervised_are_the_tokens_that_a_batch_has_a_target_for(prompt: int, response: int) -> None:
    from hsplit.data import collate

    one = TokenizedExample(tuple(range(prompt + response)), prompt)
    if one.ids:
        assert collate([one]).supervised == one.supervised
    else:
        assert one.supervised == 0


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_one_example_that_is_wanted_is_found_wherever_it_stands(before: int, after: int) -> None:
    every = examples(*[9] * before, 1, *[9] * after)
    assert has_example(every, TINY, 8)
    assert not has_example(examples(*[9] * before), TINY, 8)
