"""How far the time of a round agrees as it is predicted, emulated and measured (METHOD 8).

    python -m benchmarks.clock [--quick]        # or: hsplit bench clock (as root, on Linux)

A small random model and real actors. Clients have shares of a core that are drawn at several levels of heterogeneity: a
coefficient of variation around a fixed mean. The time of a round by three routes:

- predicted (virtual): from the cluster file alone, before anything runs: local steps, importance probe, aggregation and
  validation under the plan, at the declared budgets;
- emulated: the wall of a run with ``clock: emulated``, whose actors wait until their declared time has passed, times
  the speed-up. They compute at the machine's full speed meanwhile;
- measured: the wall of a run with the real clock, in which the kernel holds every client and the server to their share
  of a core (a quota of CPU time, by control groups), and nobody waits for a declared time.

What is declared is what such processes have. Right before each measured run clients under these quotas are timed, all
at once, at a front of two layers, forward and backward: its counted FLOPs by its seconds are their FLOP/s. One of
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
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

from rich.console import Console

from hsplit.benchmark import load_benchmark, machine_description, results_directory
from hsplit.observe.silent_display import SilentDisplay

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
"""
WORDS = 512
# The first round that counts: the one before it has no probe, and whatever is done for the first time.
FIRST = 2
SMALLEST_SHARE = 0.05
# What calibration runs: layers of a front, and bytes of a large message.
FRONT = 2
LARGE = 1 << 24
# How far a machine's pace may be another after a run than before it, and how often a run is repeated for that.
STEADY = 0.05
ATTEMPTS = 4


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        hidden, layers: of the model.
        batch, length: examples of a client's batch, tokens of each.
        clients: how many.
        mean_share, server_share: of one core; together below the cores of the machine.
        steps, rounds: local steps of a round; rounds measured.
        calibration_s: seconds of the wall that speeds are measured for.
        heterogeneity: coefficients of variation of the clients' shares.
        parts: numbers of microbatches.
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
    heterogeneity: tuple[float, ...] = (0.0, 0.3, 0.6)
    parts: tuple[int, ...] = (1, 2)


QUICK = Scale(hidden=256, clients=2, steps=1, rounds=1, calibration_s=2.0, heterogeneity=(0.3,), parts=(1,))


@dataclass(frozen=True)
class Budgets:
    """What the processes have, and so declare.

    Attributes:
        flops: FLOP/s by holder.
        latency_s, bandwidth_bps: of a message between client and server.
    """

    flops: Mapping[str, float]
    latency_s: float
    bandwidth_bps: float

    def pace_of(self, later: Budgets) -> float:
        """How much faster the same processes were ``later``: geometric mean over them."""
        return math.exp(mean(math.log(later.flops[name] / flops) for name, flops in self.flops.items()))


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        heterogeneity: coefficient of variation that the shares were drawn with.
        microbatches: of a batch.
        labels: where they are.
        splits: layers of each client, by the plan.
        predicted_s: a round, before anything runs (virtual).
        accounted_s: a round by the virtual clock of the run itself (virtual).
        emulated_s: a round, of the wall, times the speed-up.
        measured_s: a round, of the wall, under quotas.
        step_*: the same of one local step.
        pace: speed of the same processes right after the measured run, relative to right before it, when they were
            timed for what is declared.
        attempts: measured runs that it took until the pace held.
    """

    heterogeneity: float
    microbatches: int
    labels: str
    splits: str
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
class HolderRow:
    """One holder in one setting: seconds of its own part of a local step, messages left out where measured.

    Attributes:
        share: of one core.
        gflops: declared, 1e9 operations a second.
        predicted_time_s: of ``plan.csv`` (virtual).
        emulated_time_s, measured_time_s: of ``plan.csv`` too, in either run.
    """

    heterogeneity: float
    microbatches: int
    labels: str
    name: str
    share: float
    gflops: float
    split: int
    predicted_time_s: float
    emulated_time_s: float
    measured_time_s: float


def shares_of(scale: Scale, variation: float, seed: int) -> dict[str, float]:
    """Each client's share of a core: drawn, and then scaled so that the mean is what it should be."""
    from hsplit.config.budgets import Distribution, drawn

    spread = Distribution(lognormal=(scale.mean_share, variation))
    draws = {name: drawn(spread, seed, name, "tflops") for name in (f"client-{i}" for i in range(scale.clients))}
    factor = scale.mean_share / mean(draws.values())
    return {name: max(share * factor, SMALLEST_SHARE) for name, share in draws.items()}


