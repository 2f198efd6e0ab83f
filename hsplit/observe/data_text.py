"""Text of a data source: how it was read, lengths, examples with what is learned marked, and each client's part."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hsplit.data.description import DataDescription
from hsplit.observe.wording import printable

LEARNED = ("▸", "◂")
"""Around what is learned, also where there are no colours."""
_BAR, _WIDTH = "█", 30
_SHOWN_LABELS = 5
_SHOWN_TEXT = 1500
"""Most characters of a piece of an example."""


def data_view(described: DataDescription, max_length: int) -> Group:
    """Return a description of the source for a terminal."""
    reading, lengths = described.reading, described.lengths
    parts: list[RenderableType] = [Text(f"{printable(reading.headline[0].upper() + reading.headline[1:])}.")]
    for reason, own in reading.skipped.items():
        parts.append(Text(f"  {own.count:,} skipped: {printable(reason)}; at {printable(own.places)}"))
    if reading.unused:
        parts.append(Text(f"Columns not used: {printable(', '.join(reading.unused))}."))
    tokens = f"Tokens of an example: {lengths.least} to {lengths.most}, median {lengths.median}"
    parts.append(Text(f"{tokens}; {described.supervised:,} tokens to learn in all."))
    if described.too_long:
        over = "1 example is" if described.too_long == 1 else f"{described.too_long:,} examples are"
        parts.append(Text(f"{over} over max_length = {max_length} tokens."))
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = _BAR * max(round(_WIDTH * count / most), int(count > 0))
        parts.append(Text(f"{low:>8} to {high:<8} {bar} {count:,}"))
    for number, example in enumerate(described.rendered, start=1):
        text = Text(f"\nExample {number}, with what is learned between {' and '.join(LEARNED)}:\n")
        for piece, learned in example:
            shown = _shortened(piece)
            text.append(
                f"{LEARNED[0]}{shown}{LEARNED[1]}" if learned else shown, style="bold green" if learned else "dim"
            )
        parts.append(text)
    if described.not_shared:
        parts.append(Text(f"\nThe cluster's clients cannot share it: {printable(described.not_shared)}"))
    if described.clients:
        parts += [Text(), _shares(described)]
    return Group(*parts)


def _shortened(text: str) -> str:
    text = "".join(sign if sign == "\n" or sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    half = _SHOWN_TEXT // 2
    return text if len(text) <= _SHOWN_TEXT else f"{text[:half]} … {text[-half:]}"


def _shares(described: DataDescription) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("client", "examples", "median\ncharacters", "labels"):
        table.add_column(name, justify="left" if name in ("client", "labels") else "right", overflow="fold")
    for name, own in described.clients.items():
        labels = ", ".join(f"{label} {count:,}" for label, count in list(own.labels.items())[:_SHOWN_LABELS])
        more = len(own.labels) - _SHOWN_LABELS
        labels += f" and {more:,} more" if more > 0 else ""
        table.add_row(printable(name), f"{own.examples:,}", f"{own.characters[2]:,}", printable(labels) or "–")
    return table
