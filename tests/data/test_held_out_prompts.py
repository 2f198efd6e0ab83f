"""The test part: whole prompts, of no client, the same for the same seed whatever the order of the data."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hsplit.config import ClientConfig, Job, RunConfig
from hsplit.data import Example, split_off_test
from hsplit.errors import InputError
from hsplit.models.lookup import find_model
from hsplit.run.inputs import read_inputs, read_shared
from tests.finished_run import write_data

EXAMPLES = [Example(f"p{i % 40}", f"r{i}", None) for i in range(100)]


def _prompts(examples: list[Example]) -> set[str]:
    return {example.prompt for example in examples}


def test_whole_prompts_go_to_one_side_and_nothing_is_lost() -> None:
    rest, test = split_off_test(EXAMPLES, 0.25, seed=3)
    assert len(_prompts(test)) == 10 and not _prompts(rest) & _prompts(test)
    assert sorted(rest + test, key=EXAMPLES.index) == EXAMPLES
    assert rest == [e for e in EXAMPLES if e in rest] and test == [e for e in EXAMPLES if e in test]


def test_the_draw_depends_on_the_seed_and_the_prompts_and_not_on_their_order() -> None:
    shuffled = random.Random(1).sample(EXAMPLES, len(EXAMPLES))
    _, test = split_off_test(EXAMPLES, 0.25, seed=3)
    assert _prompts(split_off_test(shuffled, 0.25, seed=3)[1]) == _prompts(test)
    assert _prompts(split_off_test(EXAMPLES, 0.25, seed=4)[1]) != _prompts(test)
    # A larger share tests on the same prompts and more, so that runs can be compared on what they have in common.
    assert _prompts(test) < _prompts(split_off_test(EXAMPLES, 0.5, seed=3)[1])


def test_no_share_leaves_everything_and_a_tiny_one_tests_on_one_prompt() -> None:
    assert split_off_test(EXAMPLES, 0, seed=0) == (EXAMPLES, [])
    assert len(_prompts(split_off_test(EXAMPLES, 1e-6, seed=0)[1])) == 1


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (40, 0.99)])
def test_a_share_that_leaves_nothing_to_train_on_is_refused(count: int, share: float) -> None:
    with pytest.raises(InputError, match=r"data\.test: .* leaves none to train on"):
        split_off_test([e for e in EXAMPLES if int(e.prompt[1:]) < count], share, seed=0)


@pytest.mark.parametrize("partition", ["iid", {"unequal": 1.0}])
def test_no_client_gets_an_example_of_the_test_part(tmp_path: Path, models: dict[str, Path], partition: object) -> None:
    data = write_data(tmp_path / "data.csv")
    job = Job.model_validate({"data": {"source": str(data), "test": 0.3, "partition": partition}})
    clients = tuple(ClientConfig(name=name, kind=name, memory_gb=1.0, tflops=1.0) for name in ("a", "b", "c"))
    run, source = RunConfig(clients=clients, job=job), find_model(str(models["llama"]))
    rest, test, _ = read_shared(run, source)
    shares = read_inputs(run, source).shares
    given = [example for share in shares.values() for example in share or []]
    assert len(_prompts(test)) == 6 and len(test) == 18
    assert not _prompts(given) & _prompts(test)
    assert sorted(given, key=rest.index) == rest
