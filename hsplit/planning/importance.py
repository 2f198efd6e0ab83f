"""Importance of each weight (METHOD 3): scores from what probes report, and their history.

A score is a number, which ``log2(1 + rank)`` multiplies, or a curve: what the first 1, 2, … of the weight's directions
are worth together, concave and never falling, beyond whose end a rank adds nothing.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from hsplit.config.section import EXACT
from hsplit.errors import InputError
from hsplit.extension import find_part
from hsplit.lora.importance_probe import Score
from hsplit.models.spec import LinearShape

# The blend's eps, as a part of the mean score: a weight with less history than that has as good as none.
RELATIVE_EPS = 1e-8


@dataclass(frozen=True)
class ImportanceReport:
    """Importance of one holder's weights for one client: the scalars that leave the holder (METHOD 3).

    Attributes:
        client: the client that the probe batch and its mean loss belong to.
        tokens: supervised tokens of that batch, the weight of these sums in the mean over clients.
        scores: by weight name: ``sum_ij |W_ij G_ij|``, or the gradient's largest singular values, falling.
    """

    client: str
    tokens: int
    scores: dict[str, Score]
    __pydantic_config__ = EXACT


def size_of(score: Score) -> float:
    """Return a score as one number: a curve's end."""
    return score[-1] if isinstance(score, tuple) else score


def rounded(score: Score) -> Score:
    """Round a score to six digits: what follows is the rounding of sums in another order, and decides no plan."""
    if isinstance(score, tuple):
        return tuple(float(f"{value:.6g}") for value in score)
    return float(f"{score:.6g}")


