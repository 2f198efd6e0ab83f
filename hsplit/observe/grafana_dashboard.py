"""The Grafana dashboard of a run: its panels, and their queries over the exported metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hsplit.observe.exported_metrics import (
    CAPTURED_IMPORTANCE,
    CLIENT_TRAIN_LOSS,
    CLIENTS,
    FAILURES,
    MEMORY_DECLARED,
    MEMORY_MEASURED,
    MEMORY_PREDICTED,
    PERPLEXITY,
    RANK_TOTAL,
    ROUND,
    SPLIT,
    STEP,
    STEP_SECONDS,
    TOKENS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    VIRTUAL_SECONDS,
    VIRTUAL_STEP_SECONDS,
    WALL_SECONDS,
    WIRE_BYTES,
    ExportedMetric,
)

_COLUMNS = 24
_WIDTH, _HEIGHT = 12, 8
# The user picks the Prometheus in the dashboard; the one that is provisioned is there already.
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        expr: in PromQL; ``$run`` is what the user picks.
        legend: of its series; labels stand in ``{{}}``.
        right: whether it has the axis on the right.
    """

    expr: str
    legend: str
    right: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over time.

    Attributes:
        title: what they show.
        unit: of the axis on the left, as Grafana calls it.
        queries: the curves.
        stacked: whether they are drawn one on the other.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    stacked: bool = False


def _series(metric: ExportedMetric, which: str = "", by: str = "max") -> str:
    """A metric's series by run and own tags, without the labels that Ray adds."""
    return f'{by} by ({", ".join(("run", *metric.tags))}) ({metric.in_prometheus}{{run=~"$run"{which}}})'


_BUSY = ', phase!="waiting"'

PANELS = (
    Panel(
        "Validation perplexity",
        PERPLEXITY.unit,
        (
            Query(_series(PERPLEXITY), "{{run}}"),
            Query(_series(ROUND), "{{run}} rounds done", right=True),
        ),
    ),
    Panel(
        "Loss",
        TRAIN_LOSS.unit,
        (
            Query(_series(TRAIN_LOSS), "{{run}} training"),
            Query(_series(VALIDATION_LOSS), "{{run}} validation"),
            Query(_series(ROUND), "{{run}} rounds done", right=True),
        ),
    ),
    Panel(
        "Training loss by client", CLIENT_TRAIN_LOSS.unit, (Query(_series(CLIENT_TRAIN_LOSS), "{{run}} {{holder}}"),)
    ),
    Panel(
        "Local steps and tokens",
        STEP.unit,
        (Query(_series(STEP), "{{run}} steps"), Query(_series(TOKENS), "{{run}} tokens", right=True)),
    ),
    Panel(
        "Seconds of a local step by phase, mean over holders",
        STEP_SECONDS.unit,
        (Query(f"avg by (run, phase) ({_series(STEP_SECONDS)})", "{{run}} {{phase}}"),),
        stacked=True,
    ),
    Panel(
        "Seconds of a local step by holder: measured without waiting, and virtual as planned",
        STEP_SECONDS.unit,
        (
            Query(f"sum by (run, holder) ({_series(STEP_SECONDS, _BUSY)})", "{{run}} {{holder}}"),
            Query(_series(VIRTUAL_STEP_SECONDS), "{{run}} {{holder}} virtual"),
        ),
    ),
    Panel(
        "Bytes on the wire in a round",
        WIRE_BYTES.unit,
        (Query(_series(WIRE_BYTES), "{{run}} {{direction}}"),),
    ),
    Panel(
        "Time: wall and virtual",
        VIRTUAL_SECONDS.unit,
        (Query(_series(WALL_SECONDS), "{{run}} wall"), Query(_series(VIRTUAL_SECONDS), "{{run}} virtual")),
    ),
    Panel(
        "Memory by holder",
        MEMORY_MEASURED.unit,
        (
            Query(_series(MEMORY_MEASURED), "{{run}} {{holder}} measured"),
            Query(_series(MEMORY_PREDICTED), "{{run}} {{holder}} predicted"),
            Query(_series(MEMORY_DECLARED), "{{run}} {{holder}} declared"),
        ),
    ),
    Panel("Sum of ranks by holder", RANK_TOTAL.unit, (Query(_series(RANK_TOTAL), "{{run}} {{holder}}"),)),
    Panel("Split point by holder", SPLIT.unit, (Query(_series(SPLIT), "{{run}} {{holder}}"),)),
    Panel("Captured importance", CAPTURED_IMPORTANCE.unit, (Query(_series(CAPTURED_IMPORTANCE), "{{run}}"),)),
    Panel("Clients that take part", CLIENTS.unit, (Query(_series(CLIENTS), "{{run}}"),)),
    Panel("Failures", FAILURES.unit, (Query(_series(FAILURES), "{{run}} {{holder}} {{kind}}"),)),
)
"""The panels, two in a row."""


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana reads it from a JSON file."""
    return {
        "uid": "hsplit",
        "title": "hsplit runs",
        "tags": ["hsplit"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": [_panel(panel, number) for number, panel in enumerate(PANELS)],
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": f"label_values({CLIENTS.in_prometheus}, run)", "refId": "run"},
        # Whenever the time range changes.
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    per_row = _COLUMNS // _WIDTH
    refs = [chr(ord("A") + index) for index in range(len(panel.queries))]
    asked = list(zip(refs, panel.queries, strict=True))
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": {
            "x": number % per_row * _WIDTH,
            "y": number // per_row * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "targets": [
            {"refId": ref, "datasource": _DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
            for ref, query in asked
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "custom": {
                    "fillOpacity": 30 if panel.stacked else 0,
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                },
            },
            "overrides": [_on_the_right(ref) for ref, query in asked if query.right],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _on_the_right(ref: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byFrameRefID", "options": ref},
        "properties": [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": "short"}],
    }
