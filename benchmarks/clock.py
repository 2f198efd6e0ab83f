"""Agreement of a round's time as predicted, emulated and measured (METHOD 8).

    python -m benchmarks.clock [--quick]        # or: hsplit bench clock (as root, on Linux)

A small random model and real actors. Clients have shares of a core that are drawn at several levels of heterogeneity: a
coefficient of variation around a fixed mean. The time of a round by three routes:

- predicted (virtual): from the cluster file alone, before anything runs: local steps, importance probe, aggregation and
  validation under the plan, at the declared budgets;
- emulated: the wall of a run with ``clock: emulated``, whose actors wait until their declared time has passed, times
  the speed-up. They compute at the machine's full speed meanwhile;
- measured: the wall of a run with the real clock, in which the kernel holds every client and the server to their share
  of a core (a quota of CPU time, by control groups), and no actor waits for a declared time.

The declared budgets are those of such processes. Right before each measured run clients under these quotas are timed,
all at once, at a front of two layers, forward and backward: its counted FLOPs by its seconds are their FLOP/s. One of
them has the server's quota, and stands for it. They are timed right after it too: where the machine's pace has changed
by more than 5 % the run is repeated, whatever it took. Latency and bandwidth are those of messages between two of these
processes: all are on one machine, so that no network is part of this.

Texts have ``max_length`` tokens, as plans reckon. Checkpoints and the driver's own work are in the wall and in no
prediction. The profiler that follows memory is off.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import ray
import torch
from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from benchmarks.cpu_quota import CpuQuotas
from hsplit.actors.client import Client
from hsplit.actors.executor import Ref
from hsplit.actors.messages import ForwardReport, WireTensor
from hsplit.actors.profiling import PeakMemory
from hsplit.cluster.ray_executor import ActorShell, RayExecutor
from hsplit.config import SCHEDULER, SERVER, RunConfig
from hsplit.config.cluster import Distribution, drawn
from hsplit.lora.holder import RoundUpdate
from hsplit.models.lookup import find_model
from hsplit.models.spec import ModelSpec
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, read_rows
from hsplit.planning.scheduler import Scheduler
from hsplit.run.inputs import read_inputs
from hsplit.run_directory import RunDirectory

CLUSTER = """
server: {{memory_gb: 8, tflops: {server}}}
clients:
{clients}
job:
  model: {model}
  base: fp32
  dtype: fp32
  wire: fp32
  data: {{source: "{data}"}}
  batch_size: {batch}
  max_length: {length}
  rounds: {rounds}
  local_steps: {steps}
  rank_set: [8]
  residual: {{max_rank: 16}}
  validation: {{max_examples: {batch}}}
  clock: {clock}
  clock_speedup: {speedup}
  faults: {{deadline: null}}
  pipeline: {{microbatches: {parts}}}
  privacy: {{labels: {labels}}}
