"""matplotlib figures as SVG elements that can stand in one HTML page together, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Draw with this colour what shall have the page's text colour."""
GRID = "#040506"
"""Draw with this colour what shall have the page's line colour."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_PAGE_COLOURS = {INK: "currentColor", GRID: "var(--line)"}
_REFERENCE = re.compile(r"url\(#")
_FINE_DIGITS = re.compile(r"(\.\d\d)\d+")

_STYLE = {
    "svg.fonttype": "none",  # text stays text: to be selected, searched and read aloud
    "font.family": "DejaVu Sans",  # measured with what matplotlib brings, shown in the page's own font
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def drawing_style() -> Iterator[None]:
    """The style of the report's figures, to draw in; matplotlib's settings are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # wants its own literals of the keys
        yield


def inline_svg(figure: Figure, key: str, label: str) -> str:
    """``figure`` as an ``<svg>`` element that scales with the page and refers to nothing outside it.

    Args:
        figure: drawn in ``drawing_style``, with ``INK`` and ``GRID`` for the page's colours.
        key: unique in the page, of letters, digits and dashes; starts every id of the element.
        label: what the figure shows, for who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for parent in root.iter():
        # a style sheet inside would hold for the whole page
        for style in parent.findall(f"{{{_SVG}}}style"):
            parent.remove(style)
    for element in root.iter():
        _adapt(element, key)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


def literal(name: str) -> str:
    """``name`` without what matplotlib takes for mathematics, or for a label to leave out of a legend."""
    return f"\u200b{name}".replace("$", r"\$") if name.startswith("_") else name.replace("$", r"\$")


def _adapt(element: ElementTree.Element, key: str) -> None:
    for name, value in element.attrib.items():
        if name == "id":
            value = f"{key}-{value}"
        elif name == _XLINK:
            value = value.replace("#", f"#{key}-", 1)
        elif name == "d":
            # a hundredth of a point is not seen, and most of a heat map's bytes would be finer digits
            value = _FINE_DIGITS.sub(r"\1", value)
        else:
            value = _REFERENCE.sub(f"url(#{key}-", value)
        if name in ("style", "fill", "stroke"):
            for drawn, page in _PAGE_COLOURS.items():
                value = value.replace(drawn, page)
        element.set(name, value)
