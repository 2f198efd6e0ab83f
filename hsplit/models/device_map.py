"""A server's layers over several GPUs, one after the other, by accelerate's device map.

Everything else stays on the first GPU: tail, rotary tables, adapters and their optimizer, inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hsplit.errors import InputError


def place_layers(module: nn.Module, layers: nn.ModuleDict) -> dict[int, torch.device]:
    """Spread ``layers`` over all GPUs, and move the other children of ``module`` to the first.

    Returns:
        The device of each layer, by its number in the model.

    Raises:
        InputError: the layers do not fit on the GPUs.
    """
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    beside = [child for child in module.children() if child is not layers]
    memory = [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus]
    found = device_map(layers, memory, sum(module_bytes(child) for child in beside))
    for child in beside:
        child.to(gpus[0])
    for name, layer in layers.items():
        layer.to(gpus[found[name]])
    return {int(name): gpus[index] for name, index in found.items()}


def device_map(layers: nn.ModuleDict, memory_bytes: Sequence[int], first_bytes: int) -> dict[str, int]:
    """Assign layers to GPUs in order: to each GPU its share of all bytes, as far as layers are whole.

    Args:
        layers: by name, in order.
        memory_bytes: of each GPU.
        first_bytes: other bytes on the first GPU.

    Returns:
        The GPU's number by layer.

    Raises:
        InputError: the layers do not fit.
    """
    from accelerate import infer_auto_device_map

    if not layers:
        return {}
    sizes = [module_bytes(layer) for layer in layers.values()]
    # Rounded up, or the last GPU would get the rest; on the first, accelerate keeps room for one more layer.
    most = (sum(sizes) + first_bytes) // len(memory_bytes) + max(sizes)
    even = [min(memory, most - (gpu > 0)) for gpu, memory in enumerate(memory_bytes[:-1])] + [memory_bytes[-1]]
    whole = list({type(layer).__name__ for layer in layers.values()})
    # Even shares first; where a smaller GPU cannot take its own, as much as fits on each.
    for limits in (even, memory_bytes):
        table = dict(enumerate(limits))
        table[0] -= first_bytes
        found = infer_auto_device_map(
            layers, table, no_split_module_classes=whole, clean_result=False, offload_buffers=True
        )
        if "disk" not in found.values():
            return {name: int(found[name]) for name in layers}
    needed, there = sum(sizes) + first_bytes, sum(memory_bytes)
    raise InputError(
        f"server.num_gpus: the server's layers take {needed / 1e9:.1f} GB, more than fits on {len(memory_bytes)} GPUs"
        f" with {there / 1e9:.1f} GB together; reserve more of them, or choose a smaller base"
    )


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
