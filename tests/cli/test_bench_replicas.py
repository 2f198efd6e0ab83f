"""`hsplit bench replicas`: its table, and learning with several servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import replicas
from tests.in_process import random_examples


def test_the_table_holds_every_setting_against_one_server() -> None:
    speeds = [replicas.Speed(4, 1, 2.0, 2.2, 3.0, 0.0, 9.0), replicas.Speed(4, 2, 1.0, 1.1, 1.5, 0.25, 9.0)]
    columns, cells = replicas.speed_table(speeds)
    assert cells[1] == ["4", "2", "1.00", "1.10", "2.00", "1.5", "0.25"]
    assert all(len(row) == len(columns) for row in cells)
    columns, cells = replicas.learning_table([replicas.Learned(4, 2, "sqrt", 1000, 3.5)])
    assert dict(zip(columns, cells[0], strict=True)) == {
        "clients": "4",
        "servers": "2",
        "lr_scaling": "sqrt",
        "tokens": "1,000",
        "perplexity": "3.500",
    }


def test_a_run_of_several_servers_learns(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{e.prompt}||{e.response.strip()}\n" for e in random_examples(40, seed=3)))
    small = ["job.local_steps=2", "job.rounds=2", "job.lr=0.01", "job.max_length=32", f"job.data.source={words}"]
    monkeypatch.setattr(replicas, "LEARNING", small)
    one, two = (replicas._learned(2, servers, "none", str(models["llama"])) for servers in (1, 2))
    assert one.tokens == two.tokens > 0
    assert one.val_ppl != two.val_ppl