"""
CLIENT = (
    "- {{name: {name}, memory_gb: 8, tflops: {tflops}, bandwidth_mbps: {mbps}, latency_ms: {latency}, num_cpus: 1}}"
)
POLICY = """
split: {split}
importance: {{tokens: {tokens}, back_off: false}}
replan: {{tau: null, measured: false}}
reinit: svd
freeze: never
pace: {pace}
"""
# Rows and turns; codes and narrow messages have nothing to do here, where the base is dense and links are wide.
PACED = "{batch_size: planned, periods: planned}"
WORDS = 512
# The first round that counts: the one before it has no probe, and whatever is done for the first time.
FIRST = 2
SMALLEST_SHARE = 0.05
# Work of the calibration: layers of a front, and bytes of a large message.
FRONT = 2
LARGE = 1 << 24
# Largest change of the machine's pace during a run, and largest number of runs repeated for it.
STEADY = 0.05
ATTEMPTS = 4

# A client's forward, and its backward, which returns seconds by phase.
_Calls = tuple[Ref[ForwardReport], Ref[Mapping[str, float]]]


@dataclass(frozen=True)
class Setting:
    """What a run differs in from the others.

    Attributes:
        heterogeneity: coefficient of variation that the shares were drawn with.
        microbatches: of a batch.
        labels: their place.
        paced: rows planned, and clients in turn (``policy.pace``); otherwise equal rows, and all wait for all.
    """

    heterogeneity: float
    microbatches: int
    labels: str
    paced: bool

    @property
    def way(self) -> str:
        """How clients bring their rows."""
        return "in turn" if self.paced else f"{self.microbatches} parts"

    def __str__(self) -> str:
        return f"h {self.heterogeneity:g}, {self.way}, labels: {self.labels}"


@dataclass(frozen=True)
class Scale:
    """Sizes of the benchmark.

    Attributes:
        hidden, layers: of the model.
        batch, length: examples of a client's batch, tokens of each.
        clients: their number.
        mean_share, server_share: of one core; together below the cores of the machine.
        steps, rounds: local steps of a round; rounds measured.
        calibration_s: seconds of the wall that speeds are measured for.
        heterogeneity: coefficients of variation of the clients' shares.
        parts: microbatches of a batch where all clients wait for all; a step of turns has one.
    """

    hidden: int = 384
    layers: int = 4
    batch: int = 12
    length: int = 64
    clients: int = 4
    mean_share: float = 0.2
    server_share: float = 0.6
    steps: int = 3
    rounds: int = 3
    calibration_s: float = 8.0
    heterogeneity: tuple[float, ...] = (0.0, 0.6, 0.9)
    parts: int = 2

    def settings(self) -> list[Setting]:
        """All that is run, level by level."""
        settings = [Setting(h, parts, "server", paced) for h in self.heterogeneity for parts, paced in self._ways()]
        return [*settings, replace(settings[-1], labels="client")]

    def _ways(self) -> list[tuple[int, bool]]:
        return [(self.parts, False), (1, True)]


QUICK = Scale(hidden=256, clients=2, steps=1, rounds=1, calibration_s=2.0, heterogeneity=(0.3,), parts=1)


@dataclass(frozen=True)
class Budgets:
    """Budgets of the processes, as measured and declared.

    Attributes:
        flops: FLOP/s by holder.
        latency_s, bandwidth_bps: of a message between client and server.
    """

    flops: Mapping[str, float]
    latency_s: float
    bandwidth_bps: float

    def pace_of(self, later: Budgets) -> float:
        """Return the speed of the same processes ``later``, relative to before: geometric mean over them."""
        return math.exp(mean(math.log(later.flops[name] / flops) for name, flops in self.flops.items()))


@dataclass(frozen=True)
class Row(Setting):
    """One setting's times.

    Attributes:
        splits: layers of each client, by the plan.
        rows: that each client brings to a step.
        predicted_s: a round, before anything runs (virtual).
        accounted_s: a round by the virtual clock of the run itself (virtual).
        emulated_s: a round, of the wall, times the speed-up.
        measured_s: a round, of the wall, under quotas.
        step_*: the same of one local step.
        pace: speed of the same processes right after the measured run, relative to right before it, when they were
            timed for the declared budgets.
        attempts: measured runs that it took until the pace held.
    """

    splits: str
    rows: str
    predicted_s: float
    accounted_s: float
    emulated_s: float
    measured_s: float
    step_predicted_s: float
    step_emulated_s: float
    step_measured_s: float
    pace: float
    attempts: int

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Emulated by predicted, measured by predicted, measured by emulated."""
        return (
            self.emulated_s / self.predicted_s,
            self.measured_s / self.predicted_s,
            self.measured_s / self.emulated_s,
        )


@dataclass(frozen=True)
class HolderRow(Setting):
    """One holder in one setting: seconds of its own part of a local step, messages left out where measured.

    Attributes:
        share: of one core.
        gflops: declared, 1e9 operations a second.
        predicted_time_s: of ``plan.csv`` (virtual).
        emulated_time_s, measured_time_s: of ``plan.csv`` too, in either run.
    """

    name: str
    share: float
    gflops: float
    split: int
    predicted_time_s: float
    emulated_time_s: float
    measured_time_s: float


def shares_of(scale: Scale, variation: float, seed: int) -> dict[str, float]:
    """Draw each client's share of a core, scaled to the exact mean."""
    spread = Distribution(lognormal=(scale.mean_share, variation))
    draws = {name: drawn(spread, seed, name, "tflops") for name in (f"client-{i}" for i in range(scale.clients))}
    factor = scale.mean_share / mean(draws.values())
    return {name: max(share * factor, SMALLEST_SHARE) for name, share in draws.items()}


