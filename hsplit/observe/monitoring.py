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

from hsplit.config.files import displayed
from hsplit.errors import InputError, os_reason
from hsplit.files import write_text_atomically
from hsplit.models.packaged import cache_root
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


RAY_TEMP_DIR = Path("/tmp/ray")
"""Where Ray keeps its files unless it is told another place."""
_RAYS_FILE = "prom_metrics_service_discovery.json"
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

    Runs of this user on this machine are found whatever is given here.

    Args:
        to: the directory; what is in it of an earlier call is written anew.
        ray_temp_dirs: of Ray clusters whose head is on this machine.
        targets: metrics endpoints elsewhere, as ``HOST:PORT``.
        every_s: how often Prometheus scrapes, and looks for runs, in seconds.
        prometheus_url: where Grafana reaches Prometheus.

    Returns:
        What to do next, in lines.

    Raises:
        InputError: a target is not ``HOST:PORT``, ``every_s`` is no time, or a file cannot be written.
    """
    for target in targets:
        if not _ADDRESS.fullmatch(target):
            raise InputError(f"--target {target}: must be HOST:PORT, such as 10.0.0.2:8080")
    if not 0.001 <= every_s <= 3600:
        raise InputError(f"--every {every_s:g}: must be from 0.001 to 3600 seconds")
    root = Path(to).resolve()
    prometheus, grafana = root / "prometheus.yml", root / "grafana"
    files = {
        prometheus: _yaml(_prometheus(ray_temp_dirs, targets, every_s)),
        grafana / "provisioning" / "datasources" / "hsplit.yaml": _yaml(_datasource(prometheus_url)),
        grafana / "provisioning" / "dashboards" / "hsplit.yaml": _yaml(_provider(grafana / "dashboards")),
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
    """Its configuration, with files in which runs and Ray clusters announce themselves."""
    every = f"{round(every_s * 1000)}ms"
    announced = [discovery_directory() / "*.json", *(Path(temp).resolve() / _RAYS_FILE for temp in ray_temp_dirs)]
    scraped: dict[str, Any] = {
        "job_name": "hsplit",
        "file_sd_configs": [{"files": [str(path) for path in announced], "refresh_interval": every}],
    }
    if targets:
        scraped["static_configs"] = [{"targets": list(targets), "labels": {"job": "ray"}}]
    return {"global": {"scrape_interval": every, "scrape_timeout": every}, "scrape_configs": [scraped]}


def _datasource(url: str) -> dict[str, Any]:
    source = {"name": "hsplit", "uid": "hsplit", "type": "prometheus", "access": "proxy", "url": url, "isDefault": True}
    return {"apiVersion": 1, "datasources": [source]}


def _provider(dashboards: Path) -> dict[str, Any]:
    provider = {"name": "hsplit", "folder": "hsplit", "type": "file", "options": {"path": str(dashboards)}}
    return {"apiVersion": 1, "providers": [provider]}


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=1000)


# -- the runs that go on, in the form of Prometheus' file-based service discovery -----------------------------------


def discovery_directory() -> Path:
    """The folder of these files, in the user's cache directory."""
    return cache_root() / "prometheus"


def discovery_file(name: str) -> Path:
    """The file of a run that calls itself ``name``, which no other does at the same time."""
    return discovery_directory() / f"{name}.json"


def announce(name: str, address: str) -> None:
    """Have Prometheus find a run's metrics at ``address`` (``HOST:PORT``) from now on.

    Where the file cannot be written they have to be looked for there; a run goes on without being watched.
    """
    with suppress(OSError):
        discovery_directory().mkdir(parents=True, exist_ok=True)
        # The label is Ray's own, so that whoever is found in Ray's file as well is one target.
        write_text_atomically(discovery_file(name), json.dumps([{"targets": [address], "labels": {"job": "ray"}}]))
