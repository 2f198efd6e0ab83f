"""The split model as one transformers causal LM: the holders' segments, with the wire between them.

So perplexity is computed as by the run's holders, and generation, greedy or by beams, uses transformers' KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hsplit.actors.messages import WireTensor
from hsplit.lora.learned import LearnedTerm
from hsplit.models.loading import load_segment
from hsplit.models.recorded_segment import RecordedSegment
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.spec import ModelSpec
from hsplit.models.tail import Tail


@dataclass(frozen=True)
class Cut:
    """Position of the split, and the wire there.

    Attributes:
        split: layers ``[0, split)`` are the client's.
        wire: format of the hidden states on the wire.
        labels: ``job.privacy.labels``: with ``client`` the client has the tail, so that hidden states return to it.
    """

    split: int
    wire: str
    labels: str


def split_model(
    base: BaseModel, learned: Mapping[str, LearnedTerm], cut: Cut | None, device: torch.device | str = "cpu"
) -> Any:
    """The run's model in eval mode, which computes as its holders do.

    The client's part stores the base dense, the server's part an int8 or NF4 base as codes with the residual beside it;
    every hidden state at a cut is packed for the wire and unpacked (``int4`` by the same random numbers in each call:
    the same input gives the same output). ``privacy.noise`` is not added.

    Args:
        base: the run's base model.
        learned: update of each weight.
        cut: position of the split; ``None`` for a model that one holder has whole.
        device: to compute on.

    Returns:
        A transformers causal LM whose decoder layers are the segments' own modules, with SDPA attention.
    """
    layers = base.spec.layers
    if cut is None:
        front = deep = load_segment(base, SegmentSpec(0, layers, embedding=True, tail=True), device=device)
    else:
        at_home = cut.labels == "client"
        front = load_segment(base, SegmentSpec(0, cut.split, embedding=True, tail=at_home), device=device)
        spec = SegmentSpec(cut.split, layers, tail=not at_home)
        deep = load_segment(base, spec, quantized=True, device=device)
    for segment in {id(s): s for s in (front, deep)}.values():
        _follow(segment, learned, device)
    model = _assembled(base.spec, front, deep).to(device)
    if cut is not None:
        points = {cut.split} if cut.labels == "server" else {cut.split, layers}
        for point in points:
            _cut(model, front, point, cut.wire)
    return model


def _follow(segment: Segment, learned: Mapping[str, LearnedTerm], device: torch.device | str) -> None:
    for name, linear in segment.linears.items():
        term = learned.get(name, LearnedTerm())
        if term.matrix is not None:
            linear.set_residual_matrix(term.matrix.to(device))
        elif term.residual is not None:
            linear.append_residual(0, term.residual.on(device))
        if term.common is not None:
            common = term.common.on(device)
            linear.set_adapter(common.A, common.B, 1.0)


def _assembled(spec: ModelSpec, front: Segment, deep: Segment) -> Any:
    family = front.family
    model: Any = spec.new_skeleton()
    for path in family.embeddings:
        _replace(model, path, front.embeddings[path.rpartition(".")[2]])
    for segment in (front, deep):
        if isinstance(segment, RecordedSegment):
            segment.outer.give(model)
        for index, layer in segment.layers.items():
            _replace(model, family.layer_name(int(index)), layer)
    if isinstance(front, RecordedSegment):
        return model.eval()
    tail = cast(Tail, deep.tail if deep.tail is not None else front.tail)
    _replace(model, family.norm, tail.norm)
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.weight = nn.Parameter(tail.head, requires_grad=False)
    _replace(model, family.head, head)
    model.eval()
    # Segments compute packed rows; generation needs a KV cache and left padding, as transformers' attention has.
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if isinstance(getattr(module, "config", None), type(model.config)):
            module.config = model.config
    return model


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)


def _cut(model: nn.Module, segment: Segment, layers: int, wire: str) -> None:
    """Send the hidden states after the first ``layers`` layers through the wire."""
    family = segment.family
    if not isinstance(segment, RecordedSegment):
        path = family.layer_name(layers) if layers < segment.model_layers else family.norm
        model.get_submodule(path).register_forward_pre_hook(partial(_given_through_wire, wire=wire))
    elif layers:
        last = model.get_submodule(family.layer_name(layers - 1))
        last.register_forward_hook(partial(_returned_through_wire, wire=wire))
    else:
        first = model.get_submodule(family.layer_name(0))
        first.register_forward_pre_hook(partial(_named_through_wire, wire=wire), with_kwargs=True)


def _through_wire(hidden: Tensor, wire: str) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    return WireTensor.pack(rows, wire).unpack(hidden.dtype, hidden.device).view_as(hidden)


def _given_through_wire(module: nn.Module, inputs: tuple[Any, ...], wire: str) -> tuple[Any, ...]:
    return (_through_wire(inputs[0], wire), *inputs[1:])


def _named_through_wire(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], wire: str) -> Any:
    if inputs:
        return _given_through_wire(module, inputs, wire), named
    return inputs, named | {"hidden_states": _through_wire(named["hidden_states"], wire)}


def _returned_through_wire(module: nn.Module, inputs: tuple[Any, ...], output: Any, wire: str) -> Any:
    if isinstance(output, Tensor):
        return _through_wire(output, wire)
    return type(output)((_through_wire(output[0], wire), *output[1:]))
