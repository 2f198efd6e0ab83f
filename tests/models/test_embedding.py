"""Reading rows of an embedding, and looking them up by their ids in the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hsplit.models import checkpoint_reader
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.embedding import OwnRows

ROWS, WIDTH = 50, 6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.sets(st.integers(0, ROWS - 1)),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    chunk=st.sampled_from([1, 3 * WIDTH * 4, 1 << 20]),
)
def test_rows_are_those_of_the_whole_tensor(
    tmp_path_factory: pytest.TempPathFactory, chosen: set[int], stored: torch.dtype, dtype: torch.dtype, chunk: int
) -> None:
    directory = tmp_path_factory.mktemp("model")
    before, after = torch.randn(7), torch.randn(9)
    values = torch.randn(ROWS, WIDTH).to(stored)
    save_file({"a": before, "embed.weight": values, "z": after}, directory / "model.safetensors")
    reader = CheckpointReader(directory, "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_reader, "CHUNK_BYTES", chunk)
        read = reader.read_rows("embed.weight", sorted(chosen), dtype)
    assert read.dtype == dtype
    assert torch.equal(read, reader.read("embed.weight", dtype)[sorted(chosen)])


def test_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.zeros(ROWS, WIDTH), "z": torch.zeros(99)}, tmp_path / "model.safetensors")
    with pytest.raises(IndexError, match=f"row {ROWS} of embed.weight, which has {ROWS}"):
        CheckpointReader(tmp_path, "model").read_rows("embed.weight", [0, ROWS], torch.float32)


@given(st.sets(st.integers(0, ROWS - 1), min_size=1), st.data())
def test_own_rows_embed_as_the_whole_and_refuse_every_other_id(chosen: set[int], data: st.DataObject) -> None:
    whole, ids = torch.randn(ROWS, WIDTH), torch.tensor(sorted(chosen))
    own = OwnRows(ids, whole[ids])
    tokens = torch.tensor(data.draw(st.lists(st.sampled_from(sorted(chosen)), max_size=12)), dtype=torch.int64)
    assert torch.equal(own(tokens), whole[tokens])
    for other in set(range(-1, ROWS + 1)) - chosen:
        with pytest.raises(IndexError):
            own(torch.tensor([ids[0], other]))


def test_without_a_row_nothing_is_embedded() -> None:
    own = OwnRows(torch.empty(0, dtype=torch.int64), torch.empty(0, WIDTH))
    assert own(torch.empty(0, dtype=torch.int64)).shape == (0, WIDTH)
    with pytest.raises(IndexError):
        own(torch.tensor([3]))
