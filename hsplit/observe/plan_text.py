"""Text of a plan: a table, a line for each holder, and the changes to the next plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hsplit.observe.wording import (
    NOTHING,
    batch_text,
    bytes_text,
    kind_labels,
    layer_of,
    number_text,
    of_budget,
    printable,
    weight_kind,
)
from hsplit.planning.plan import HolderPlan, Plan

if TYPE_CHECKING:
    from hsplit.planning.insight import Insight

_BARS = "▁▂▃▄▅▆▇█"

SHOWN_GAINS = 3
"""Number of holders listed with their gain from one more GB of memory."""


def plan_table(plan: Plan, insight: Insight | None = None) -> Group:
    """Return a table of the clients and the server; below it makespan, captured importance and its source.

    With an insight, also the bottleneck and the gain from one more GB of memory.

    Readable at 80 columns too, where the ranks by weight kind take several lines.
    """
    lines = plan_lines(plan) + ([] if insight is None else insight_lines(insight, plan))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold", min_width=8)
    table.add_column("split", justify="right", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    if plan.paced:
        # Examples in a step, and how often.
        table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("ranks", overflow="fold", min_width=14)
    table.add_column("predicted /\ndeclared", no_wrap=True)
    table.add_column("step time\n(virtual)", justify="right", no_wrap=True)
    if plan.paced:
        table.add_column("busy", justify="right", no_wrap=True)
    table.add_column("share of\ncaptured", justify="right", no_wrap=True)
    for client in plan.clients:
        _add_row(table, client, plan)
    table.add_section()
    _add_row(table, plan.server, plan)
    # Not as the table's caption, which would be wrapped at the table's width.
    return Group(table, Text("\n".join(map(printable, lines))))


def _add_row(table: Table, holder: HolderPlan, plan: Plan) -> None:
    # two lines, so that the column stays narrow
    ranks = ranks_by_kind(holder.ranks) if holder.available else lacking_text(holder).replace(", ", ",\n")
    if own := forms_text(holder, plan):
        ranks = f"{ranks}\n{own}"
    cells = [
        printable(holder.name),
        NOTHING if holder.split is None else str(holder.split),
        layers_held(holder, plan.layers),
        *([rows_text(holder)] if plan.paced else []),
        ranks,
        memory_text(holder),
        number_text(holder.step_time_s, "s") if holder.available else NOTHING,
        *([busy_text(holder, plan)] if plan.paced else []),
        share_text(holder),
    ]
    table.add_row(*(Text(cell) for cell in cells), style=None if holder.available else "dim")


def holder_line(holder: HolderPlan, layers: int) -> str:
    """Describe a holder's whole part of a plan in one line."""
    if not holder.available:
        return f"{_label(holder)}: {lacking_text(holder)} (declared {bytes_text(holder.declared_bytes)})"
    parts = [
        f"split {split_text(holder, layers)}",
        f"layers {layers_held(holder, layers)}",
        f"ranks {ranks_range(holder.ranks)}",
        f"memory {memory_text(holder)}",
        f"{number_text(holder.step_time_s, 's')} a step (virtual)",
    ]
    return f"{_label(holder)}: {', '.join(parts)}"


