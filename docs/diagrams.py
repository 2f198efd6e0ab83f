"""Draws the diagrams of the README and of ``docs/how-it-works.md``: ``python -m docs.diagrams``.

Each is a sketch of a mechanism; no figure in them is measured. Text is drawn as outlines, so that they look the same
everywhere, on a background of their own, so that they can be read in a dark scheme too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DIAGRAMS = Path(__file__).parent / "diagrams"

INK, MUTED, LINE, PAPER = "#1f2933", "#5b6773", "#c9d1da", "#ffffff"
CLIENT, CLIENT_PALE = "#3567a8", "#dbe7f5"
SERVER, SERVER_PALE = "#c4691c", "#fbe8d6"
LEARNED, LEARNED_PALE = "#3b8a5c", "#dcf0e4"
FROZEN = "#e4e8ed"
WIDTH = 100.0
"""Of every diagram, in its own units; its height is given in the same."""


class Sheet:
    """A drawing area ``WIDTH`` wide and ``height`` high, with the origin at the upper left."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(9.0, 9.0 * height / WIDTH))
        axes = self.figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(height, 0)
        axes.set_axis_off()
        self._axes = axes
        self.figure.patch.set_alpha(0)
        self.box(0.3, 0.3, WIDTH - 0.6, height - 0.6, PAPER, LINE, rounding=1.6)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, edge: str | None = None, rounding: float = 0.8
    ) -> None:
        shape = FancyBboxPatch(
            (x + rounding, y + rounding),
            width - 2 * rounding,
            height - 2 * rounding,
            boxstyle=f"round,pad={rounding},rounding_size={rounding}",
            facecolor=fill,
            edgecolor=edge or fill,
            linewidth=1.0,
        )
        self._axes.add_patch(shape)

    def cell(self, x: float, y: float, width: float, height: float, fill: str, edge: str = PAPER) -> None:
        self._axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=1.0))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        color: str = INK,
        size: float = 9.0,
        align: str = "center",
        bold: bool = False,
    ) -> None:
        self._axes.text(
            x, y, words, color=color, fontsize=size, ha=align, va="center", fontweight="bold" if bold else "normal"
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = INK, bend: float = 0.0) -> None:
        self._axes.add_patch(
            FancyArrowPatch(
                (x, y),
                (to_x, to_y),
                arrowstyle="-|>",
                mutation_scale=11,
                color=color,
                linewidth=1.4,
                shrinkA=0,
                shrinkB=0,
                connectionstyle=f"arc3,rad={bend}",
            )
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, color: str = LINE, style: str = "-") -> None:
        self._axes.plot([x, to_x], [y, to_y], color=color, linewidth=1.2, linestyle=style)


def _layers(sheet: Sheet, x: float, y: float, labels: list[str], fill: str, width: float = 5.4) -> float:
    """Draw a row of layers; returns the x of its end."""
    for label in labels:
        sheet.cell(x, y, width, 8, fill)
        sheet.text(x + width / 2, y + 4, label, PAPER, 8.5)
        x += width
    return x


# -- the diagrams -------------------------------------------------------------------------------------------------