def predicted(run: Any, model: Path) -> tuple[float, float]:
    """Virtual seconds of a round and of one local step, from the configuration alone.

    What an aggregation sends is reckoned with the residual at its cap, which is where a run soon is.
    """
    from hsplit.actors.scheduler import Scheduler
    from hsplit.models.segment import linear_shapes, model_config, targeted

    scheduler = Scheduler(run, model)
    plan = scheduler.plan()
    job = run.job
    sides = {s.name: s.d_in + s.d_out for s in targeted(linear_shapes(model_config(model)), job.targets)}
    counted = scheduler.cost.model
    caps = dict(zip((w.name for w in counted.weights), counted.residual_entries.tolist(), strict=True))
    up = {c.name: sum(4 * rank * sides[w] for w, rank in c.ranks.items()) for c in plan.available}
    down = {c.name: up[c.name] + sum(4 * round(caps[w]) for w in c.ranks) for c in plan.available}
    batches = dict.fromkeys(up, 1)
    steps_s = scheduler.step_times_s(plan)
    between = scheduler.aggregation_time_s(plan, list(up), up, down) + scheduler.validation_time_s(plan, batches)
    if run.policy.probes:
        between += scheduler.probe_time_s(plan)
    return sum(steps_s) + between, steps_s[-1]


