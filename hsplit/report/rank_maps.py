"""Importance and ranks over the rounds: heat maps of layer by weight kind, beside one another on common scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from hsplit.observe.wording import kind_labels, weight_place
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.report.figures import GRID, drawing_style, inline_svg
from hsplit.report.run_record import PlanHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MAPS = 8
"""Most maps beside one another; more would not be legible."""
SHADES = 32
"""Number of shades of a scale; finer ones could not be distinguished."""
_NO_PROBE = "equal: no probe yet"
# Shares have distinct shades from the largest down to this fraction of it.
_SPAN = 100.0
_LEAST_COLUMNS = 4
_WIDTH_IN = 9.5
_LAYER_IN = 0.075
_LEAST_IN, _MOST_IN = 1.1, 4.8

Cells = Mapping[tuple[int, int], float]
"""Values by row and column, both from 0; a cell without a value is left blank."""


# -- contents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HolderGroup:
    """Holders that share a heat map of the mean rank over those that hold a weight."""

    label: str
    names: frozenset[str]

    def of(self, plan: Plan) -> list[HolderPlan]:
        """Return the group's holders that take part in ``plan``."""
        return [holder for holder in (plan.server, *plan.available) if holder.name in self.names]


def rounds_shown(history: PlanHistory, limit: int = MAX_MAPS) -> tuple[int, ...]:
    """Return the rounds of ``history.changed`` to draw: at most ``limit``, with the first, the last and others between.

    Those between are spread evenly; a new plan is preferred to a mere probe nearby.
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
    """Format the time of a plan or a probe: ``at the start``, ``after round 3``."""
    return f"after round {done}" if done else "at the start"


def mean_ranks(holders: Iterable[HolderPlan]) -> dict[str, float]:
    """Return the mean rank by weight name, over those of ``holders`` that train the weight."""
    held: dict[str, list[int]] = {}
    for holder in holders:
        for weight, rank in holder.ranks.items():
            if rank > 0:
                held.setdefault(weight, []).append(rank)
    return {weight: sum(ranks) / len(ranks) for weight, ranks in held.items()}


class RankMaps:
    """The heat maps of a run, all on the same scales for comparison.

    Args:
        history: at least one plan in it.
        groups: the holders to draw, the server among them.
    """

    def __init__(self, history: PlanHistory, groups: Sequence[HolderGroup]) -> None:
        self.shown = rounds_shown(history)
        self._history = history
        plans = list(history.plans.values())
        self.layers = max(plan.layers for plan in plans)
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
        """Draw a strip of maps over the rounds for each of ``groups``, below the importance if requested and known."""
        strips, named = [], []
        if importance and self._importance:
            shares = [(done, self._history.importance_after(done) or {}) for done in self.shown]
            maps = [HeatMap(after_text(done), self._cells(known), _NO_PROBE) for done, known in shares]
            strips.append(Strip("importance", maps, self._importance))
            named.append("normalized importance")
        for group in groups:
            strips.append(self._rank_strip(group, titled=not strips))
            named.append(f"ranks of {group.label}")
        label = f"{' and '.join(named)} by layer and weight kind over rounds"
        return heat_maps_svg(strips, self.layers, kind_labels(self._kinds), key, label)

    def _rank_strip(self, group: HolderGroup, titled: bool) -> Strip:
        maps = []
        for done in self.shown:
            note = "none takes part" if self._history.plan_after(done) else "no plan known"
            title = after_text(done) if titled else self._since(done)
            maps.append(HeatMap(title, self._cells(self._means[group.label, done]), note))
        return Strip(f"ranks, {group.label}", maps, self._ranks)

    def _since(self, done: int) -> str:
        """Format the age of the plan drawn at ``done``; empty for the first one at the start."""
        made = max((other for other in self._history.plans if other <= done), default=None)
        if made is None or done == 0:
            return ""
        return "new plan" if made == done else f"since round {made}" if made else "since the start"

    def _cells(self, values: Mapping[str, float]) -> Cells:
        columns = {kind: column for column, kind in enumerate(self._kinds)}
        placed = [(place, value) for weight, value in values.items() if (place := weight_place(weight))]
        return {(layer, columns[kind]): value for (layer, kind), value in placed if layer < self.layers}


def _kinds(plans: Iterable[Plan], history: PlanHistory) -> list[str]:
    """Return the weight kinds in their order within a layer."""
    held = [holder.ranks for plan in plans for holder in (plan.server, *plan.clients)]
    weights = chain.from_iterable((*history.importance.values(), *held))
    return list(dict.fromkeys(place[1] for place in map(weight_place, weights) if place))


# -- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Mapping of values to colours.

    Attributes:
        label: name of the values, with their unit.
        colours: name of a matplotlib map that colour-blind readers can read.
        shade: from a value to 0 (lowest) to 1 (highest).
        ticks: the values that the colour bar names, and their texts.
    """

    label: str
    colours: str
    shade: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def _rank_scale(top: float) -> Scale:
    """Shades in proportion to ``g(r) = log2(1 + r)``, the value of a rank (METHOD 5)."""
    highest = max(math.ceil(top), 1)
    # the label of a power of two next to the highest rank would overlap it
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


