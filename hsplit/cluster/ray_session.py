"""Ray for a session: the processes beside the driver, and a local Ray or the connection to a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hsplit.actors.executor import LOCALHOST
from hsplit.cluster.cleanup import MARK, CleanupProcess
from hsplit.cluster.fork_server import ForkServer
from hsplit.config import RunConfig
from hsplit.errors import InputError, os_reason
from hsplit.home import keep_ray_token
from hsplit.shadowing import shadowing_file, why_refused
from hsplit.streams import quieten_bitsandbytes
from hsplit.waiting import Waiting

# A module in the working directory that has a name of Python's own, such as random.py, is not for Ray's processes.
OWN_MODULES_ONLY = {"PYTHONSAFEPATH": "1"}


# For clients that join a local run, however little the others ask for.
_LEAST_SPARE_CPUS = 4


@dataclass(frozen=True)
class Helpers:
    """Processes beside the driver.

    Attributes:
        cleanup: tidies up when the driver is gone.
        fork_server: forks a local Ray's workers, or ``None``.
    """

    cleanup: CleanupProcess
    fork_server: ForkServer | None


@contextmanager
def helpers_of(run: RunConfig, address: str | None) -> Iterator[Helpers]:
    """Start what works beside the driver, while everything is checked.

    Workers of a local cluster are forked from a process that imports meanwhile; not where a holder has a GPU, which a
    forked process may be unable to use, and not on systems whose own libraries do not bear a fork.
    """
    quieten_bitsandbytes()
    # Read when Ray is imported. What the coordinator tells of a lost actor is enough.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
    # A local one whose dashboard is not there by then is no Ray; its own 60 s are short on a machine with much to do.
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")
    if address is None:
        if (file := shadowing_file()) is not None:
            raise InputError(why_refused(file))
        # Under `uv run` Ray would upload the whole working directory for workers that are on this machine anyway.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            keep_ray_token()
        except OSError as error:
            raise InputError(
                f"HOME: Ray's token cannot be written there nor elsewhere ({os_reason(error)}); set HOME or TMPDIR to a"
                " directory that can be written"
            ) from error
    with Waiting("importing Ray"):
        import ray

    holders = (run.server, *run.participants)
    local = address is None and not ray.is_initialized()
    forking = local and sys.platform == "linux" and not any(holder.num_gpus for holder in holders)
    environment = OWN_MODULES_ONLY if local else {}
    with (
        CleanupProcess() as cleanup,
        _environment({MARK: str(cleanup.root), "TMPDIR": str(cleanup.root), **environment}),
    ):
        if not forking:
            yield Helpers(cleanup, None)
            return
        with ForkServer(within=cleanup.root) as fork_server:
            yield Helpers(cleanup, fork_server)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Give ``values`` to the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def ray_of(
    run: RunConfig,
    address: str | None,
    helpers: Helpers,
    *,
    dashboard: bool = True,
    dashboard_host: str = LOCALHOST,
) -> Iterator[str | None]:
    """Ray for ``run``'s actors, unless this process is connected already; yields the dashboard's address, if any."""
    import ray

    from hsplit.cluster.connection import connect

    if ray.is_initialized():
        yield None
        return
    cpus = local_cpus(run)
    root, fork_server = helpers.cleanup.root, helpers.fork_server
    with Waiting("starting Ray" if address is None else f"connecting to the Ray cluster at {address}"):
        found = connect(address, cpus, dashboard, root=root, fork_server=fork_server, dashboard_host=dashboard_host)
    try:
        yield found
    finally:
        ray.shutdown()


def local_cpus(run: RunConfig) -> float:
    """How many logical CPUs a local Ray needs at least: with room for as many clients again, which may join.

    Ray only keeps account of them. Workers that it starts beforehand, where it does, are no more than there are cores.
    """
    clients = sum(client.num_cpus for client in run.participants)
    return run.server.num_cpus * run.server.replicas + clients + max(clients, _LEAST_SPARE_CPUS)
