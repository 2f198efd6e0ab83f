"""Which split point each client had in which rounds: a bar a client, in pieces where another plan changed it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hsplit.observe.inline_svg import INK, drawing_style, inline_svg, literal
from hsplit.observe.plan_history import PlanHistory
from hsplit.scheduling.plan import Plan

_WIDTH_IN = 9.5
_COLOURS = "cividis"
_DIGIT_SHARE = 0.014
"""How much of the figure's width a character takes."""


@dataclass(frozen=True)
class Piece:
    """Rounds ``first`` to ``last``, counted from 1, in which a client had one split; None: it took no part."""

    first: int
    last: int
    split: int | None


def split_pieces(history: PlanHistory, client: str, rounds: int) -> list[Piece]:
    """The split points of ``client`` in rounds 1 to ``rounds``, neighbours that are equal made one.

    A plan put in force when ``r`` rounds were done holds from round ``r + 1`` on. Rounds before the first known plan
    are left out.
    """
    made = [done for done in sorted(history.plans) if done < rounds]
    pieces: list[Piece] = []
    for done, until in zip(made, [*made[1:], rounds], strict=True):
        split = _split(history.plans[done], client)
        if pieces and pieces[-1].split == split:
            pieces[-1] = Piece(pieces[-1].first, until, split)
        else:
            pieces.append(Piece(done + 1, until, split))
    return pieces


def splits_svg(history: PlanHistory, clients: Sequence[str], rounds: int, key: str) -> str:
    """A bar for each of ``clients`` over rounds 1 to ``rounds``, with the split points written into it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    layers = max(plan.layers for plan in history.plans.values())
    colours = colormaps[_COLOURS]
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_IN, 0.8 + 0.3 * len(clients)), layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=False)
        for row, piece in _rows(history, clients, rounds):
            length = piece.last - piece.first + 1
            if piece.split is None:
                text, ink = "unavailable", INK
            else:
                text, shade = str(piece.split), piece.split / layers
                ink = "#102030" if shade > 0.5 else "#ffffff"
                corner = (piece.first - 0.5, row - 0.42)
                axes.add_patch(Rectangle(corner, length, 0.84, facecolor=colours(shade), edgecolor=INK, linewidth=0.5))
            short = text if _fits(text, length, rounds) else "×" if piece.split is None else ""
            if _fits(short, length, rounds):
                middle = (piece.first + piece.last) / 2
                axes.text(middle, row, short, ha="center", va="center", fontsize=7, color=ink)
        axes.set_xlim(0.5, rounds + 0.5)
        axes.set_ylim(len(clients) - 0.5, -0.5)
        axes.set_yticks(range(len(clients)), [literal(name) for name in clients])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("round")
        return inline_svg(figure, key, "split point of each client by round")


def _rows(history: PlanHistory, clients: Sequence[str], rounds: int) -> Iterator[tuple[int, Piece]]:
    for row, client in enumerate(clients):
        for piece in split_pieces(history, client, rounds):
            yield row, piece


def _fits(text: str, length: int, rounds: int) -> bool:
    return len(text) * _DIGIT_SHARE < length / rounds


def _split(plan: Plan, client: str) -> int | None:
    """The client's split, ``None`` where it takes no part or the plan does not know it."""
    return next((holder.split for holder in plan.available if holder.name == client), None)
