"""A real Prometheus, with the files that `hsplit monitoring` writes, against a live run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.observe.exported_metrics import METRICS
from hsplit.observe.tables import read_metrics, read_plan

pytestmark = pytest.mark.real

# In a process of its own, whose Ray has a dashboard, which writes Ray's own list of nodes. A client dies in
# the first round; after two of three rounds, and a step, the run waits until it has been looked at.
PROGRAM = """
import sys, time
from pathlib import Path

import ray
from ray.util.state import list_actors, list_tasks

import hsplit
from tests.in_process import Recorder

cluster_file, runs, looked_at = map(Path, sys.argv[1:])


class Display(Recorder):
    def started(self, run_name, lines):
        print(*lines, sep="\\n", flush=True)


def after_step(step):
    if step == 2:
        ray.kill(ray.get_actor("hsplit:watched:client:large-1", namespace="hsplit"))
    if step == 10:
        # As the dashboard lists them; there may be other Ray clusters on the machine.
        here = ray.get_runtime_context().gcs_address
        names = {actor.name for actor in list_actors(here)}
        assert {"hsplit:watched:client:small", "hsplit:watched:server", "hsplit:watched:scheduler"} <= names, names
        tasks = {task.name for task in list_tasks(here, limit=10_000)}
        assert {"Client.forward", "Server.train_step", "Client.backward"} <= tasks, tasks
        until = time.monotonic() + 400
        while not looked_at.exists() and time.monotonic() < until:
            time.sleep(0.1)


run = hsplit.launch(cluster_file, runs_dir=runs, name="watched", display=Display(after_step=after_step))
assert run.complete
"""
_PATIENCE_S = 120.0


def _until(what: Callable[[], Any]) -> Any:
    """What ``what`` returns once that is true, or at last."""
    until = time.monotonic() + _PATIENCE_S
    while not (found := what()) and time.monotonic() < until:
        time.sleep(0.2)
    return found


class Prometheus:
    """Asks a Prometheus over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/api/v1"

    def get(self, path: str, **parameters: str) -> Any:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}?{urllib.parse.urlencode(parameters)}") as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
            return {}
        except OSError:
            # Not yet there.
            return {}

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series."""
        return [
            (found["metric"], float(found["value"][1])) for found in self.get("query", query=expr).get("result", [])
        ]


@contextmanager
def _process(command: list[str], to: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with to.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _by(label: str, found: list[tuple[dict[str, str], float]]) -> dict[str, float]:
    return {labels[label]: value for labels, value in found}


@pytest.fixture
def temporary() -> Iterator[Path]:
    """With a short path, since Ray's sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="p") as path:
        yield Path(path)


def test_prometheus_has_every_metric_and_answers_every_query_of_the_dashboard(
    cluster_file: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    monkeypatch.setenv("HSPLIT_CACHE", str(tmp_path / "cache"))
    program, runs, looked_at, to = (tmp_path / name for name in ("program.py", "runs", "looked-at", "monitoring"))
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(cluster_file), str(runs), str(looked_at)]
    often = {"RAY_metrics_report_interval_ms": "1000", "TMPDIR": str(temporary)}
    with _process(command, tmp_path / "run.log", PYTHONPATH=str(Path(__file__).parents[2]), **often) as run:
        (rays_file,) = _until(lambda: list(temporary.glob("hsplit-*/prom_metrics_service_discovery.json")))
        url = f"http://127.0.0.1:{_free_port()}"
        options = ["--ray-temp-dir", str(rays_file.parent), "--every", "0.5", "--prometheus", url]
        done = CliRunner().invoke(main, ["monitoring", "--to", str(to), *options])
        assert done.exit_code == 0, done.output
        start = [*shlex.split(done.stdout.splitlines()[0]), f"--web.listen-address={url.removeprefix('http://')}"]
        with _process(start, tmp_path / "prometheus.log"):
            prometheus = Prometheus(url)
            assert _until(lambda: prometheus.query('ray_hsplit_step{run="watched"} == 9')), _ends(tmp_path)
            _is_what_the_run_wrote(prometheus, runs / "watched")
            _is_shown(prometheus, to)
            # What Ray lists is scraped as well, soon after Ray has listed it; the node that both name is one target.
            assert _until(lambda: len(_listed(rays_file)) > 1 and _scraped(prometheus) == _listed(rays_file)), (
                f"{_scraped(prometheus)}, {_listed(rays_file)}"
            )
            _can_be_signed_in_to((tmp_path / "run.log").read_text(), _scraped(prometheus))
            looked_at.touch()
            assert run.wait(_PATIENCE_S) == 0, _ends(tmp_path)
            # The run is over, and nobody goes on showing what it was.
            assert _until(lambda: not prometheus.query('{__name__=~"ray_hsplit_.*"}'))
            assert not list((tmp_path / "cache" / "prometheus").iterdir())


