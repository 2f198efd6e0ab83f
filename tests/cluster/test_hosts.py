"""A run over hosts with addresses, files and link rates of their own: Linux network namespaces, a Ray node in each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hsplit.observe.run_list import list_runs
from hsplit.observe.tables import read_metrics
from tests.cluster.namespaces import Host, RayNode, environment, hosts, ray_on, unavailable
from tests.errors import error_lines
from tests.in_process import random_examples

pytestmark = pytest.mark.drill

Record = Callable[[str, object], None]

# Declared, and what the links are shaped to.
RATES_MBPS = {"phone": 20.0, "laptop": 50.0, "clinic": 100.0}
TRANSFER_S = 1.0


@dataclass
class Hosts:
    """Hosts with a Ray node each.

    Attributes:
        made: by name: ``head`` has the driver and the server; ``bare`` has Ray, but not hsplit.
        address: of the Ray cluster.
        cluster_file: three clients, each pinned in another way, whose data are on their hosts alone.
        data: the folder that is another one on each client's host.
    """

    made: dict[str, Host]
    address: str
    cluster_file: Path
    data: Path

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Python on the head."""
        command = self.made["head"].command(sys.executable, *arguments)
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=self.data, timeout=900)

    def launch(self, runs: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``hsplit launch`` on the head."""
        command_line = "from hsplit.cli import run; run()"
        where = ["--address", self.address, "--runs-dir", str(runs)]
        return self.run("-c", command_line, "launch", "--cluster", self.cluster_file, *where, *arguments)


@pytest.fixture(scope="module")
def ray_hosts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := unavailable():
        pytest.skip(f"hosts of their own cannot be made: {reason}")
    folder = tmp_path_factory.mktemp("hosts")
    (data := folder / "data").mkdir()
    files: dict[str, dict[Path, Path | None]] = {}
    for seed, name in enumerate(RATES_MBPS):
        (own := folder / name).mkdir()
        lines = [f"{e.prompt}||{e.response.strip()}" for e in random_examples(20 + 10 * seed, seed=seed)]
        (own / "notes.txt").write_text("\n".join(lines) + "\n")
        files[name] = {data: own}
    nodes = {
        "head": RayNode(cpus=2),
        "phone": RayNode(files=files["phone"]),
        "laptop": RayNode(options=["--labels=site=office"], files=files["laptop"]),
        "clinic": RayNode(options=['--resources={"patients": 1}'], files=files["clinic"]),
        "bare": RayNode(options=["--labels=site=bare"], environment={"PYTHONPATH": str(folder / "bare")}),
    }
    (folder / "bare" / "hsplit").mkdir(parents=True)
    missing = "raise ModuleNotFoundError(\"No module named 'hsplit'\")\n"
    (folder / "bare" / "hsplit" / "__init__.py").write_text(missing)
    rates: dict[str, float | None] = {"head": None, **RATES_MBPS, "bare": None}
    with hosts(rates) as made, ray_on(made, nodes) as address:
        cluster_file = folder / "hosts.yaml"
        pins = {
            "phone": f"node: {made['phone'].address}",
            "laptop": "labels: {site: office}",
            "clinic": "resources: {patients: 1}",
        }
        clients = "\n".join(
            f"  - {{name: {name}, memory_gb: 0.0014, tflops: 0.01, bandwidth_mbps: {rate}, latency_ms: 1,"
            f" data: {data}/notes.txt, {pins[name]}}}"
            for name, rate in RATES_MBPS.items()
        )
        cluster_file.write_text(
            f"""
server: {{memory_gb: 1, tflops: 0.001, node: {made["head"].address}}}
clients:
{clients}
job: {{model: {models["llama"]}, dtype: fp32, wire: fp32, rounds: 2, local_steps: 2, max_length: 32, rank_set: [1, 2]}}
"""
        )
        yield Hosts(made, address, cluster_file, data)


def test_a_run_over_hosts_and_their_links(ray_hosts: Hosts, tmp_path: Path, record_property: Record) -> None:
    done = ray_hosts.launch(tmp_path, "--name", "hosts")
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = list_runs(tmp_path)
    assert run.state == "complete"
    assert (read_metrics(tmp_path / "hosts" / "metrics.csv")["available_clients"] == 3).all()
    # The driver's host has none of the data.
    assert not list(ray_hosts.data.iterdir())

    sizes = [f"{name}={round(rate * 1e6 / 8 * TRANSFER_S)}" for name, rate in RATES_MBPS.items()]
    looked = ray_hosts.run("-m", "tests.cluster.links", ray_hosts.address, "head", *sizes)
    assert looked.returncode == 0, looked.stderr[-3000:]
    found: dict[str, Any] = json.loads(looked.stdout)
    wanted = {f"hosts:client:{name}": name for name in RATES_MBPS}
    assert found["actors"] == {**wanted, "hosts:server": "head", "hosts:scheduler": "head"}
    for name, declared in RATES_MBPS.items():
        for way, measured in found["links"][name].items():
            record_property(f"{name}_{way}_mbps", f"declared {declared:g}, measured {measured:.1f}")
            print(f"{name:8} {way:4} declared {declared:6.1f} Mbit/s, measured {measured:6.1f}")
    for name, declared in RATES_MBPS.items():
        for way, measured in found["links"][name].items():
            assert measured == pytest.approx(declared, rel=0.25), (name, way)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "clients.phone.data=/nowhere/notes.txt",
            "phone: data: there is no file /nowhere/notes.txt on its node phone (PHONE)",
        ),
        (
            "clients.laptop.model=GPT2",
            "laptop: model: GPT2 on its node laptop (LAPTOP) is not the run's base model: sha256 ",
        ),
        (
            "clients.laptop.labels.site=mars",
            "laptop: labels: no node has site=mars; head (HEAD) has 2 CPU; phone (PHONE) has 1 CPU; ",
        ),
        (
            "clients.clinic.resources.patients=2",
            "clinic: resources.patients: 2 asked, no node has more than 1; head (HEAD) has 2 CPU; ",
        ),
        ("clients.phone.node=tablet", "phone: node: tablet is not in the Ray cluster; it has head (HEAD), phone ("),
        (
            "server.num_cpus=3",
            "server: num_cpus: 3 asked, no node of the name HEAD has more than 2; head (HEAD) has 2 CPU",
        ),
        (
            "clients.laptop.labels.site=bare",
            "node bare (BARE): hsplit cannot be imported there (No module named 'hsplit'): install hsplit ",
        ),
    ],
)
def test_what_a_host_cannot_give_is_refused_in_one_line(
    ray_hosts: Hosts, models: dict[str, Path], tmp_path: Path, override: str, reason: str
) -> None:
    refused = ray_hosts.launch(tmp_path / "runs", "--set", override.replace("GPT2", str(models["gpt2"])))
    assert refused.returncode == 2
    for name, host in ray_hosts.made.items():
        reason = reason.replace(name.upper(), host.address)
    (line,) = error_lines(refused.stderr)
    assert line.startswith("error: " + reason.replace("GPT2", str(models["gpt2"])))
    assert not list((tmp_path / "runs").iterdir())
