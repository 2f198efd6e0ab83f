"""What a score raises that has no value for the texts at hand, or cannot be computed on this machine."""

from __future__ import annotations


class Undefined(Exception):
    """A score has no value here; the text says why, and the score is left out rather than the evaluation failed."""
