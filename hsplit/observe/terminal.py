"""The display of a run: a live table in a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
from typing import TextIO

from hsplit.observe.live_display import LiveDisplay
from hsplit.observe.observer import Observer, SilentDisplay
from hsplit.observe.pace import Pace
from hsplit.observe.plain_display import PlainDisplay
from hsplit.streams import is_terminal


def display_for(stream: TextIO | None, pace: Pace | None = None) -> Observer:
    """The live table if ``stream`` is a terminal that can show it, plain lines otherwise; nothing without a stream.

    Args:
        stream: where to.
        pace: how far the run is; by default counted from now on.
    """
    if stream is None or stream.closed:
        return SilentDisplay()
    if is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown") and _shows(stream, "–Σ→━"):
        return LiveDisplay(stream, pace=pace)
    return PlainDisplay(stream, pace=pace)


def _shows(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
