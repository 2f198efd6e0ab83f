"""Where the time of local steps goes: the rows of ``timing.csv``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hsplit.config.section import EXACT, Whole

PHASES = ("data", "unpack", "forward", "tail", "backward", "optimizer", "pack", "paced", "waiting")
"""What a holder's time is spent on, in the order of a step; ``TimingRow`` says what each is."""


@dataclass(frozen=True)
class TimingRow:
    """One phase of one holder in one round in ``timing.csv``; round 0 has no rows.

    A holder's rows of a round sum to the wall time of that round's local steps.

    Attributes:
        name: a client's name, or ``server``.
        phase: one of ``PHASES``: ``data`` (drawing and collating batches), ``unpack`` (from the wire's bytes),
            ``forward``, ``tail`` (norm, head, loss and its gradient), ``backward``, ``optimizer``, ``pack`` (to the
            wire's dtype and bytes), ``paced`` (slept so that the wall follows the declared speed) and ``waiting``
            (the rest: for others, for messages, for a core).
        seconds: wall seconds, summed over the round's local steps.

    Raises:
        ValueError: ``phase`` is none of ``PHASES``.
    """

    round: Whole
    name: str
    phase: str
    seconds: float
    __pydantic_config__ = EXACT

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase {self.phase!r} is none of {', '.join(PHASES)}")


def timing_rows(round: int, spent: Mapping[str, Mapping[str, float]], steps_s: float) -> list[TimingRow]:
    """The rows of a round.

    Args:
        round: which.
        spent: wall seconds by holder and phase, without ``waiting``, summed over the round's local steps.
        steps_s: wall seconds of those steps.
    """
    rows = []
    for name, seconds in spent.items():
        whole = {**seconds, "waiting": steps_s - sum(seconds.values())}
        rows += [TimingRow(round, name, phase, whole[phase]) for phase in PHASES if phase in whole]
    return rows
