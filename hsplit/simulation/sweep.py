"""Simulations of a fleet at several sizes and with several numbers of servers, and the need for more than one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsplit.config import RunConfig, load_run_config
from hsplit.config.cluster import MAX_COUNT
from hsplit.config.overrides import Overrides
from hsplit.config.reading import find_preset, read_yaml
from hsplit.errors import InputError
from hsplit.models.spec import ModelSpec
from hsplit.planning.scheduler import Scheduler
from hsplit.run.inputs import resolved_config
from hsplit.simulation.fleet import Traffic, read_trace, shape_of
from hsplit.simulation.rounds import Round, simulated

MAX_SERVERS = 1000
# One server is enough while its part of a local step is smaller, and more of them are not this many times as fast.
LARGE_SHARE = 0.5
FASTER = 1.1


@dataclass(frozen=True)
class Setting:
    """One fleet with one number of servers. All seconds are virtual.

    Attributes:
        clients, servers: their numbers.
        unavailable: number of clients without memory for the smallest part of the model.
        training: clients that train in a round, on average.
        refused: reason that there is no plan; empty if there is one. All that follows is 0 without a plan.
        step_s: of one local step of the last round.
        round_s: of a round, on average.
        makespan_s: of all rounds.
        server_share: the server's part of a local step, 0 to 1, on average.
        bottleneck: largest part of a local step in most rounds.
        server_gb: memory that the plan reserves for each server.
        bytes_up, bytes_down: per round, on average.
        server_gbps: these bytes over a round's time, in Gbit/s of all servers' links together, which have no limit.
        rounds: all rounds.
    """

    clients: int
    servers: int
    unavailable: int
    training: float
    refused: str
    step_s: float
    round_s: float
    makespan_s: float
    server_share: float
    bottleneck: str
    server_gb: float
    bytes_up: float
    bytes_down: float
    server_gbps: float
    rounds: tuple[Round, ...]

    def row(self) -> dict[str, Any]:
        """All fields but the rounds, for a file."""
        return {key: value for key, value in asdict(self).items() if key != "rounds"}


@dataclass(frozen=True)
class Sweep:
    """Results of several simulations.

    Attributes:
        about: their common settings: cluster, model, policy, seed, churn.
        settings: by fleet, then by servers.
    """

    about: dict[str, Any]
    settings: tuple[Setting, ...]

    def findings(self) -> list[str]:
        """Sentences about the fleet size that one server is enough for, and the gain of more servers."""
        lines, enough = [], 0
        for size in sorted({s.clients for s in self.settings if s.servers == 1}):
            if why := self._falls_short(size):
                lines.append(f"simulation: one server is not enough for {size:,} clients: {why}")
                break
            enough = size
        if enough:
            lines.insert(0, f"simulation: one server is enough for {enough:,} clients")
        for size in dict.fromkeys(s.clients for s in self.settings):
            own = [s for s in self.settings if s.clients == size and not s.refused]
            if len(own) > 1:
                first, best = own[0], min(own, key=lambda s: s.round_s)
                lines.append(
                    f"simulation: {size:,} clients: {best.servers} servers do a round in {best.round_s:.3g} s,"
                    f" {first.servers} in {first.round_s:.3g} s (virtual)"
                )
            needed = [s.servers for s in own if s.server_share < LARGE_SHARE]
            if needed and needed[0] > 1:
                lines.append(
                    f"simulation: {size:,} clients: from {needed[0]} servers on, clients take longer than servers"
                )
        return lines

    def _falls_short(self, size: int) -> str:
        """Reason that one server is not enough for ``size`` clients; empty if it is enough."""
        own = [s for s in self.settings if s.clients == size]
        one = next(s for s in own if s.servers == 1)
        if one.refused or one.server_share >= LARGE_SHARE:
            return one.refused or f"it takes {one.server_share:.0%} of a local step (virtual)"
        best = min((s for s in own if not s.refused), key=lambda s: s.round_s)
        if one.round_s < FASTER * best.round_s:
            return ""
        # With little memory at the server, clients hold layers that they are slow at.
        return f"{best.servers} do a round {one.round_s / best.round_s:.1f} times as fast (virtual)"

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``hsplit simulate --json`` prints it."""
        settings = [{**s.row(), "rounds": [asdict(r) for r in s.rounds]} for s in self.settings]
        return {"simulation": True, **self.about, "settings": settings, "findings": self.findings()}


