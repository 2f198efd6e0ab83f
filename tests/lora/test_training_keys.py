"""Schedule, clipping, dropout and A-init: what the keys of ``job`` and ``policy`` do to a holder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit.config import Policy
from hsplit.lora.adapters import AdapterSet, initial_A
from hsplit.lora.optimizer import learning_rate
from hsplit.models.spec import LinearShape
from tests.in_process import Recorder, coordinator, fixed_plan, random_examples

SHAPES = [LinearShape("a", 0, 6, 4), LinearShape("b", 1, 3, 5)]


def test_schedules() -> None:
    def curve(schedule: str, warmup: int = 0) -> list[float]:
        return [learning_rate(step, 10, 1.0, schedule, warmup) for step in range(10)]

    assert curve("constant") == [1.0] * 10
    assert curve("constant", warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert curve("linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = curve("cosine", warmup=2)
    assert cosine[2] == 1.0 and cosine[6] == pytest.approx(0.5)
    assert cosine[2:] == sorted(cosine[2:], reverse=True)


def test_initial_A_is_pefts_and_its_rows_do_not_depend_on_the_rank() -> None:
    A = initial_A(64, 100, "key")
    assert torch.equal(A[:3], initial_A(3, 100, "key"))
    assert not torch.equal(A[:3], initial_A(3, 100, "other key"))
    assert A.abs().max() <= 0.1 and A.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_adapters_share_one_buffer_and_one_gradient() -> None:
    adapters = AdapterSet(SHAPES, {"a": 2, "b": 1}, alpha=8.0, dtype=torch.float32)
    assert adapters.flat.numel() == 2 * (6 + 4) + 1 * (3 + 5)
    (adapters.A("a").sum() + 3 * adapters.B("b").sum()).backward()
    assert adapters.flat.grad is not None and adapters.flat.grad.sum() == 2 * 4 + 3 * 3
    adapters.scale_grad_by_layer({0: 0.5, 1: 2.0})
    assert adapters.flat.grad.sum() == 0.5 * 8 + 2.0 * 9
    adapters.restart({"a": "k", "b": "k"}, {})
    assert torch.equal(adapters.A("a"), initial_A(2, 4, "k")) and not adapters.B("a").any()
    assert adapters.scale("a") == 4.0 and adapters.ranks == {"a": 2, "b": 1}


def _final_loss(models: dict[str, Path], to: Path, **job: Any) -> list[float]:
    from hsplit.config import Job

    settings = {"base": "fp32", "local_steps": 4, "rounds": 2, "lr": 0.02, **job}
    plan = fixed_plan(models["llama"], Job.model_validate(settings), [1, 3], [2, 4], 4)
    shares = {f"c{i}": random_examples(20, i) for i in range(2)}
    recorder = Recorder()
    coordinator(models["llama"], to, plan, shares, recorder, Policy(), **settings).run()
    return [row.val_loss for row in recorder.rows]


def test_every_key_changes_training_and_all_but_noise_repeat_exactly(models: dict[str, Path], tmp_path: Path) -> None:
    plain = _final_loss(models, tmp_path / "plain")
    changes: dict[str, dict[str, Any]] = {
        "dropout": {"dropout": 0.3},
        "clip": {"clip": 1e-3, "optimizer": "sgd"},
        "unclipped": {"optimizer": "sgd"},
        "decay": {"weight_decay": 0.5},
        "cosine": {"schedule": "cosine"},
        "warmup": {"warmup": 6},
        "accumulation": {"grad_accumulation": 2},
        "alpha": {"alpha": 4.0},
        "targets": {"targets": ["q_proj", "v_proj"]},
        "noise": {"privacy": {"noise": 0.5}},
        "seed": {"seed": 1},
    }
    seen = {"plain": plain[-1]}
    for name, change in changes.items():
        seen[name] = _final_loss(models, tmp_path / name, **change)[-1]
        again = _final_loss(models, tmp_path / f"{name}-again", **change)[-1]
        # Noise is drawn from a secret of each client's, or the server could subtract it.
        assert (seen[name] == again) == (name != "noise"), name
    assert len(set(seen.values())) == len(seen), seen
