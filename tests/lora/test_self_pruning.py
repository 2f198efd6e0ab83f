"""HetLoRA's self-pruning (arXiv 2401.06432, section 4.2) against autograd and the published rule."""

from __future__ import annotations

import pytest
import torch

from hsplit.config import SelfPruning
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.self_pruning import RankPruner
from hsplit.models.spec import LinearShape

SHAPES = [LinearShape("a", 0, 12, 10), LinearShape("b", 1, 6, 14)]
RANKS = {"a": 8, "b": 1}


def adapters(seed: int) -> AdapterSet:
    made = AdapterSet(SHAPES, RANKS, 16.0, torch.float32)
    with torch.no_grad():
        made.flat.copy_(torch.randn(made.flat.shape, generator=torch.Generator().manual_seed(seed)))
    return made


def test_the_penaltys_gradient_is_that_of_the_norms_product() -> None:
    made = adapters(0)
    RankPruner(SelfPruning(decay=0.7, penalty=0.3), made).add_gradient()
    A, B = made.A("a").detach().clone().requires_grad_(), made.B("a").detach().clone().requires_grad_()
    # floor(0.7 * 8) = 5 directions are kept; lambda ||B[:, 5:]|| ||A[5:]|| is added to the loss.
    (0.3 * B[:, 5:].norm() * A[5:].norm()).backward()
    assert A.grad is not None and B.grad is not None
    assert torch.allclose(made.A("a").grad, A.grad, atol=1e-6) and torch.allclose(made.B("a").grad, B.grad, atol=1e-6)
    # Of one direction nothing can be given up.
    assert not made.A("b").grad.any() and not made.B("b").grad.any()


@pytest.mark.parametrize(("factor", "ranks"), [(0.9, {"a": 5, "b": 1}), (1.1, RANKS), (1.0, RANKS)])
def test_ranks_fall_where_the_trailing_directions_have_shrunk(factor: float, ranks: dict[str, int]) -> None:
    made = adapters(1)
    pruner = RankPruner(SelfPruning(decay=0.7), made)
    pruner.begin_round()
    with torch.no_grad():
        made.A("a")[5:].mul_(factor)
        # What happens before them does not count.
        made.A("a")[:5].mul_(0.1)
    pruner.end_round()
    assert pruner.ranks == ranks
    # Asked again before the next round, nothing more is given up.
    pruner.end_round()
    assert pruner.ranks == ranks
    pruner.begin_round()
    assert not made.A("a")[ranks["a"] :].any() and not made.B("a")[:, ranks["a"] :].any()


def test_a_restored_pruner_decides_as_the_one_it_was_saved_from() -> None:
    made = adapters(2)
    pruner = RankPruner(SelfPruning(decay=0.7), made)
    pruner.begin_round()
    restored = RankPruner(SelfPruning(decay=0.7), made)
    restored.load_state(pruner.state())
    with torch.no_grad():
        made.B("a")[:, 5:].mul_(0.5)
    pruner.end_round()
    restored.end_round()
    assert restored.ranks == pruner.ranks == {"a": 5, "b": 1}