def sweep(
    cluster: str | Path,
    policy: str | Path | None = None,
    overrides: Overrides = (),
    *,
    cpu: bool = False,
    sizes: Sequence[int] = (),
    servers: Sequence[int] = (),
    rounds: int | None = None,
    leave: float = 0.0,
    back: float = 0.5,
    variation: float = 0.0,
    trace: Path | None = None,
    progress: Callable[[str], object] = lambda text: None,
) -> Sweep:
    """Simulate a cluster file's fleet.

    Args:
        cluster, policy, overrides, cpu: as for :func:`hsplit.api.launch`.
        sizes: numbers of clients to scale the fleet to, in the proportions of the file; by default the file's own.
        servers: numbers of servers; by default the file's own.
        rounds: their number; ``job.rounds`` by default.
        leave, back, variation: see :class:`~hsplit.simulation.fleet.Traffic`.
        trace: file for :func:`~hsplit.simulation.fleet.read_trace`.
        progress: called with a line before each simulation.

    Raises:
        InputError: an argument or a file is wrong.
    """
    for option, values, most in (("--clients", sizes, MAX_COUNT), ("--servers", servers, MAX_SERVERS)):
        for value in values:
            if not 1 <= value <= most:
                raise InputError(f"{option}: must be from 1 to {most} (got {value})")
    drawn = Traffic(leave, back, variation)
    settings: list[Setting] = []
    model: ModelSpec | None = None
    wanted: list[int | None] = [*sorted(set(sizes))]
    for size in wanted or [None]:
        run = _fleet(cluster, policy, overrides, cpu, size)
        traffic = drawn if trace is None else Traffic(leave, back, variation, read_trace(trace, run.clients))
        model = model or shape_of(run.job.model)
        for count in sorted(set(servers)) or [run.server.replicas]:
            if count > 1 and run.policy.placement != "split":
                raise InputError("--servers: must be 1 with a policy that does not split the model")
            progress(f"simulating {len(run.clients):,} clients, {count} servers")
            replicated = run.server.model_copy(update={"replicas": count})
            own = run.model_copy(update={"server": replicated})
            settings.append(_setting(own, model, rounds or run.job.rounds, traffic))
    about = {
        "cluster": str(cluster),
        "model": run.job.model,
        "policy": run.policy.name,
        "seed": run.job.seed,
        "rounds": rounds or run.job.rounds,
        "local_steps": run.job.local_steps,
        "clients_per_round": run.job.clients_per_round,
        "leave": leave,
        "return": back,
        "link_variation": variation,
        "trace": None if trace is None else str(trace),
        "server_memory_gb": run.server.memory_gb,
        "server_tflops": run.server.tflops,
    }
    return Sweep(about, tuple(settings))


def _fleet(
    cluster: str | Path, policy: str | Path | None, overrides: Overrides, cpu: bool, size: int | None
) -> RunConfig:
    """The run with the file's fleet, or with ``size`` clients in its proportions."""
    if size is None:
        return resolved_config(load_run_config(cluster, policy, overrides, cpu=cpu, most_clients=MAX_COUNT))
    declared = read_yaml(find_preset("cluster", cluster)).get("clients")
    groups = [group for group in declared if isinstance(group, dict)] if isinstance(declared, list) else []
    counts: dict[str, int] = {str(g.get("name")): g.get("count", 1) for g in groups}
    named = all(isinstance(g.get("name"), str) for g in groups)
    if not counts or not named or not all(type(n) is int and n > 0 for n in counts.values()):
        # The file is wrong: reading it raises the usual error.
        return resolved_config(load_run_config(cluster, policy, overrides, cpu=cpu, most_clients=MAX_COUNT))
    if size < len(counts):
        raise InputError(
            f"--clients: must be at least {len(counts)}, one of each kind of the cluster file (got {size})"
        )
    scaled = [f"clients.{name}.count={n}" for name, n in scaled_counts(counts, size).items()]
    own = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, dict) else list(overrides)
    return resolved_config(load_run_config(cluster, policy, [*own, *scaled], cpu=cpu, most_clients=MAX_COUNT))


def scaled_counts(counts: dict[str, int], size: int) -> dict[str, int]:
    """``size`` clients in the proportions of ``counts``, at least one of each kind."""
    total = sum(counts.values())
    exact = {name: size * count / total for name, count in counts.items()}
    made = {name: max(1, int(share)) for name, share in exact.items()}
    # One client at a time is added to, or taken from, the kind that is furthest from its share.
    while (lacking := size - sum(made.values())) != 0:
        step = 1 if lacking > 0 else -1
        open_ = [name for name in made if made[name] + step >= 1]
        made[max(open_, key=lambda name: step * (exact[name] - made[name]))] += step
    return made


def _setting(run: RunConfig, model: ModelSpec, rounds: int, traffic: Traffic) -> Setting:
    scheduler = Scheduler(run, model)
    try:
        found = simulated(run, scheduler, rounds, traffic)
    except InputError as error:
        if not str(error).startswith("server: memory_gb"):
            raise
        return Setting(
            len(run.clients), run.server.replicas, 0, 0.0, str(error), 0.0, 0.0, 0.0, 0.0, "", 0.0, 0.0, 0.0, 0.0, ()
        )
    trained = found.rounds[1:]
    held = [r.bottleneck for r in trained]
    total_s, nbytes = sum(r.round_s for r in trained), sum(r.bytes_up + r.bytes_down for r in trained)
    return Setting(
        clients=len(run.clients),
        servers=run.server.replicas,
        unavailable=len(run.clients) - len(found.plan.available),
        training=sum(r.training for r in trained) / rounds,
        refused="",
        step_s=trained[-1].step_s,
        round_s=total_s / rounds,
        makespan_s=found.rounds[-1].virtual_time_s,
        server_share=sum(r.server_share for r in trained) / rounds,
        bottleneck=max(dict.fromkeys(held), key=held.count),
        server_gb=found.plan.server.predicted_bytes / 1e9,
        bytes_up=sum(r.bytes_up for r in trained) / rounds,
        bytes_down=sum(r.bytes_down for r in trained) / rounds,
        server_gbps=8 * nbytes / total_s / 1e9,
        rounds=found.rounds,
    )
