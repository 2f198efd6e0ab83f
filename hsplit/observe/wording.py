"""Figures of a plan and of a run as a user reads them, the same in terminals and in reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hsplit.scheduling.plan import HolderPlan, Plan

if TYPE_CHECKING:
    from hsplit.scheduling.insight import Insight

NOTHING = "–"
# How many holders are named to whom one more GB of memory would bring most.
SHOWN_GAINS = 3

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(weight: str) -> int | None:
    """The decoder layer in a weight's name (3 for ``model.layers.3.mlp.up_proj``), None if there is none."""
    found = _LAYER.search(weight)
    return int(found[1]) if found else None


def weight_place(weight: str) -> tuple[int, str] | None:
    """Layer and kind of a weight (3 and ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``), None without a layer."""
    layer = layer_of(weight)
    return None if layer is None else (layer, _kind(weight))


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """A short name for each weight kind, such as ``q`` for ``self_attn.q_proj``."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    # GPT-2 has a c_proj in its attention and one in its MLP: those keep their module's name
    labels = [kind if last.count(short) > 1 else short for kind, short in zip(kinds, last, strict=True)]
    return [label.removesuffix("_proj") for label in labels]


def number_text(value: float, unit: str = "") -> str:
    """``value`` to three or four digits."""
    if not math.isfinite(value):
        text = str(value)
    elif value != 0 and abs(value) < 0.01:
        text = f"{value:.2g}"
    elif abs(value) < 100:
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"
    return f"{text} {unit}".rstrip()


def bytes_text(size: float) -> str:
    """``size`` bytes in the largest unit that leaves it above a tenth, such as ``0.16 GB``."""
    unit, factor = _unit(size)
    return f"{_amount(size / factor, unit)} {unit}"


def of_budget(predicted: float, declared: float) -> str:
    """Predicted against declared bytes, in the unit of the budget: ``0.15 / 0.16 GB``."""
    unit, factor = _unit(declared)
    return f"{_amount(predicted / factor, unit)} / {_amount(declared / factor, unit)} {unit}"


def memory_text(holder: HolderPlan) -> str:
    """Predicted against declared memory of a holder; an unavailable one has no prediction."""
    if holder.available:
        return of_budget(holder.predicted_bytes, holder.declared_bytes)
    return f"{NOTHING} / {bytes_text(holder.declared_bytes)}"


def lacking_text(holder: HolderPlan) -> str:
    """Why an unavailable client takes no part."""
    return f"unavailable, lacks {bytes_text(holder.lacking_bytes)}"


def share_text(holder: HolderPlan) -> str:
    """A holder's part of the captured importance: ``12.3 %``."""
    return f"{100 * holder.captured_share:.1f} %" if holder.available else NOTHING


