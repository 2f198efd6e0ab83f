"""The factors of a low-rank matrix, in adapted linears and in messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The matrix ``B A`` of shape ``(d_out, d_in)``, never formed.

    Attributes:
        B: ``(d_out, r)``, scale folded in.
        A: ``(r, d_in)``, same dtype and device as ``B``.
    """

    B: Tensor
    A: Tensor

    def __getstate__(self) -> tuple[Any, Any]:
        # Adapters travel as many small factors, and a tensor takes fifty times as long to pickle as an array does.
        if self.B.device.type != "cpu" or self.B.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            return self.B, self.A
        if self.B.dtype == torch.bfloat16:
            # NumPy has no such type: its bits.
            return self.B.detach().view(torch.int16).numpy(), self.A.detach().view(torch.int16).numpy()
        return self.B.detach().numpy(), self.A.detach().numpy()

    def __setstate__(self, state: tuple[Any, Any]) -> None:
        # Copied: an array that has travelled may be read-only.
        for name, factor in zip(("B", "A"), state, strict=True):
            tensor = factor if isinstance(factor, Tensor) else torch.tensor(factor)
            object.__setattr__(self, name, tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor)

    @property
    def rank(self) -> int:
        """Directions: rows of ``A`` and columns of ``B``."""
        return self.A.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def on(self, device: torch.device | str) -> LowRank:
        """The same factors on ``device``; these themselves where they are there."""
        return LowRank(self.B.to(device), self.A.to(device))

    def dense(self) -> Tensor:
        """``B A`` as a matrix, for tests and for forming a working weight."""
        return self.B @ self.A

    def from_rank(self, start: int) -> LowRank:
        """The factors from row ``start`` on, as tensors of their own."""
        return LowRank(self.B[:, start:].clone(), self.A[start:].clone())

    def up_to_rank(self, stop: int) -> LowRank:
        """The factors before row ``stop``, as tensors of their own."""
        return LowRank(self.B[:, :stop].clone(), self.A[:stop].clone())

    def to(self, dtype: torch.dtype) -> LowRank:
        """Both factors in ``dtype``."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))