def mean_score(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """Average scores of one weight, all of them numbers or curves of one length."""
    if isinstance(scores[0], tuple):
        curves = [score for score in scores if isinstance(score, tuple)]
        return tuple(math.fsum(w * v for w, v in zip(weights, at, strict=True)) for at in zip(*curves, strict=True))
    return math.fsum(w * size_of(score) for w, score in zip(weights, scores, strict=True))


def mean_report(reports: Sequence[ImportanceReport], weights: Collection[str]) -> ImportanceReport | None:
    """Join the reports of many clients into one that gives the same :func:`scores`.

    Args:
        reports: of every client, from every holder of its layers; those of a client that lack a weight do not count.
        weights: names of all that are adapted.

    Returns:
        Token-weighted means, of no client in particular; ``None`` if nothing is left, or is not finite, or above 0.
    """
    sums: dict[str, dict[str, Score]] = defaultdict(dict)
    for report in reports:
        if report.tokens:
            sums[report.client].update(report.scores)
    whole = {
        report.client: report.tokens for report in reports if weights and sums[report.client].keys() >= set(weights)
    }
    total = sum(whole.values())
    if not whole or not total:
        return None
    parts = [tokens / total for tokens in whole.values()]
    mean = {name: mean_score([sums[client][name] for client in whole], parts) for name in weights}
    sizes = [size_of(score) for score in mean.values()]
    return ImportanceReport("", total, mean) if all(map(math.isfinite, sizes)) and any(sizes) else None


Metric = Callable[[Mapping[str, Any], Sequence[LinearShape]], Mapping[str, Score]]
"""Gives scores by weight name, from raw sums ``sum |W G|`` by weight name (``spectral``: spectra), and the weights."""


def equal_importance(shapes: Sequence[LinearShape]) -> dict[str, Score]:
    """Give equal importance per parameter, ``d_in d_out`` by weight name: ``H_w`` before any score exists."""
    return {s.name: float(s.parameters) for s in shapes}


def gradient_weight_product(sums: Mapping[str, float], shapes: Sequence[LinearShape]) -> dict[str, Score]:
    """RNGWP: ``sum_ij |W_ij G_ij|`` by weight name.

    The allocation resource-normalizes it: it ranks weights by their gain per byte, so that a rank's cost counts once.
    """
    return {s.name: sums[s.name] for s in shapes}


def spectral(spectra: Mapping[str, Sequence[float]], shapes: Sequence[LinearShape]) -> dict[str, Score]:
    """Give each weight a curve: the fall of the loss by the best step of each rank, in one unit for all weights.

    The best step of rank ``r`` and of given size lowers the loss in proportion to the root of the sum of the ``r``
    largest squared singular values of the gradient (METHOD 3).

    Args:
        spectra: singular values of each weight's gradient, falling.
        shapes: the weights.
    """
    return {s.name: tuple(map(math.sqrt, accumulate(value**2 for value in spectra[s.name]))) for s in shapes}


def _equal(sums: Mapping[str, Any], shapes: Sequence[LinearShape]) -> dict[str, Score]:
    return equal_importance(shapes)


# A further metric is one function and one line.
IMPORTANCE: dict[str, Metric] = {
    "rngwp": gradient_weight_product,
    "spectral": spectral,
    "equal": _equal,
}


def find_metric(name: str) -> Metric:
    """Find the metric that a policy names; a user's own has the same form.

    Raises:
        InputError: there is none of that name.
    """
    found: Metric = find_part(name, IMPORTANCE, "policy: importance: metric")
    return found


def scores(
    reports: Sequence[ImportanceReport], shapes: Sequence[LinearShape], metric: str = "rngwp"
) -> dict[str, Score]:
    """Compute ``I_w`` of one probe: the metric of the mean over clients, weighted by their supervised tokens.

    Args:
        reports: of every client, from every holder of its layers.
        shapes: every adapted weight.
        metric: a name in :data:`IMPORTANCE`, or ``package.module:name``.

    Returns:
        A score by weight name, in the order of ``shapes``.

    Raises:
        FloatingPointError: a sum is not finite: training has diverged.
        InputError: the metric gives a weight a score that is not finite or below 0, or gives all of them 0.
        ValueError: a weight has no sum or two sums for some client, or no client had a supervised token.
    """
    sums: dict[str, dict[str, Score]] = defaultdict(dict)
    tokens: dict[str, int] = {}
    for report in reports:
        tokens[report.client] = report.tokens
        twice = sums[report.client].keys() & report.scores.keys()
        if twice:
            raise ValueError(f"importance: reported twice for {report.client}: {', '.join(sorted(twice))}")
        sums[report.client].update(report.scores)
    total = sum(tokens.values())
    if not total:
        raise ValueError("importance: no client had a supervised token in its probe")
    for client, own in sums.items():
        missing = [s.name for s in shapes if s.name not in own]
        if missing:
            raise ValueError(f"importance: missing for {client}: {', '.join(missing)}")
        infinite = [s.name for s in shapes if not _finite(own[s.name])]
        if infinite:
            raise FloatingPointError(f"the importance of {infinite[0]} for {client} is not finite")
    parts = [tokens[client] / total for client in sums]
    mean = {s.name: mean_score([own[s.name] for own in sums.values()], parts) for s in shapes}
    found = find_metric(metric)(mean, shapes)
    scored = {s.name: _as_score(found.get(s.name, math.nan)) for s in shapes}
    if not all(map(_is_gain, scored.values())) or not any(map(size_of, scored.values())):
        must = (
            "must give every weight a finite score of at least 0, or a concave curve of such that never falls,"
            " not all of them 0"
        )
        raise InputError(f"policy: importance: metric: {metric} {must}")
    return scored


def _as_score(found: float | Sequence[float]) -> Score:
    return tuple(map(float, found)) if isinstance(found, Sequence) else float(found)


def _finite(score: Score) -> bool:
    return all(map(math.isfinite, score)) if isinstance(score, tuple) else math.isfinite(score)


def _is_gain(score: Score) -> bool:
    """True for a number of at least 0, or a concave curve that begins at one and never falls."""
    if not isinstance(score, tuple):
        return math.isfinite(score) and score >= 0
    gains = increments_of(score)
    rounding = 1e-9 * sum(gains)
    falling = all(after <= before + rounding for before, after in pairwise(gains))
    return bool(gains) and _finite(score) and falling and gains[-1] >= -rounding


def increments_of(score: Score) -> tuple[float, ...]:
    """Return what each direction of a curve adds; a number is one direction."""
    if not isinstance(score, tuple):
        return (score,)
    return tuple(after - before for before, after in pairwise((0.0, *score)))


class ImportanceHistory:
    """``H_w``: present and past importance, blended over the rounds (METHOD 3).

    The present counts more early in training, and less where it jumps::

        nu_t  = |I_t - H_{t-1}| / (H_{t-1} + eps)
        lam_t = clip(lam_0 (1 - t/T) / (1 + nu_t), lam_min, 1)
        H_t   = lam_t I_t + (1 - lam_t) H_{t-1},   H_0 = I_0

    ``eps`` is 1e-8 of the mean of ``H_{t-1}``, so that the unit of the scores does not matter.

    Args:
        rounds: ``T``, at least 1.
        lam_0: weight of the present at the start, 0 to 1.
        lam_min: least weight of the present, 0 to 1.

    Attributes:
        scores: ``H_w`` by weight name; empty before the first blend.
    """

    def __init__(self, rounds: int, lam_0: float = 0.9, lam_min: float = 0.1) -> None:
        if rounds < 1 or not 0 <= lam_min <= 1 or not 0 <= lam_0 <= 1:
            raise ValueError(f"rounds must be at least 1, lam_0 and lam_min in [0, 1]: {rounds}, {lam_0}, {lam_min}")
        self._rounds, self._lam_0, self._lam_min = rounds, lam_0, lam_min
        self.scores: dict[str, Score] = {}

    def blend(self, round_: int, current: Mapping[str, Score]) -> dict[str, Score]:
        """Blend in the scores ``I_t`` of round ``t`` (``round_``) and return ``H_t``, both by weight name.

        Raises:
            ValueError: the weights are not those of the history.
        """
        if not self.scores:
            self.scores = dict(current)
            return dict(self.scores)
        if current.keys() != self.scores.keys():
            differing = ", ".join(sorted(current.keys() ^ self.scores.keys()))
            raise ValueError(f"importance: in the new scores or in the history, not in both: {differing}")
        eps = max(RELATIVE_EPS * math.fsum(map(size_of, self.scores.values())) / len(self.scores), sys.float_info.min)
        weight = self._lam_0 * (1 - round_ / self._rounds)
        for name, past in self.scores.items():
            # A curve moves as a whole, so that it stays concave.
            fluctuation = abs(size_of(current[name]) - size_of(past)) / (size_of(past) + eps)
            lam = min(max(weight / (1 + fluctuation), self._lam_min), 1.0)
            self.scores[name] = mean_score([current[name], past], [lam, 1 - lam])
        return dict(self.scores)

    def moved(self, since: Mapping[str, Score]) -> float:
        """L1 distance from ``since`` (scores by the same names), each normalized to sum 1: from 0 to 2.

        Between curves it is that of all their directions. Between a curve and a number, which says nothing of
        directions, it is that of their sizes.
        """
        alike = all(isinstance(score, tuple) == isinstance(since[name], tuple) for name, score in self.scores.items())
        now, then = (_shares(scores, alike) for scores in (self.scores, since))
        return math.fsum(abs(share - then.get(of, 0.0)) for of, share in now.items())

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {"rounds": self._rounds, "lam_0": self._lam_0, "lam_min": self._lam_min, "scores": dict(self.scores)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ImportanceHistory:
        """Read what :meth:`to_json` made."""
        history = ImportanceHistory(data["rounds"], data["lam_0"], data["lam_min"])
        history.scores = {name: _as_score(score) for name, score in data["scores"].items()}
        return history


def _shares(scores: Mapping[str, Score], by_direction: bool) -> dict[tuple[str, int], float]:
    """Return the share of each weight, or of each direction of it, in the sum of all, by name and direction."""
    parts = {
        (name, place): part
        for name, score in scores.items()
        for place, part in enumerate(increments_of(score) if by_direction else (size_of(score),))
    }
    total = math.fsum(parts.values())
    return {of: part / total if total else 0.0 for of, part in parts.items()}
