"""The residual ``R_w``: the sum of what earlier rounds have learned, exact up to its cap (METHOD 6)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.lora.low_rank import LowRankSum, concatenate, empty, norm, spectral
from hsplit.models.factors import LowRank

# Rows of a residual's matrix that are formed at once in fp64.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class ResidualUpdate:
    """A change of one weight's residual, for its holders.

    Attributes:
        start_rank: directions that the holder keeps.
        factors: to append after them, in the dtype in which holders get them; ``None`` when ``matrix`` is given.
        matrix: the whole residual as one matrix ``(d_out, d_in)``.
    """

    start_rank: int
    factors: LowRank | None
    matrix: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the factors or of the matrix."""
        return (self.factors.nbytes if self.factors else 0) + (self.matrix.nbytes if self.matrix is not None else 0)


class Residual:
    """``R_w`` of one weight as concatenated factors, recompressed in fp64 only when it passes its cap.

    Args:
        d_out, d_in: the weight's shape.
        max_rank: cap (``residual.max_rank``), or ``None`` for none: then factors become one matrix as soon as they
            would be larger than it.
        dtype: fp32; fp64 in fp64 runs.
        sent: dtype in which holders get it, ``dtype`` by default.

    Attributes:
        held: the residual as its holders have it, while a change waits; ``None``: they have all of it.
        lag: upper bound of the Frobenius norm of what they lack.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        max_rank: int | None,
        dtype: torch.dtype = torch.float32,
        sent: torch.dtype | None = None,
    ) -> None:
        self.cap = None if max_rank is None else min(max_rank, min(d_out, d_in) // 2)
        self.factors = empty(d_out, d_in, dtype)
        self.matrix: Tensor | None = None
        self._shape, self._dtype, self._sent_dtype = (d_out, d_in), dtype, sent or dtype
        self.held: Residual | None = None
        self.lag = 0.0
        self._sent = 0
        # Whether holders had frozen directions beside it at the last updates, and at these.
        self._had_beside = self._has_beside = False
        self._matrix_sent = False
        self._updates: dict[tuple[int, int], ResidualUpdate] = {}

    @property
    def rank(self) -> int:
        """Directions held as factors (0 when held as a matrix)."""
        return self.factors.rank

    @property
    def nbytes(self) -> int:
        """Bytes held: factors or matrix."""
        return self.factors.nbytes if self.matrix is None else self.matrix.nbytes

    def has_room(self, beside: int) -> bool:
        """Check whether the cap leaves room for ``beside`` directions that holders keep frozen."""
        return self.cap is None or self.rank + beside <= self.cap

    def add(self, delta: LowRank | LowRankSum | None, beside: int = 0) -> float:
        """``R <- R + delta``.

        Past the cap, ``R`` and all terms of ``delta`` are decomposed together, without being concatenated.

        Args:
            delta: scale and token weights folded in, or a sum of such terms by reference; ``None``: nothing.
            beside: directions that holders keep frozen beside ``R``, for which the cap leaves room.

        Returns:
            Frobenius norm of what the cap cut, relative to ``R`` (0.0 when nothing was cut).
        """
        self._updates.clear()
        self._matrix_sent &= delta is None
        if delta is None:
            return 0.0 if self.has_room(beside) else self._recompress(LowRankSum((self.factors,), (1.0,)), beside)
        if isinstance(delta, LowRank):
            delta = LowRankSum((delta,), (1.0,))
        dtype = self._dtype
        joint = self.rank + delta.rank
        d_out, d_in = self._shape
        if self.matrix is not None:
            self.matrix = self._summed(self.matrix, delta)
        elif self.cap is None and joint * (d_out + d_in) > d_out * d_in:
            self.matrix = self._summed(self.factors.B.new_zeros(self._shape), delta.plus(self.factors))
            self.factors = empty(d_out, d_in, dtype)
        elif self.cap is None or joint + beside <= self.cap:
            self.factors = concatenate([self.factors, delta.compressed(dtype)])
        else:
            return self._recompress(delta.plus(self.factors), beside)
        return 0.0

    def join(self, delta: LowRank | LowRankSum | None, beside: int = 0, allowed: float = 0.0) -> float:
        """``R <- R + delta`` as :meth:`add`, where holders may lack up to ``allowed`` (Frobenius norm) for now.

        A change that may wait is sent neither alone nor beside other directions; the next one that may not goes with
        all before it.
        """
        before, lag = self.held or self._as_sent(), self.lag
        cut = self.add(delta, beside)
        if allowed > 0 and before.has_room(beside):
            lag += 0.0 if delta is None else norm(delta)
            lag += self._norm_of(cut)
            if lag <= allowed:
                self.held, self.lag = before, lag
                return cut
        self.release()
        return cut

    def join_everywhere(self, delta: LowRank | LowRankSum | None, beside: int = 0) -> float:
        """``R <- R + delta`` as :meth:`add`, for holders too if a change waits, which waits on."""
        cut = self.add(delta, beside)
        if self.held is None:
            return cut
        also = self.held.add(delta, beside)
        self.lag += self._norm_of(cut) + self.held._norm_of(also)
        return max(cut, also)

    def release(self) -> None:
        """Let no change wait any longer: the next update has all of them."""
        if self.held is None:
            return
        held, self.held, self.lag = self.held, None, 0.0
        self._sent = _common_directions(self.factors, held.factors)
        self._matrix_sent = False
        self._had_beside, self._has_beside = held._had_beside, held._has_beside
        self._updates.clear()

    def _norm_of(self, cut: float) -> float:
        """Norm of what was cut, from its part of the norm of that and what was kept."""
        return cut * norm(self.factors) / (1 - cut**2) ** 0.5 if 0 < cut < 1 else 0.0

    def _as_sent(self) -> Residual:
        """A copy that shares the tensors, none of which is ever changed in place."""
        copied = copy.copy(self)
        copied._updates = {}
        return copied

    def _recompress(self, total: LowRankSum, beside: int) -> float:
        """Keep the leading directions of ``total``, as many as the cap allows; returns the relative cut."""
        decomposed = spectral(total)
        # Directions that are rounding errors of fp64 are dropped; one stays, so that holders get a change.
        kept = min((self.cap or 0) - beside, max(decomposed.rank, 1))
        self.factors = decomposed.part(0, kept, self._dtype)
        self._sent = 0
        norm = float(decomposed.S.norm())
        return decomposed.norm_beyond(kept) / norm if norm else 0.0

    def _summed(self, matrix: Tensor, delta: LowRankSum) -> Tensor:
        """Compute ``matrix + delta`` in fp64, a few rows at a time."""
        total = torch.empty_like(matrix)
        for start in range(0, len(matrix), _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, len(matrix)))
            total[rows] = delta.dense_rows(rows.start, rows.stop).add_(matrix[rows])
        return total

    def update(
        self, whole: bool, common: LowRank | None = None, rank: int = 0, merges: bool = False
    ) -> ResidualUpdate | None:
        """Return the changes since :meth:`mark_sent`, or the ``whole`` residual; ``None`` if nothing changed.

        Of a change that waits it has nothing. Call :meth:`mark_sent` once every holder has its update.

        Args:
            whole: from the residual's first direction on.
            common: the holders' common restart; its directions beyond ``rank`` are appended to the residual until the
                next update.
            rank: the holder's.
            merges: the holder merges the residual into its working weight, and needs all of it at each change.
        """
        if self.held is not None:
            return self.held.update(whole, common, rank, merges)
        if self.matrix is not None:
            if self._matrix_sent and not whole:
                return None
            if (0, 0) not in self._updates:
                self._updates[0, 0] = ResidualUpdate(0, None, self.matrix.to(self._sent_dtype))
            return self._updates[0, 0]
        beside = 0 if common is None else max(0, common.rank - rank)
        self._has_beside |= beside > 0
        have = 0 if whole else self._sent
        if self.factors.rank == have and not beside and not self._had_beside:
            return None
        start = 0 if merges else have
        if (start, beside) not in self._updates:
            # One copy for all holders of the weight with that rank.
            factors = self.factors.from_rank(start)
            if common is not None and beside:
                factors = concatenate([factors, common.from_rank(rank)])
            self._updates[start, beside] = ResidualUpdate(start, factors.to(self._sent_dtype))
        return self._updates[start, beside]

    def mark_sent(self) -> None:
        """Record that every holder has the residual, but for a change that waits, as it is now."""
        if self.held is not None:
            self.held.mark_sent()
            return
        self._matrix_sent = True
        self._sent = self.factors.rank
        self._had_beside, self._has_beside = self._has_beside, False
        self._updates.clear()

    def restore(
        self,
        factors: LowRank | None,
        matrix: Tensor | None,
        held: tuple[LowRank | None, Tensor | None, float] | None = None,
    ) -> None:
        """Replace the residual by one read from a checkpoint.

        Args:
            factors, matrix: the residual.
            held: factors, matrix and :attr:`lag` of what holders have of it, where a change waits.
        """
        self.held, self.lag = None, 0.0
        if held is not None:
            self.held, self.lag = self._as_sent(), held[2]
            self.held.restore(*held[:2])
        self.matrix = matrix
        self.factors = factors if factors is not None else empty(*self._shape, dtype=self._dtype)
        self._sent = self.factors.rank


def _common_directions(one: LowRank, other: LowRank) -> int:
    """Count the leading directions that are the same in both."""
    count = min(one.rank, other.rank)
    same = (one.B[:, :count] == other.B[:, :count]).all(dim=0) & (one.A[:count] == other.A[:count]).all(dim=1)
    return int(same.long().cumprod(dim=0).sum())
