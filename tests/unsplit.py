"""A model's segments against the unsplit model as transformers loads it, with no more than a layer in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsplit.models.loading import load_segment
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, SegmentSpec
from hsplit.models.spec import ModelSpec


def unsplit(directory: Path, text: Sequence[int], dtype: torch.dtype, scratch: Path) -> list[Tensor]:
    """Hidden states ``(T, d)`` before the first layer and after each one, and the losses ``(T - 1,)`` of one text.

    transformers' own ``from_pretrained``, its decoder layers left on the disk and read as they are called.
    """
    from transformers import AutoModelForCausalLM

    spec = ModelSpec.read(directory)
    family = spec.family
    bare, _, layers = family.layers.partition(".")
    skeleton = AutoModelForCausalLM.from_config(spec.config).get_submodule(bare)
    places = {f"{bare}.{name}": "disk" if name == layers else "cpu" for name, _ in skeleton.named_children()}
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={**places, family.head: "cpu"}, offload_folder=scratch
    ).eval()
    states: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if not states:
            states.append(inputs[0][0])
        states.append((output[0] if isinstance(output, tuple) else output)[0])

    for layer in model.get_submodule(family.layers):
        layer.register_forward_hook(keep)
    ids = torch.tensor([text])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    return [*states, torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="none")]


def joined(directory: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """The same by the segments, one layer at a time, for all texts in one packed batch: ``(n, ...)`` each.

    The losses are there twice: of a tail on a holder without the embedding (the server), and on one that has it too.
    """
    base, packing = BaseModel(ModelSpec.read(directory), "fp32", dtype), Packing.of([len(text) for text in texts])
    layers = base.spec.layers
    ids = torch.tensor([token for text in texts for token in text])
    with torch.no_grad():
        states = [load_segment(base, SegmentSpec(0, 0, embedding=True)).embed(ids, packing)]
        for layer in range(layers):
            segment = load_segment(base, SegmentSpec(layer, layer + 1))
            states.append(segment.run(states[-1], packing, layer, layer + 1))
        losses = []
        for at_home in (False, True):
            tail = load_segment(base, SegmentSpec(layers, layers, embedding=at_home, tail=True)).tail
            assert tail is not None
            losses.append(tail.token_losses(states[-1], torch.roll(ids, -1)))
        return [*states, *losses]


def differences(directory: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype, scratch: Path) -> dict[str, float]:
    """Largest relative error of the segments by place: ``embedding``, ``layer 0``, ..., ``loss``, ``loss at home``.

    Args:
        directory: of the model.
        texts: token ids; the segments compute them in one batch, transformers each alone.
        dtype: of both.
        scratch: an empty folder.
    """
    own = [state.split([len(text) for text in texts]) for state in joined(directory, texts, dtype)]
    errors: dict[str, float] = {}
    for index, text in enumerate(texts):
        reference = unsplit(directory, text, dtype, scratch)
        names = ["embedding", *(f"layer {layer}" for layer in range(len(reference) - 2)), "loss", "loss at home"]
        for name, state, parts in zip(names, [*reference, reference[-1]], own, strict=True):
            # Nothing follows the last token.
            part = parts[index][: len(state)].to(state.dtype)
            error = float((part - state).norm() / state.norm())
            errors[name] = max(errors.get(name, 0.0), error if error == error else float("inf"))
    return errors
