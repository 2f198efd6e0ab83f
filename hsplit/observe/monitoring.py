"""Configuration files of Prometheus and Grafana, the dashboard's panels, and files that announce a run's metrics."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hsplit.config.reading import displayed
from hsplit.errors import InputError, os_reason
from hsplit.files import write_text_atomically
from hsplit.home import cache_root
from hsplit.observe import exported_metrics as metrics
from hsplit.observe.exported_metrics import ExportedMetric

_COLUMNS = 24
_WIDTH, _HEIGHT = 12, 8
# The user picks a Prometheus in the dashboard; the provisioned one is preselected.
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Attributes:
        expr: in PromQL; ``$run`` is the run that the user picks.
        legend: of its series, with labels in ``{{}}``.
        right: drawn against the axis on the right.
    """

    expr: str
    legend: str
    right: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over time.

    Attributes:
        title: of the panel.
        unit: of the axis on the left, as Grafana calls it.
        queries: the curves.
        stacked: drawn on top of one another.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    stacked: bool = False


def _series(metric: ExportedMetric, which: str = "", by: str = "max") -> str:
    """Return the query of a metric's series by run and own tags, without the labels that Ray adds."""
    return f'{by} by ({", ".join(("run", *metric.tags))}) ({metric.in_prometheus}{{run=~"$run"{which}}})'


_BUSY = ', phase!="waiting"'

PANELS = (
    Panel(
        "Validation perplexity",
        metrics.PERPLEXITY.unit,
        (
            Query(_series(metrics.PERPLEXITY), "{{run}}"),
            Query(_series(metrics.WORST_PERPLEXITY), "{{run}}, worst client"),
            Query(_series(metrics.ROUND), "{{run}} rounds done", right=True),
        ),
    ),
    Panel(
        "Loss",
        metrics.TRAIN_LOSS.unit,
        (
            Query(_series(metrics.TRAIN_LOSS), "{{run}} training"),
            Query(_series(metrics.VALIDATION_LOSS), "{{run}} validation"),
            Query(_series(metrics.ROUND), "{{run}} rounds done", right=True),
        ),
    ),
    Panel(
        "Training loss by client",
        metrics.CLIENT_TRAIN_LOSS.unit,
        (Query(_series(metrics.CLIENT_TRAIN_LOSS), "{{run}} {{holder}}"),),
    ),
    Panel(
        "Local steps and tokens",
        metrics.STEP.unit,
        (Query(_series(metrics.STEP), "{{run}} steps"), Query(_series(metrics.TOKENS), "{{run}} tokens", right=True)),
    ),
    Panel(
        "Seconds of a local step by phase, mean over holders",
        metrics.STEP_SECONDS.unit,
        (Query(f"avg by (run, phase) ({_series(metrics.STEP_SECONDS)})", "{{run}} {{phase}}"),),
        stacked=True,
    ),
    Panel(
        "Seconds of a local step by holder: measured without waiting, and virtual as planned",
        metrics.STEP_SECONDS.unit,
        (
            Query(f"sum by (run, holder) ({_series(metrics.STEP_SECONDS, _BUSY)})", "{{run}} {{holder}}"),
            Query(_series(metrics.VIRTUAL_STEP_SECONDS), "{{run}} {{holder}} virtual"),
        ),
    ),
    Panel(
        "Bytes on the wire in a round",
        metrics.WIRE_BYTES.unit,
        (Query(_series(metrics.WIRE_BYTES), "{{run}} {{direction}}"),),
    ),
    Panel(
        "Time: wall and virtual",
        metrics.VIRTUAL_SECONDS.unit,
        (
            Query(_series(metrics.WALL_SECONDS), "{{run}} wall"),
            Query(_series(metrics.VIRTUAL_SECONDS), "{{run}} virtual"),
            Query(_series(metrics.TRAIN_WALL_SECONDS), "{{run}} wall, without validation"),
            Query(_series(metrics.TRAIN_VIRTUAL_SECONDS), "{{run}} virtual, without validation"),
        ),
    ),
    Panel(
        "Memory by holder",
        metrics.MEMORY_MEASURED.unit,
        (
            Query(_series(metrics.MEMORY_MEASURED), "{{run}} {{holder}} measured"),
            Query(_series(metrics.MEMORY_PREDICTED), "{{run}} {{holder}} predicted"),
            Query(_series(metrics.MEMORY_DECLARED), "{{run}} {{holder}} declared"),
        ),
    ),
    Panel(
        "Sum of ranks by holder", metrics.RANK_TOTAL.unit, (Query(_series(metrics.RANK_TOTAL), "{{run}} {{holder}}"),)
    ),
    Panel("Split point by holder", metrics.SPLIT.unit, (Query(_series(metrics.SPLIT), "{{run}} {{holder}}"),)),
    Panel(
        "Captured importance",
        metrics.CAPTURED_IMPORTANCE.unit,
        (Query(_series(metrics.CAPTURED_IMPORTANCE), "{{run}}"),),
    ),
    Panel("Clients that take part", metrics.CLIENTS.unit, (Query(_series(metrics.CLIENTS), "{{run}}"),)),
    Panel("Failures", metrics.FAILURES.unit, (Query(_series(metrics.FAILURES), "{{run}} {{holder}} {{kind}}"),)),
)
"""The panels of the dashboard, two in a row."""


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's JSON form."""
    datasource = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": f"label_values({metrics.CLIENTS.in_prometheus}, run)", "refId": "run"},
        "refresh": 2,  # whenever the time range changes
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
    return {
        "uid": "hsplit",
        "title": "hsplit runs",
        "tags": ["hsplit"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [datasource, run]},
        "panels": [_panel(panel, number) for number, panel in enumerate(PANELS)],
    }


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    per_row = _COLUMNS // _WIDTH
    queries = [(chr(ord("A") + index), query) for index, query in enumerate(panel.queries)]
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": {"x": number % per_row * _WIDTH, "y": number // per_row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "targets": [
            {"refId": ref, "datasource": _DATASOURCE, "expr": query.expr, "legendFormat": query.legend}
            for ref, query in queries
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "custom": {
                    "fillOpacity": 30 if panel.stacked else 0,
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                },
            },
            "overrides": [_on_right_axis(ref) for ref, query in queries if query.right],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
    }


