"""What `hsplit monitoring` writes: valid, and about the metrics that there are."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.errors import InputError
from hsplit.observe.exported_metrics import METRICS
from hsplit.observe.monitoring import announce, discovery_file, write_monitoring
from hsplit.observe.ray_metrics import RayMetrics

DOCS = Path(__file__).parents[2] / "docs" / "monitoring.md"
_UNITS = {"": "short", "seconds": "s", "bytes": "bytes"}


pytestmark = pytest.mark.usefixtures("own_cache")


def _dashboard(to: Path) -> Any:
    return json.loads((to / "grafana" / "dashboards" / "hsplit.json").read_text())


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_every_query_is_about_a_metric_that_there_is_and_every_metric_is_asked_for(tmp_path: Path) -> None:
    write_monitoring(tmp_path / "m")
    tags = {metric.in_prometheus: {"run", *metric.tags} for metric in METRICS}
    asked: set[str] = set()
    for panel in _dashboard(tmp_path / "m")["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"\w*hsplit_\w+", target["expr"])
            assert names and set(names) <= tags.keys(), target
            assert 'run=~"$run"' in target["expr"], target
            used = re.findall(r"{{(\w+)}}", target["legendFormat"]) + re.findall(r'(\w+)!?=~?"', target["expr"])
            assert set(used) <= tags[names[0]], target
            asked |= set(names)
    assert asked == tags.keys()


def test_the_documentation_has_the_list_as_it_is() -> None:
    rows = re.findall(r"^\| `(ray_hsplit_\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", DOCS.read_text(), re.MULTILINE)
    found = [(name, tuple(re.findall(r"`(\w+)`", tags)), _UNITS[unit], meaning) for name, tags, unit, meaning in rows]
    assert found == [(metric.in_prometheus, metric.tags, metric.unit, metric.meaning) for metric in METRICS]
    for metric in METRICS:
        assert metric.name.startswith("hsplit_")
        assert ("virtual" in metric.name) == ("Virtual" in metric.meaning), metric


def test_grafana_finds_dashboard_and_prometheus(tmp_path: Path) -> None:
    write_monitoring(tmp_path / "m", prometheus_url="http://prometheus:9999")
    provisioning = tmp_path / "m" / "grafana" / "provisioning"
    (source,) = _yaml(provisioning / "datasources" / "hsplit.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9999")
    (provider,) = _yaml(provisioning / "dashboards" / "hsplit.yaml")["providers"]
    assert [path.name for path in Path(provider["options"]["path"]).iterdir()] == ["hsplit.json"]
    dashboard = _dashboard(tmp_path / "m")
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "run"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert [p["title"] for p in dashboard["panels"] if p["fieldConfig"]["defaults"]["custom"]["fillOpacity"]] == [
        "Seconds of a local step by phase, mean over holders"
    ]


def test_prometheus_looks_where_runs_and_ray_announce_themselves(tmp_path: Path) -> None:
    ray = tmp_path / "ray"
    options = ["--ray-temp-dir", ray, "--target", "10.0.0.2:8080", "--target", "[::1]:80", "--every", "2.5"]
    to = tmp_path / "my monitoring"
    done = CliRunner().invoke(main, ["monitoring", "--to", str(to), *map(str, options)])
    assert done.exit_code == 0, done.output
    config = _yaml(to / "prometheus.yml")
    (scraped,) = config["scrape_configs"]
    (announced,) = scraped["file_sd_configs"]
    assert announced["files"] == [
        str(tmp_path / "cache" / "prometheus" / "*.json"),
        str(ray / "prom_metrics_service_discovery.json"),
    ]
    assert config["global"]["scrape_interval"] == announced["refresh_interval"] == "2500ms"
    assert scraped["static_configs"][0]["targets"] == ["10.0.0.2:8080", "[::1]:80"]
    announce("hsplit-one", "127.0.0.1:8080")
    (entry,) = json.loads(discovery_file("hsplit-one").read_text())
    assert entry["targets"] == ["127.0.0.1:8080"] and discovery_file("hsplit-one").match(announced["files"][0])
    program, file, _ = shlex.split(done.stdout.splitlines()[0])
    assert program == "prometheus" and Path(file.removeprefix("--config.file=")) == to / "prometheus.yml"


def test_prometheus_own_tool_accepts_the_configuration(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool, which comes with Prometheus, is not installed")
    write_monitoring(tmp_path / "m", targets=["10.0.0.2:8080"], every_s=0.5)
    checked = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "m" / "prometheus.yml")], capture_output=True, text=True
    )
    assert checked.returncode == 0 and "FAILED" not in checked.stdout, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "localhost"], "--target localhost: must be HOST:PORT, such as 10.0.0.2:8080"),
        (["--target", "http://localhost:80"], "--target http://localhost:80: must be HOST:PORT"),
        (["--every", "0"], "--every 0: must be from 0.001 to 3600 seconds"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["monitoring", "--to", str(tmp_path / "m"), *options])
    assert done.exit_code == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--to .*file: cannot be written"):
        write_monitoring(tmp_path / "file")


def test_a_cache_that_cannot_be_written_does_not_keep_a_run_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "file"))
    announce("hsplit-one", "127.0.0.1:8080")
    assert (tmp_path / "file").read_text() == ""


def test_gauges_that_fail_are_told_of_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then whoever drives the observer leaves it out; until then the thread is quiet."""

    class Broken:
        def __init__(self, *arguments: Any, **options: Any) -> None: ...

        def set(self, *arguments: Any, **options: Any) -> None:
            raise RuntimeError("the agent is gone")

    monkeypatch.setattr("ray.util.metrics.Gauge", Broken)
    with RayMetrics(every_s=0.001) as metrics:
        metrics.started("broken", [])
        metrics.step(1, 1, 1, 4, {}, {})
        assert metrics._thread is not None
        metrics._thread.join()
        with pytest.raises(RuntimeError, match="the agent is gone"):
            metrics.step(1, 1, 2, 4, {}, {})
