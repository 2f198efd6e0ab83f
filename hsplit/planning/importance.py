"""Importance of each weight (METHOD 3): scores from the sums that probes report, and their history."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.config.section import EXACT
from hsplit.errors import InputError
from hsplit.extension import find_part
from hsplit.models.spec import LinearShape

# fp32 parameter, gradient and two Adam moments (METHOD 3).
BYTES_PER_PARAMETER = 16

# The blend's eps, as a part of the mean score: a weight with less history than that has as good as none.
RELATIVE_EPS = 1e-8


@dataclass(frozen=True)
class ImportanceReport:
    """Importance of one holder's weights for one client: the scalars that leave the holder (METHOD 3).

    Attributes:
        client: the client that the probe batch and its mean loss belong to.
        tokens: supervised tokens of that batch, the weight of these sums in the mean over clients.
        scores: ``sum_ij |W_ij G_ij|`` by weight name, not yet divided by ``cost_w``.
    """

    client: str
    tokens: int
    scores: dict[str, float]
    __pydantic_config__ = EXACT


def mean_report(reports: Sequence[ImportanceReport], weights: Collection[str]) -> ImportanceReport | None:
    """Join the reports of many clients into one that gives the same :func:`scores`.

    Args:
        reports: of every client, from every holder of its layers; those of a client that lack a weight do not count.
        weights: names of all that are adapted.

    Returns:
        Token-weighted means, of no client in particular; ``None`` if nothing is left, or is not finite, or above 0.
    """
    sums: dict[str, dict[str, float]] = defaultdict(dict)
    for report in reports:
        if report.tokens:
            sums[report.client].update(report.scores)
    whole = {
        report.client: report.tokens for report in reports if weights and sums[report.client].keys() >= set(weights)
    }
    total = sum(whole.values())
    mean = {name: sum(tokens / total * sums[client][name] for client, tokens in whole.items()) for name in weights}
    useful = total and all(map(math.isfinite, mean.values())) and any(mean.values())
    return ImportanceReport("", total, mean) if useful else None


# Gives scores by weight name, from raw sums ``sum |W G|`` by weight name, and the weights.
Metric = Callable[[Mapping[str, float], Sequence[LinearShape]], dict[str, float]]


def equal_importance(shapes: Sequence[LinearShape]) -> dict[str, float]:
    """Give equal importance per parameter, over the bytes to adapt the weight: ``H_w`` before any score exists.

    Returns:
        ``parameters / cost_w`` by weight name, with ``cost_w = 16 (d_in + d_out)`` bytes per unit of rank.
    """
    return {s.name: s.parameters / _cost_bytes(s) for s in shapes}


def resource_normalized(sums: Mapping[str, float], shapes: Sequence[LinearShape]) -> dict[str, float]:
    """RNGWP: ``sum_ij |W_ij G_ij| / cost_w`` by weight name, with ``cost_w = 16 (d_in + d_out)``."""
    return {s.name: sums[s.name] / _cost_bytes(s) for s in shapes}


def _equal(sums: Mapping[str, float], shapes: Sequence[LinearShape]) -> dict[str, float]:
    return equal_importance(shapes)


# A further metric is one function and one line.
IMPORTANCE: dict[str, Metric] = {
    "rngwp": resource_normalized,
    "equal": _equal,
}


def find_metric(name: str) -> Metric:
    """Find the metric that a policy names; a user's own has the same form.

    Raises:
        InputError: there is none of that name.
    """
    found: Metric = find_part(name, IMPORTANCE, "policy: importance: metric")
    return found


def _cost_bytes(shape: LinearShape) -> int:
    return BYTES_PER_PARAMETER * (shape.d_in + shape.d_out)


def scores(
    reports: Sequence[ImportanceReport], shapes: Sequence[LinearShape], metric: str = "rngwp"
) -> dict[str, float]:
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
    sums: dict[str, dict[str, float]] = defaultdict(dict)
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
        infinite = [s.name for s in shapes if not math.isfinite(own[s.name])]
        if infinite:
            raise FloatingPointError(f"the importance of {infinite[0]} for {client} is not finite")
    mean = {s.name: sum(tokens[c] / total * own[s.name] for c, own in sums.items()) for s in shapes}
    found = find_metric(metric)(mean, shapes)
    scored = {s.name: float(found.get(s.name, math.nan)) for s in shapes}
    if not all(math.isfinite(score) and score >= 0 for score in scored.values()) or not any(scored.values()):
        must = "must give every weight a finite score of at least 0, not all of them 0"
        raise InputError(f"policy: importance: metric: {metric} {must}")
    return scored


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
        self.scores: dict[str, float] = {}

    def blend(self, round_: int, current: Mapping[str, float]) -> dict[str, float]:
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
        eps = max(RELATIVE_EPS * sum(self.scores.values()) / len(self.scores), sys.float_info.min)
        weight = self._lam_0 * (1 - round_ / self._rounds)
        for name, past in self.scores.items():
            fluctuation = abs(current[name] - past) / (past + eps)
            lam = min(max(weight / (1 + fluctuation), self._lam_min), 1.0)
            self.scores[name] = lam * current[name] + (1 - lam) * past
        return dict(self.scores)

    def moved(self, since: Mapping[str, float]) -> float:
        """L1 distance from ``since`` (scores by the same names), each normalized to sum 1: from 0 to 2."""
        now, then = _shares(self.scores), _shares(since)
        return sum(abs(share - then[name]) for name, share in now.items())

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {"rounds": self._rounds, "lam_0": self._lam_0, "lam_min": self._lam_min, "scores": dict(self.scores)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ImportanceHistory:
        """Read what :meth:`to_json` made."""
        history = ImportanceHistory(data["rounds"], data["lam_0"], data["lam_min"])
        history.scores = dict(data["scores"])
        return history


def _shares(scores: Mapping[str, float]) -> dict[str, float]:
    total = sum(scores.values())
    return {name: score / total if total else 0.0 for name, score in scores.items()}
