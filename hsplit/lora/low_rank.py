"""Low-rank matrices kept as their two factors, and their algebra for aggregation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.models.factors import LowRank

_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class LowRankSum:
    """The sum ``sum_i w_i B_i A_i`` by reference: no factor is copied or scaled before it is needed.

    Attributes:
        terms: at least one, all of one shape ``(d_out, d_in)``.
        weights: ``w_i``, one for each term.
        bound: upper bound of the sum's rank, where one below the sum of the terms' ranks is known.
    """

    terms: tuple[LowRank, ...]
    weights: tuple[float, ...]
    bound: int | None = None

    @property
    def width(self) -> int:
        """Sum of the terms' ranks: the rank of the concatenation."""
        return sum(term.rank for term in self.terms)

    @property
    def rank(self) -> int:
        """Upper bound of the sum's rank."""
        return self.width if self.bound is None else min(self.width, self.bound)

    def plus(self, term: LowRank, weight: float = 1.0, bound: int | None = None) -> LowRankSum:
        """Return the sum with one more term; ``bound`` is the new sum's."""
        return LowRankSum((*self.terms, term), (*self.weights, weight), bound)

    def concatenated(self, dtype: torch.dtype) -> LowRank:
        """Concatenate to one pair of factors of rank :attr:`width`, weights folded into ``B`` (METHOD 6)."""
        B = torch.cat([(t.B.to(dtype) * w).to(dtype) for t, w in self._weighted], dim=1)
        return LowRank(B, torch.cat([t.A.to(dtype) for t in self.terms], dim=0))

    def compressed(self, dtype: torch.dtype) -> LowRank:
        """Return one pair of factors of rank :attr:`rank`, exact to the rounding of ``dtype``."""
        if self.rank == self.width:
            return self.concatenated(dtype)
        return spectral(self).part(0, self.rank, dtype)

    def dense_rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)`` of the sum as a matrix in fp64, ``(stop - start, d_in)``."""
        first = self.terms[0].A
        rows = torch.zeros(stop - start, first.shape[1], dtype=torch.float64, device=first.device)
        for term, weight in self._weighted:
            rows.addmm_(term.B[start:stop].double(), term.A.double(), alpha=weight)
        return rows

    def times(self, right: Tensor) -> Tensor:
        """Compute ``[w_1 B_1, w_2 B_2, ...] right`` in fp64 for ``right`` ``(width, k)``: ``(d_out, k)``."""
        product = right.new_zeros(self.terms[0].B.shape[0], right.shape[1])
        for (term, weight), rows in zip(self._weighted, right.split([t.rank for t in self.terms]), strict=True):
            product.addmm_(term.B.double(), rows, alpha=weight)
        return product

    def times_from_left(self, left: Tensor) -> Tensor:
        """Compute ``left [A_1; A_2; ...]`` in fp64 for ``left`` ``(k, width)``: ``(k, d_in)``."""
        product = left.new_zeros(left.shape[0], self.terms[0].A.shape[1])
        for term, columns in zip(self.terms, left.split([t.rank for t in self.terms], dim=1), strict=True):
            product.addmm_(columns, term.A.double())
        return product

    @property
    def _weighted(self) -> list[tuple[LowRank, float]]:
        return list(zip(self.terms, self.weights, strict=True))


def norm(matrix: LowRank | LowRankSum) -> float:
    """Compute the Frobenius norm of ``B A``, or of a sum of such, as ``trace((B^T B)(A A^T))`` in fp64."""
    factors = matrix.concatenated(torch.float64) if isinstance(matrix, LowRankSum) else matrix.to(torch.float64)
    return float(((factors.B.T @ factors.B) * (factors.A @ factors.A.T)).sum().clamp_min(0.0).sqrt())


def concatenate(terms: Sequence[LowRank]) -> LowRank:
    """Return the exact sum of ``terms`` as one pair of factors, concatenated along the rank (METHOD 6)."""
    return LowRank(torch.cat([t.B for t in terms], dim=1), torch.cat([t.A for t in terms], dim=0))


def empty(d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> LowRank:
    """Return the zero matrix, of rank 0."""
    return LowRank(torch.zeros(d_out, 0, dtype=dtype), torch.zeros(0, d_in, dtype=dtype))


class SpectralFactors(ABC):
    """Singular value decomposition ``U diag(S) V`` of a low-rank matrix, in fp64.

    Directions are formed on demand.

    Attributes:
        S: ``(r,)`` descending.
        noise: singular values up to this one are rounding errors; their directions are zeros.
    """

    S: Tensor
    noise: float

    @abstractmethod
    def _left(self, start: int, stop: int) -> Tensor:
        """``U diag(S)`` of directions ``[start, stop)``: ``(d_out, stop - start)``."""

    @abstractmethod
    def _right(self, start: int, stop: int) -> Tensor:
        """``diag(S) V`` of directions ``[start, stop)``: ``(stop - start, d_in)``."""

    @property
    def rank(self) -> int:
        """Directions that are more than rounding errors."""
        return int((self.noise < self.S).sum())

    @property
    def U(self) -> Tensor:
        """All left singular vectors, ``(d_out, r)``."""
        return self._left(0, len(self.S)).mul_(self._inverse(self.S))

    @property
    def V(self) -> Tensor:
        """All right singular vectors, ``(r, d_in)``."""
        return self._right(0, len(self.S)).mul_(self._inverse(self.S)[:, None])

    def part(self, start: int, stop: int, dtype: torch.dtype) -> LowRank:
        """Return singular directions ``[start, stop)`` as balanced factors ``(U sqrt(S), sqrt(S) V)``."""
        inverse_root = self._inverse(self.S).sqrt()[start:stop]
        B = self._left(start, stop).mul_(inverse_root).to(dtype)
        return LowRank(B, self._right(start, stop).mul_(inverse_root[:, None]).to(dtype))

    def norm_beyond(self, rank: int) -> float:
        """Compute the Frobenius norm of what a cut at ``rank`` drops, without rounding errors."""
        return float(self.S[rank : self.rank].norm())

    def _inverse(self, values: Tensor) -> Tensor:
        return torch.where(values > self.noise, 1 / values, 0.0)


class _FromMatrix(SpectralFactors):
    """Decomposition of a sum whose factors are larger than the matrix itself, as that matrix."""

    def __init__(self, total: LowRankSum) -> None:
        matrix = total.dense_rows(0, total.terms[0].B.shape[0])
        d_out, d_in = matrix.shape
        if d_out <= d_in:
            right, self.S, left = _svd_in_place(matrix.T)
            self._U, self._V = left.T, right.T
        else:
            self._U, self.S, self._V = _svd_in_place(matrix.T.contiguous().T)
        self.noise = float(self.S[:1].sum()) * torch.finfo(torch.float64).eps * len(self.S)

    def _left(self, start: int, stop: int) -> Tensor:
        return self._U[:, start:stop] * self.S[start:stop]

    def _right(self, start: int, stop: int) -> Tensor:
        return self.S[start:stop, None] * self._V[start:stop]


class _FromFactors(SpectralFactors):
    """Decomposition by QR of ``B`` and of ``A^T`` and an SVD of the small core ``R_b R_a^T`` (METHOD 6).

    No ``Q`` is kept or formed. With the core's SVD ``u diag(S) v`` the directions follow from the factors themselves:
    ``U diag(S) = B A V^T = B (R_a^T v^T)`` and ``diag(S) V = U^T B A = (u^T R_b) A``. Both are as exact as products
    with ``Q`` would be (rounding errors in fp64, relative to ``sum_j |b_j| |a_j|`` over columns of ``B`` and rows of
    ``A``), and the only divisor is ``S``.
    """

    def __init__(self, total: LowRankSum) -> None:
        self._total = total
        R_b = _triangle([(t.B.T, w) for t, w in zip(total.terms, total.weights, strict=True)])
        R_a = _triangle([(t.A, 1.0) for t in total.terms])
        self.noise = float(R_b.norm(dim=0) @ R_a.norm(dim=0)) * torch.finfo(torch.float64).eps
        core = (R_a @ R_b.T).T
        # Both triangles in one square, while the SVD takes its memory.
        self._diagonal = R_a.diagonal().clone()
        R_a.T.tril_(-1)
        self._triangles = R_b.add_(R_a.T)
        del R_a, R_b
        self._u, self.S, self._v = _svd_in_place(core)

    def _left(self, start: int, stop: int) -> Tensor:
        v = self._v[start:stop].T
        inner = self._diagonal[:, None] * v
        for first, rows in self._blocks():
            inner[first : first + len(rows)].addmm_(rows.tril(first - 1), v)
        return self._total.times(inner)

    def _right(self, start: int, stop: int) -> Tensor:
        u = self._u[:, start:stop]
        inner = u.new_zeros(u.shape[1], len(u))
        for first, rows in self._blocks():
            inner.addmm_(u[first : first + len(rows)].T, rows.triu(first))
        return self._total.times_from_left(inner)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield a few rows of the triangles at a time, after the first one's index, to split them in little memory."""
        for first in range(0, len(self._triangles), _ROWS_AT_ONCE):
            yield first, self._triangles[first : first + _ROWS_AT_ONCE]