def plan_changes(before: Plan, after: Plan) -> list[str]:
    """Return a line for each holder with another state, split, ranks or memory in ``after`` than in ``before``.

    New holders are described completely, others by the differences visible to a reader; ranks moved between weights
    are reported as moved.
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
            lines.append(f"{_label(holder)}: {', '.join(parts)}")
    return lines + [f"{_label(holder)}: left" for holder in known.values()]


def _changed(past: HolderPlan, holder: HolderPlan, layers: int) -> list[str]:
    parts = []
    if past.split != holder.split:
        parts.append(f"split {NOTHING if past.split is None else past.split} → {split_text(holder, layers)}")
    if holder.kind == "client" and rows_text(past) != rows_text(holder):
        parts.append(f"rows {rows_text(past)} → {rows_text(holder)}")
    parts += [
        f"{then} → {now}" for then, now in ((past.stored, holder.stored), (past.wire, holder.wire)) if then != now
    ]
    if past.ranks != holder.ranks:
        then, now = ranks_range(past.ranks), ranks_range(holder.ranks)
        parts.append(f"ranks {then} → {now}" if then != now else f"ranks {now} moved between weights")
    then, now = memory_text(past), memory_text(holder)
    if then != now:
        parts.append(f"memory {then} → {now}")
    return parts


def _label(holder: HolderPlan) -> str:
    return "server" if holder.kind == "server" else f"{holder.name} (client)"


# -- the whole plan --------------------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> list[str]:
    """Lines on the plan as a whole: its speed, its importance, and where that came from."""
    available = len(plan.available)
    exchange = (
        f" The exchange of adapters at a round's end adds {number_text(plan.exchange_s, 's')} to each."
        if plan.exchange_s
        else ""
    )
    lines = [
        f"One local step takes {number_text(plan.makespan_s, 's')} (virtual: at the declared budgets).{exchange}",
        f"Captured importance: {number_text(plan.captured_importance)}, from {plan.importance}.",
    ]
    if plan.speed is not None:
        speed = plan.speed
        lines.append(
            f"Speed: {number_text(speed.rows_per_s)} examples a second (virtual), {speed.share:.0%} of the"
            f" {number_text(speed.bound_rows_per_s)} that these budgets allow if nobody ever waits; bound by"
            f" {speed.binding}."
        )
    if plan.groups > 1:
        lines.append(f"The server serves the clients in {plan.groups} groups, one after another.")
    if not plan.waits:
        lines.append("Changes of the residual do not wait (pace.residual_wait): ranks need the server's memory.")
    if available < len(plan.clients):
        lines.append(f"{available} of {len(plan.clients)} clients take part.")
    if frozen := [part.name for part in plan.available if part.forward_only]:
        names = frozen[0] if len(frozen) == 1 else f"{frozen[0]} and {len(frozen) - 1} more"
        lines.append(
            f"{names} only compute{'s' if len(frozen) == 1 else ''} forward: training there would hold everybody up for"
            " longer than it is worth (policy.freeze)."
        )
    if plan.servers > 1:
        lines.append(f"{plan.servers} servers share the clients; the server's row is the part of each.")
    return lines


def insight_lines(insight: Insight, plan: Plan) -> list[str]:
    """Describe the bottleneck, and the gain from one more GB of memory at the few holders with the largest gain."""
    bottleneck = insight.bottleneck
    part = bottleneck.shortens_s / plan.makespan_s
    lines = [
        f"Bottleneck: {_holders(bottleneck.name, bottleneck.alike)}; infinitely fast, it would make a step"
        f" {number_text(bottleneck.shortens_s, 's')} ({part:.0%}) shorter.",
    ]
    objective = plan.objective
    gains = [gain for gain in insight.one_more_gb if gain.joins or gain.objective_change > 1e-9 * objective]
    if not gains:
        lines.append("One more GB of memory would buy nothing, at no holder.")
    for gain in gains[:SHOWN_GAINS]:
        more = gain.objective_change / objective
        captured = gain.captured_importance_change / plan.captured_importance
        joins = " It would take part." if gain.joins else ""
        lines.append(
            f"One more GB at {_holders(gain.name, gain.alike, 'one of ')}: objective {more:+.1%}"
            f" ({captured:+.1%} captured, step {gain.makespan_change_s / plan.makespan_s:+.1%}).{joins}"
        )
    if insight.kinds_left_out:
        lines.append(f"Not tried with one more GB: {insight.kinds_left_out} kinds of clients that promise less.")
    return lines


def _holders(name: str, alike: int, which: str = "") -> str:
    return name if alike == 1 else f"{name} ({which}{alike} alike)"


# -- a holder -------------------------------------------------------------------------------------------------------


def memory_text(holder: HolderPlan) -> str:
    """Format predicted and declared memory of a holder; an unavailable one has no prediction."""
    if holder.available:
        return of_budget(holder.predicted_bytes, holder.declared_bytes)
    return f"{NOTHING} / {bytes_text(holder.declared_bytes)}"


def lacking_text(holder: HolderPlan) -> str:
    """Return the reason why a client is unavailable."""
    return f"unavailable, lacks {bytes_text(holder.lacking_bytes)}"


def rows_text(holder: HolderPlan) -> str:
    """Format the examples of a client's batch, and how often it brings one: ``3``, or ``3 / 2 steps``."""
    if not holder.available or holder.kind == "server":
        return NOTHING
    return batch_text(holder.rows, holder.every)


