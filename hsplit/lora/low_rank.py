"""Low-rank matrices kept as their two factors, and the little algebra that aggregation needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes

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
        return LowRank(self.B.to(dtype), self.A.to(dtype))


def concatenate(terms: Sequence[LowRank]) -> LowRank:
    """The exact sum of ``terms`` as one pair of factors, concatenated along the rank (METHOD 6)."""
    return LowRank(torch.cat([t.B for t in terms], dim=1), torch.cat([t.A for t in terms], dim=0))


def empty(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> LowRank:
    """The zero matrix: rank 0."""
    return LowRank(torch.zeros(d_out, 0, dtype=dtype), torch.zeros(0, d_in, dtype=dtype))


@dataclass(frozen=True)
class SpectralFactors:
    """Singular value decomposition ``U diag(S) V`` of a low-rank matrix, in fp64.

    Attributes:
        U: ``(d_out, r)``; S: ``(r,)`` descending; V: ``(r, d_in)``.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def part(self, start: int, stop: int, dtype: torch.dtype) -> LowRank:
        """Singular directions ``[start, stop)`` as balanced factors ``(U sqrt(S), sqrt(S) V)``."""
        root = self.S[start:stop].sqrt()
        return LowRank((self.U[:, start:stop] * root).to(dtype), (root[:, None] * self.V[start:stop]).to(dtype))

    def norm_beyond(self, rank: int) -> float:
        """Frobenius norm of what a cut at ``rank`` drops."""
        return float(self.S[rank:].norm())


def spectral(matrix: LowRank) -> SpectralFactors:
    """SVD of ``B A`` by QR of ``B`` and of ``A^T`` and an SVD of the small core, all in fp64 (METHOD 6).

    Cost: ``O((d_out + d_in) r^2 + r^3)``; nothing of shape ``(d_out, d_in)`` is formed.
    """
    Q_b, R_b = torch.linalg.qr(matrix.B.double())
    Q_a, R_a = torch.linalg.qr(matrix.A.double().T)
    U, S, V = torch.linalg.svd(R_b @ R_a.T)
    rank = S.shape[0]
    return SpectralFactors(Q_b @ U[:, :rank], S, V[:rank] @ Q_a.T)