def duration_text(seconds: float) -> str:
    """``seconds`` in one or two units: ``42 s``, ``3 min 05 s``, ``2 h 07 min``, ``4 d 01 h``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return number_text(seconds, "s") if seconds > 0 else "0 s"
    whole = round(seconds)
    for unit, size, below, parts in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // parts:02d} {below}"
    return f"{whole} s"


def age_text(seconds: float) -> str:
    """How long ago something was, in its largest unit: ``42 s ago``, ``3 min ago``, ``2 h ago``, ``4 d ago``."""
    whole = max(0, int(seconds))  # below 0 where another machine's clock is ahead
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} ago"
    return f"{whole} s ago"


def layers_held(holder: HolderPlan, layers: int) -> str:
    """The decoder layers of a holder: ``0–2``, ``29``, or a dash for none."""
    if not holder.available or holder.split is None:
        return NOTHING
    first, last = (holder.split, layers - 1) if holder.kind == "server" else (0, holder.split - 1)
    if first > last:
        return NOTHING
    return f"{first}–{last}" if first < last else str(first)


def split_text(holder: HolderPlan, layers: int) -> str:
    """A client's split point out of all layers, or the server's first layer."""
    if not holder.available or holder.split is None:
        return NOTHING
    return f"from {holder.split}" if holder.kind == "server" else f"{holder.split} of {layers}"


def ranks_range(ranks: Mapping[str, int]) -> str:
    """Least and greatest rank and their sum: ``1–8 (Σ 112)``; ``frozen`` where nothing that is held is trained."""
    held = [rank for rank in ranks.values() if rank > 0]
    return f"{_span(held)} (Σ {sum(held)})" if held else _untrained(ranks)


def ranks_by_kind(ranks: Mapping[str, int]) -> str:
    """Ranks by weight kind over all layers: ``all 8``, or ``q:8 k:2–4 down:1``; ``frozen`` as above."""
    kinds: dict[str, list[int]] = {}
    for weight, rank in ranks.items():
        if rank > 0:
            kinds.setdefault(_kind(weight), []).append(rank)
    if not kinds:
        return _untrained(ranks)
    spans = {kind: _span(held) for kind, held in kinds.items()}
    if len(set(spans.values())) == 1:
        return f"all {next(iter(spans.values()))}"
    last = [kind.rpartition(".")[2] for kind in spans]
    # GPT-2 has a c_proj in its attention and one in its MLP: those keep their module's name
    labels = [kind if last.count(short) > 1 else short for kind, short in zip(spans, last, strict=True)]
    named = zip(labels, spans.values(), strict=True)
    # no space within a pair, where a narrow table would break the line
    return " ".join(f"{label.removesuffix('_proj')}:{span}" for label, span in named)


def _untrained(ranks: Mapping[str, int]) -> str:
    return "frozen" if ranks else NOTHING


def plan_lines(plan: Plan) -> list[str]:
    """What holds of the plan as a whole: its speed, its importance, and where that came from."""
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
    if available < len(plan.clients):
        lines.append(f"{available} of {len(plan.clients)} clients take part.")
    if frozen := [part.name for part in plan.available if part.forward_only]:
        whose = frozen[0] if len(frozen) == 1 else f"{frozen[0]} and {len(frozen) - 1} more"
        lines.append(
            f"{whose} only compute{'s' if len(frozen) == 1 else ''} forward: training there would hold everybody up for"
            " longer than it is worth (policy.freeze)."
        )
    if plan.servers > 1:
        lines.append(f"{plan.servers} servers share the clients; the server's row is the part of each.")
    return lines


def insight_lines(insight: Insight, plan: Plan) -> list[str]:
    """Whom the step waits for most, and what one more GB of memory would buy, for the few to whom it brings most."""
    waits = insight.bottleneck
    part = waits.shortens_s / plan.makespan_s
    lines = [
        f"Bottleneck: {_holders(waits.name, waits.alike)}; infinitely fast, it would make a step"
        f" {number_text(waits.shortens_s, 's')} ({part:.0%}) shorter.",
    ]
    objective = plan.objective
    buys = [gain for gain in insight.one_more_gb if gain.joins or gain.objective_change > 1e-9 * objective]
    if not buys:
        lines.append("One more GB of memory would buy nothing, at no holder.")
    for gain in buys[:SHOWN_GAINS]:
        more = gain.objective_change / objective
        captured = gain.captured_importance_change / plan.captured_importance
        joins = " It would take part." if gain.joins else ""
        lines.append(
            f"One more GB at {_holders(gain.name, gain.alike, 'one of ')}: {more:+.1%} captured per second"
            f" ({captured:+.1%} captured, step {gain.makespan_change_s / plan.makespan_s:+.1%}).{joins}"
        )
    if insight.kinds_left_out:
        lines.append(f"Not tried with one more GB: {insight.kinds_left_out} kinds of clients that promise less.")
    return lines


def _holders(name: str, alike: int, which: str = "") -> str:
    return name if alike == 1 else f"{name} ({which}{alike} alike)"


def printable(text: str) -> str:
    """``text`` without control characters but newlines, so that no name can steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _unit(size: float) -> tuple[str, float]:
    # a tenth: 0.16 GB reads as cluster files have it, in GB
    return next((unit for unit in _UNITS if size >= unit[1] / 10), _UNITS[-1])


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _span(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


def _kind(weight: str) -> str:
    """What follows the layer's number: ``self_attn.q_proj``."""
    found = _LAYER.search(weight)
    return weight[found.end() :] if found else weight
