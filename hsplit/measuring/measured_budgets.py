"""``hsplit probe``: measure the budgets of clients and server, and write a cluster file of them.

Each holder is measured by an actor on the node, and with the resources and threads, that a run would give it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hsplit.actors.executor import Executor, R, Ref
from hsplit.cluster.ray_executor import RayExecutor
from hsplit.cluster.ray_session import helpers_of, ray_of
from hsplit.config import SERVER, Job, Policy, RunConfig
from hsplit.config.overrides import Overrides
from hsplit.config.reading import displayed
from hsplit.config.section import shown
from hsplit.errors import InputError, RunError, os_reason
from hsplit.files import write_text_atomically
from hsplit.measuring.cluster_file import Figure, Figures, load_unmeasured, measured_file
from hsplit.measuring.compute import StepSeconds, client_flops, dequantization_flops, joined_clients, server_flops
from hsplit.measuring.free_memory import HEADROOM, Location, shared_out
from hsplit.measuring.link import SIZES, Link, measure_link
from hsplit.measuring.measuring_actor import MeasuringActor
from hsplit.models.lookup import ModelReference, find_model
from hsplit.models.segment import BaseModel
from hsplit.observe.wording import NOTHING, printable
from hsplit.planning.cost.counted_model import DEQUANTIZATION_FLOPS
from hsplit.planning.cost.model import CostModel
from hsplit.run.inputs import check_model, resolved_config
from hsplit.streams import is_terminal

# Hops of a message between client and server, by its least size: an even number, there and back.
_HOPS = ((16 << 20, 2), (4 << 20, 4), (1 << 20, 8), (0, 32))
_HEADINGS = {
    "memory_gb": "memory\nGB",
    "tflops": "compute\nTFLOP/s",
    "bandwidth_mbps": "bandwidth\nMbit/s",
    "latency_ms": "latency\nms",
}


@dataclass(frozen=True)
class MeasuredBudgets:
    """Measured budgets of a cluster file.

    Attributes:
        path: the cluster file that was written.
        machines: host name by holder; the clients, then the servers.
        figures: by holder and key of its budget.
        dequantization_flops: operations in whose time a client dequantizes an entry of a quantized base, by client.
    """

    path: Path
    machines: dict[str, str]
    figures: Figures
    dequantization_flops: Mapping[str, Figure]

    def to_json(self) -> dict[str, Any]:
        """Return the form that ``hsplit probe --json`` prints."""
        holders = [
            {"name": name, "machine": machine, **{key: asdict(figure) for key, figure in self.figures[name].items()}}
            for name, machine in self.machines.items()
        ]
        flops = {name: asdict(figure) for name, figure in self.dequantization_flops.items()}
        return {"cluster_file": str(self.path), "holders": holders, "dequantization_flops": flops}


def measure_budgets(
    cluster: str | Path,
    to: str | Path,
    overrides: Overrides = (),
    *,
    address: str | None = None,
    cpu: bool = False,
    repeats: int = 5,
    seconds: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
) -> MeasuredBudgets:
    """Measure every holder of a cluster file where it would run, and write a cluster file with the figures.

    Args:
        cluster: path or name of a cluster file; its clients need no budgets.
        to: the cluster file to write.
        overrides: ``key=value`` strings, or a mapping of dotted keys.
        address: a running Ray cluster (``auto`` for the one on this machine); by default a local one is started.
        cpu: measure a cluster file with GPUs on CPUs.
        repeats: samples of each figure.
        seconds: computation time of the clients, and then of the servers, in all.
        progress: called with a description of each measurement.

    Raises:
        InputError: an argument is wrong, or a holder fits on no node; no actor was started.
        ActorFailure: a holder could not be measured; nothing was written.
        RunError: a holder has no memory at all; nothing was written.
    """
    to = Path(to)
    _check(to, repeats, seconds)
    config = load_unmeasured(cluster, overrides, cpu=cpu)
    run = _as_measured(resolved_config(config))
    with helpers_of(run, address) as helpers:
        source = find_model(run.job.model, is_terminal(sys.stderr), accepted=run.job.accept_licence)
        check_model(run, source)
        source.spec.check_weights()
        cost = CostModel.of_run(source.spec, run)
        progress("starting the actors")
        with (
            ray_of(run, address, helpers, dashboard=False),
            closing(MeasuringExecutor(f"probe-{os.getpid()}", run, source.directory)) as executor,
        ):
            measurement = BudgetMeasurement(run, cost, executor, repeats, seconds, progress)
            machines, figures = measurement.machines(), measurement.figures()
            codes = measurement.dequantization_flops()
    for name, machine in machines.items():
        if figures[name]["memory_gb"].value <= 0:
            raise RunError(f"{name}: no memory is free on {machine}")
    try:
        header = _header(run, cost, cluster, machines, seconds, codes)
        write_text_atomically(to, measured_file(config, figures, header))
    except OSError as error:
        raise InputError(f"--to {displayed(to)}: cannot be written: {os_reason(error)}") from error
    return MeasuredBudgets(to, machines, figures, codes)


def _as_measured(run: RunConfig) -> RunConfig:
    """Return ``run`` with every client present, and with messages through Ray's object store."""
    clients = tuple(client.model_copy(update={"late": False}) for client in run.clients)
    job = run.job.model_copy(update={"transport": "store"})
    return run.model_copy(update={"clients": clients, "job": job})


