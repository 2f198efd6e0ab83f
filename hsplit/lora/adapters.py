"""The live LoRA factors of one holder, in one flat buffer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsplit.models.factors import LowRank
from hsplit.models.segment import Segment
from hsplit.models.spec import LinearShape


def initial_A(rank: int, d_in: int, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw PEFT's A-init, ``U(-1/sqrt(d_in), 1/sqrt(d_in))``, as a pure function of ``key``.

    The first rows do not depend on ``rank``, so holders of unequal ranks with the same key share them.

    Returns:
        ``(rank, d_in)``.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(d_in)
    # Drawn row by row in fp32 on the CPU: the same numbers on every device and for every rank.
    rows = [torch.rand(d_in, generator=generator) for _ in range(rank)]
    return (torch.stack(rows) * 2 * bound - bound).to(dtype)


@dataclass(frozen=True)
class _Slot:
    shape: LinearShape
    rank: int
    start: int

    @property
    def size_A(self) -> int:
        return self.rank * self.shape.d_in

    @property
    def stop(self) -> int:
        return self.start + self.size_A + self.rank * self.shape.d_out


class AdapterSet:
    """Factors ``A_w (r_w, d_in)`` and ``B_w (d_out, r_w)`` of every weight that a holder adapts.

    They are views of one flat buffer with one flat gradient: the optimizer steps one tensor, and a checkpoint stores
    one.

    Args:
        shapes: the holder's adaptable weights, in layer order.
        ranks: rank by weight name; weights of rank 0, or without one, are not held.
        alpha: LoRA's alpha; the scale of weight ``w`` is ``alpha / r_w``.
        dtype: master dtype: fp32, or fp64 in fp64 runs.
    """

    def __init__(
        self,
        shapes: Sequence[LinearShape],
        ranks: Mapping[str, int],
        alpha: float,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._slots: dict[str, _Slot] = {}
        self.alpha = alpha
        size = 0
        for shape in shapes:
            rank = ranks.get(shape.name, 0)
            if rank > 0:
                slot = _Slot(shape, rank, size)
                self._slots[shape.name] = slot
                size = slot.stop
        self.flat = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        self._leaves = {name: self._leaf_pair(slot) for name, slot in self._slots.items()}

    def _leaf_pair(self, slot: _Slot) -> tuple[nn.Parameter, nn.Parameter]:
        middle = slot.start + slot.size_A
        assert self.flat.grad is not None
        pair = []
        for start, stop, columns in ((slot.start, middle, slot.shape.d_in), (middle, slot.stop, slot.rank)):
            # Leaves over the flat storage: autograd adds into the flat gradient in place.
            leaf = nn.Parameter(self.flat.data[start:stop].view(-1, columns))
            leaf.grad = self.flat.grad[start:stop].view(-1, columns)
            pair.append(leaf)
        return pair[0], pair[1]

    @property
    def names(self) -> list[str]:
        """The weights held, in layer order."""
        return list(self._slots)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by weight name."""
        return {name: slot.rank for name, slot in self._slots.items()}

    def A(self, name: str) -> nn.Parameter:
        """``A (r, d_in)``, a view of the flat buffer."""
        return self._leaves[name][0]

    def B(self, name: str) -> nn.Parameter:
        """``B (d_out, r)``, a view of the flat buffer."""
        return self._leaves[name][1]

    def scale(self, name: str) -> float:
        """``s = alpha / r``."""
        return self.alpha / self._slots[name].rank

    def layer(self, name: str) -> int:
        """Index of a weight's layer."""
        return self._slots[name].shape.layer

    def attach(self, segment: Segment, dropout: float = 0.0) -> None:
        """Make ``segment`` train with these factors, in place of any that it had before."""
        linears = segment.linears
        for linear in linears.values():
            linear.remove_adapter()
        for name in self._slots:
            linears[name].set_adapter(self.A(name), self.B(name), self.scale(name))
            linears[name].dropout = dropout

    @torch.no_grad()
    def restart(self, keys: Mapping[str, str], common: Mapping[str, LowRank]) -> list[str]:
        """Begin a round.

        Args:
            keys: init key by weight name, see :func:`initial_A`.
            common: by weight name, the factors that every holder restarts with (scale folded in), of at most the
                holder's rank. Further directions start fresh with ``B = 0``.

        Returns:
            The weights whose factors have changed.
        """
        changed = []
        for name, slot in self._slots.items():
            A, B = self.A(name), self.B(name)
            if name in common and self._is_at(name, common[name]):
                continue
            changed.append(name)
            A.copy_(initial_A(slot.rank, slot.shape.d_in, keys[name]))
            B.zero_()
            if name in common:
                shared = common[name]
                A[: shared.rank].copy_(shared.A)
                B[:, : shared.rank].copy_(shared.B.to(B) / self.scale(name))

        return changed

    def _is_at(self, name: str, term: LowRank) -> bool:
        """Compare the live factors with those of ``term``, up to the rounding of its folded scale."""
        A, B = self.A(name), self.B(name)
        if term.rank != len(A) or not torch.equal(term.A.to(A), A):
            return False
        return torch.allclose(term.B.to(B), B * self.scale(name), rtol=4 * torch.finfo(B.dtype).eps, atol=0.0)

    def spans(self, name: str) -> tuple[tuple[int, tuple[int, int]], tuple[int, tuple[int, int]]]:
        """Return where ``A`` and ``B`` begin in the flat buffer, and their shapes."""
        slot = self._slots[name]
        sides = slot.shape
        return (slot.start, (slot.rank, sides.d_in)), (slot.start + slot.size_A, (sides.d_out, slot.rank))

    def gradients(self) -> dict[str, Tensor]:
        """Return views of the flat gradient, one for ``A`` and ``B`` of each weight together, by weight name."""
        assert self.flat.grad is not None
        return {name: self.flat.grad[slot.start : slot.stop] for name, slot in self._slots.items()}

    def scale_grad_by_layer(self, factors: Mapping[int, float]) -> None:
        """Multiply the gradient of every factor of layer ``l`` by ``factors[l]``."""
        assert self.flat.grad is not None
        for slot in self._slots.values():
            self.flat.grad[slot.start : slot.stop].mul_(factors[slot.shape.layer])

    @torch.no_grad()
    def lengthen_steps(self, before: Tensor, factors: Mapping[int, float]) -> None:
        """Multiply the way from ``before``, the factors a step earlier ``(n,)``, by ``factors[l]`` in layer ``l``."""
        for slot in self._slots.values():
            factor, values = factors.get(slot.shape.layer, 1.0), self.flat[slot.start : slot.stop]
            if factor != 1:
                torch.lerp(before[slot.start : slot.stop], values, factor, out=values)

    @torch.no_grad()
    def round_live(self, dtype: torch.dtype) -> None:
        """Round every live term's factors, scale folded in, to what ``dtype`` can hold."""
        for name in self.names:
            A, B, scale = self.A(name), self.B(name), self.scale(name)
            A.copy_(A.to(dtype))
            B.copy_((B * scale).to(dtype).to(B) / scale)

    def live(self, name: str, rank: int | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """Copy the live term ``s B A``, scale folded into ``B``, or its leading ``rank`` directions, in ``dtype``."""
        B, A = self.B(name).detach()[:, :rank] * self.scale(name), self.A(name).detach()[:rank]
        return LowRank(B, A.clone()) if dtype is None else LowRank(B.to(dtype), A.to(dtype))
