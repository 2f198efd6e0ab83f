"""How the adapters of a weight's holders become one update. A new rule is one function and one registry line.

A rule splits the new global term of a weight into two parts whose sum is what the model has learned: what joins the
residual, and what every holder restarts with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hsplit.lora.low_rank import LowRank, concatenate, spectral


@dataclass(frozen=True)
class Contribution:
    """One holder's adapter of one weight at the end of a round.

    Attributes:
        term: ``s_c B_c A_c``, scale folded in.
        share: token weight ``p_c``; the shares of a weight's holders sum to 1.
    """

    term: LowRank
    share: float


@dataclass(frozen=True)
class Outcome:
    """What a rule made of the contributions.

    Attributes:
        residual: joins ``R_w``; ``None`` for nothing.
        common: what every holder restarts with, scale folded in; ``None`` for a fresh start. Its rank is at most
            the smallest of the holders' next ranks.
    """

    residual: LowRank | None
    common: LowRank | None


Rule = Callable[[Sequence[Contribution], str, int], Outcome]


def noise_free(contributions: Sequence[Contribution], reinit: str, restart_rank: int) -> Outcome:
    """Noise-free aggregation (METHOD 6): the exact token-weighted sum, concatenated along the rank.

    ``sum_c p_c s_c B_c A_c`` already contains what the adapters started the round with, and the residual does not
    (it left ``R_w`` at the restart), so the sum of residual and restart is the new global term and nothing has to be
    subtracted.

    Args:
        reinit: ``random``: all of it joins the residual; ``svd``: its leading ``restart_rank`` directions stay in the
            adapters, the rest joins.
        restart_rank: smallest rank among the weight's next holders.
    """
    total = concatenate([LowRank(c.term.B * c.share, c.term.A) for c in contributions])
    if reinit == "random" or restart_rank == 0:
        return Outcome(total, None)
    parts = spectral(total)
    dtype = total.A.dtype
    # Beyond the matrix's own size there are no directions left to restart from.
    kept = min(restart_rank, len(parts.S))
    rest = parts.part(kept, len(parts.S), dtype)
    return Outcome(rest if rest.rank else None, parts.part(0, kept, dtype))


def average_factors(contributions: Sequence[Contribution], reinit: str, restart_rank: int) -> Outcome:
    """FedAvg of A and of B separately, as SplitLoRA does: needs equal ranks and carries the aggregation noise.

    ``mean(B) mean(A)`` is not ``mean(B A)``; holders go on from the averages and the residual stays as it is.
    """
    B = torch.stack([c.term.B * c.share for c in contributions]).sum(0)
    A = torch.stack([c.term.A * c.share for c in contributions]).sum(0)
    return Outcome(None, LowRank(B, A))


AGGREGATIONS: dict[str, Rule] = {"concat": noise_free, "fedavg": average_factors}