class BudgetMeasurement:
    """Measures a run's clients and servers through an executor; Ray-free.

    Args:
        run: the holders, and the job.
        cost: counts the work of its steps.
        executor: has a :class:`~hsplit.measuring.measuring_actor.MeasuringActor` under every holder's name.
        repeats: samples of each figure.
        seconds: computation time of the clients, and then of the servers, in all.
        progress: called with a description of each measurement.
        sizes: bytes of the messages with which a link is measured.
        clock: seconds, for messages.
    """

    def __init__(
        self,
        run: RunConfig,
        cost: CostModel,
        executor: Executor,
        repeats: int,
        seconds: float,
        progress: Callable[[str], None] = lambda text: None,
        *,
        sizes: Sequence[int] = SIZES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._run, self._cost, self._executor = run, cost, executor
        self._repeats, self._spell_s, self._progress = repeats, seconds / repeats, progress
        self._sizes, self._clock = sizes, clock
        self._clients, self._servers = [client.name for client in run.clients], run.server.names
        # Of the clients, by name, on the dense base.
        self._dense: dict[str, list[StepSeconds]] = {}

    def machines(self) -> dict[str, str]:
        """Return the host name by holder."""
        return {name: host for name, (host, _) in self._all(MeasuringActor.machine).items()}

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Measure everything, in the units of a cluster file.

        Memory and links come first, before any holder has a layer.
        """
        memory, links = self._memory_and_links()
        self._progress("computing: the clients side by side")
        flops = self._client_flops()
        self._progress("computing: the server" if len(self._servers) == 1 else "computing: the servers side by side")
        flops |= self._server_flops()
        found = {}
        for name in (*self._clients, *self._servers):
            found[name] = {
                "memory_gb": Figure.least_of([nbytes / 1e9 for nbytes in memory[name]]),
                "tflops": Figure.median_of([each / 1e12 for each in flops[name]]),
            }
            if name in links:
                found[name] |= {
                    "bandwidth_mbps": Figure.median_of([link.bandwidth_bps / 1e6 for link in links[name]]),
                    "latency_ms": Figure.median_of([link.latency_s * 1e3 for link in links[name]]),
                }
        return found

    def _memory_and_links(self) -> tuple[dict[str, list[float]], dict[str, list[Link]]]:
        run = self._run
        gpus = {client.name: client.num_gpus for client in run.clients}
        gpus |= dict.fromkeys(self._servers, run.server.num_gpus)
        locations = {
            name: Location(machine, gpus[name]) for name, (_, machine) in self._all(MeasuringActor.machine).items()
        }
        # The first use of a GPU takes some of its memory, and the first messages some of the host's.
        self._all(MeasuringActor.free_bytes)
        for name in self._clients:
            measure_link(partial(self._sent, name), self._sizes)
        memory: dict[str, list[float]] = {name: [] for name in locations}
        links: dict[str, list[Link]] = {name: [] for name in self._clients}
        for repeat in range(self._repeats):
            for name, shared in shared_out(self._all(MeasuringActor.free_bytes), locations).items():
                memory[name].append(shared)
            for name in self._clients:
                self._progress(f"link of {name}, {repeat + 1} of {self._repeats}")
                links[name].append(measure_link(partial(self._sent, name), self._sizes))
        return memory, links

    def _sent(self, client: str, size: int) -> tuple[int, float]:
        """Pass a message of about ``size`` bytes between ``client`` and the server, there and back.

        The driver begins all calls at once and sees no tensor, as in a run.

        Returns:
            The message's exact size, and the mean seconds of one hop.
        """
        begin, message = self._executor.call_pair(client, MeasuringActor.message, size)
        (nbytes,) = self._answers([begin])
        hops = next(count for least, count in _HOPS if size >= least)
        begun = self._clock()
        for hop in range(hops):
            receiver = client if hop % 2 else SERVER
            end, message = self._executor.call_pair(receiver, MeasuringActor.pass_on, message)
        self._answers([end])
        return nbytes, (self._clock() - begun) / hops

    def _client_flops(self) -> dict[str, list[float]]:
        self._dense = self._spells(self._clients, 1, codes=False)
        return {name: [client_flops(self._cost, took) for took in self._dense[name]] for name in self._clients}

    def dequantization_flops(self) -> dict[str, Figure]:
        """Measure each client's steps on codes too, after :meth:`figures`; empty for a base that is not quantized.

        Returns:
            Operations in whose time it dequantizes an entry, by client.
        """
        if not self._cost.model.quantized:
            return {}
        self._progress("computing: the clients side by side, on codes")
        codes = self._spells(self._clients, 1, codes=True)
        flops = {
            name: [dequantization_flops(self._cost, *took) for took in zip(self._dense[name], codes[name], strict=True)]
            for name in self._clients
        }
        return {name: Figure.median_of(samples) for name, samples in flops.items()}

    def _server_flops(self) -> dict[str, list[float]]:
        together = joined_clients(self._cost.model, len(self._clients))
        spells = self._spells(self._servers, together, codes=self._cost.model.quantized)
        return {name: [server_flops(self._cost, together, took) for took in spells[name]] for name in self._servers}

    def _spells(self, holders: Sequence[str], clients: int, *, codes: bool) -> dict[str, list[StepSeconds]]:
        """Measure the seconds of local steps of ``holders``, all at the same time, in each of several spells."""
        model, job = self._cost.model, self._run.job
        setting = model.setting(model.top_rank, clients * job.batch_size, job.base if codes else None)
        self._answers([self._executor.call(name, MeasuringActor.prepare, setting, clients) for name in holders])
        spells = []
        for _ in range(self._repeats):
            took = self._answers(
                [self._executor.call(name, MeasuringActor.step_seconds, self._spell_s) for name in holders]
            )
            spells.append(dict(zip(holders, took, strict=True)))
        return {name: [spell[name] for spell in spells] for name in holders}

    def _all(self, method: Callable[[MeasuringActor], R]) -> dict[str, R]:
        """Call ``method`` of every holder at the same time; returns the values by name."""
        names = [*self._clients, *self._servers]
        return dict(zip(names, self._answers([self._executor.call(name, method) for name in names]), strict=True))

    def _answers(self, calls: Sequence[Ref[R]]) -> list[R]:
        return self._executor.get(calls, time.monotonic() + self._run.job.faults.patience_s + self._spell_s)


def _check(to: Path, repeats: int, seconds: float) -> None:
    if repeats < 1:
        raise InputError(f"--repeats: must be at least 1 (got {repeats})")
    if not 0 < seconds <= 1e6:
        raise InputError(f"--seconds: must be above 0 and at most 1e6 (got {seconds:g})")
    if to.is_dir() or not to.parent.is_dir():
        raise InputError(f"--to {displayed(to)}: must be a file in a directory that there is")


def _header(
    run: RunConfig,
    cost: CostModel,
    cluster: str | Path,
    machines: dict[str, str],
    seconds: float,
    codes: Mapping[str, Figure],
) -> list[str]:
    job, servers = run.job, run.server.replicas
    together = joined_clients(cost.model, len(run.clients))
    server = "the server alone" if servers == 1 else f"all {servers} servers at the same time, each"
    least = [] if servers == 1 else ["", f"the server's figures are the least of the {servers} servers'"]
    lines = [
        f"Budgets measured by hsplit probe on {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}; who there is:"
        f" {shown(displayed(cluster), 200)}",
        "",
        f"memory_gb       {1 - HEADROOM:.0%} of what was free, in equal parts for all holders on a host; of a GPU, the"
        " reserved share",
        f"tflops          local steps of {job.batch_size} x {job.max_length} tokens in {job.dtype} on a base in"
        f" {job.base}, over {seconds:g} s: all clients",
        f"                at the same time, then {server} with the batches of {together}",
        "bandwidth_mbps  messages between client and server through Ray, one client at a time; on one machine that is"
        " its memory's",
        "latency_ms      one way, with all that Ray and the driver do for a message",
        *least,
        *_lines_on_codes(job, codes),
        "",
        *(f"{name} was on {machine}" for name, machine in machines.items()),
    ]
    return lines


def _lines_on_codes(job: Job, codes: Mapping[str, Figure]) -> list[str]:
    if not codes:
        return []
    least, most = min(codes.values(), key=_value), max(codes.values(), key=_value)
    found = f"{least.value:.0f}" if len(codes) == 1 else f"{least.value:.0f} to {most.value:.0f}"
    counted = DEQUANTIZATION_FLOPS[job.base]
    return ["", f"on codes a client dequantizes an entry in the time of {found} operations; plans count {counted:g}"]


def _value(figure: Figure) -> float:
    return figure.value


def budget_table(machines: Mapping[str, str], figures: Figures) -> Table:
    """Make a table of measured budgets with a row for each holder: the figures, and below each its samples' range.

    Args:
        machines: host name by holder, in the order of the rows.
        figures: by holder and key of its budget.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", overflow="fold", min_width=8)
    table.add_column("machine", overflow="fold", min_width=8)
    for heading in _HEADINGS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, machine in machines.items():
        found = [figures[name].get(key) for key in _HEADINGS]
        cells = [NOTHING if f is None else f"{f.value:g}\n{f.low:g}-{f.high:g}" for f in found]
        table.add_row(*(Text(cell) for cell in (printable(name), printable(machine), *cells)))
    return table


def make_measuring_actor(
    job: Job, policy: Policy, model: ModelReference, device: str, at_server: bool
) -> MeasuringActor:
    """Make the measuring actor of a holder, on its node.

    Raises:
        InputError: the model is not there.
    """
    return MeasuringActor(job, policy, BaseModel.of_job(model.read(), job), device, at_server=at_server)


class MeasuringExecutor(RayExecutor):
    """The executor of a run, with measuring actors in place of clients and servers, and no scheduler."""

    _unplaced = ()

    def _maker(self, name: str, device: str) -> Callable[[], Any]:
        run, model = self._run, self._base_of(name)
        return partial(make_measuring_actor, run.job, run.policy, model, device, name in run.server.names)
