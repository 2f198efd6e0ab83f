"""How the adapters of a weight's holders become one update. A new rule is one function and one registry line.

A rule splits the new global term of a weight into two parts whose sum is what the model has learned: what joins the
residual, and what the holders restart with. A user's own rule is given as ``package.module:name``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hsplit.extension import find_part
from hsplit.lora.low_rank import LowRank, LowRankSum, leading_and_rest, spectral


@dataclass(frozen=True)
class Contribution:
    """One holder's adapter of one weight at the end of a round.

    Attributes:
        term: ``s_c B_c A_c``, scale folded in.
        share: token weight ``p_c``; the shares of a weight's holders sum to 1. A rule that freezes is given as further
            terms what some of them had frozen beside their adapters, with those holders' shares.
        first: which direction of the holders' common restart the term's first one began as.
    """

    term: LowRank
    share: float
    first: int = 0


@dataclass(frozen=True)
class Restart:
    """What the holders of one weight are to go on with.

    Attributes:
        reinit: the policy's: ``random``, ``svd`` or ``mean``.
        ranks: rank of each next holder of the weight; empty where nobody holds it any more.
        spare: directions that a holder can keep frozen beside its adapter, for a rule that freezes.
    """

    reinit: str
    ranks: tuple[int, ...]
    spare: int = 0

    @property
    def smallest(self) -> int:
        """The smallest rank of the next holders; 0 without any."""
        return min(self.ranks, default=0)

    @property
    def largest(self) -> int:
        """The largest rank of the next holders; 0 without any."""
        return max(self.ranks, default=0)

    @property
    def kept(self) -> int:
        """Directions that may restart: as many as the largest rank, if the smallest has spare room for the others."""
        return min(self.largest, self.smallest + self.spare)


@dataclass(frozen=True)
class Outcome:
    """What a rule made of the contributions.

    Attributes:
        residual: joins ``R_w``; ``None`` for nothing.
        common: what the holders restart with, scale folded in; ``None`` for a fresh start. Each takes the leading
            directions that its rank has room for, so up to the smallest rank nothing is lost; beyond it nothing is
            either where the rule freezes.
    """

    residual: LowRank | LowRankSum | None
    common: LowRank | None


Rule = Callable[[Sequence[Contribution], Restart], Outcome]
"""From the contributions of a weight's holders (at least one) to the outcome."""


