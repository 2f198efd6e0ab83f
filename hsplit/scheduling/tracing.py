"""Watching a computation: what autograd keeps, most bytes alive at once, and operations (METHOD 4)."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


@contextmanager
def saved_storages(held: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every distinct storage that autograd saves inside, by storage.

    Args:
        held: tensors that are there anyway and do not count: weights, adapters, tables.
    """
    known = _storages(held)
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
            # A freed storage's address may be given to the next one, which would then not count.
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    alive.clear()


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def flop_counter() -> FlopCounterMode:
    """Counts multiplications and additions of all matrix products, attention's included."""
    aten = torch.ops.aten
    # torch's own list lacks the CPU kernel of scaled dot product attention and the product in place.
    missing = {
        aten.addmm_: _addmm_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=missing)


def _addmm_flops(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _sdpa_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, and the most bytes of them that were alive at once."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._held = _storages(held)
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def begin_peak(self) -> None:
        """Forget the peak so far: what is alive now is the new one's beginning."""
        self.peak = self._now

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._held or key in self._alive:
            return

        def freed(_: Any) -> None:
            self._now -= nbytes
            self._alive.pop(key, None)

        self._now += nbytes
        self._alive[key] = weakref.ref(storage, freed)
