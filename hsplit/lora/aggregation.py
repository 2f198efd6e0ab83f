"""Aggregation of the adapters of a weight's holders into one update, weight by weight (METHOD 6).

A rule splits the new global term of a weight into two parts whose sum is what the model has learned: one joins the
residual, and with the other the holders restart. A new rule is one function and one registry line; a user's own rule is
given as ``package.module:name``. The aggregator applies the rule and keeps what earlier rounds have learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hsplit.config import Job, Policy
from hsplit.extension import find_part
from hsplit.lora.holder import HeldAdapters, RoundUpdate, exchange_dtype
from hsplit.lora.learned import LearnedTerm, held_parts, held_tensors, learned_parts
from hsplit.lora.low_rank import LowRankSum, leading_and_rest, norm, spectral
from hsplit.lora.residual import Residual
from hsplit.models.dtype import resolve_dtype
from hsplit.models.factors import LowRank
from hsplit.models.spec import LinearShape


@dataclass(frozen=True)
class Contribution:
    """One holder's adapter of one weight at the end of a round.

    Attributes:
        term: ``s_c B_c A_c``, scale folded in.
        share: token weight ``p_c``; the shares of a weight's holders sum to 1. A rule that freezes gets the directions
            that some holders had frozen beside their adapters as further terms, with those holders' shares.
        first: index, in the holders' common restart, of the direction from which the term's first one began.
    """

    term: LowRank
    share: float
    first: int = 0


@dataclass(frozen=True)
class Restart:
    """Room that the next holders of one weight have for a common restart.

    Attributes:
        reinit: the policy's: ``random``, ``svd`` or ``mean``.
        ranks: rank of each next holder of the weight; empty where it has none.
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
        """Directions that may restart: the largest rank, or fewer if the smallest has too little spare room."""
        return min(self.largest, self.smallest + self.spare)


@dataclass(frozen=True)
class Outcome:
    """Result of a rule.

    Attributes:
        residual: joins ``R_w``; ``None`` for nothing.
        common: factors that the holders restart with, scale folded in; ``None`` for a fresh start. Each holder takes
            the leading directions that its rank has room for: nothing is lost up to the smallest rank, nor beyond it
            where the rule freezes.
    """

    residual: LowRank | LowRankSum | None
    common: LowRank | None


Rule = Callable[[Sequence[Contribution], Restart], Outcome]
"""From the contributions of a weight's holders (at least one) to the outcome."""