def _scraped(prometheus: Prometheus) -> list[str]:
    """Addresses of all targets."""
    return sorted(target["scrapeUrl"] for target in prometheus.get("targets")["activeTargets"])


def _listed(rays_file: Path) -> list[str]:
    """Addresses that Ray lists for Prometheus."""
    return sorted(f"http://{target}/metrics" for target in json.loads(rays_file.read_text())[0]["targets"])


def _is_what_the_run_wrote(prometheus: Prometheus, run: Path) -> None:
    """Every metric of the list is there, and those of the tables have the values of the last complete round."""
    found = {}
    for metric in METRICS:
        found[metric.name] = series = prometheus.query(f'{metric.in_prometheus}{{run="watched"}}')
        assert series, metric
        assert all(labels.get(tag) for labels, _ in series for tag in metric.tags), series
        labels, value = series[0]
        print(f"{metric.in_prometheus} | {len(series)} | { {tag: labels[tag] for tag in metric.tags} } {value:g}")
    metrics, plans = read_metrics(run / "metrics.csv"), read_plan(run / "plan.csv")
    last = metrics.iloc[-1]
    assert last["round"] == 2
    one = {name: series[0][1] for name, series in found.items() if len(series) == 1}
    for name, column in {
        "round": "round",
        "tokens": "tokens",
        "train_loss": "train_loss",
        "validation_loss": "val_loss",
        "validation_perplexity": "val_ppl",
        "wall_seconds": "wall_time_s",
        "virtual_seconds": "virtual_time_s",
        "train_wall_seconds": "train_wall_time_s",
        "train_virtual_seconds": "train_virtual_time_s",
        "clients": "available_clients",
    }.items():
        assert one[f"hsplit_{name}"] == pytest.approx(last[column], rel=1e-12), name
    assert _by("direction", found["hsplit_wire_bytes"]) == {"up": last["bytes_up"], "down": last["bytes_down"]}
    # In the third round the large clients have less memory, so the plan in force is another by now.
    of_round = plans[plans["round"] == 2].set_index("name")
    assert set(of_round.index) == {"server", "small", "large-0", "large-1"}
    measured = _by("holder", found["hsplit_memory_measured_bytes"])
    assert measured == of_round["measured_bytes"].dropna().astype(float).to_dict()
    assert _by("holder", found["hsplit_memory_declared_bytes"])["large-0"] == 1_180_000
    assert _by("holder", found["hsplit_split"])["large-0"] < of_round.loc["large-0", "split"]
    for name in ("memory_declared_bytes", "memory_predicted_bytes", "rank_total", "split", "virtual_step_seconds"):
        assert _by("holder", found[f"hsplit_{name}"]).keys() == set(of_round.index), name
    timing = pd.read_csv(run / "timing.csv").query("round == 2").set_index(["name", "phase"])["seconds"]
    seconds = {(labels["holder"], labels["phase"]): value for labels, value in found["hsplit_step_seconds"]}
    assert seconds == pytest.approx((timing / 4).to_dict(), rel=1e-12)
    (failure,) = found["hsplit_failures"]
    assert (failure[0]["holder"], failure[0]["kind"], failure[1]) == ("large-1", "died", 1)


def _is_shown(prometheus: Prometheus, to: Path) -> None:
    """Every query of the dashboard has an answer, for the run that is picked and for all of them."""
    dashboard = json.loads((to / "grafana" / "dashboards" / "hsplit.json").read_text())
    variable = dashboard["templating"]["list"][1]
    metric = variable["query"]["query"].removeprefix("label_values(").removesuffix(", run)")
    assert prometheus.get("label/run/values", **{"match[]": metric}) == ["watched"]
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            picked, every = (
                prometheus.query(target["expr"].replace("$run", run)) for run in ("watched", variable["allValue"])
            )
            assert picked and len(picked) == len(every), target
            print(f"{target['expr']} | {len(picked)} | {picked[0][1]:g}")


def _can_be_signed_in_to(log: str, targets: list[str]) -> None:
    """What a launch prints leads to the dashboard, and to the metrics that Prometheus scrapes."""
    printed = re.search(r"^ray      (http://\S+) \(sign in with the output of: ray (.*)\)$", log, re.MULTILINE)
    assert printed, log
    url = f"{printed[1]}/api/v0/actors"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url)
    assert refused.value.code == 401
    token = subprocess.check_output([sys.executable, "-m", "ray.scripts.scripts", printed[2]], text=True).strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        assert "hsplit:watched:server" in answer.read().decode()
    metrics = re.search(r"^metrics  (http://\S+) ", log, re.MULTILINE)
    assert metrics and metrics[1] in targets, log


def _ends(folder: Path) -> str:
    """How the logs end, for who has to find out what went wrong."""
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in folder.glob("*.log"))
