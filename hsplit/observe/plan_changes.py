"""What another plan changes for whom, a line a holder."""

from __future__ import annotations

from hsplit.observe.wording import (
    NOTHING,
    bytes_text,
    lacking_text,
    layers_held,
    memory_text,
    number_text,
    ranks_range,
    split_text,
)
from hsplit.scheduling.plan import HolderPlan, Plan


def holder_line(holder: HolderPlan, layers: int) -> str:
    """A holder's whole part of a plan."""
    if not holder.available:
        return f"{_name(holder)}: {lacking_text(holder)} (declared {bytes_text(holder.declared_bytes)})"
    parts = [
        f"split {split_text(holder, layers)}",
        f"layers {layers_held(holder, layers)}",
        f"ranks {ranks_range(holder.ranks)}",
        f"memory {memory_text(holder)}",
        f"{number_text(holder.step_time_s, 's')} a step (virtual)",
    ]
    return f"{_name(holder)}: {', '.join(parts)}"


def plan_changes(before: Plan, after: Plan) -> list[str]:
    """A line for each holder of ``after`` whose state, split, ranks or memory are not those of ``before``.

    Who comes is described whole; of the others only what is another as a reader sees it, and ranks that were moved
    from weight to weight are said to be moved.
    """
    known = {holder.name: holder for holder in (*before.clients, before.server)}
    lines = []
    for holder in (*after.clients, after.server):
        past = known.pop(holder.name, None)
        if past is None or (holder.available and not past.available):
            lines.append(f"{holder_line(holder, after.layers)}, {'new' if past is None else 'back'}")
        elif past.available and not holder.available:
            lines.append(f"{holder_line(holder, after.layers)}, had split {split_text(past, before.layers)}")
        elif holder.available and (parts := _changed(past, holder, after.layers)):
            lines.append(f"{_name(holder)}: {', '.join(parts)}")
    return lines + [f"{_name(holder)}: left" for holder in known.values()]


def _changed(past: HolderPlan, holder: HolderPlan, layers: int) -> list[str]:
    parts = []
    if past.split != holder.split:
        parts.append(f"split {NOTHING if past.split is None else past.split} → {split_text(holder, layers)}")
    if past.ranks != holder.ranks:
        then, now = ranks_range(past.ranks), ranks_range(holder.ranks)
        parts.append(f"ranks {then} → {now}" if then != now else f"ranks {now} moved between weights")
    then, now = memory_text(past), memory_text(holder)
    if then != now:
        parts.append(f"memory {then} → {now}")
    return parts


def _name(holder: HolderPlan) -> str:
    return "server" if holder.kind == "server" else f"{holder.name} (client)"