def noise_free(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """Noise-free aggregation (METHOD 6): the exact token-weighted sum, concatenated along the rank.

    Nothing is lost here; :meth:`~hsplit.lora.residual.Residual.add` returns what the residual's cap then cuts.

    ``sum_c p_c s_c B_c A_c`` already contains what the adapters started the round with, and the residual does not
    (it left ``R_w`` at the restart), so the sum of residual and restart is the new global term and nothing has to be
    subtracted. With ``reinit: random`` this is what FLoRA (arXiv 2409.05976) calls stacking.

    With ``reinit: svd`` all holders restart with the sum's leading directions, as many as the largest next rank, and
    the rest joins the residual. A holder trains as many of them as its rank has room for; the others stay frozen beside
    its adapter until the next aggregation, which counts them as its own. So a client of rank 1 does not cost the others
    what they have learned, and all compute with the same weight. (With only as many as the smallest rank, as in
    METHOD 6, the larger ranks would start fresh every round.) Their ``A`` has the size of a fresh one: ``B`` learns at
    the pace of ``A``, and a decomposition's balanced factors would slow down every round but the first. A weight that
    only one holder has trained stays as it is.

    With ``reinit: mean`` all holders restart with the mean factors, as in FedAvg, and the residual takes what these
    leave out of the exact sum: with ``B`` and ``A`` the means, ``sum_c p_c s_c (B_c - B)(A_c - A)``. Where the holders
    began alike that is small, no direction turns, and the optimizer's moments stay valid.
    """
    total = LowRankSum(tuple(c.term for c in contributions), tuple(c.share for c in contributions))
    if restart.reinit == "random" or restart.kept == 0:
        return Outcome(total, None)
    if len(contributions) == 1 and total.width <= restart.kept:
        return Outcome(None, contributions[0].term)
    if restart.reinit == "mean":
        mean = mean_factors(contributions)
        common = mean if mean.rank <= restart.kept else mean.up_to_rank(restart.kept)
        return Outcome(LowRankSum((*total.terms, common), (*total.weights, -1.0)), common)
    common, rest = leading_and_rest(total, restart.kept, contributions[0].term.A.dtype)
    return Outcome(rest, _as_large_as_fresh(common))


def rounded(outcome: Outcome, dtype: torch.dtype, keeps_residual: bool) -> Outcome:
    """Round the restart of ``outcome`` to what ``dtype`` can hold; what that leaves out joins the residual, if one is
    kept.
    """
    common = outcome.common
    if common is None:
        return outcome
    restart = common.to(dtype).to(common.A.dtype)
    if torch.equal(restart.A, common.A) and torch.equal(restart.B, common.B):
        return outcome
    if not keeps_residual:
        return Outcome(outcome.residual, restart)
    whole = outcome.residual
    if whole is None:
        whole = LowRankSum((), ())
    elif isinstance(whole, LowRank):
        whole = LowRankSum((whole,), (1.0,))
    parts = list(zip(whole.terms, whole.weights, strict=True))
    # A residual that is a sum less the restart is that sum less the rounded one: no directions more.
    less = [(restart if term is common else term, weight) for term, weight in parts]
    if all(term is not common for term, _ in parts):
        less += [(common, 1.0), (restart, -1.0)]
    return Outcome(LowRankSum(tuple(term for term, _ in less), tuple(weight for _, weight in less)), restart)


def average_factors(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """FedAvg of A and of B separately, as SplitLoRA does: needs equal ranks and carries the aggregation noise.

    ``mean(B) mean(A)`` is not ``mean(B A)``; holders continue from the averages and the residual does not change.
    """
    return Outcome(None, _averaged(contributions, [c.share for c in contributions]))


def sparsity_weighted(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """HetLoRA (arXiv 2401.06432): A and B padded with zeros to the largest rank and averaged, weighted by
    ``||B_c A_c||_F``; each holder then continues with the leading directions that its rank has room for.

    The averages carry the aggregation noise, and a holder loses what its rank cuts off. Adapters that have learned
    nothing yet have no weight; where none has, token weights are used.
    """
    norms = [norm(c.term) for c in contributions]
    weights = norms if sum(norms) > 0 else [c.share for c in contributions]
    return Outcome(None, _averaged(contributions, [w / sum(weights) for w in weights]))


def averaged_products(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """FlexLoRA (arXiv 2402.11505): the average of the products, then to each holder its SVD's leading directions.

    The average is exact; a holder loses what its rank cuts off, and all of them what is beyond the largest rank.
    As published, B takes the singular values.
    """
    total = LowRankSum(tuple(c.term for c in contributions), tuple(c.share for c in contributions))
    return _redistributed(total, restart)


def averaged_slices(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """RaFLoRA (arXiv 2602.13486): as FlexLoRA, with each slice of the rank averaged over the holders that have it.

    A slice lies between two neighbouring ranks of the holders; its token weights are renormalized over the holders that
    have it, so that directions that few have are not averaged away.
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


FLORIST_ENERGY = 0.9
"""Part of the squared singular values that FLoRIST keeps."""


def thresholded_products(
    contributions: Sequence[Contribution], restart: Restart, energy: float = FLORIST_ENERGY
) -> Outcome:
    """FLoRIST (arXiv 2506.09199): of the sum of the products, the fewest leading directions that hold a part of its
    energy; they join the base at every holder, and adapters start fresh.

    Args:
        contributions, restart: as for every rule.
        energy: part of the squared singular values that is kept.
    """
    total = LowRankSum(tuple(c.term for c in contributions), tuple(c.share for c in contributions))
    parts = spectral(total)
    if not parts.rank:
        return Outcome(None, None)
    held = parts.S.square().cumsum(0)
    # Rounding may leave the last sum short of all.
    kept = min(1 + int((held < energy * held[-1]).sum()), parts.rank)
    return Outcome(parts.part(0, kept, contributions[0].term.A.dtype), None)


def averaged_directions(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """Fed-PLoRA (arXiv 2602.16936): every direction is a module of rank one, and is averaged over those who trained it.

    A holder trains as many of them as its rank has room for, and the others stay frozen beside them. Which ones is
    drawn anew at every aggregation. As published each client draws its own; here those of a smaller rank are among
    those of a larger one. The draw follows from the factors, so that a resumed run repeats it.
    """
    rank = max(c.first + c.term.rank for c in contributions)
    some = contributions[0].term
    B, A, having = some.B.new_zeros(len(some.B), rank), some.A.new_zeros(rank, some.A.shape[1]), some.A.new_zeros(rank)
    # Frozen parts, which begin behind some holder's rank, only count where nobody has trained.
    for c in sorted(contributions, key=lambda own: own.first):
        own = slice(c.first, c.first + c.term.rank)
        weights = c.share * ((having[own] == 0) | (c.first == 0)).to(having)
        B[:, own] += weights * c.term.B
        A[own] += weights[:, None] * c.term.A
        having[own] += weights
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(A.cpu().numpy().tobytes()).digest()[:7], "big"))
    order = torch.randperm(rank, generator=draw)
    common = LowRank((B / having)[:, order], (A / having[:, None])[order])
    if rank <= restart.kept:
        return Outcome(None, common)
    stays = common.up_to_rank(restart.kept) if restart.kept else None
    return Outcome(common.from_rank(restart.kept), stays)


def continued(contributions: Sequence[Contribution], restart: Restart) -> Outcome:
    """Aggregate nothing: the only holder keeps its adapter."""
    (only,) = contributions
    return Outcome(None, only.term)


def mean_factors(contributions: Sequence[Contribution]) -> LowRank:
    """Average the factors by tokens; each direction of ``A`` only over the holders that have it."""
    mean = _averaged(contributions, [c.share for c in contributions])
    having = mean.A.new_zeros(mean.rank)
    for c in contributions:
        having[c.first : c.first + c.term.rank] += c.share
    return LowRank(mean.B, mean.A / having[:, None])


def _averaged(contributions: Sequence[Contribution], weights: Sequence[float]) -> LowRank:
    """Average B and A with ``weights``, taking zeros beyond a holder's own rank."""
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
    """Restart with the leading directions of ``total``, as many as the largest rank; B takes the singular values."""
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
    """Rescale the factors so that rows of ``A`` are about as long as fresh ones, ``1 / sqrt(3)``.

    The product stays: the scales are powers of two, so nothing is rounded.
    """
    lengths = torch.linalg.vector_norm(term.A, dim=1)
    powers = torch.where(lengths > 0, (3**-0.5 / lengths).log2().round(), 0.0)
    return LowRank(torch.ldexp(term.B, -powers), torch.ldexp(term.A, powers[:, None]))


@dataclass(frozen=True)
class Aggregation:
    """A rule, and its properties that the rest of hsplit depends on.

    Attributes:
        rule: the rule.
        keeps_residual: whether anything joins the residual at a round's end; if not, plans reserve no memory for one.
        truncates: whether holders lose the part of the common restart that their ranks have no room for.
        decomposes: whether it takes singular value decompositions, which cost memory and time.
        freezes: whether holders keep that part frozen beside their adapters. It is then among the rule's
            contributions.
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
    "florist": Aggregation(thresholded_products),
    "fedplora": Aggregation(averaged_directions, decomposes=False, freezes=True),
    "none": Aggregation(continued, keeps_residual=False, decomposes=False),
}


def find_aggregation(name: str) -> Aggregation:
    """Find a policy's aggregation; a user's own is an ``Aggregation``, or a rule that may use the residual.

    Raises:
        InputError: there is none of that name.
    """
    found = find_part(name, AGGREGATIONS, "policy: aggregation", Aggregation)
    return found if isinstance(found, Aggregation) else Aggregation(found)


Ranks = Mapping[str, Mapping[str, int]]
"""Ranks by holder and weight."""


class Aggregator:
    """Keeps ``R_w`` and the common restart of every adapted weight.

    Args:
        shapes: every adapted weight of the model.
        job, policy: the run's settings.
        master: dtype of what is kept: fp32, or fp64 in fp64 runs.
        merges: whether holders merge the residual into a working weight, and therefore need it whole at each change.
    """

    def __init__(
        self, shapes: Sequence[LinearShape], job: Job, policy: Policy, master: torch.dtype, *, merges: bool
    ) -> None:
        self._reinit, self._merges, self._wait = policy.reinit, merges, policy.pace.residual_wait
        dtype = resolve_dtype(job.dtype)
        self._sent, self._master = exchange_dtype(policy, dtype), master
        self._aggregation = find_aggregation(policy.aggregation)
        cap = None if job.residual.max_rank == "full" else job.residual.max_rank
        # A quantized base's holders narrow what they get to the dtype that they compute in, so that it may be narrowed
        # before. A dense base forms its working weight in fp32 and rounds it to bf16: factors of the residual that
        # were rounded err far below that, and go so where adapters do.
        sent = dtype if not merges or self._sent is not None else master
        self.residuals = {shape.name: Residual(shape.d_out, shape.d_in, cap, master, sent) for shape in shapes}
        self._common: dict[str, LowRank] = {}
        self._restarts: dict[tuple[str, int], LowRank] = {}

    def aggregate(self, held: Sequence[HeldAdapters], absent: Ranks | None = None, last: bool = False) -> float:
        """Aggregate every weight over its holders.

        Args:
            held: every holder's adapters at the end of the round; they continue at the same ranks.
            absent: ranks, by holder and weight, of holders that sent no adapter and follow the others' result; 0 for a
                client that computes with a weight without training it.
            last: no round follows, so that no change may wait any longer.

        Returns:
            The largest part of a residual that its cap cut, as a relative Frobenius norm.
        """
        cut = 0.0
        before, self._common = self._common, {}
        for name, residual in self.residuals.items():
            holders = [h for h in held if name in h.terms]
            tokens = [h.tokens.get(h.layers[name], 0) for h in holders]
            total = sum(tokens)
            if total == 0:
                # Not trained: the adapters still are what they restarted with, and do so again.
                if name in before:
                    self._common[name] = before[name]
                if last:
                    residual.release()
                continue
            # Freed before the next one is made, so that two sets of restarts are never in memory together.
            began = before.pop(name, None)
            contributions = [
                Contribution(h.terms[name].on("cpu").to(self._master), count / total)
                for h, count in zip(holders, tokens, strict=True)
                if count
            ]
            if began is not None and self._aggregation.freezes:
                contributions += _frozen(began, contributions)
            others = _ranks_of(name, absent or {})
            ranks = (*(h.terms[name].rank for h in holders), *others)
            outcome = self._aggregation.rule(contributions, self._restart(residual, ranks))
            if self._sent is not None:
                outcome = rounded(outcome, self._sent, self._aggregation.keeps_residual)
            allowed = 0.0 if last or not self._wait or outcome.common is None else self._wait * norm(outcome.common)
            cut = max(cut, residual.join(outcome.residual, self._beside(outcome.common, ranks), allowed))
            if outcome.common is not None:
                self._common[name] = outcome.common
        return cut

    def fit_restarts(self, next_ranks: Ranks) -> tuple[float, set[str]]:
        """Make the common restarts fit holders of other ranks: what no longer fits joins the residual (law E4).

        An aggregation that truncates leaves them as they are: its holders take what they have room for.

        Args:
            next_ranks: ranks of the next holders; their adapters have not been trained since the last aggregation.

        Returns:
            The largest cut, as :meth:`aggregate` does, and the weights that change for every holder.
        """
        cut, changed = 0.0, set[str]()
        if self._aggregation.truncates:
            return cut, changed
        for name, common in list(self._common.items()):
            residual, ranks = self.residuals[name], _ranks_of(name, next_ranks)
            room = self._restart(residual, ranks).kept
            # Exact for any factors: the sum of what stays and what joins the residual is what was there.
            stays, joins = (common, None) if common.rank <= room else (common.up_to_rank(room), common.from_rank(room))
            beside = self._beside(stays, ranks)
            if joins is None and residual.has_room(beside):
                continue
            cut = max(cut, residual.join_everywhere(joins, beside))
            changed.add(name)
            if room:
                self._common[name] = stays
            else:
                del self._common[name]
        return cut, changed

    def _restart(self, residual: Residual, ranks: tuple[int, ...]) -> Restart:
        # Half of the directions that holders keep room for: what restarts is the leading part.
        spare = (residual.cap or 0) // 2 if self._aggregation.freezes else 0
        return Restart(self._reinit, ranks, spare)

    def _beside(self, common: LowRank | None, ranks: tuple[int, ...]) -> int:
        """Count the directions of ``common`` that the holder of the smallest rank keeps frozen beside the residual."""
        if common is None or not ranks or not self._aggregation.freezes:
            return 0
        return max(0, common.rank - min(ranks))

    @property
    def lag(self) -> float:
        """Largest part of a weight's aggregated adapters that its holders lack of the residual: at most ``wait``."""
        waiting = [(self.residuals[name].lag, common) for name, common in self._common.items()]
        return max((lag / norm(common) for lag, common in waiting if lag), default=0.0)

    def update_for(self, round_: int, ranks: Mapping[str, int], whole: Iterable[str] = ()) -> RoundUpdate:
        """Make a holder's update for ``round_``: changes since :meth:`mark_sent` that do not wait, and restarts.

        Args:
            ranks: its rank by weight name.
            whole: weights whose residual it does not have yet.
        """
        new = set(whole)
        freezes = self._aggregation.freezes
        changes = {
            n: self.residuals[n].update(n in new, self._common.get(n) if freezes else None, rank, self._merges)
            for n, rank in ranks.items()
        }
        restarting = {n: (self._common[n], rank) for n, rank in ranks.items() if rank and n in self._common}
        common = {n: self._restart_as_sent(n, term, rank) for n, (term, rank) in restarting.items()}
        return RoundUpdate(round_, {n: change for n, change in changes.items() if change is not None}, common)

    def _restart_as_sent(self, name: str, term: LowRank, rank: int) -> LowRank:
        """Make the part of a restart that a holder of ``rank`` takes, in the exchange's format."""
        if self._sent is None:
            return term if term.rank <= rank else term.up_to_rank(rank)
        if (name, rank) not in self._restarts:
            # One copy for all holders of the weight with that rank.
            own = term if term.rank <= rank else term.up_to_rank(rank)
            self._restarts[name, rank] = own.to(self._sent)
        return self._restarts[name, rank]

    def mark_sent(self) -> None:
        """Record that every holder has every residual, but for changes that wait, as it is now."""
        self._restarts.clear()
        for residual in self.residuals.values():
            residual.mark_sent()

    def state(self) -> dict[str, Tensor]:
        """Return every residual and every common restart, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, residual in self.residuals.items():
            factors = residual.factors if residual.rank else None
            tensors |= LearnedTerm(factors, residual.matrix, self._common.get(name)).tensors(name)
            if residual.held is not None:
                tensors |= held_tensors(name, residual.held.factors, residual.held.matrix, residual.lag)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state`."""
        parts, held = learned_parts(tensors), held_parts(tensors)
        for name, residual in self.residuals.items():
            term = parts.get(name, LearnedTerm())
            residual.restore(term.residual, term.matrix, held.get(name))
            if term.common is not None:
                self._common[name] = term.common


def _ranks_of(name: str, ranks: Ranks) -> tuple[int, ...]:
    return tuple(own[name] for own in ranks.values() if name in own)


def _frozen(began: LowRank, contributions: Sequence[Contribution]) -> list[Contribution]:
    """Slice the restart that holders began with, by reference, into the parts that some of them had frozen."""
    ranks = {c.term.rank for c in contributions}
    stops = sorted(rank for rank in ranks | {began.rank} if rank <= began.rank)
    return [
        Contribution(
            LowRank(began.B[:, start:stop], began.A[start:stop]),
            sum(c.share for c in contributions if c.term.rank <= start),
            start,
        )
        for start, stop in pairwise(stops)
    ]
