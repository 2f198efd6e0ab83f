"""Tokens, targets and sampling, against plain-Python references."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hsplit.data.batches import ExampleSampler, collate, validation_batches
from hsplit.data.examples import Example, TokenizedExample
from hsplit.data.tokens import padding_id, tokenize

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

EXAMPLES = [Example("a b", " c", None), Example("d", " e f g h", None)]


def test_prompt_response_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenized, too_long = tokenize(EXAMPLES, tokenizer, 10)
    assert tokenized == [TokenizedExample((4, 5, 6, 1), 2), TokenizedExample((7, 8, 9, 10, 11, 1), 1)]
    assert too_long == 0


def test_too_long_is_left_out_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenize(EXAMPLES, tokenizer, 6)[1] == 0
    assert tokenize(EXAMPLES, tokenizer, 5) == ([TokenizedExample((4, 5, 6, 1), 2)], 1)
    assert tokenize(EXAMPLES, tokenizer, 1) == ([], 2)
    assert tokenize([], tokenizer, 1) == ([], 0)


def test_bos_only_where_the_tokenizer_adds_one(make_tokenizer: MakeTokenizer) -> None:
    llama = make_tokenizer(eos_token="<eos>", leading_bos=True)
    assert tokenize(EXAMPLES[:1], llama, 10)[0] == [TokenizedExample((2, 4, 5, 6, 1), 3)]
    gpt2 = make_tokenizer(eos_token="<eos>", bos_token="<bos>")
    assert tokenize(EXAMPLES[:1], gpt2, 10)[0] == [TokenizedExample((4, 5, 6, 1), 2)]
    bare = make_tokenizer()
    assert tokenize(EXAMPLES[:1], bare, 10)[0] == [TokenizedExample((4, 5, 6), 2)]


def test_special_tokens_of_a_template_are_not_doubled(make_tokenizer: MakeTokenizer) -> None:
    llama = make_tokenizer(eos_token="<eos>", leading_bos=True)
    templated = Example("<bos> a", "b <eos>", None)
    assert tokenize([templated], llama, 10)[0] == [TokenizedExample((2, 4, 5, 1), 2)]


def test_padding_id(tokenizer: PreTrainedTokenizerFast, make_tokenizer: MakeTokenizer) -> None:
    assert tokenizer.pad_token_id is None
    assert padding_id(tokenizer) == 1
    assert padding_id(make_tokenizer(pad_token="<pad>", eos_token="<eos>")) == 3
    assert padding_id(make_tokenizer()) == 0


def token_lists(longest: int = 9) -> st.SearchStrategy[list[TokenizedExample]]:
    ids = st.lists(st.integers(0, 50), min_size=1, max_size=longest)
    example = ids.flatmap(lambda ids: st.builds(TokenizedExample, st.just(tuple(ids)), st.integers(0, len(ids))))
    return st.lists(example, min_size=1, max_size=6)


@given(examples=token_lists(), padding=st.integers(0, 50))
def test_targets_are_the_next_response_ids(examples: list[TokenizedExample], padding: int) -> None:
    batch = collate(examples, padding)
    width = max(len(example.ids) for example in examples)
    for row, example in enumerate(examples):
        for t in range(width):
            real = t < len(example.ids)
            assert batch.ids[row, t] == (example.ids[t] if real else padding)
            supervised = example.prompt_length <= t + 1 < len(example.ids)
            assert batch.targets[row, t] == (example.ids[t + 1] if supervised else -100)
    assert batch.ids.shape == batch.targets.shape == (len(examples), width)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert batch.lengths == tuple(len(example.ids) for example in examples)
    assert batch.supervised == sum(len(e.ids) - max(e.prompt_length, 1) for e in examples)


@given(examples=token_lists(), batch_size=st.integers(1, 8))
def test_validation_batches_hold_every_example_once(examples: list[TokenizedExample], batch_size: int) -> None:
    batches = validation_batches(examples, batch_size)
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == sorted(len(example.ids) for example in examples)
    assert [len(batch.lengths) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(batch.supervised for batch in batches) == collate(examples).supervised
    for one, again in zip(batches, validation_batches(examples, batch_size), strict=True):
        assert torch.equal(one.ids, again.ids) and torch.equal(one.targets, again.targets)


@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=5),
)
def test_a_step_s_batch_needs_no_history(count: int, batch_size: int, seed: int, steps: list[int]) -> None:
    used = ExampleSampler(count, seed, "phone-0")
    for step in steps:
        first = step * batch_size
        fresh = ExampleSampler(count, seed, "phone-0")
        assert used.indices(first, batch_size) == fresh.indices(first, batch_size)
        assert len(used.indices(first, batch_size)) == batch_size


@given(count=st.integers(1, 30), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_whatever_the_sizes(count: int, sizes: list[int], seed: int) -> None:
    sampler = ExampleSampler(count, seed, "phone-0")
    drawn: list[int] = []
    for size in sizes:
        drawn += sampler.indices(len(drawn), size)
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_clients_seeds_and_epochs_draw_differently() -> None:
    first = ExampleSampler(100, 0, "phone-0")
    assert first.indices(0, 100) != first.indices(100, 100)
    assert first.indices(0, 100) != ExampleSampler(100, 0, "phone-1").indices(0, 100)
    assert first.indices(0, 100) != ExampleSampler(100, 1, "phone-0").indices(0, 100)


def test_senseless_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        ExampleSampler(0, 0, "phone-0")
    for first, count in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="first must be at least 0 and count at least 1"):
            ExampleSampler(1, 0, "phone-0").indices(first, count)
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        validation_batches([], 0)


def test_importing_the_package_loads_no_framework() -> None:
    modules = "batches, chat, examples, forms, holdout, partition, restaurants, sources"
    heavy = "{'torch', 'transformers', 'numpy', 'pandas'}"
    code = f"import sys; from hsplit.data import {modules}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
