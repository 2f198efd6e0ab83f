"""Numbers, units and names as a user reads them, the same in terminals and in reports."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

NOTHING = "–"

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_LAYER = re.compile(r"\.(\d+)\.")


def layer_of(weight: str) -> int | None:
    """Return the decoder layer in a weight's name (3 for ``model.layers.3.mlp.up_proj``), None without one."""
    found = _LAYER.search(weight)
    return int(found[1]) if found else None


def weight_place(weight: str) -> tuple[int, str] | None:
    """Return a weight's layer and kind (3, ``mlp.up_proj`` for ``model.layers.3.mlp.up_proj``), None without layer."""
    layer = layer_of(weight)
    return None if layer is None else (layer, weight_kind(weight))


def weight_kind(weight: str) -> str:
    """Return the part of a weight's name after the layer's number: ``self_attn.q_proj``."""
    found = _LAYER.search(weight)
    return weight[found.end() :] if found else weight


def kind_labels(kinds: Sequence[str]) -> list[str]:
    """Return a short name for each weight kind, such as ``q`` for ``self_attn.q_proj``."""
    last = [kind.rpartition(".")[2] for kind in kinds]
    # GPT-2 has a c_proj in its attention and another in its MLP: these keep their module's name
    labels = [kind if last.count(short) > 1 else short for kind, short in zip(kinds, last, strict=True)]
    return [label.removesuffix("_proj") for label in labels]


def number_text(value: float, unit: str = "") -> str:
    """Format ``value`` to three or four digits."""
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
    """Format ``size`` bytes in the largest unit of which it is at least a tenth, such as ``0.16 GB``."""
    unit, factor = _unit(size)
    return f"{_amount(size / factor, unit)} {unit}"


def of_budget(predicted: float, declared: float) -> str:
    """Format predicted and declared bytes, in the unit of the budget: ``0.15 / 0.16 GB``."""
    unit, factor = _unit(declared)
    return f"{_amount(predicted / factor, unit)} / {_amount(declared / factor, unit)} {unit}"


def duration_text(seconds: float) -> str:
    """Format ``seconds`` in one or two units: ``42 s``, ``3 min 05 s``, ``2 h 07 min``, ``4 d 01 h``."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return number_text(seconds, "s") if seconds > 0 else "0 s"
    whole = round(seconds)
    for unit, size, below, parts in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // parts:02d} {below}"
    return f"{whole} s"


def figure_text(value: float | None) -> str:
    """Format a number that may be missing: ``3.14``, or a dash for None."""
    return NOTHING if value is None else number_text(value)


def age_text(seconds: float) -> str:
    """Format the time since an event in its largest unit: ``42 s ago``, ``3 min ago``, ``2 h ago``, ``4 d ago``."""
    whole = max(0, int(seconds))  # below 0 where another machine's clock is ahead
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} ago"
    return f"{whole} s ago"


def printable(text: str) -> str:
    """Return ``text`` without control characters except newlines, so that no name can control a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _unit(size: float) -> tuple[str, float]:
    # a tenth: 0.16 GB reads as in cluster files, in GB
    return next((unit for unit in _UNITS if size >= unit[1] / 10), _UNITS[-1])


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def batch_text(rows: int, every: int) -> str:
    """Format the examples of a client's batch, of which it brings one every ``every`` local steps."""
    return str(rows) if every == 1 else f"{rows} / {every} steps"