def overview() -> Sheet:
    """Layers of each holder: clients of unequal depth, the server, and the scheduler that decides."""
    sheet = Sheet(47)
    clients = [("phone", 1), ("phone", 1), ("laptop", 3), ("laptop", 3), ("workstation", 6)]
    for row, (name, split) in enumerate(clients):
        y = 7.5 + 6.6 * row
        sheet.text(14.5, y + 2.3, name, CLIENT, 9, "right", bold=True)
        sheet.cell(16, y, 4.2, 4.6, LEARNED)
        sheet.text(18.1, y + 2.3, "data", PAPER, 6.5)
        for layer in range(split):
            sheet.cell(21 + 3.4 * layer, y, 3.4, 4.6, CLIENT)
        sheet.line(21.5 + 3.4 * split, y + 2.3, 50, y + 2.3, CLIENT, ":")
        sheet.arrow(50, y + 2.3, 54, y + 2.3, CLIENT)
    sheet.text(29, 4, "clients: own data, as many layers as each can carry", MUTED, 8)
    sheet.box(55, 7, 27, 33.5, SERVER_PALE, SERVER)
    sheet.text(68.5, 4, "server: the deep layers, for all at once", MUTED, 8)
    sheet.text(57, 10.5, "server", SERVER, 9, "left", bold=True)
    for layer in range(1, 8):
        joined = sum(split <= layer for _, split in clients)
        height = 4.2 * joined
        sheet.cell(57 + 3.3 * (layer - 1), 36 - height, 3.3, height, SERVER)
    sheet.text(68.5, 38.3, "layers 1 to 7, batch joined by depth", MUTED, 7)
    sheet.box(86, 7, 11.5, 15, FROZEN, LINE)
    sheet.text(91.7, 11, "scheduler", INK, 8.5, bold=True)
    sheet.text(91.7, 14.5, "split points", MUTED, 7.5)
    sheet.text(91.7, 17.5, "and ranks", MUTED, 7.5)
    sheet.box(86, 25.5, 11.5, 15, LEARNED_PALE, LEARNED)
    sheet.text(91.7, 29.5, "adapter", LEARNED, 8.5, bold=True)
    sheet.text(91.7, 33, "sum of", MUTED, 7.5)
    sheet.text(91.7, 36, "all updates", MUTED, 7.5)
    sheet.arrow(85.5, 14.5, 82.5, 14.5, MUTED)
    sheet.arrow(82.5, 33, 85.5, 33, LEARNED)
    sheet.text(68.5, 43.5, "activations go up, gradients come back; raw text stays where it is", INK, 8.5)
    return sheet


def split_and_tail() -> Sheet:
    """Places of the three segments, with the labels at the server and at the client."""
    sheet = Sheet(62)
    sheet.text(3, 5, "labels: server   (the default, as in the papers)", align="left", bold=True)
    sheet.box(3, 9, 37, 18, CLIENT_PALE, CLIENT)
    sheet.text(5, 12, "client  ·  k = 3", CLIENT, align="left", bold=True)
    sheet.text(38.5, 12, "its texts stay here", MUTED, 8, "right")
    end = _layers(sheet, 5, 16, ["embed", "0", "1", "2"], CLIENT, 7.6)
    sheet.box(58, 9, 39, 18, SERVER_PALE, SERVER)
    sheet.text(60, 12, "server", SERVER, align="left", bold=True)
    begin = 60.0
    end_of_deep = _layers(sheet, begin, 16, ["3", "4", "5", "6", "7"], SERVER, 4.6)
    _layers(sheet, end_of_deep, 16, ["norm", "head"], SERVER, 6.2)
    sheet.text(97 - 1.2, 12, "loss", MUTED, 8, "right")
    sheet.arrow(41, 17.5, 57, 17.5, CLIENT)
    sheet.text(49, 15, "activations, labels", CLIENT, 8)
    sheet.arrow(57, 22.5, 41, 22.5, SERVER)
    sheet.text(49, 25, "gradients", SERVER, 8)
    sheet.text(5 + (end - 5) / 2, 25.5, "front", MUTED, 8)
    sheet.text((begin + end_of_deep) / 2, 25.5, "deep", MUTED, 8)
    sheet.text(end_of_deep + 6.2, 25.5, "tail", MUTED, 8)

    sheet.text(3, 34, "labels: client   (a U: the tail is at home too)", align="left", bold=True)
    sheet.box(3, 38, 31, 18, CLIENT_PALE, CLIENT)
    sheet.text(5, 41, "client", CLIENT, align="left", bold=True)
    _layers(sheet, 5, 45, ["embed", "0", "1", "2"], CLIENT, 6.6)
    sheet.text(18.2, 54.5, "front", MUTED, 8)
    sheet.box(46, 38, 27, 18, SERVER_PALE, SERVER)
    sheet.text(48, 41, "server", SERVER, align="left", bold=True)
    _layers(sheet, 48, 45, ["3", "4", "5", "6", "7"], SERVER, 4.6)
    sheet.text(59.5, 54.5, "deep", MUTED, 8)
    sheet.box(83, 38, 14, 18, CLIENT_PALE, CLIENT)
    sheet.text(84.2, 41, "same client", CLIENT, 8.5, "left", bold=True)
    _layers(sheet, 84.2, 45, ["norm", "head"], CLIENT, 5.8)
    sheet.text(90, 54.5, "tail, loss, labels", MUTED, 7.5)
    for x, to_x in ((35, 45), (74, 82)):
        sheet.arrow(x, 46.5, to_x, 46.5, CLIENT if x < 50 else SERVER)
        sheet.arrow(to_x, 51.5, x, 51.5, SERVER if x < 50 else CLIENT)
        sheet.text((x + to_x) / 2, 44, "activations", CLIENT if x < 50 else SERVER, 7.5)
        sheet.text((x + to_x) / 2, 54, "gradients", SERVER if x < 50 else CLIENT, 7.5)
    return sheet


