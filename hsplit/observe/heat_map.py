"""Heat maps beside one another, with a colour bar a row, as small SVGs: one path a shade instead of one a cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hsplit.observe.inline_svg import GRID, drawing_style, inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path

SHADES = 32
"""How many shades a scale has; finer ones would not be told apart."""
_LEAST_COLUMNS = 4
_WIDTH_IN = 9.5
_LAYER_IN = 0.075
_LEAST_IN, _MOST_IN = 1.1, 4.8

Cells = Mapping[tuple[int, int], float]
"""Values by row and column, both from 0; a cell without a value is left blank."""


@dataclass(frozen=True)
class Scale:
    """How values become colours.

    Attributes:
        label: what the values are, with their unit.
        colours: name of a matplotlib map that colour-blind readers can read.
        shade: from a value to 0 (lowest) to 1 (highest).
        ticks: the values that the colour bar names, and how.
    """

    label: str
    colours: str
    shade: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class HeatMap:
    """One map: what is written above it, and its cells; ``note`` is written across a map without any."""

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
    """``strips`` below one another; a map has ``rows`` rows, the decoder layers from 0, and the named columns.

    Args:
        strips: each with as many maps as the others.
        rows: decoder layers of the model.
        columns: a short name each.
        key, label: see :func:`inline_svg`.
    """
    from matplotlib.figure import Figure

    used = len(strips[0].maps)
    # a few maps are not drawn wider than more would be: what is left stays empty, right of the colour bar
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
        shades = {place: scale.shade(value) for place, value in each.cells.items()}
        _fill(axes, shades, scale)
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
    """A colour bar: a column of ``SHADES`` cells, the highest on top."""
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


def _fill(axes: Axes, shades: Mapping[tuple[int, int], float], scale: Scale) -> None:
    """One path for all cells of a shade: a map of 80 layers would else weigh a megabyte."""
    from matplotlib import colormaps
    from matplotlib.patches import PathPatch

    colours = colormaps[scale.colours]
    steps = {place: min(int(min(max(shade, 0.0), 1.0) * SHADES), SHADES - 1) for place, shade in shades.items()}
    for step in sorted(set(steps.values())):
        cells = sorted((column, row) for (row, column), other in steps.items() if other == step)
        colour = colours((step + 0.5) / SHADES)
        # the thin edge covers the seam at which the page would else shine through between neighbours
        axes.add_patch(PathPatch(_outline(cells), facecolor=colour, edgecolor=colour, linewidth=0.3, clip_on=False))


def _outline(cells: Sequence[tuple[int, int]]) -> Path:
    """Rectangles around ``cells`` (column, row), one for each run of neighbours in a column."""
    from matplotlib.path import Path

    corners: list[tuple[float, float]] = []
    codes: list[Any] = []
    for column, first, last in _runs(cells):
        left, right, top, bottom = column - 0.5, column + 0.5, first - 0.5, last + 0.5
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(corners, codes)


def _runs(cells: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Column, first and last row of each run in ``cells``, which are in order."""
    column, first = cells[0]
    last = first - 1
    for next_column, row in cells:
        if next_column != column or row != last + 1:
            yield column, first, last
            column, first = next_column, row
        last = row
    yield column, first, last