def _triangle(rows: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Compute ``R`` of the QR decomposition of ``[w_1 X_1; w_2 X_2; ...]^T``, in fp64.

    Args:
        rows: ``X_i`` of shape ``(r_i, d)`` with its weight; ``sum r_i <= d``.

    Returns:
        ``(sum r_i, sum r_i)``, upper triangular.
    """
    sizes = [X.shape[0] for X, _ in rows]
    stacked = torch.empty(sum(sizes), rows[0][0].shape[1], dtype=torch.float64, device=rows[0][0].device)
    for part, (X, weight) in zip(stacked.split(sizes), rows, strict=True):
        part.copy_(X).mul_(weight)
    # Transposed, the stacked rows have LAPACK's layout, so that it works in place.
    reflectors, scales = stacked.T, stacked.new_empty(len(stacked))
    torch.geqrf(reflectors, out=(reflectors, scales))
    return reflectors[: len(stacked)].triu()


def _svd_in_place(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``U, S, V`` of ``matrix`` ``(m, n)``, ``m >= n``, stored column by column, and overwrite it with ``U``.

    LAPACK destroys its input, so torch gives it a copy and no longer needs the original.
    """
    n = matrix.shape[1]
    S, V = matrix.new_empty(n), matrix.new_empty(n, n).T
    torch.linalg.svd(matrix, full_matrices=False, out=(matrix, S, V))
    return matrix, S, V


def spectral(matrix: LowRank | LowRankSum) -> SpectralFactors:
    """Decompose a low-rank matrix, or a weighted sum of them, by SVD in fp64 (METHOD 6).

    Time: ``O((d_out + d_in) r^2 + r^3)`` for terms of rank ``r`` together. Memory beyond the terms, in bytes: at most
    ``8 max(r max(d_out, d_in) + 2 r^2, 4 r^2)``, about four times the fp32 terms or less, and ``3.2 * 8 r^2``
    of LAPACK's workspace. Nothing of shape ``(d_out, d_in)`` is formed, except where ``r`` reaches the smaller side:
    there the matrix is smaller than one factor, and is decomposed itself.
    """
    total = LowRankSum((matrix,), (1.0,)) if isinstance(matrix, LowRank) else matrix
    smaller_side = min(total.terms[0].B.shape[0], total.terms[0].A.shape[1])
    return _FromFactors(total) if total.width < smaller_side else _FromMatrix(total)


def leading_and_rest(total: LowRankSum, rank: int, dtype: torch.dtype) -> tuple[LowRank, LowRankSum | None]:
    """Split a sum exactly into its leading singular directions and the rest.

    Args:
        rank: directions wanted; at most the sum's own rank is returned.
        dtype: of the leading part.

    Returns:
        The leading part as balanced factors, and the rest by reference: ``total`` minus the rounded leading part;
        ``None`` where nothing is left.
    """
    parts = spectral(total)
    # Directions of rounding errors would be zeros, and factors of zeros never learn.
    kept = min(rank, parts.rank)
    leading, left = parts.part(0, kept, dtype), parts.rank - kept
    return leading, total.plus(leading, -1.0, bound=left) if left > 0 else None
