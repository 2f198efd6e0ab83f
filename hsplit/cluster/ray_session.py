"""Ray for a session: processes beside the driver, and a local Ray or the connection to a cluster."""

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
from hsplit.errors import InputError
from hsplit.home import keep_ray_token, no_ray_token
from hsplit.shadowing import refusal_text, shadowing_file
from hsplit.streams import quieten_bitsandbytes
from hsplit.waiting import Waiting

# Keeps Ray's processes from importing modules of the working directory that are named like Python's, such as random.py.
OWN_MODULES_ONLY = {"PYTHONSAFEPATH": "1"}


# For clients that join a local run, even if the others ask for little.
_LEAST_SPARE_CPUS = 4


@dataclass(frozen=True)
class Helpers:
    """Processes beside the driver.

    Attributes:
        cleanup: cleans up when the driver is gone.
        fork_server: forks a local Ray's workers, or ``None``.
    """

    cleanup: CleanupProcess
    fork_server: ForkServer | None


@contextmanager
def helpers_of(run: RunConfig, address: str | None) -> Iterator[Helpers]:
    """Start the processes beside the driver, which import while inputs are checked.

    Workers of a local cluster are forked, except where a holder has a GPU, which a forked process may be unable to use,
    and on systems whose libraries do not support a fork.
    """
    quieten_bitsandbytes()
    # Read when Ray is imported. The coordinator reports lost actors itself.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
    # A local Ray fails if its dashboard is not up by then; the default of 60 s is short on a busy machine.
    os.environ.setdefault("RAY_DASHBOARD_STARTUP_TIMEOUT_S", "300")
    if address is None:
        if (file := shadowing_file()) is not None:
            raise InputError(refusal_text(file))
        # Under `uv run` Ray would upload the working directory for workers that are on this machine anyway.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            keep_ray_token()
        except OSError as error:
            raise InputError(no_ray_token(error)) from error
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
    """Set environment variables for the processes that are started inside."""
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
    """Connect Ray for ``run``'s actors, unless it is connected already; yields the dashboard's address, if any."""
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
    """Count the logical CPUs that a local Ray needs, with room for as many clients again, which may join.

    They are figures of Ray's scheduling alone: where it starts workers in advance, it starts no more than one a core.
    """
    clients = sum(client.num_cpus for client in run.participants)
    return run.server.num_cpus * run.server.replicas + clients + max(clients, _LEAST_SPARE_CPUS)
