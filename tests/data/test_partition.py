"""Partitions: complete, disjoint, deterministic, never starving a client, and skewed as asked."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hsplit.data.examples import Example
from hsplit.data.partition import partition
from hsplit.errors import InputError


def labelled(count: int, labels: int = 5) -> list[Example]:
    return [Example(f"p{index}", "r", f"l{index % labels}") for index in range(count)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, Any]:
    clients = draw(st.integers(1, 12))
    count = draw(st.integers(2 * clients, 2 * clients + 60))
    positive = st.floats(1e-6, 1e6)
    spec = draw(
        st.one_of(
            st.sampled_from(["iid", "label", "length"]),
            st.fixed_dictionaries({"dirichlet": positive}),
            st.fixed_dictionaries({"unequal": st.floats(0, 5)}),
            st.fixed_dictionaries({"shares": st.lists(positive, min_size=clients, max_size=clients)}),
        )
    )
    return count, clients, spec


@given(problem=problems(), labels=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_every_example_has_one_client_and_every_client_two_examples(
    problem: tuple[int, int, Any], labels: int, seed: int
) -> None:
    count, clients, spec = problem
    shares = partition(labelled(count, labels), clients, spec, seed)
    assert len(shares) == clients
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert all(len(share) >= 2 and share == sorted(share) for share in shares)
    assert shares == partition(labelled(count, labels), clients, spec, seed)
    if spec == "iid":
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_seeds_differ() -> None:
    for spec in ("iid", "length", {"dirichlet": 0.5}, {"unequal": 1.0}):
        assert partition(labelled(100), 4, spec, 0) != partition(labelled(100), 4, spec, 1)


def test_shares_are_kept_to_within_one_example() -> None:
    assert [len(share) for share in partition(labelled(100), 3, {"shares": [5, 3, 2]}, 0)] == [50, 30, 20]
    assert [len(share) for share in partition(labelled(101), 2, {"shares": [1, 1]}, 0)] == [51, 50]


def test_sigma_spreads_the_sizes() -> None:
    even = partition(labelled(1000), 10, {"unequal": 0}, 0)
    uneven = partition(labelled(1000), 10, {"unequal": 1.5}, 0)
    assert {len(share) for share in even} == {100}
    assert max(map(len, uneven)) > 3 * min(map(len, uneven))


def dominance(alpha: float) -> float:
    """The mean share of a client's most frequent label."""
    examples = labelled(2000)
    shares = partition(examples, 5, {"dirichlet": alpha}, 0)
    counts = [[sum(examples[index].label == f"l{k}" for index in share) for k in range(5)] for share in shares]
    return sum(max(count) / sum(count) for count in counts) / len(counts)


def test_a_small_alpha_skews_the_labels() -> None:
    assert dominance(1e4) < 0.25 < dominance(0.5) < dominance(0.02)


@pytest.mark.parametrize(("labels", "clients"), [(5, 5), (7, 3), (2, 5), (1, 4)])
def test_a_label_goes_to_one_client_and_only_among_too_few_to_several(labels: int, clients: int) -> None:
    examples = labelled(210, labels)
    shares = partition(examples, clients, "label", 0)
    holders = {k: {c for c, share in enumerate(shares) if any(examples[i].label == f"l{k}" for i in share)}
               for k in range(labels)}  # fmt: skip
    if labels >= clients:
        assert all(len(own) == 1 for own in holders.values())
        assert max(map(len, shares)) - min(map(len, shares)) <= 210 / labels + 1
    else:
        assert sum(map(len, holders.values())) == clients
        sizes = sorted(map(len, holders.values()))
        assert sizes[-1] - sizes[0] <= 1


def test_by_length_the_first_client_has_the_shortest() -> None:
    draw = [Example("p" * (index * 7 % 60), "r" * (index % 13), None) for index in range(60)]
    shares = partition(draw, 4, "length", 0)
    lengths = [[len(draw[i].prompt) + len(draw[i].response) for i in share] for share in shares]
    for shorter, longer in itertools.pairwise(lengths):
        assert max(shorter) <= min(longer)
    assert {len(share) for share in shares} == {15}


@pytest.mark.parametrize("alpha", [1e-300, 1e300])
def test_extreme_alphas_still_share_out(alpha: float) -> None:
    shares = partition(labelled(50), 5, {"dirichlet": alpha}, 0)
    assert sorted(index for share in shares for index in share) == list(range(50))


@pytest.mark.parametrize(
    ("count", "clients", "spec", "line"),
    [
        (5, 3, "iid", "data: more clients than examples to share out: 3 clients need at least 6 examples"),
        (5, 0, "iid", "clients: 0 is too few, at least 1 is needed"),
        (9, 2, "even", "data.partition: 'even' is unknown; give iid, label, length, {dirichlet: ALPHA}"),
        (9, 2, {}, "data.partition: {} is unknown; give iid"),
        (9, 2, {"zipf": 1}, "data.partition: 'zipf' is unknown; give iid"),
        (9, 2, {"dirichlet": 0}, "data.partition.dirichlet: 0 is not allowed; must be a number above 0"),
        (9, 2, {"dirichlet": float("nan")}, "data.partition.dirichlet: nan is not allowed"),
        (9, 2, {"dirichlet": "a"}, "data.partition.dirichlet: 'a' is not allowed"),
        (9, 2, {"unequal": -1}, "data.partition.unequal: -1 is not allowed; must be a number from 0 to 20"),
        (9, 2, {"shares": [1]}, "data.partition.shares: has 1 shares; must be 2, one for each client"),
        (9, 2, {"shares": [1, 0]}, "data.partition.shares: [1, 0] is not allowed; must be a list of"),
        (9, 2, {"shares": "11"}, "data.partition.shares: '11' is not allowed"),
    ],
)  # fmt: skip
def test_refusals(count: int, clients: int, spec: Any, line: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        partition(labelled(count), clients, spec, 0)


@pytest.mark.parametrize("spec", [{"dirichlet": 1}, "label"])
def test_a_partition_by_label_needs_labels(spec: Any) -> None:
    examples = [*labelled(6), Example("p", "r", None)]
    with pytest.raises(InputError, match=r"^data\.label: .* example 7 of 7 has none; set data\.label to"):
        partition(examples, 2, spec, 0)
    assert len(partition(examples, 2, "iid", 0)) == 2
