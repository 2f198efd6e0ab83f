"""Parts of the residual that ``residual.max_rank`` has cut, by a run's events (METHOD 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

FIELD = "residual_cut"
"""Name of the cut in the event that closes a round; events of older versions lack it."""
# Factors are kept in fp32, whose own rounding errors come near this: what is smaller is none of the cap's loss.
_ROUNDING = 1e-6


def residual_cuts(events: Iterable[Mapping[str, Any]], rounds: int | None = None) -> dict[int, float]:
    """Largest part of a weight's residual that was cut, by round; a round that was repeated counts as it ended.

    Args:
        events: of a run, oldest first.
        rounds: the last round that counts; by default all.

    Returns:
        Frobenius norms relative to the residual, 0.0 for a round in which nothing was cut; rounds of older versions,
        whose events do not tell, and the state before training are absent.
    """
    closed = {event.get("round"): event.get(FIELD) for event in events if event["event"] == "round"}
    return {
        round_: float(cut)
        for round_, cut in closed.items()
        if isinstance(round_, int) and isinstance(cut, int | float)
        if round_ >= 1 and (rounds is None or round_ <= rounds)
    }


def cut_text(cuts: Mapping[int, float], aggregation: object) -> str:
    """One sentence on what was cut, or on that nothing was; empty where the events do not tell.

    Args:
        cuts: as :func:`residual_cuts` returns them.
        aggregation: the policy's. Only of ``concat`` it says that nothing was cut: the others may lose something that
            is no cut of the residual. A cut no larger than the rounding of fp32 counts as none.
    """
    cutting = [cut for cut in cuts.values() if cut > _ROUNDING]
    if cutting:
        often = f"in {len(cutting)} of {len(cuts)} {'round' if len(cuts) == 1 else 'rounds'}"
        return (
            f"residual.max_rank cut {often}: at most {share_cut(cuts)} of a weight's residual in one (relative"
            " Frobenius norm), so that the aggregation was not exact"
        )
    exact = cuts and aggregation == "concat"
    return "residual.max_rank cut nothing: the adapters were summed exactly in every round" if exact else ""


def share_cut(cuts: Mapping[int, float]) -> str:
    """The largest of ``cuts`` in percent, such as ``27 %``."""
    return f"{100 * max(cuts.values()):.2g} %"
