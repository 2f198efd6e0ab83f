"""Some rows of a stored weight are those of the whole."""

from __future__ import annotations

import pytest
import torch

from hsplit.models.weights import DenseWeight, Int8Weight, NF4Weight


@pytest.mark.parametrize("kind", [DenseWeight, Int8Weight, NF4Weight])
@pytest.mark.parametrize("d_in", [128, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_whole_weight(kind: type, d_in: int, dtype: torch.dtype) -> None:
    weight = kind(torch.randn(48, d_in, generator=torch.Generator().manual_seed(0)))
    for chosen in (slice(None), slice(3, 48, 16), slice(5, 9), slice(47, 48)):
        assert torch.equal(weight.rows(chosen, dtype), weight.dense(dtype)[chosen])