def noise_free(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """Noise-free aggregation (METHOD 6): the exact token-weighted sum, concatenated along the rank.

    Nothing is lost here; what the residual's cap then cuts, :meth:`~hsplit.lora.residual.Residual.add` returns.

    ``sum_c p_c s_c B_c A_c`` already contains what the adapters started the round with, and the residual does not
    (it left ``R_w`` at the restart), so the sum of residual and restart is the new global term and nothing has to be
    subtracted. With ``reinit: random`` this is what FLoRA (arXiv 2409.05976) calls stacking.

    With ``reinit: svd`` the sum's leading directions, as many as the largest next rank, are what everybody goes on
    with, and the rest joins the residual. A holder trains as many of them as its rank has room for; the others stay
    frozen beside its adapter until the next aggregation, which counts them as its own. So a client of rank 1 does not
    cost the others what they have learned, and all compute with the same weight. (With as many as the smallest rank
    alone, as METHOD 6 has it, the larger ranks would start afresh every round.) They go on with an ``A`` of the size
    that a fresh one has: ``B`` learns at the pace of ``A``, and a decomposition's balanced factors would slow every
    round but the first. A weight that only one holder has trained goes on as it is.

    With ``reinit: mean`` everybody goes on with the holders' mean factors, as with FedAvg, and the residual takes what
    these leave out of the exact sum: with ``B`` and ``A`` the means, ``sum_c p_c s_c (B_c - B)(A_c - A)``. Where the
    holders began alike that is small, no direction turns, and the optimizer's moments go on meaning what they did.
    """
    total = LowRankSum(tuple(c.term for c in contributions), tuple(c.share for c in contributions))
    if restart.reinit == "random" or restart.kept == 0:
        return Outcome(total, None)
    if len(contributions) == 1 and total.width <= restart.kept:
        return Outcome(None, contributions[0].term)
    if restart.reinit == "mean":
        mean = _mean_factors(contributions)
        common = mean if mean.rank <= restart.kept else mean.up_to_rank(restart.kept)
        return Outcome(LowRankSum((*total.terms, common), (*total.weights, -1.0)), common)
    common, rest = leading_and_rest(total, restart.kept, contributions[0].term.A.dtype)
    return Outcome(rest, _as_large_as_fresh(common))


def average_factors(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """FedAvg of A and of B separately, as SplitLoRA does: needs equal ranks and carries the aggregation noise.

    ``mean(B) mean(A)`` is not ``mean(B A)``; holders go on from the averages and the residual stays as it is.
    """
    return Outcome(None, _averaged(contributions, [c.share for c in contributions]))


def sparsity_weighted(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """HetLoRA (arXiv 2401.06432): A and B padded with zeros to the largest rank and averaged, weighted by
    ``||B_c A_c||_F``; each holder then goes on with the leading directions that its rank has room for.

    The averages carry the aggregation noise, and what a small rank cuts is lost to its holder. Adapters that have
    learned nothing yet have no weight; where none has, token weights are taken.
    """
    norms = [_product_norm(c.term) for c in contributions]
    weights = norms if sum(norms) > 0 else [c.share for c in contributions]
    return Outcome(None, _averaged(contributions, [w / sum(weights) for w in weights]))


def averaged_products(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """FlexLoRA (arXiv 2402.11505): the average of the products, then to each holder its SVD's leading directions.

    The average is exact; what a holder's rank cuts off is lost to that holder, and beyond the largest rank to all.
    As published, B takes the singular values.
    """
    total = LowRankSum(tuple(c.term for c in contributions), tuple(c.share for c in contributions))
    return _redistributed(total, restart)


def averaged_slices(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """RaFLoRA (arXiv 2602.13486): as FlexLoRA, with each slice of the rank averaged over the holders that have it.

    A slice is what lies between two neighbouring ranks of the holders; its token weights are renormalized over the
    holders whose rank reaches it, so that directions that few have are not averaged away.
    """
    terms: list[LowRank] = []
    weights: list[float] = []
    begin = 0
    for end in sorted({c.term.rank for c in contributions}):
        having = [c for c in contributions if c.term.rank >= end]
        total = sum(c.share for c in having)
        terms += [LowRank(c.term.B[:, begin:end], c.term.A[begin:end]) for c in having]
        weights += [c.share / total for c in having]
        begin = end
    return _redistributed(LowRankSum(tuple(terms), tuple(weights)), restart)


def continued(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """No aggregation: the one holder goes on with what it has."""
    (only,) = contributions
    return Outcome(None, only.term)


def _mean_factors(contributions: Sequence[Contribution]) -> LowRank:
    """Token-weighted means; of ``A`` over those holders alone that have the direction: others know of none."""
    mean = _averaged(contributions, [c.share for c in contributions])
    having = mean.A.new_zeros(mean.rank)
    for c in contributions:
        having[c.first : c.first + c.term.rank] += c.share
    return LowRank(mean.B, mean.A / having[:, None])


def _averaged(contributions: Sequence[Contribution], weights: Sequence[float]) -> LowRank:
    """Weighted means of B and of A, zero beyond a holder's own rank."""
    some = contributions[0].term
    rank = max(c.first + c.term.rank for c in contributions)
    B, A = some.B.new_zeros(some.B.shape[0], rank), some.A.new_zeros(rank, some.A.shape[1])
    for contribution, weight in zip(contributions, weights, strict=True):
        term = contribution.term
        own = slice(contribution.first, contribution.first + term.rank)
        B[:, own].add_(term.B, alpha=weight)
        A[own].add_(term.A, alpha=weight)
    return LowRank(B, A)


def _redistributed(total: LowRankSum, restart: Restart) -> Outcome:
    """The leading directions of ``total``, as many as the largest rank, B with the singular values."""
    dtype = total.terms[0].A.dtype
    parts = spectral(total)
    # Directions of rounding errors are left out, so that what remains of the rank starts fresh instead of dead.
    kept = min(restart.largest, parts.rank)
    if kept == 0:
        return Outcome(None, None)
    leading, root = parts.part(0, kept, torch.float64), parts.S[:kept].sqrt()
    # From balanced factors to U diag(S) and V.
    return Outcome(None, LowRank(leading.B * root, leading.A / root[:, None]).to(dtype))


def _as_large_as_fresh(term: LowRank) -> LowRank:
    """The same product with every row of ``A`` about as long as a fresh one's, ``1 / sqrt(3)``.

    The factors are powers of two, so nothing is rounded.
    """
    lengths = torch.linalg.vector_norm(term.A, dim=1)
    powers = torch.where(lengths > 0, (3**-0.5 / lengths).log2().round(), 0.0)
    return LowRank(torch.ldexp(term.B, -powers), torch.ldexp(term.A, powers[:, None]))


def _product_norm(term: LowRank) -> float:
    """``||B A||_F`` without forming the product: ``trace((B^T B)(A A^T))``, in fp64."""
    B, A = term.B.double(), term.A.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0.0).sqrt())


@dataclass(frozen=True)
class Aggregation:
    """A rule and what the rest of hsplit must know of it.

    Attributes:
        rule: the rule.
        keeps_residual: whether anything joins the residual at a round's end. Without, plans reserve no memory for one.
        truncates: whether holders take as much of the common restart as their ranks have room for, and lose the rest.
        decomposes: whether it takes singular value decompositions, which cost memory and time.
        freezes: whether holders keep frozen, beside their adapters, what their ranks have no room for of the common
            restart. The rule is then given that among the contributions.
    """

    rule: Rule
    keeps_residual: bool = True
    truncates: bool = False
    decomposes: bool = True
    freezes: bool = False


AGGREGATIONS: dict[str, Aggregation] = {
    "concat": Aggregation(noise_free, freezes=True),
    "fedavg": Aggregation(average_factors, keeps_residual=False, decomposes=False),
    "hetlora": Aggregation(sparsity_weighted, keeps_residual=False, truncates=True, decomposes=False),
    "flexlora": Aggregation(averaged_products, keeps_residual=False, truncates=True),
    "raflora": Aggregation(averaged_slices, keeps_residual=False, truncates=True),
    "none": Aggregation(continued, keeps_residual=False, decomposes=False),
}


def find_aggregation(name: str) -> Aggregation:
    """The aggregation that a policy names; a user's own is an ``Aggregation``, or a rule that may use the residual.

    Raises:
        InputError: there is none of that name.
    """
    found = find_part(name, AGGREGATIONS, "policy: aggregation", Aggregation)
    return found if isinstance(found, Aggregation) else Aggregation(found)