def _on_right_axis(ref: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byFrameRefID", "options": ref},
        "properties": [{"id": "custom.axisPlacement", "value": "right"}, {"id": "unit", "value": "short"}],
    }


RAY_TEMP_DIR = Path("/tmp/ray")
"""Default folder of Ray's files."""
_RAY_DISCOVERY_FILE = "prom_metrics_service_discovery.json"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:]+\]|[\w.-]+):\d{1,5}")


def write_monitoring(
    to: str | Path,
    *,
    ray_temp_dirs: Sequence[str | Path] = (RAY_TEMP_DIR,),
    targets: Sequence[str] = (),
    every_s: float = 10.0,
    prometheus_url: str = "http://localhost:9090",
) -> list[str]:
    """Write the configuration of a Prometheus that scrapes hsplit's runs and of a Grafana that shows them.

    Runs of this user on this machine are always found.

    Args:
        to: the directory; files of an earlier call are overwritten.
        ray_temp_dirs: of Ray clusters with their head on this machine.
        targets: metrics endpoints elsewhere, as ``HOST:PORT``.
        every_s: interval of Prometheus's scrapes and searches for runs, in seconds.
        prometheus_url: address of Prometheus for Grafana.

    Returns:
        The commands that start both, a line each.

    Raises:
        InputError: a target is not ``HOST:PORT``, ``every_s`` is no time, or a file cannot be written.
    """
    for target in targets:
        if not _ADDRESS.fullmatch(target):
            raise InputError(f"--target {target}: must be HOST:PORT, such as 10.0.0.2:8080")
    if not 0.001 <= every_s <= 3600:
        raise InputError(f"--every {every_s:g}: must be from 0.001 to 3600 seconds")
    root = Path(to).resolve()
    source = {"name": "hsplit", "uid": "hsplit", "type": "prometheus", "access": "proxy", "isDefault": True}
    prometheus, grafana = root / "prometheus.yml", root / "grafana"
    folder = {"path": str(grafana / "dashboards")}
    provider = {"name": "hsplit", "folder": "hsplit", "type": "file", "options": folder}
    files = {
        prometheus: _yaml(_prometheus(ray_temp_dirs, targets, every_s)),
        grafana / "provisioning" / "datasources" / "hsplit.yaml": _yaml(
            {"apiVersion": 1, "datasources": [{**source, "url": prometheus_url}]}
        ),
        grafana / "provisioning" / "dashboards" / "hsplit.yaml": _yaml({"apiVersion": 1, "providers": [provider]}),
        grafana / "dashboards" / "hsplit.json": json.dumps(dashboard(), indent=2) + "\n",
    }
    try:
        discovery_directory().mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path, text)
    except OSError as error:
        raise InputError(f"--to {displayed(to)}: cannot be written ({os_reason(error)})") from None
    return [
        f"prometheus --config.file={_quoted(prometheus)} --storage.tsdb.path={_quoted(root / 'data')}",
        f"GF_PATHS_PROVISIONING={_quoted(grafana / 'provisioning')} grafana server --homepath /usr/share/grafana",
    ]


def _prometheus(ray_temp_dirs: Sequence[str | Path], targets: Sequence[str], every_s: float) -> dict[str, Any]:
    """Return Prometheus's configuration, with the files in which runs and Ray clusters announce themselves."""
    every = f"{round(every_s * 1000)}ms"
    of_ray = [Path(temp).resolve() / _RAY_DISCOVERY_FILE for temp in ray_temp_dirs]
    scraped: dict[str, Any] = {
        "job_name": "hsplit",
        "file_sd_configs": [
            {"files": [str(path) for path in (discovery_directory() / "*.json", *of_ray)], "refresh_interval": every}
        ],
    }
    if targets:
        scraped["static_configs"] = [{"targets": list(targets), "labels": {"job": "ray"}}]
    return {"global": {"scrape_interval": every, "scrape_timeout": every}, "scrape_configs": [scraped]}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=1000)


# -- running runs, for Prometheus' file-based service discovery -----------------------------------------------------


def discovery_directory() -> Path:
    """Return the folder of the discovery files, in the user's cache directory."""
    return cache_root() / "prometheus"


def discovery_file(name: str) -> Path:
    """Return the discovery file of the run ``name``, which is unique among running ones."""
    return discovery_directory() / f"{name}.json"


def announce(name: str, address: str) -> None:
    """Announce a run's metrics at ``address`` (``HOST:PORT``) to Prometheus.

    If the file cannot be written, the run continues without being found.
    """
    with suppress(OSError):
        discovery_directory().mkdir(parents=True, exist_ok=True)
        # The label is Ray's own, so that an address that is also in Ray's file is one target.
        write_text_atomically(discovery_file(name), json.dumps([{"targets": [address], "labels": {"job": "ray"}}]))
