"""Several hosts on one machine: network namespaces with addresses and files of their own, on links of a given rate."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]
RAY_PORT = 6379
_PATIENCE_S = 180.0
_NUMBERS = count()


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        namespace: its network namespace.
        address: its IP address, which every other host reaches.
    """

    namespace: str
    address: str

    def command(self, *arguments: str | Path, files: Mapping[Path, Path | None] | None = None) -> list[str]:
        """The command line that runs ``arguments`` on this host.

        Args:
            arguments: what to run.
            files: by folder what is in it on this host instead of what is there elsewhere: a folder's contents, or
                nothing.
        """
        lines = ["set -e"]
        for folder, contents in (files or {}).items():
            # `ip netns exec` gives every process mounts of its own, so nobody else sees this one.
            lines.append(f"mount -t tmpfs none {shlex.quote(str(folder))}")
            if contents is not None:
                lines.append(f"cp -r {shlex.quote(str(contents))}/. {shlex.quote(str(folder))}")
        lines.append(f"exec {shlex.join(map(str, arguments))}")
        return ["ip", "netns", "exec", self.namespace, "sh", "-c", "\n".join(lines)]


def unavailable() -> str:
    """Why there can be no such hosts on this machine; empty if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    missing = [tool for tool in ("ip", "tc", "mount") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        with hosts({"a": 10.0}) as made:
            _run(*made["a"].command("true", files={Path(tempfile.gettempdir()): None}))
    except subprocess.CalledProcessError as error:
        return f"not permitted: {shlex.join(error.cmd)}: {error.stderr.strip()}"
    return ""


@contextmanager
def hosts(rates_mbps: Mapping[str, float | None]) -> Iterator[dict[str, Host]]:
    """Make a host of each name, all on one switch, and take everything away at the end, with what runs there.

    Args:
        rates_mbps: by name the rate of the host's link in Mbit/s, in both directions; ``None``: no limit.
    """
    prefix, subnet = f"hs{os.getpid():x}{next(_NUMBERS)}", f"10.77.{os.getpid() % 250 + 1}"
    switch = f"{prefix}sw"
    made = {name: Host(f"{prefix}n{i}", f"{subnet}.{i}") for i, name in enumerate(rates_mbps, start=1)}
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for i, (name, host) in enumerate(made.items(), start=1):
            _run("ip", "netns", "add", host.namespace)
            # Both ends are born in their namespaces: this machine's own network is left as it is.
            ends = ["type", "veth", "peer", "name", f"port{i}", "netns", switch]
            _run("ip", "-n", host.namespace, "link", "add", "eth0", *ends)
            _run("ip", "-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            rate = rates_mbps[name]
            if rate is not None:
                _shape(host.namespace, "eth0", rate)
                _shape(switch, f"port{i}", rate)
        yield made
    finally:
        for namespace in (*(host.namespace for host in made.values()), switch):
            _end_all(namespace)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _shape(namespace: str, device: str, rate_mbps: float) -> None:
    # A bucket of some milliseconds, so that a transfer's first bytes do not pass for a faster link.
    burst = max(16_000, round(rate_mbps * 1e6 / 8 * 0.004))
    tbf = ["tbf", "rate", f"{rate_mbps}mbit", "burst", f"{burst}", "latency", "100ms"]
    _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *tbf)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _end_all(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in map(int, listed.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class RayNode:
    """How a host's Ray is started.

    Attributes:
        cpus: logical CPUs.
        options: further ones of ``ray start``.
        files: by folder what is in it on this host alone, see :meth:`Host.command`.
        environment: further variables.
    """

    cpus: int = 1
    options: Sequence[str] = ()
    files: Mapping[Path, Path | None] | None = None
    environment: Mapping[str, str] | None = None


@contextmanager
def ray_on(made: Mapping[str, Host], nodes: Mapping[str, RayNode]) -> Iterator[str]:
    """Start Ray on hosts, the first of ``nodes`` being the head, with the token that the environment has.

    Gives the cluster's address. The processes end with the hosts.
    """
    (head, *_) = nodes
    address = f"{made[head].address}:{RAY_PORT}"
    # Short: Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:
        started: list[tuple[TextIO, subprocess.Popen[bytes]]] = []
        try:
            for name, node in nodes.items():
                first = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false"]
                command = [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                    *(first if name == head else [f"--address={address}"]),
                    *(f"--node-ip-address={made[name].address}", f"--node-name={name}", f"--num-cpus={node.cpus}"),
                    *("--object-store-memory=100000000", f"--temp-dir={temporary}/{name}", *node.options),
                ]
                log = (Path(temporary) / f"{name}.log").open("w+")
                process = subprocess.Popen(
                    made[name].command(*command, files=node.files),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment(node.environment),
                )
                started.append((log, process))
                _wait_for(process, log.name)
            yield address
        finally:
            for host in made.values():
                _end_all(host.namespace)
            for log, process in started:
                process.wait()
                log.close()


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process of another host has in its environment."""
    own = {
        "PYTHONPATH": str(ROOT),
        "RAY_prestart_worker_first_driver": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers yield to all other work of a machine otherwise, and a test would wait in vain on a busy one.
        "RAY_worker_niceness": "0",
    }
    return os.environ | own | dict(more or {})


def _wait_for(process: subprocess.Popen[bytes], log: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while "Ray runtime started" not in Path(log).read_text():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"Ray did not start: {Path(log).read_text()[-2000:]}")
        time.sleep(0.1)
