"""A server's layers over several GPUs: which goes where, and that a step crosses from one to the next and back.

No GPU is used: fake tensors carry shapes and devices alone, refuse to be mixed across devices as real ones do, and may
be moved at will, so that ``meta`` stands for the second GPU and ``cpu`` for the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hsplit.config import Job, Policy
from hsplit.errors import InputError
from hsplit.lora.holder import Holder
from hsplit.lora.importance_probe import _EffectiveWeight
from hsplit.models.device_map import device_map, module_bytes
from hsplit.models.factors import LowRank
from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.spec import ModelSpec

FIRST, SECOND = torch.device("cpu"), torch.device("meta")
PLENTY = 10**9


class Layer(nn.Module):
    """Of 1000 bytes, half of them in a part that must not be torn off."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(500, dtype=torch.uint8))
        self.part = nn.Linear(125, 1, bias=False)


def counts(layers: int, memory: list[int], first_bytes: int = 0) -> list[int]:
    """Layers on each GPU, after a check that they are in order and whole."""
    found = device_map(nn.ModuleDict({str(7 + i): Layer() for i in range(layers)}), memory, first_bytes)
    assert list(found) == [str(7 + i) for i in range(layers)]
    assert list(found.values()) == sorted(found.values())
    return [list(found.values()).count(gpu) for gpu in range(len(memory))]


def test_every_gpu_gets_its_share() -> None:
    assert module_bytes(Layer()) == 1000
    assert counts(30, [PLENTY, PLENTY]) == [15, 15]
    assert counts(9, [PLENTY, PLENTY, PLENTY]) == [3, 3, 3]
    assert max(counts(27, [PLENTY] * 8)) == 4
    # What the first holds besides counts as its own.
    assert counts(30, [PLENTY, PLENTY], 10_000) == [10, 20]
    assert counts(4, [PLENTY, PLENTY], 100_000) == [0, 4]
    assert counts(1, [PLENTY, PLENTY]) == [1, 0]
    assert counts(0, [PLENTY, PLENTY]) == [0, 0]


def test_a_smaller_gpu_gets_what_fits() -> None:
    assert counts(30, [8_000, PLENTY]) == [7, 23]
    assert counts(30, [PLENTY, 8_000]) == [30, 0]
    with pytest.raises(
        InputError, match=r"server\.num_gpus: the server's layers take 0\.0 GB, more than fits on 2 GPUs"
    ):
        counts(30, [8_000, 8_000])


@pytest.fixture
def segment(models: dict[str, Path]) -> Segment:
    base = BaseModel(ModelSpec.read(models["llama"]), "nf4", torch.float32)
    return load_segment(base, SegmentSpec(1, 4, tail=True))


def test_layers_are_spread_and_all_else_is_on_the_first(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: dict[str, Any] = {}
    names = {id(module): name for name, module in segment.named_modules()}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("GPU", (), {"total_memory": PLENTY}))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: moved.update({names[id(module)]: str(device)}))
    segment.place(torch.device("cuda"))
    assert moved["tail"] == moved["rotary"] == "cuda:0"
    assert [moved[f"layers.{index}"] for index in range(1, 4)] == [str(segment.layer_devices[i]) for i in range(1, 4)]
    assert moved["layers.3"] == "cuda:1" and "" not in moved
    # A client's segment, a GPU that was named, and a CPU: moved whole.
    for spec, device in (
        (SegmentSpec(0, 2, embedding=True), "cuda"),
        (SegmentSpec(1, 4), "cuda:1"),
        (SegmentSpec(1, 4), "cpu"),
    ):
        moved.clear()
        segment.spec, segment.layer_devices = spec, {}
        segment.place(torch.device(device))
        assert moved == {"": device} and segment.layer_devices == {}


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    mode = FakeTensorMode()
    mode.allow_meta = True
    with mode:
        yield mode


def put(module: nn.Module, device: torch.device) -> None:
    """Give ``module`` fake values on ``device``."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    store[name] = nn.Parameter(values, requires_grad=False) if is_parameter else values


def fake_packing(lengths: tuple[int, ...]) -> Packing:
    tokens, places = sum(lengths), max(lengths) * len(lengths)
    sizes = (tokens, places, tokens)
    return Packing(lengths, *(torch.zeros(size, dtype=torch.int64) for size in sizes))


def test_a_step_crosses_the_gpus_and_its_gradients_come_back(
    segment: Segment, models: dict[str, Path], fake: FakeTensorMode
) -> None:
    put(segment, FIRST)
    put(segment.layers["3"], SECOND)
    segment.layer_devices = {1: FIRST, 2: FIRST, 3: SECOND}
    shapes = ModelSpec.read(models["llama"]).linears
    ranks = {shape.name: 2 for shape in shapes if shape.layer > 0}
    holder = Holder("server", segment, shapes, ranks, Job(base="nf4"), Policy(), torch.float32)
    for name, linear in segment.linears.items():
        linear.append_residual(0, residual_of(linear))
        assert linear.device == (SECOND if ".3." in name else FIRST)
    seen: dict[int, torch.device] = {}
    for index, layer in segment.layers.items():
        layer.register_forward_hook(lambda *call, index=int(index): seen.update({index: call[2].device}))
    hidden = torch.zeros(8, 32, requires_grad=True)
    output = segment.run(hidden, fake_packing((5, 3)), 1, 4)
    assert seen == {1: FIRST, 2: FIRST, 3: SECOND}
    assert output.device == FIRST and output.shape == (8, 32)
    output.sum().backward()
    assert hidden.grad is not None and hidden.grad.device == FIRST
    adapters = holder.adapters
    for name in adapters.names:
        for factor in (adapters.A(name), adapters.B(name)):
            assert factor.grad is not None and factor.device == factor.grad.device == FIRST
        effective = _EffectiveWeight(name, segment.linears[name], adapters, torch.float32, whole=True)
        assert effective.rows(slice(0, 4)).device == segment.linears[name].device


def residual_of(linear: Any) -> LowRank:
    d_out, d_in = linear.weight.shape
    return LowRank(torch.zeros(d_out, 3, device=linear.device), torch.zeros(3, d_in, device=linear.device))


def test_layers_that_are_not_moved_between_are_refused_by_the_fakes(segment: Segment, fake: FakeTensorMode) -> None:
    put(segment, FIRST)
    put(segment.layers["3"], SECOND)
    with pytest.raises(RuntimeError, match="same device"):
        segment.run(torch.zeros(8, 32), fake_packing((5, 3)), 1, 4)


def test_what_is_beside_a_base_moves_with_it(segment: Segment) -> None:
    linear = segment.linears["model.layers.1.mlp.up_proj"]
    linear.append_residual(0, LowRank(torch.ones(48, 3), torch.ones(3, 32)))
    segment.to(SECOND)
    assert linear._residual is not None and linear._residual.B.device == linear._residual.A.device == SECOND
    linear.set_residual_matrix(torch.ones(48, 32, device=SECOND))
    assert linear._residual_matrix is not None and linear._residual_matrix.device == SECOND


def test_one_device_is_never_moved_from(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, packing = torch.randn(8, 32), Packing.of((5, 3))
    with torch.no_grad():
        expected = segment.run(hidden, packing, 1, 4)
        segment.layer_devices = dict.fromkeys(range(1, 4), FIRST)

        def refuse(*_: Any) -> Tensor:
            raise AssertionError("a packing was moved")

        monkeypatch.setattr(Packing, "to", refuse)
        assert torch.equal(segment.run(hidden, packing, 1, 4), expected)
