"""Learned tensors by their names in a checkpoint."""

from __future__ import annotations

import pytest
import torch

from hsplit.lora.learned import (
    OPTIMIZER,
    WEIGHT,
    LearnedTerm,
    held_parts,
    held_tensors,
    learned,
    learned_parts,
    of_kind,
    trained_weights,
    with_kind,
)
from hsplit.models.factors import LowRank


def factors(rank: int) -> LowRank:
    return LowRank(torch.randn(3, rank, dtype=torch.float64), torch.randn(rank, 4, dtype=torch.float64))


def test_every_part_is_read_as_it_was_written() -> None:
    terms = {
        "layers.0.q": LearnedTerm(residual=factors(2)),
        "layers.0.k": LearnedTerm(matrix=torch.randn(3, 4, dtype=torch.float64), common=factors(1)),
        "layers.1.q": LearnedTerm(residual=factors(2), common=factors(1)),
    }
    tensors = {key: tensor for name, term in terms.items() for key, tensor in term.tensors(name).items()}
    assert tensors.keys() == {
        "residual.layers.0.q.B",
        "residual.layers.0.q.A",
        "residual.layers.0.k.matrix",
        "common.layers.0.k.B",
        "common.layers.0.k.A",
        "residual.layers.1.q.B",
        "residual.layers.1.q.A",
        "common.layers.1.q.B",
        "common.layers.1.q.A",
    }
    others = {"parameters": torch.zeros(1), "optimizer.step": torch.zeros(1)}
    assert learned_parts(others | tensors) == terms
    for name, whole in learned(tensors).items():
        term = terms[name]
        parts = [part.dense() for part in (term.residual, term.common) if part is not None]
        parts += [] if term.matrix is None else [term.matrix]
        assert torch.allclose(whole.dense(), sum(parts[1:], parts[0]))


def test_what_holders_have_while_a_change_waits_is_read_as_it_was_written() -> None:
    some, matrix, none = factors(2), torch.randn(3, 4, dtype=torch.float64), factors(0)
    tensors = held_tensors("layers.0.q", some, None, 0.25) | held_tensors("layers.0.k", none, matrix, 0.5)
    tensors |= held_tensors("layers.1.q", none, None, 1e-9)
    parts = held_parts(LearnedTerm(common=factors(1)).tensors("layers.0.q") | tensors)
    assert parts == {
        "layers.0.q": (some, None, 0.25),
        "layers.0.k": (None, matrix, 0.5),
        "layers.1.q": (None, None, 1e-9),
    }
    assert learned_parts(tensors) == {}


def test_a_weight_without_both_factors_is_refused() -> None:
    tensors = LearnedTerm(common=factors(1)).tensors("layers.0.q")
    del tensors["common.layers.0.q.A"]
    with pytest.raises(KeyError):
        learned_parts(tensors)
    assert learned_parts({}) == {} and LearnedTerm().tensors("layers.0.q") == {}


def test_a_kind_is_read_apart_from_the_others() -> None:
    weights, moments = {"norm.weight": torch.ones(2)}, {"step": torch.ones(1)}
    tensors = with_kind(WEIGHT, weights) | with_kind(OPTIMIZER, moments) | {"weights": torch.zeros(1)}
    assert of_kind(WEIGHT, tensors) == weights and of_kind(OPTIMIZER, tensors) == moments
    assert trained_weights({"central": tensors, "server": {}}) == weights