def depth_joined_batch() -> Sheet:
    """Rows of clients with unequal splits become one batch at the server."""
    sheet = Sheet(56)
    left, width, layers = 24.0, 8.0, 8
    # The deepest first, so that no arrow crosses another client's layers.
    splits = {"workstation": 6, "laptop": 3, "phone": 1}
    for layer in range(layers):
        sheet.text(left + width * (layer + 0.5), 4.5, f"layer {layer}", MUTED, 8)
    for row, (name, split) in enumerate(splits.items()):
        y = 8 + 6.5 * row
        sheet.text(left - 2, y + 2.25, f"{name}, k = {split}", CLIENT, 9, "right", bold=True)
        for layer in range(split):
            sheet.cell(left + width * layer, y, width, 4.5, CLIENT)
    bottom = 47.0
    for layer in range(layers):
        joined = sum(split <= layer for split in splits.values())
        for row in range(joined):
            sheet.cell(left + width * layer, bottom - 5 * (row + 1), width, 5, SERVER)
    sheet.text(left - 2, bottom - 5, "server: one batch", SERVER, 9, "right", bold=True)
    for row, split in enumerate(splits.values()):
        x, top = left + width * split, bottom - 5 * (len(splits) - row)
        sheet.arrow(x + 0.6, 8 + 6.5 * row + 2.25, x + width / 2, top - 0.3, CLIENT, -0.35)
    sheet.text(
        left + width * 4,
        51.5,
        "rows join where their client's split lies; a layer's base weights are read, and dequantized, once a step",
        MUTED,
        8.5,
    )
    return sheet


