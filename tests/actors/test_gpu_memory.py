"""A holder's memory on a GPU, with a stand-in for CUDA's counters and switches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsplit.actors.factory import holder_class, make_holder
from hsplit.actors.gpu_memory import ALLOWANCE, ALLOWANCE_BYTES, GpuMemory
from hsplit.config import Job, RunConfig
from hsplit.lora.holder import HeldAdapters
from hsplit.models.lookup import ModelReference
from hsplit.planning.plan import HolderPlan
from tests.in_process import fixed_plan

TOTAL, BESIDE = 10_000_000_000, 64_000_000


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What was asked of CUDA."""
    made: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: BESIDE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=TOTAL))
    # The real one takes no device without a number.
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, gpu: made.append((f"limit {int(gpu)}", share))
    )
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append(("empty", None)))
    return made


def test_a_process_may_reserve_what_its_plan_declares(
    calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = GpuMemory(torch.device("cuda"))
    memory.allow(1_000_000_000)
    assert not calls, "several holders in one process share its limit, which would be the last one's"
    memory.limited = True
    memory.allow(1_000_000_000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 900_000_000)
    memory.allow(2_000_000_000)
    memory.allow(0)
    memory.allow(50 * TOTAL)
    memory.give_back()
    expected = [(BESIDE + (1 + ALLOWANCE) * size + ALLOWANCE_BYTES) / TOTAL for size in (1e9, 2e9)]
    assert [name for name, _ in calls] == ["limit 0"] * 4 + ["empty"]
    assert [share for _, share in calls[:4]] == pytest.approx([*expected, 1.0, 1.0])


@pytest.mark.parametrize("device", ["cpu", "several"])
def test_no_limit_is_set_where_nothing_is_shared(
    calls: list[tuple[str, Any]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "several":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = GpuMemory(torch.device("cuda" if device == "several" else "cpu"))
    memory.limited = True
    memory.allow(1_000_000_000)
    memory.give_back()
    assert not calls


class Asked:
    """Stands in for a holder's :class:`GpuMemory`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def allow(self, declared_bytes: int) -> None:
        self.calls.append(f"allow {declared_bytes}")

    def give_back(self) -> None:
        self.calls.append("give back")


def made(name: str, model: Path) -> tuple[Any, Asked]:
    run = RunConfig.model_validate(
        {"clients": [{"name": "a", "kind": "a", "memory_gb": 1, "tflops": 1}], "job": {"dtype": "fp32", "base": "fp32"}}
    )
    holder = make_holder(holder_class(run, name), name, run.job, run.policy, ModelReference(str(model), model))
    assert holder.gpu_memory.limited
    asked = Asked()
    holder.gpu_memory = asked  # type: ignore[assignment]
    return holder, asked


def test_a_holder_in_a_process_of_its_own_keeps_to_each_plan(models: dict[str, Path]) -> None:
    client, asked = made("a", models["llama"])
    client.configure(HolderPlan("a", "client", True, 2, {}, declared_bytes=7))
    client.shrink(HolderPlan("a", "client", True, 1, {}, declared_bytes=5))
    client.release()
    assert asked.calls == ["allow 7", "give back", "give back"]
    server, asked = made("server", models["llama"])
    server.configure(fixed_plan(models["llama"], Job(dtype="fp32", base="fp32"), [1], [2], 2))
    assert asked.calls == ["give back", "allow 0"]


def test_adapters_leave_a_holder_on_the_cpu(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is at hand: the move is watched instead."""
    from hsplit.models.factors import LowRank

    client, _ = made("a", models["llama"])
    names = [shape.name for shape in client._base.spec.targeted(client._job.targets) if shape.layer == 0]
    client.configure(HolderPlan("a", "client", True, 1, dict.fromkeys(names, 2)))
    moved: list[str] = []
    own = LowRank.on
    monkeypatch.setattr(LowRank, "on", lambda term, device: moved.append(str(device)) or own(term, device))
    _, held = client.collect()
    assert isinstance(held, HeldAdapters) and held.terms.keys() == set(names)
    assert moved == ["cpu"] * len(names)
