"""A run over hosts whose Ray speaks TLS: it is complete, nothing of it can be read on the way, and strangers stay out.

Certificates are made by the commands of docs/security.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hsplit.observe.run_list import list_runs
from tests.cluster.namespaces import Host, RayNode, environment, hosts, ray_on, unavailable
from tests.documents import DOCS
from tests.errors import error_lines
from tests.in_process import random_examples

pytestmark = pytest.mark.drill

# Counts frames, and those with the marker in them, until its input ends.
SNIFFER = """
import select, socket, sys
frames = found = 0
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3)) as wire:
    wire.bind(("eth0", 0))
    print("listening", flush=True)
    while True:
        ready, _, _ = select.select([wire, sys.stdin], [], [])
        if wire in ready:
            frames += 1
            found += sys.argv[1].encode() in wire.recv(1 << 16)
        elif sys.stdin in ready:
            break
print(frames, found)
"""


def certificates(folder: Path, address: str) -> dict[str, str]:
    """Make a host's certificate by the authority in ``folder``, and the authority where there is none.

    Returns:
        The environment of the host's Ray.
    """
    commands = re.findall(r"^    (openssl (?:.|\\\n)*?[^\\])$", (DOCS / "security.md").read_text(), re.MULTILINE)
    authority, *own = [command.replace("10.0.0.2", address).replace("host.", f"{address}.") for command in commands]
    if not (folder / "authority.crt").exists():
        subprocess.run(["bash", "-ec", authority], cwd=folder, check=True, capture_output=True)
    for command in own:
        subprocess.run(["bash", "-ec", command], cwd=folder, check=True, capture_output=True)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / f"{address}.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / f"{address}.key"),
        "RAY_TLS_CA_CERT": str(folder / "authority.crt"),
    }


@contextmanager
def sniffing(host: Host, marker: str) -> Iterator[list[int]]:
    """Read along at the host's link; the list then has the number of frames, and of those with ``marker`` in them."""
    command = host.command(sys.executable, "-c", SNIFFER, marker)
    counts: list[int] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sniffer:
        assert sniffer.stdout is not None and sniffer.stdout.readline() == "listening\n"
        yield counts
        out, _ = sniffer.communicate()
    counts += map(int, out.split())


@dataclass
class Clinic:
    """Three hosts: the head and a clinic with Ray, and a stranger without.

    Attributes:
        made: by name.
        address: of the Ray cluster.
        cluster_file: one client, pinned to the clinic.
        certificates: environment of the head's processes.
    """

    made: dict[str, Host]
    address: str
    cluster_file: Path
    certificates: Mapping[str, str]

    def hsplit(self, host: str, own: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run ``hsplit`` on a host."""
        code = "from hsplit.cli import run; run()"
        command = self.made[host].command(sys.executable, "-c", code, *map(str, arguments))
        folder = self.cluster_file.parent
        return subprocess.run(
            command, capture_output=True, text=True, env=environment(own), cwd=folder, timeout=400, check=False
        )

    def launch(self, host: str, own: Mapping[str, str], runs: Path) -> subprocess.CompletedProcess[str]:
        """Run ``hsplit launch`` on a host."""
        where = ("--address", self.address, "--runs-dir", runs, "--name", "secure")
        return self.hsplit(host, own, "launch", "--cluster", self.cluster_file, *where)


@contextmanager
def clinic(model: Path, folder: Path, secure: bool) -> Iterator[Clinic]:
    """Make the hosts, and start Ray with or without TLS."""
    lines = [f"{e.prompt}||{e.response.strip()}" for e in random_examples(20, seed=1)]
    (folder / "notes.txt").write_text("\n".join(lines) + "\n")
    with hosts(dict.fromkeys(("head", "clinic", "stranger"))) as made:
        own = {name: certificates(folder, host.address) if secure else {} for name, host in made.items()}
        nodes = {"head": RayNode(cpus=2, environment=own["head"]), "clinic": RayNode(environment=own["clinic"])}
        file = folder / "clinic.yaml"
        file.write_text(
            f"""
server: {{memory_gb: 1, tflops: 0.001, node: head}}
clients: [{{name: clinic, memory_gb: 0.0014, tflops: 0.01, node: clinic, data: {folder}/notes.txt}}]
job: {{model: {model}, dtype: fp32, wire: fp32, rounds: 1, local_steps: 2, max_length: 32, rank_set: [1, 2]}}
"""
        )
        with ray_on(made, nodes) as address:
            yield Clinic(made, address, file, own["head"])


@pytest.fixture(scope="module")
def possible() -> None:
    if reason := unavailable():
        pytest.skip(f"hosts of their own cannot be made: {reason}")


@pytest.fixture(scope="module")
def secure(possible: None, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    with clinic(models["llama"], tmp_path_factory.mktemp("secure"), secure=True) as made:
        yield made


def run_read_along(hosts: Clinic, runs: Path) -> list[int]:
    """Launch a run to its end; returns the frames at the head's link, and those that name an actor."""
    with sniffing(hosts.made["head"], "hsplit:secure:client:clinic") as counts:
        done = hosts.launch("head", hosts.certificates, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = list_runs(runs)
    assert run.state == "complete"
    return counts


def test_a_run_with_certificates_is_complete_and_cannot_be_read(secure: Clinic, tmp_path: Path) -> None:
    frames, found = run_read_along(secure, tmp_path)
    assert frames > 100 and found == 0


def test_without_certificates_it_can_be_read(possible: None, models: dict[str, Path], tmp_path: Path) -> None:
    with clinic(models["llama"], tmp_path, secure=False) as open_hosts:
        frames, found = run_read_along(open_hosts, tmp_path / "runs")
    assert frames > 100 and found > 0


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", "this Ray cluster uses TLS: set RAY_USE_TLS=1 here, and RAY_TLS_SERVER_CERT, "),
        ("of another authority", "the certificate there does not pass "),
    ],
)
def test_a_host_without_the_certificate_is_refused_in_one_line(
    secure: Clinic, tmp_path: Path, kind: str, reason: str
) -> None:
    """Although it has the token."""
    assert os.environ["RAY_AUTH_MODE"] == "token"
    own = {} if kind == "none" else certificates(tmp_path, secure.made["stranger"].address)
    refused = secure.launch("stranger", own, tmp_path / "runs")
    (line,) = error_lines(refused.stderr)
    assert refused.returncode == 2 and line.startswith(f"error: --address {secure.address}: {reason}")
    assert not list((tmp_path / "runs").iterdir())