def importance_to_ranks() -> Sheet:
    """From a probe's scores and the memory that is left to a rank for each weight and holder."""
    sheet = Sheet(56)
    weights = ["q", "k", "v", "o", "gate", "up", "down"]
    scores = [2.2, 1.4, 8.0, 6.0, 1.8, 2.6, 4.4]
    ranks = {"laptop": [1, 1, 8, 4, 1, 1, 2], "server": [8, 4, 32, 16, 4, 8, 16]}
    sheet.text(16.5, 5, "1  probe", bold=True)
    sheet.text(16.5, 9, "importance of each weight, per byte", MUTED, 8)
    base = 43.0
    for i, (name, score) in enumerate(zip(weights, scores, strict=True)):
        x = 4.5 + 3.5 * i
        sheet.cell(x, base - 3.2 * score, 2.8, 3.2 * score, LEARNED)
        sheet.text(x + 1.4, base + 2.5, name, INK, 7.5)
    sheet.line(3.5, base, 30, base, MUTED)
    sheet.text(16.5, 51, "I = Σ |W · dL/dW| / bytes of a rank", MUTED, 8)

    sheet.text(48, 5, "2  memory that is left", bold=True)
    sheet.text(48, 9, "after layers, activations, residual", MUTED, 8)
    for row, (name, used, color, pale) in enumerate(
        (("laptop", 0.72, CLIENT, CLIENT_PALE), ("server", 0.45, SERVER, SERVER_PALE))
    ):
        y = 15 + 17 * row
        sheet.text(36, y - 1.5 + 2, name, color, 9, "left", bold=True)
        sheet.cell(36, y + 3, 24 * used, 6, FROZEN)
        sheet.cell(36 + 24 * used, y + 3, 24 * (1 - used), 6, pale, color)
        sheet.text(36 + 24 * (1 + used) / 2, y + 6, "left", color, 8)
    sheet.text(48, 51, "next rank where it gains most per byte", MUTED, 8)
    sheet.arrow(31, 26, 34.5, 26, MUTED)
    sheet.arrow(61.5, 26, 65, 26, MUTED)

    sheet.text(82, 5, "3  ranks", bold=True)
    sheet.text(82, 9, "each holder and weight its own", MUTED, 8)
    for row, (name, own) in enumerate(ranks.items()):
        color, pale = (CLIENT, CLIENT_PALE) if name == "laptop" else (SERVER, SERVER_PALE)
        y = 15 + 17 * row
        sheet.text(67, y + 0.5, name, color, 9, "left", bold=True)
        for i, rank in enumerate(own):
            sheet.box(67 + 4.3 * i, y + 3, 3.9, 6, pale, color, rounding=0.5)
            sheet.text(67 + 4.3 * i + 1.95, y + 6, str(rank), color, 8.5, bold=True)
            sheet.text(67 + 4.3 * i + 1.95, y + 11, weights[i], MUTED, 7)
    sheet.text(82, 51, "figures made up for the sketch", MUTED, 8)
    return sheet


def aggregation_and_residual() -> Sheet:
    """The sum of unequal adapters, the restart, and the part that joins the residual."""
    sheet = Sheet(66)
    sheet.text(14, 5, "1  adapters of a round", bold=True)
    holders = [("phone", 1, CLIENT), ("laptop", 2, CLIENT), ("server", 4, SERVER)]
    top = 10.0
    for name, rank, color in holders:
        sheet.text(3, top + 5, name, color, 9, "left", bold=True)
        sheet.text(3, top + 8.3, f"rank {rank}", MUTED, 7.5, "left")
        for i in range(rank):
            sheet.cell(13 + 1.7 * i, top, 1.7, 12, color)
            sheet.cell(21, top + 1.7 * i, 9, 1.7, color)
        sheet.text(13 + 0.85 * rank, top + 14, "B", MUTED, 7.5)
        sheet.text(25.5, top + 14, "A", MUTED, 7.5)
        top += 17.0

    sheet.text(46, 5, "2  exact sum", bold=True)
    sheet.text(46, 9, "concatenated along the rank,", MUTED, 8)
    sheet.text(46, 12, "weighted by tokens", MUTED, 8)
    x, y = 37.0, 27.0
    for _, rank, color in holders:
        for _ in range(rank):
            sheet.cell(x, 20, 1.4, 14, color)
            sheet.cell(48, y - 7, 9, 1.4, color)
            x, y = x + 1.4, y + 1.4
    sheet.text(41.9, 36, "[p s B ...]", MUTED, 7.5)
    sheet.text(52.5, 36, "[A; ...]", MUTED, 7.5)
    sheet.text(46, 42, "mean(B A), not", LEARNED, 9, bold=True)
    sheet.text(46, 45.5, "mean(B) mean(A)", LEARNED, 9, bold=True)
    sheet.arrow(31.5, 27, 35.5, 27, MUTED)
    sheet.arrow(58.5, 27, 63.5, 20, MUTED)
    sheet.arrow(58.5, 30, 63.5, 51, MUTED)

    sheet.text(81, 5, "3  svd: leading part restarts", bold=True)
    sheet.text(81, 9, "the same weight for all holders", MUTED, 8)
    for row, (name, rank, color) in enumerate(holders):
        y = 13.0 + 9 * row
        sheet.text(65, y + 3, name, color, 9, "left", bold=True)
        for i in range(4):
            sheet.cell(75 + 5 * i, y, 5, 6, color if i < rank else FROZEN)
            sheet.text(75 + 5 * i + 2.5, y + 3, "trains" if i < rank else "frozen", PAPER if i < rank else MUTED, 7)
    sheet.box(65, 46, 32, 12, LEARNED_PALE, LEARNED)
    sheet.text(81, 49.5, "the rest joins the residual R", LEARNED, 9, bold=True)
    sheet.text(81, 53.5, "fp32 factors up to a cap; W0 stays as it is", MUTED, 8)
    law = "all holders compute with  W0 + R + s B A;  until the cap cuts, a restart changes no output"
    sheet.text(50, 62, law, INK, 9)
    return sheet