def predicted(run: RunConfig, model: Path) -> tuple[float, float]:
    """Virtual seconds of a round and of one local step, from the configuration alone.

    The messages of an aggregation count the residual at its cap, which a run soon reaches.
    """
    scheduler = Scheduler(run, ModelSpec.read(model))
    plan = scheduler.plan()
    sides = {s.name: s.d_in + s.d_out for s in ModelSpec.read(model).targeted(run.job.targets)}
    counted = scheduler.cost.model
    caps = dict(zip((w.name for w in counted.weights), counted.residual_entries.tolist(), strict=True))
    up = {c.name: sum(4 * rank * sides[w] for w, rank in c.ranks.items()) for c in plan.available}
    down = {c.name: up[c.name] + sum(4 * round(caps[w]) for w in c.ranks) for c in plan.available}
    # Validated in batches of a step's rows.
    batches = {c.name: math.ceil(run.job.validation.max_examples / c.rows) for c in plan.available}
    clock = scheduler.clock()
    steps_s = clock.steps_s(plan)
    between = clock.aggregation_s(plan, run.policy, up, down, list(up), clock.finished_s(plan))
    between += clock.validation_s(plan, batches)
    if run.policy.probes:
        between += clock.watched_s(plan, run.policy.importance.tokens)
    return sum(steps_s) + between, steps_s[-1]