def busy_text(holder: HolderPlan, plan: Plan) -> str:
    """Format the part of a step in which a holder computes or sends: ``87 %``."""
    return f"{holder.step_time_s / plan.makespan_s:.0%}" if holder.available and plan.makespan_s else NOTHING


def forms_text(holder: HolderPlan, plan: Plan) -> str:
    """Name a client's stored form and wire format, where they are not the same for all."""
    if not holder.available or holder.kind == "server":
        return ""
    stored, wires = {part.stored for part in plan.available}, {part.wire for part in plan.available}
    return ", ".join([holder.stored] * (len(stored) > 1) + [holder.wire] * (len(wires) > 1))


def share_text(holder: HolderPlan) -> str:
    """Format a holder's part of the captured importance: ``12.3 %``."""
    return f"{100 * holder.captured_share:.1f} %" if holder.available else NOTHING


def layers_held(holder: HolderPlan, layers: int) -> str:
    """Format the decoder layers of a holder: ``0–2``, ``29``, or a dash for none."""
    if not holder.available or holder.split is None:
        return NOTHING
    first, last = (holder.split, layers - 1) if holder.kind == "server" else (0, holder.split - 1)
    if first > last:
        return NOTHING
    return f"{first}–{last}" if first < last else str(first)


def split_text(holder: HolderPlan, layers: int) -> str:
    """Format a client's split point out of all layers, or the server's first layer."""
    if not holder.available or holder.split is None:
        return NOTHING
    return f"from {holder.split}" if holder.kind == "server" else f"{holder.split} of {layers}"


def ranks_range(ranks: Mapping[str, int]) -> str:
    """Format smallest and largest rank and the sum: ``1–8 (Σ 112)``; ``frozen`` if no held weight is trained."""
    held = [rank for rank in ranks.values() if rank > 0]
    return f"{_span(held)} (Σ {sum(held)})" if held else _untrained(ranks)


def ranks_by_kind(ranks: Mapping[str, int]) -> str:
    """Format ranks by weight kind over all layers: ``all 8``, or ``q:8 k:2–4 down:1``; ``frozen`` as above."""
    kinds: dict[str, list[int]] = {}
    for weight, rank in ranks.items():
        if rank > 0:
            kinds.setdefault(weight_kind(weight), []).append(rank)
    if not kinds:
        return _untrained(ranks)
    spans = {kind: _span(held) for kind, held in kinds.items()}
    if len(set(spans.values())) == 1:
        return f"all {next(iter(spans.values()))}"
    # no space within a pair, where a narrow table would break the line
    return " ".join(f"{label}:{span}" for label, span in zip(kind_labels([*spans]), spans.values(), strict=True))


def ranks_by_layer(ranks: Mapping[str, int], layers: int, largest: int) -> str:
    """Draw the mean rank of each layer as a bar of eighths, on a scale of doublings: ``▁▁▃▅█``.

    A layer that is not held is a space, one that is held and not trained a dot.

    Args:
        ranks: by weight name.
        layers: of the model, one character each.
        largest: rank of a full bar.
    """
    held: dict[int, list[int]] = {}
    for weight, rank in ranks.items():
        if (layer := layer_of(weight)) is not None:
            held.setdefault(layer, []).append(rank)

    def bar(own: list[int]) -> str:
        mean = sum(own) / len(own)
        part = math.log2(1 + mean) / math.log2(1 + max(largest, 1))
        return _BARS[max(0, math.ceil(part * len(_BARS)) - 1)] if mean else "·"

    return "".join(bar(held[layer]) if layer in held else " " for layer in range(layers)).rstrip()


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


def _untrained(ranks: Mapping[str, int]) -> str:
    return "frozen" if ranks else NOTHING