class Experiment:
    """One model, one set of texts, one Ray.

    Args:
        folder: for everything written on the way.
        scale: how large everything is.
        speedup: of the emulated clock.
        quotas: where processes are held to their shares; ``None``: nothing is measured.
    """

    def __init__(self, folder: Path, scale: Scale, speedup: float, quotas: Any) -> None:
        self._folder, self._scale, self._speedup, self._quotas = folder, scale, speedup, quotas
        sizes = {"hidden_size": scale.hidden, "intermediate_size": 3 * scale.hidden, "num_hidden_layers": scale.layers}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
        self._model = load_benchmark("tiny_cluster").tiny_model(folder / "model", WORDS, **sizes, **heads)
        self._data = texts(folder / "texts.csv", scale)

    def configured(
        self, budgets: Budgets, parts: int, labels: str, split: str | int = "planned", emulated: bool = False
    ) -> Any:
        """The run of one setting."""
        from hsplit.config import load_run_config
        from hsplit.preparation import settled

        scale = self._scale
        link = {"mbps": f"{budgets.bandwidth_bps / 1e6:.3f}", "latency": f"{1e3 * budgets.latency_s:.4f}"}
        clients = "\n".join(
            CLIENT.format(name=name, tflops=f"{flops / 1e12:.9f}", **link)
            for name, flops in budgets.flops.items()
            if name != "server"
        )
        cluster, policy = self._folder / "cluster.yaml", self._folder / "policy.yaml"
        cluster.write_text(
            CLUSTER.format(
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
                parts=parts,
                labels=labels,
            )
        )
        # Two examples' supervised tokens.
        policy.write_text(POLICY.format(split=split, tokens=2 * (scale.length - 1)))
        return settled(load_run_config(cluster, policy))

    def calibrated(self, shares: Mapping[str, float]) -> Budgets:
        """What processes with these shares have: FLOP/s at a front of two layers, and messages between them."""
        import torch

        from hsplit.actors.client import Client
        from hsplit.actors.messages import WireTensor
        from hsplit.actors.ray_executor import RayExecutor
        from hsplit.actors.scheduler import Scheduler
        from hsplit.lora.holder import RoundUpdate
        from hsplit.models.source import find_model
        from hsplit.preparation import read_inputs

        scale = self._scale
        # The server's share is given to a client too, so that all do the same work.
        names = {name if name != "server" else "as-server": share for name, share in shares.items()}
        trial = Budgets(dict.fromkeys([*names, "server"], 1e10), 1e-3, 1e9)
        run = self.configured(trial, 1, "server", FRONT)
        scheduler = Scheduler(run, self._model)
        plan, model = scheduler.plan(), scheduler.cost.model
        flops = float((model.forward_flops + model.backward_flops)[:FRONT].sum())
        executor = RayExecutor(f"speed-{time.monotonic_ns()}", run, self._model)
        try:
            data = read_inputs(run, find_model(str(self._model))).shares
            for name in names:
                executor.ask(name, Client.load_data, {name: data[name]}, None)
                executor.ask(name, Client.configure, FRONT, plan.client(name).ranks)
                executor.ask(name, Client.restart, RoundUpdate(1, {}, {}))
            gradient = WireTensor.pack(torch.randn(scale.batch * scale.length, scale.hidden), "fp32")

            def asked(steps: Mapping[str, range]) -> dict[str, list[Any]]:
                calls: dict[str, list[Any]] = {}
                for name, own in steps.items():
                    for step in own:
                        report, _ = executor.call_pair(name, Client.forward, step, 0)
                        calls.setdefault(name, []).append(
                            (report, executor.call(name, Client.backward, step, 0, gradient))
                        )
                return calls

            def seconds(calls: Sequence[Any]) -> list[float]:
                values = [executor.get(pair) for pair in calls]
                return [sum(up.seconds.values()) + sum(down.values()) for up, down in values]

            _without_profiler(executor)
            # How many fill the time.
            warm = {name: seconds(calls) for name, calls in asked(dict.fromkeys(names, range(3))).items()}
            with ExitStack() as stack:
                handles = {name: executor._handles[name] for name in names}
                if self._quotas is not None:
                    stack.enter_context(self._quotas.applied({pid(handles[n]): share for n, share in names.items()}))
                count = {
                    n: range(3, 3 + max(3, round(scale.calibration_s * share / min(warm[n]))))
                    for n, share in names.items()
                }
                calls = asked(count)
                speeds = {name: flops / mean(seconds(own)) for name, own in calls.items()}
                latency_s, bandwidth_bps = _messages(*list(handles.values())[:2])
        finally:
            executor.close()
        return Budgets({("server" if n == "as-server" else n): s for n, s in speeds.items()}, latency_s, bandwidth_bps)

    def _measured(self, shares: Mapping[str, float], parts: int, labels: str) -> tuple[Budgets, Any, float, int]:
        """What is declared, and a run under quotas while that held: the first at a steady pace, or the steadiest.

        What a process of a given share has changes with the machine's pace, by up to a third within minutes where
        others use the same hardware. So the same processes are timed before and after; what the run itself took has no
        say in whether it counts.

        Returns:
            Budgets, the run, the pace after it relative to before, and how many runs there were.
        """
        found = []
        before = self.calibrated(shares)
        for _ in range(ATTEMPTS):
            run = self._trained(self.configured(before, parts, labels), shares)
            after = self.calibrated(shares)
            found.append((before, run, before.pace_of(after)))
            if abs(found[-1][-1] - 1) <= STEADY:
                break
            before = after
        return *min(found, key=lambda tried: abs(tried[-1] - 1)), len(found)

    def row(self, variation: float, shares: Mapping[str, float], parts: int, labels: str) -> Any:
        """One setting by all three routes, and its holders."""
        budgets, measured, pace, attempts = self._measured(shares, parts, labels)
        expected_s, step_s = predicted(self.configured(budgets, parts, labels), self._model)
        emulated = self._trained(self.configured(budgets, parts, labels, emulated=True), None)
        splits = " ".join(str(row.split) for row in emulated.plan if row.kind == "client")
        row = Row(
            variation,
            parts,
            labels,
            splits,
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
        holders = [
            HolderRow(
                variation,
                parts,
                labels,
                one.name,
                shares[one.name],
                budgets.flops[one.name] / 1e9,
                one.split,
                one.predicted_time_s,
                one.measured_time_s * self._speedup,
                other.measured_time_s,
            )
            for one, other in zip(emulated.plan, measured.plan, strict=True)
        ]
        return row, holders

    def _trained(self, run: Any, shares: Mapping[str, float] | None) -> Any:
        """Train; with ``shares`` everybody is held to its own once the rounds that are measured begin."""
        import ray
        import torch

        from hsplit.actors.ray_executor import RayExecutor
        from hsplit.coordinator import Coordinator
        from hsplit.models.source import find_model
        from hsplit.observe.metrics import MetricsRow, PlanRow, read_rows
        from hsplit.observe.timing import TimingRow
        from hsplit.preparation import read_inputs
        from hsplit.run_directory import RunDirectory

        executor = RayExecutor(f"clock-{time.monotonic_ns()}", run, self._model)
        with ExitStack() as stack:
            stack.callback(executor.close)
            directory = RunDirectory.create(self._folder, f"run-{time.monotonic_ns()}")
            _without_profiler(executor)

            def hold() -> None:
                if shares is not None:
                    pids = {pid(executor._handles[name]): share for name, share in shares.items()}
                    stack.enter_context(self._quotas.applied(pids))

            if shares is not None:
                # One thread, or the quota would be spent by threads that wait for one another.
                server = executor._handles["server"]
                ray.get(server.__ray_call__.remote(lambda self: torch.set_num_threads(1)))
            watch = _Watch(FIRST - 1, hold)
            Coordinator(run, executor, directory, read_inputs(run, find_model(str(self._model))), watch).run()
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
    plan: Sequence[Any]


def _names(plan: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(row.name for row in plan))


def _of_rounds(rows: Sequence[Any]) -> Any:
    return replace(rows[-1], measured_time_s=median(row.measured_time_s for row in rows))


class _Watch(SilentDisplay):
    """A display that calls ``then`` when round ``last`` is done."""

    def __init__(self, last: int, then: Any) -> None:
        super().__init__()
        self._last, self._then = last, then

    def round_done(self, row: Any, holders: Any, timing: Any) -> None:
        if row.round == self._last:
            self._then()


def _without_profiler(executor: Any) -> None:
    """Have nobody follow its memory: small operations are slowed down by that more than by anything else."""
    import ray

    def stop(shell: Any) -> None:
        from hsplit.actors.peak_memory import PeakMemory

        shell.actor._memory = PeakMemory(shell.actor._device, enabled=False)

    handles = [handle for name, handle in executor._handles.items() if name != "scheduler"]
    ray.get([handle.__ray_call__.remote(stop) for handle in handles])


def pid(actor: Any) -> int:
    """The process of an actor."""
    import ray

    return int(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))