def clocks() -> Sheet:
    """Sources of the real, the virtual and the emulated clock."""
    sheet = Sheet(58)
    rows = [
        ("real", "clock: real", "wall time: this machine's seconds", [9.0, 9.0, 9.0], 15.0),
        ("virtual", "beside every run", "an account: declared FLOP/s, bandwidth and latency", [30.0, 16.0, 6.0], 12.0),
        ("emulated", "clock: emulated", "actors wait until their declared time has passed", [30.0, 16.0, 6.0], 12.0),
    ]
    names = ["phone", "laptop", "workstation"]
    for row, (title, key, about, fronts, server) in enumerate(rows):
        y = 3.0 + 18 * row
        sheet.text(3, y + 2.5, title, INK, 10, "left", bold=True)
        sheet.text(3, y + 6, key, MUTED, 8, "left")
        sheet.text(98, y + 2.0, about, MUTED, 8, "right")
        for i, (name, front) in enumerate(zip(names, fronts, strict=True)):
            lane = y + 4.5 + 3.6 * i
            sheet.text(29, lane + 1.4, name, CLIENT, 7.5, "right")
            worked = min(front, 9.0 - 2 * i) if title == "emulated" else front
            sheet.cell(30, lane, worked, 2.8, CLIENT)
            if worked < front:
                sheet.cell(30 + worked, lane, front - worked, 2.8, CLIENT_PALE, CLIENT)
                if front - worked > 5:
                    sheet.text(30 + (worked + front) / 2, lane + 1.4, "waits", CLIENT, 6.5)
        begin = 30 + max(fronts)
        sheet.cell(begin, y + 4.5, server, 10, SERVER)
        sheet.text(begin + server / 2, y + 9.5, "server", PAPER, 8)
        sheet.line(30, y + 16, 96, y + 16)
        unit = {"real": "seconds", "virtual": "virtual seconds", "emulated": "seconds × clock_speedup"}[title]
        sheet.text(96, y + 14, unit, MUTED, 7.5, "right")
    return sheet


ALL: dict[str, Callable[[], Sheet]] = {
    "overview": overview,
    "split": split_and_tail,
    "depth-joined-batch": depth_joined_batch,
    "importance": importance_to_ranks,
    "aggregation": aggregation_and_residual,
    "clocks": clocks,
}
"""Every diagram by the name of its file."""


def main() -> None:
    """Draw the diagrams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=DIAGRAMS, help="folder of the diagrams (docs/diagrams)")
    to = parser.parse_args().to
    to.mkdir(parents=True, exist_ok=True)
    # The same bytes each time, so that a diagram that has not changed is no change of the file.
    settings = {"svg.hashsalt": "hsplit", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(settings):
        for name, draw in ALL.items():
            path = to / f"{name}.svg"
            draw().figure.savefig(path, transparent=True, metadata={"Date": None})
            print(f"{path} {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
