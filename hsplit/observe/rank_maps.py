"""Importance and ranks over the rounds as heat maps of layer by weight kind, and split points as bars over rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hsplit.observe.heat_map import Cells, HeatMap, Scale, Strip, heat_maps_svg
from hsplit.observe.plan_history import PlanHistory
from hsplit.observe.wording import kind_labels, weight_place
from hsplit.scheduling.plan import HolderPlan, Plan

MAX_MAPS = 8
"""Maps beside one another; more would not be legible."""
_NO_PROBE = "equal: no probe yet"
_SPAN = 100.0
"""From the largest share down to which part of it shares are told apart."""


@dataclass(frozen=True)
class HolderGroup:
    """Holders that share a heat map: the mean of the ranks of those that hold a weight is drawn."""

    label: str
    names: frozenset[str]

    def of(self, plan: Plan) -> list[HolderPlan]:
        """The group's holders that take part in ``plan``."""
        return [holder for holder in (plan.server, *plan.available) if holder.name in self.names]


def rounds_shown(history: PlanHistory, limit: int = MAX_MAPS) -> tuple[int, ...]:
    """The rounds of ``history.changed`` to draw: all, or at most ``limit``, the first, the last and others between.

    Those between are spread evenly; where one with a new plan is about as near as a mere probe, it is the one.
    """
    changed = history.changed
    if len(changed) <= limit:
        return changed
    first, last = changed[0], changed[-1]
    apart = (last - first) / (limit - 1)
    shown = {first, last}
    for number in range(1, limit - 1):
        wanted = first + number * apart
        near = [done for done in history.plans if abs(done - wanted) <= apart / 2]
        shown.add(min(sorted(near) or changed, key=lambda done: abs(done - wanted)))
    return tuple(sorted(shown))


def after_text(done: int) -> str:
    """When a plan came in force or a probe was made: ``at the start``, ``after round 3``."""
    return f"after round {done}" if done else "at the start"


def mean_ranks(holders: Iterable[HolderPlan]) -> dict[str, float]:
    """By weight name, the mean rank over those of ``holders`` that train the weight, at least one."""
    held: dict[str, list[int]] = {}
    for holder in holders:
        for weight, rank in holder.ranks.items():
            if rank > 0:
                held.setdefault(weight, []).append(rank)
    return {weight: sum(ranks) / len(ranks) for weight, ranks in held.items()}


class RankMaps:
    """The heat maps of a run; all on the same scales, so that they can be compared.

    Args:
        history: at least one plan in it.
        groups: whose ranks are drawn, the server among them.
    """

    def __init__(self, history: PlanHistory, groups: Sequence[HolderGroup]) -> None:
        self.shown = rounds_shown(history)
        self._history = history
        plans = list(history.plans.values())
        self._layers = max(plan.layers for plan in plans)
        self._kinds = _kinds(plans, history)
        self._means = {
            (group.label, done): mean_ranks(group.of(plan)) if (plan := history.plan_after(done)) else {}
            for group in groups
            for done in self.shown
        }
        self._ranks = _rank_scale(max((rank for means in self._means.values() for rank in means.values()), default=1))
        shares = [
            share for done in self.shown for share in (history.importance_after(done) or {}).values() if share > 0
        ]
        self._importance = _share_scale(min(shares), max(shares)) if shares else None

    def svg(self, groups: Sequence[HolderGroup], key: str, importance: bool = False) -> str:
        """A strip of maps over the rounds for each of ``groups``, below the importance if it is asked for and known."""
        strips, named = [], []
        if importance and self._importance:
            strips.append(self._importance_strip(self._importance))
            named.append("normalized importance")
        for group in groups:
            strips.append(self._rank_strip(group, titled=not strips))
            named.append(f"ranks of {group.label}")
        label = f"{' and '.join(named)} by layer and weight kind over rounds"
        columns = kind_labels(self._kinds)
        return heat_maps_svg(strips, self._layers, columns, key, label)

    def _importance_strip(self, scale: Scale) -> Strip:
        maps = [
            HeatMap(after_text(done), self._cells(self._history.importance_after(done) or {}), _NO_PROBE)
            for done in self.shown
        ]
        return Strip("importance", maps, scale)

    def _rank_strip(self, group: HolderGroup, titled: bool) -> Strip:
        maps = []
        for done in self.shown:
            cells = self._cells(self._means[group.label, done])
            note = "none takes part" if self._history.plan_after(done) else "no plan known"
            maps.append(HeatMap(after_text(done) if titled else self._since(done), cells, note))
        return Strip(f"ranks, {group.label}", maps, self._ranks)

    def _since(self, done: int) -> str:
        """Since when the plan that is drawn at ``done`` has been in force; nothing to say of the first at the start."""
        made = max((other for other in self._history.plans if other <= done), default=None)
        if made is None or done == 0:
            return ""
        return "new plan" if made == done else f"since round {made}" if made else "since the start"

    def _cells(self, values: Mapping[str, float]) -> Cells:
        columns = {kind: column for column, kind in enumerate(self._kinds)}
        cells = {}
        for weight, value in values.items():
            place = weight_place(weight)
            if place is not None and place[0] < self._layers:
                cells[place[0], columns[place[1]]] = value
        return cells


def _kinds(plans: Iterable[Plan], history: PlanHistory) -> list[str]:
    """The weight kinds in the order in which a layer has them."""
    kinds: dict[str, None] = {}
    held = [holder.ranks for plan in plans for holder in (plan.server, *plan.clients)]
    for weights in (*history.importance.values(), *held):
        kinds |= dict.fromkeys(place[1] for place in map(weight_place, weights) if place is not None)
    return list(kinds)


def _rank_scale(top: float) -> Scale:
    """Shades in proportion to ``g(r) = log2(1 + r)``, what a rank captures (METHOD 5)."""
    highest = max(math.ceil(top), 1)
    # a power of two next to the highest rank would be written over it
    powers = [2**n for n in range(highest.bit_length()) if 2**n * 1.3 < highest]
    ticks = [(float(rank), str(rank)) for rank in (*powers, highest)]
    span = math.log2(1 + highest) - 1 or 1.0  # rank 1, the lowest there is, has g = 1
    return Scale("rank", "cividis", lambda rank: (math.log2(1 + rank) - 1) / span, ticks)


def _share_scale(lowest: float, highest: float) -> Scale:
    """Shades by the logarithm of the share: a few weights have many times the importance of most."""
    low = max(lowest, highest / _SPAN)
    span = math.log(highest / low) or 1.0
    decades = range(math.floor(math.log10(low * 100)), math.ceil(math.log10(highest * 100)) + 1)
    round_shares = [digit * 10.0**power / 100 for power in decades for digit in (1, 2, 5)]
    ticks = [share for share in round_shares if low <= share <= highest]
    named = ticks if len(ticks) > 1 else sorted({low, highest})
    return Scale(
        "share of the total (%)",
        "viridis",
        lambda share: math.log(max(share, low) / low) / span,
        [(share, f"{share * 100:.2g}") for share in named],
    )