def _messages(one: Any, other: Any) -> tuple[float, float]:
    """Seconds from one actor's call to the other's, and bit/s of a large message between them."""
    import ray

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


def texts(to: Path, scale: Scale) -> Path:
    """Examples of exactly ``scale.length`` tokens, all but the first of them supervised, a CSV."""
    draw = random.Random(0)
    # One word of prompt, and the end of the text.
    lines = [
        " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(scale.length - 2)) for _ in range(200 * scale.clients)
    ]
    to.write_text("prompt,response\n" + "\n".join(f"w2,{line}" for line in lines) + "\n")
    return to


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every setting, print the tables and write them down."""
    options = _options(arguments)
    console, scale = Console(width=140), QUICK if options.quick else Scale()
    rows: list[Row] = []
    holders: list[HolderRow] = []
    drawn: dict[float, float] = {}
    quotas = load_benchmark("cpu_quota").CpuQuotas()
    with quotas.ahead():
        _run(scale, options, quotas, console, rows, holders, drawn)
    header: dict[str, Any] = {**machine_description("ray", "torch"), "cores": os.cpu_count()}
    header["command"] = f"hsplit bench clock {' '.join(arguments or ())}".strip()
    header |= {"seed": options.seed, "speedup": options.speedup, **asdict(scale)}
    header["variation drawn"] = ", ".join(f"{h:g}: {value:.2f}" for h, value in drawn.items())
    load_benchmark("clock_page").write_results(options.to, rows, holders, header, console)


def _run(
    scale: Scale,
    options: argparse.Namespace,
    quotas: Any,
    console: Console,
    rows: list[Row],
    holders: list[HolderRow],
    drawn: dict[float, float],
) -> None:
    """Every setting, on one Ray; results join ``rows``, ``holders`` and ``drawn``."""
    with load_benchmark("tiny_cluster").local_ray(scale.clients + 4) as folder:
        experiment = Experiment(folder, scale, options.speedup, quotas)
        for variation in scale.heterogeneity:
            shares = shares_of(scale, variation, options.seed)
            drawn[variation] = pstdev(shares.values()) / mean(shares.values())
            shares["server"] = scale.server_share
            settings = [(parts, "server") for parts in scale.parts]
            if variation == scale.heterogeneity[-1]:
                settings += [(scale.parts[-1], "client")]
            for parts, labels in settings:
                row, its = experiment.row(variation, shares, parts, labels)
                rows.append(row)
                holders += its
                seconds = ", ".join(f"{value:.2f}" for value in (row.predicted_s, row.emulated_s, row.measured_s))
                console.print(
                    f"h {variation:g}, {parts} parts, labels: {labels}: {seconds} s a round, pace {row.pace:.3f}"
                    f" after {row.attempts} runs"
                )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hsplit bench clock", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one level and one round")
    parser.add_argument("--speedup", type=float, default=1.0, help="of the emulated clock")
    parser.add_argument("--seed", type=int, default=1, help="of the shares drawn")
    parser.add_argument("--to", type=Path, default=results_directory("clock"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