class Experiment:
    """One model, one set of texts, one Ray.

    Args:
        folder: for everything written on the way.
        scale: how large everything is.
        speedup: of the emulated clock.
        quotas: where processes are held to their shares; ``None``: nothing is measured.
    """

    def __init__(self, folder: Path, scale: Scale, speedup: float, quotas: CpuQuotas | None) -> None:
        self._folder, self._scale, self._speedup, self._quotas = folder, scale, speedup, quotas
        sizes = {"hidden_size": scale.hidden, "intermediate_size": 3 * scale.hidden, "num_hidden_layers": scale.layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        self._model = common.tiny_model(folder / "model", WORDS, **sizes, **heads)
        # Of exactly so many tokens with one word of prompt and the end of the text; all but the first supervised.
        count, length = 200 * scale.clients, scale.length - 2
        self._data = common.texts(folder / "texts.csv", count, WORDS, length, prompt="w2")

    def configured(
        self, budgets: Budgets, setting: Setting, split: str | int = "planned", emulated: bool = False
    ) -> RunConfig:
        """The run of one setting."""
        scale = self._scale
        link = {"mbps": f"{budgets.bandwidth_bps / 1e6:.3f}", "latency": f"{1e3 * budgets.latency_s:.4f}"}
        clients = "\n".join(
            CLIENT.format(name=name, tflops=f"{flops / 1e12:.9f}", **link)
            for name, flops in budgets.flops.items()
            if name != "server"
        )
        cluster = CLUSTER.format(
            server=f"{budgets.flops['server'] / 1e12:.9f}",
            clients=clients,
            model=self._model,
            data=self._data,
            batch=scale.batch,
            length=scale.length,
            rounds=FIRST - 1 + scale.rounds,
            steps=scale.steps,
            clock="emulated" if emulated else "real",
            speedup=self._speedup,
            parts=setting.microbatches,
            labels=setting.labels,
        )
        # Two examples' supervised tokens.
        tokens, pace = 2 * (scale.length - 1), PACED if setting.paced else "{}"
        return common.configured(self._folder, cluster, POLICY.format(split=split, tokens=tokens, pace=pace))

    def calibrated(self, shares: Mapping[str, float]) -> Budgets:
        """Measure processes with these shares: FLOP/s at a front of two layers, and messages between them."""
        scale = self._scale
        # The server's share is given to a client too, so that all do the same work.
        names = {name if name != "server" else "as-server": share for name, share in shares.items()}
        trial = Budgets(dict.fromkeys([*names, "server"], 1e10), 1e-3, 1e9)
        run = self.configured(trial, Setting(0.0, 1, "server", False), FRONT)
        scheduler = Scheduler(run, ModelSpec.read(self._model))
        plan, model = scheduler.plan(), scheduler.cost.model
        flops = float((model.forward_flops + model.backward_flops)[:FRONT].sum())
        executor = RayExecutor(f"speed-{time.monotonic_ns()}", run, self._model)
        try:
            data = read_inputs(run, find_model(str(self._model))).shares
            for name in names:
                executor.ask(name, Client.load_data, {name: data[name]}, None)
                executor.ask(name, Client.configure, plan.client(name))
                executor.ask(name, Client.restart, RoundUpdate(1, {}, {}))
            gradient = WireTensor.pack(torch.randn(scale.batch * scale.length, scale.hidden), "fp32")

            def asked(steps: Mapping[str, range]) -> dict[str, list[_Calls]]:
                calls: dict[str, list[_Calls]] = {}
                for name, own in steps.items():
                    for step in own:
                        report, _ = executor.call_pair(name, Client.forward, step, 0)
                        phases = executor.call(name, Client.backward, step, 0, gradient)
                        calls.setdefault(name, []).append((report, phases))
                return calls

            def seconds(calls: Sequence[_Calls]) -> list[float]:
                values = [(executor.value(report), executor.value(phases)) for report, phases in calls]
                return [sum(up.seconds.values()) + sum(down.values()) for up, down in values]

            _without_profiler(executor)
            # Number of repeats that fill the time.
            warm = {name: seconds(calls) for name, calls in asked(dict.fromkeys(names, range(3))).items()}
            with ExitStack() as stack:
                self._hold(stack, executor, names)
                count = {
                    n: range(3, 3 + max(3, round(scale.calibration_s * share / min(warm[n]))))
                    for n, share in names.items()
                }
                calls = asked(count)
                speeds = {name: flops / mean(seconds(own)) for name, own in calls.items()}
                latency_s, bandwidth_bps = _messages(*(executor._handles[name] for name in list(names)[:2]))
        finally:
            executor.close()
        return Budgets({("server" if n == "as-server" else n): s for n, s in speeds.items()}, latency_s, bandwidth_bps)

    def _hold(self, stack: ExitStack, executor: RayExecutor, shares: Mapping[str, float]) -> None:
        """Hold actors to their shares of a core until ``stack`` ends."""
        if self._quotas is not None:
            pids = {common.pid_of(executor, name): share for name, share in shares.items()}
            stack.enter_context(self._quotas.applied(pids))

    def _measured(self, shares: Mapping[str, float], setting: Setting) -> tuple[Budgets, _Trained, float, int]:
        """Measure a run under quotas at a steady pace, or the steadiest of several.

        The speed of a process of a given share changes with the machine's pace, by up to a third within minutes where
        others use the same hardware. So the same processes are timed before and after; the run's own time does not
        decide whether it counts.

        Returns:
            Declared budgets, the run, the pace after it relative to before, and the number of runs.
        """
        found = []
        before = self.calibrated(shares)
        for _ in range(ATTEMPTS):
            run = self._trained(self.configured(before, setting), shares)
            after = self.calibrated(shares)
            found.append((before, run, before.pace_of(after)))
            if abs(found[-1][-1] - 1) <= STEADY:
                break
            before = after
        return *min(found, key=lambda tried: abs(tried[-1] - 1)), len(found)

    def row(self, setting: Setting, shares: Mapping[str, float]) -> tuple[Row, list[HolderRow]]:
        """One setting by all three routes, and its holders."""
        budgets, measured, pace, attempts = self._measured(shares, setting)
        expected_s, step_s = predicted(self.configured(budgets, setting), self._model)
        emulated = self._trained(self.configured(budgets, setting, emulated=True), None)
        clients = [row for row in emulated.plan if row.kind == "client"]
        row = Row(
            **asdict(setting),
            splits=" ".join(str(row.split) for row in clients),
            rows=" ".join(str(row.rows) for row in clients),
            predicted_s=expected_s,
            accounted_s=emulated.virtual_s,
            emulated_s=emulated.round_s * self._speedup,
            measured_s=measured.round_s,
            step_predicted_s=step_s,
            step_emulated_s=emulated.step_s * self._speedup,
            step_measured_s=measured.step_s,
            pace=pace,
            attempts=attempts,
        )
        holders = []
        for one, other in zip(emulated.plan, measured.plan, strict=True):
            assert one.split is not None and one.measured_time_s is not None and other.measured_time_s is not None
            gflops, emulated_s = budgets.flops[one.name] / 1e9, one.measured_time_s * self._speedup
            times = one.predicted_time_s, emulated_s, other.measured_time_s
            of = setting.heterogeneity, setting.microbatches, setting.labels, setting.paced
            holders.append(HolderRow(*of, one.name, shares[one.name], gflops, one.split, *times))
        return row, holders

    def _trained(self, run: RunConfig, shares: Mapping[str, float] | None) -> _Trained:
        """Train; with ``shares`` every process is held to its own once the measured rounds begin."""
        name = f"clock-{time.monotonic_ns()}"
        with ExitStack() as stack:

            def hold() -> None:
                if shares is not None:
                    self._hold(stack, executor, shares)

            watch = _Watch(FIRST - 1, hold)
            coordinator, executor = stack.enter_context(common.on_ray(name, run, self._model, self._folder, watch))
            _without_profiler(executor)
            if shares is not None:
                # One thread, or the quota would be spent by threads that wait for one another.
                server = executor._handles[SERVER]
                ray.get(server.__ray_call__.remote(lambda self: torch.set_num_threads(1)))
            coordinator.run()
        directory = RunDirectory(self._folder / name)
        rows = read_rows(directory.metrics, MetricsRow)
        timing = read_rows(directory.timing, TimingRow)
        rounds = range(FIRST, FIRST + self._scale.rounds)
        step_s = [sum(t.seconds for t in timing if t.round == r and t.name == "server") for r in rounds]
        plan = read_rows(directory.plan, PlanRow)
        return _Trained(
            round_s=median(rows[r].wall_time_s - rows[r - 1].wall_time_s for r in rounds),
            virtual_s=median(rows[r].virtual_time_s - rows[r - 1].virtual_time_s for r in rounds),
            step_s=median(step_s) / self._scale.steps,
            plan=[_of_rounds([p for p in plan if p.name == name and p.round in rounds]) for name in _names(plan)],
        )


@dataclass(frozen=True)
class _Trained:
    """Medians over a run's rounds: of the wall, and virtual; and each holder's row of ``plan.csv``."""

    round_s: float
    virtual_s: float
    step_s: float
    plan: Sequence[PlanRow]


def _names(plan: Sequence[PlanRow]) -> list[str]:
    return list(dict.fromkeys(row.name for row in plan))


def _of_rounds(rows: Sequence[PlanRow]) -> PlanRow:
    return replace(
        rows[-1], measured_time_s=median(row.measured_time_s for row in rows if row.measured_time_s is not None)
    )


class _Watch(SilentDisplay):
    """A display that calls ``then`` when round ``last`` is done."""

    def __init__(self, last: int, then: Callable[[], None]) -> None:
        super().__init__()
        self._last, self._then = last, then

    def round_done(self, row: MetricsRow, *more: Any) -> None:
        if row.round == self._last:
            self._then()


def _without_profiler(executor: RayExecutor) -> None:
    """Switch off memory profiling, which slows small operations more than anything else."""

    def stop(shell: ActorShell) -> None:
        shell.actor._memory = PeakMemory(shell.actor._device, enabled=False)

    handles = [handle for name, handle in executor._handles.items() if name != SCHEDULER]
    ray.get([handle.__ray_call__.remote(stop) for handle in handles])


def _messages(one: Any, other: Any) -> tuple[float, float]:
    """Seconds from one actor's call to the other's, and bit/s of a large message between them."""

    def chain(nbytes: int) -> float:
        def made(self: Any, nbytes: int) -> Any:
            import numpy

            return numpy.ones(nbytes, numpy.uint8)

        def taken(self: Any, data: Any) -> int:
            return len(data.copy())

        begun = time.perf_counter()
        ray.get(other.__ray_call__.remote(taken, one.__ray_call__.remote(made, nbytes)))
        return time.perf_counter() - begun

    small = median(chain(1) for _ in range(11))
    large = median(chain(LARGE) for _ in range(3))
    # Driver to one, one to the other, and back to the driver: three ways.
    return small / 3, 8 * LARGE / max(large - small, 1e-3)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every setting, print the tables and write them down."""
    options = _options(arguments)
    console, scale = Console(width=140), QUICK if options.quick else Scale()
    rows: list[Row] = []
    holders: list[HolderRow] = []
    drawn_variation: dict[str, float] = {}
    quotas = CpuQuotas()
    with quotas.ahead(), common.local_ray(scale.clients + 4) as folder:
        experiment = Experiment(folder, scale, options.speedup, quotas)
        for setting in scale.settings():
            shares = shares_of(scale, setting.heterogeneity, options.seed)
            drawn_variation[f"{setting.heterogeneity:g}"] = pstdev(shares.values()) / mean(shares.values())
            row, its = experiment.row(setting, shares | {"server": scale.server_share})
            rows.append(row)
            holders += its
            seconds = ", ".join(f"{value:.2f}" for value in (row.predicted_s, row.emulated_s, row.measured_s))
            console.print(f"{setting}: {seconds} s a round, pace {row.pace:.3f} after {row.attempts} runs")
    facts = {"cores": os.cpu_count(), "seed": options.seed, "speedup": options.speedup, **asdict(scale)}
    header = common.header_of("clock", arguments, "ray", "torch", **facts)
    header["variation drawn"] = ", ".join(f"{h}: {value:.2f}" for h, value in drawn_variation.items())
    tables = [table(rows), holder_table(holders)]
    for columns, cells in tables:
        common.show_table(console, columns, cells)
    furthest = max((ratio for row in rows for ratio in row.ratios), key=lambda ratio: abs(ratio - 1))
    console.print(f"furthest from one another: {furthest:.3f}")
    to: Path = options.to
    ratios = ("emulated_by_predicted", "measured_by_predicted", "measured_by_emulated")
    written = [asdict(row) | dict(zip(ratios, row.ratios, strict=True)) for row in rows]
    common.write_rows(to / "clock.csv", written, header)
    common.write_rows(to / "holders.csv", holders, header)
    common.write_markdown(to / "clock.md", header, [common.markdown_table(*each) for each in tables])
    plot(rows, to / "clock.svg")
    console.print(f"written to {to}")


def table(rows: Sequence[Row]) -> Table:
    """Columns and cells: a round by the three routes."""
    columns = ["h", "way", "labels", "splits", "rows", "predicted, s (virtual)", "emulated, s", "measured, s"]
    columns += ["emulated / predicted", "measured / predicted", "measured / emulated", "pace"]
    cells = []
    for row in rows:
        seconds = (row.predicted_s, row.emulated_s, row.measured_s)
        setting = [f"{row.heterogeneity:g}", row.way, row.labels, row.splits, row.rows]
        cells.append([*setting, *(f"{value:.2f}" for value in (*seconds, *row.ratios, row.pace))])
    return columns, cells


def holder_table(holders: Sequence[HolderRow]) -> Table:
    """Columns and cells: each holder's own part of a local step, by level, where all wait for all."""
    columns = ["h", "holder", "of a core", "GFLOP/s", "split", "predicted, s (virtual)", "emulated, s", "measured, s"]
    cells = []
    for row in holders:
        if not row.paced and row.labels == "server":
            seconds = (row.predicted_time_s, row.emulated_time_s, row.measured_time_s)
            budget = [f"{row.share:.2f}", f"{row.gflops:.1f}", str(row.split)]
            cells.append([f"{row.heterogeneity:g}", row.name, *budget, *(f"{value:.2f}" for value in seconds)])
    return columns, cells


def plot(rows: Sequence[Row], to: Path) -> None:
    """A round's seconds by the three routes, a group of bars a setting."""
    figure = common.new_figure(9, 3.8)
    axes = figure.subplots()
    routes = {"predicted (virtual)": "predicted_s", "emulated": "emulated_s", "measured": "measured_s"}
    for index, (name, field) in enumerate(routes.items()):
        at = [position + 0.27 * (index - 1) for position in range(len(rows))]
        axes.bar(at, [getattr(row, field) for row in rows], width=0.25, label=name)
    names = [f"h {row.heterogeneity:g}\n{row.way}\nlabels: {row.labels}" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylabel="seconds a round (median)", ylim=(0, None))
    # Above the bars.
    figure.legend(loc="outside upper center", ncols=3)
    common.save_figure(figure, to)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("clock", __doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, one level and one round")
    parser.add_argument("--speedup", type=float, default=1.0, help="of the emulated clock")
    parser.add_argument("--seed", type=int, default=1, help="of the shares drawn")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
