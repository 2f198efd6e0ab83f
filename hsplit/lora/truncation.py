"""Cutting what was learned to fewer directions, with the error that this makes."""

from __future__ import annotations

from collections.abc import Mapping

from hsplit.lora.low_rank import LowRank, spectral
from hsplit.lora.relative_error import RelativeError


def truncated(terms: Mapping[str, LowRank], rank: int) -> tuple[dict[str, LowRank], RelativeError | None]:
    """Each term cut to its ``rank`` leading singular directions, the best of that rank (Eckart and Young 1936).

    A term of no more than ``rank`` directions stays as it is.

    Args:
        terms: ``(d_out, d_in)`` matrices as factors, by weight name.
        rank: at least 1.

    Returns:
        The terms, and the relative Frobenius error against the whole ones; ``None`` where nothing was learned.
    """
    cut: dict[str, LowRank] = {}
    norms: dict[str, tuple[float, float]] = {}
    for name, term in terms.items():
        if term.rank == 0:
            cut[name] = term
            continue
        parts = spectral(term)
        cut[name] = term if term.rank <= rank else parts.part(0, rank, term.A.dtype)
        norms[name] = (parts.norm_beyond(rank) if term.rank > rank else 0.0, float(parts.S.norm()))
    return cut, RelativeError.of(norms)