# -- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeatMap:
    """One map with a title and cells; ``note`` is written across a map without any."""

    title: str
    cells: Cells
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """Maps beside one another on one scale, named at the left."""

    label: str
    maps: Sequence[HeatMap]
    scale: Scale


def heat_maps_svg(strips: Sequence[Strip], rows: int, columns: Sequence[str], key: str, label: str) -> str:
    """Draw ``strips`` below one another; a map has ``rows`` rows, the decoder layers from 0, and the named columns.

    Args:
        strips: each with as many maps as the others.
        rows: decoder layers of the model.
        columns: a short name each.
        key, label: see :func:`inline_svg`.
    """
    from matplotlib.figure import Figure

    used = len(strips[0].maps)
    # a few maps are not drawn wider than many would be: the space right of the colour bar stays empty
    widths = [*[1.0] * used, 0.12, *[1.0] * (_LEAST_COLUMNS - used)]
    height = min(max(_LAYER_IN * rows, _LEAST_IN), _MOST_IN)
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_IN, len(strips) * (height + 0.85)), layout="constrained")
        grid = figure.subplots(len(strips), len(widths), squeeze=False, width_ratios=widths)
        for strip, places in zip(strips, grid, strict=True):
            for index, (each, axes) in enumerate(zip(strip.maps, places, strict=False)):
                _draw_map(axes, each, strip.scale, rows, columns, f"{strip.label}\nlayer" if index == 0 else "")
            _draw_bar(places[used], strip.scale)
            for axes in places[used + 1 :]:
                axes.set_visible(False)
        return inline_svg(figure, key, label)


def _draw_map(axes: Axes, each: HeatMap, scale: Scale, rows: int, columns: Sequence[str], name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    _frame(axes)
    axes.set_title(each.title, fontsize=8)
    axes.set_xlim(-0.5, max(len(columns), 1) - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    if each.cells:
        _fill(axes, {place: scale.shade(value) for place, value in each.cells.items()}, scale)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    else:
        axes.set_xticks([])
        axes.text(0.5, 0.5, each.note, rotation=90, ha="center", va="center", transform=axes.transAxes, fontsize=8)
    if name:
        axes.set_ylabel(name)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    else:
        axes.set_yticks([])


def _draw_bar(axes: Axes, scale: Scale) -> None:
    """Draw a colour bar: a column of ``SHADES`` cells, the highest on top."""
    _frame(axes)
    _fill(axes, {(row, 0): (row + 0.5) / SHADES for row in range(SHADES)}, scale)
    axes.set_xlim(-0.5, 0.5)
    axes.set_ylim(-0.5, SHADES - 0.5)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_yticks([scale.shade(value) * SHADES - 0.5 for value, _ in scale.ticks], [text for _, text in scale.ticks])
    axes.tick_params(labelsize=7, length=0)
    axes.set_ylabel(scale.label, fontsize=8)


def _frame(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(GRID)


def _fill(axes: Axes, shades: Cells, scale: Scale) -> None:
    """Fill the cells with one path for each shade: a map of 80 layers would otherwise weigh a megabyte."""
    from matplotlib import colormaps
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import Affine2D

    colours = colormaps[scale.colours]
    steps = {place: min(int(min(max(shade, 0.0), 1.0) * SHADES), SHADES - 1) for place, shade in shades.items()}
    for step in sorted(set(steps.values())):
        corners = [(column - 0.5, row - 0.5) for (row, column), other in steps.items() if other == step]
        squares = [Path.unit_rectangle().transformed(Affine2D().translate(*corner)) for corner in corners]
        outline = Path.make_compound_path(*squares)
        colour = colours((step + 0.5) / SHADES)
        # the thin edge covers the seam between neighbours, through which the page would show
        axes.add_patch(PathPatch(outline, facecolor=colour, edgecolor=colour, linewidth=0.3, clip_on=False))
