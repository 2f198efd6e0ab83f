"""Loading segments: the modules that a part of the model needs, filled from its own tensors only."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hsplit.models.adapted_linear import AdaptedLinear
from hsplit.models.checkpoint_reader import CheckpointReader
from hsplit.models.families import Family
from hsplit.models.recorded_family import RecordedFamily
from hsplit.models.recorded_segment import RecordedSegment
from hsplit.models.segment import BaseModel, Segment, SegmentSpec, fill
from hsplit.models.spec import ModelSpec
from hsplit.models.weights import ReadWeight, freeze, is_quantized, read_dense, stored_again


def new_segment(model: ModelSpec, spec: SegmentSpec, dtype: torch.dtype) -> Segment:
    """Make a segment of the class that serves the model, without modules."""
    return RecordedSegment(model, spec, dtype) if isinstance(model.family, RecordedFamily) else Segment(model, spec)


def load_segment(
    model: BaseModel,
    spec: SegmentSpec,
    *,
    quantized: bool = False,
    device: torch.device | str = "cpu",
    kept: Segment | None = None,
    vocabulary: Tensor | None = None,
) -> Segment:
    """Read one segment; of the checkpoint only its own tensors are read.

    Args:
        model: the base.
        spec: the part to read.
        quantized: keep an int8 or NF4 base as bitsandbytes codes, as the server does; else dense.
        device: device to compute on; a server's layers are spread over all GPUs where it is ``cuda``.
        kept: the segment held so far: its modules that ``spec`` has too are taken over, residuals included, and not
            read again, but for weights that become codes.
        vocabulary: ids, increasing, ``(n,)`` int64: in a segment without the tail, only their rows of the token
            embedding are read; ``None``: all are.

    Returns:
        The segment, frozen, in eval mode: the base's own dropout (GPT-2's) stays off in fine-tuning, so that the
        output does not depend on the split point.
    """
    family, reader = model.spec.family, model.spec.open_checkpoint()
    segment = new_segment(model.spec, spec, model.dtype)
    if spec.embedding:
        segment.load_embedding(reader, model, kept, vocabulary)
    for index in range(spec.first, spec.last):
        if kept is not None and str(index) in kept.layers:
            segment.layers[str(index)] = layer = kept.layers[str(index)]
            for linear in layer.modules():
                if isinstance(linear, AdaptedLinear):
                    read = _reading(linear.name, family, reader)
                    linear.weight = stored_again(linear.weight, read, model.base, model.dtype, quantized=quantized)
            continue
        path = family.layer_name(index)
        layer = model.spec.module(path)
        _adapt_linears(layer, path, family, reader, model, quantized)
        fill(layer, path, reader, model)
        segment.layers[str(index)] = layer
    if family.rotary is not None and spec.last > spec.first:
        segment.rotary = model.spec.module(family.rotary)
    if spec.tail:
        segment.load_tail(reader, model, kept)
    segment.place(torch.device(device))
    # Base dropout stays off; AdaptedLinear's own dropout follows segment.train().
    return segment.eval()


def _adapt_linears(
    layer: nn.Module, path: str, family: Family, reader: CheckpointReader, model: BaseModel, quantized: bool
) -> None:
    """Replace every linear of ``layer`` by an :class:`AdaptedLinear` with its ``W_0``."""
    for inner, module in family.linears(layer):
        name = f"{path}.{inner}"
        reader.check(f"{name}.weight", cast(Tensor, module.weight).shape)
        bias = reader.read(f"{name}.bias", model.dtype) if module.bias is not None else None
        read = _reading(name, family, reader)
        weight = freeze(read, model.base, model.dtype, quantized=quantized)

        def pristine(read: ReadWeight = read) -> Tensor:
            # fp64 runs keep their sum in fp64; everything else forms it in fp32.
            return read_dense(read, model.base, torch.promote_types(model.dtype, torch.float32))

        adapted = AdaptedLinear(
            name, weight, bias, None if is_quantized(model.base) else pristine, compute_dtype=model.dtype
        )
        owner, _, attribute = inner.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, adapted)


def _reading(name: str, family: Family, reader: CheckpointReader) -> ReadWeight:
    return partial(reader.read, f"{name}.weight", transposed=family.transposed)
