"""Configuration files of Prometheus and Grafana, and the files in which runs announce their metrics to Prometheus."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from hsplit.config.files import displayed
from hsplit.errors import InputError, os_reason
from hsplit.files import write_text_atomically
from hsplit.models.packaged import cache_root
from hsplit.observe.grafana_dashboard import dashboard

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
