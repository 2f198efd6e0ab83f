"""What cutting batches into microbatches gives, on declared speeds that everybody waits for (``clock: emulated``).

    python -m benchmarks.overlap            # a part of: hsplit bench throughput

A tiny random model, so that computing takes next to nothing of the declared time; real actors, messages and waiting.
Seconds are of the wall. Three balances of clients and server are declared; in each, a step is measured with some of 1
to 8 microbatches and held against what the virtual clock predicts and against the slower side plus one fill: the time
of one part at the other side, which cannot be hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from hsplit.benchmark import load_benchmark, markdown_table

# Declared seconds of the clients' and the server's phase of a whole batch.
BALANCES = {"clients slower": (1.6, 0.8), "even": (1.2, 1.2), "server slower": (0.8, 1.6)}
# Microbatches that each is measured with: every setting starts its actors anew.
PARTS = {"clients slower": (1, 2, 4), "even": (2, 8), "server slower": (4,)}
CLUSTER = """
server: {{memory_gb: 1, tflops: {server_tflops}}}
clients: [{{name: client, count: 4, memory_gb: 1, tflops: {client_tflops}, bandwidth_mbps: 1000, latency_ms: 1}}]
job:
  model: {model}
  base: fp32
  wire: fp32
  data: {{source: "{data}"}}
  batch_size: 8
  max_length: 32
  rounds: 1000
  local_steps: 8
  clock: emulated
  pipeline: {{microbatches: {parts}}}
"""
POLICY = "split: 4\nranks: 4\nimportance: {metric: equal}\nfreeze: never\n"


@dataclass(frozen=True)
class Overlap:
    """A step on emulated speeds.

    Attributes:
        balance: which side is slower.
        microbatches: parts of a batch.
        clients_s, server_s: declared seconds of their phases of a step.
        bound_s: the slower of them, and one part of the other: one fill.
        predicted_s: by the virtual clock.
        measured_s: of the wall, the median step.
    """

    balance: str
    microbatches: int
    clients_s: float
    server_s: float
    bound_s: float
    predicted_s: float
    measured_s: float


def overlaps(steps: int, console: Console) -> list[Overlap]:
    """Measure every balance with its numbers of microbatches."""
    tiny = load_benchmark("tiny_cluster")
    with tiny.local_ray(8) as folder:
        model, data = tiny.tiny_model(folder / "model"), tiny.texts(folder / "texts.csv")
        found = []
        for balance, wanted in BALANCES.items():
            for parts in PARTS[balance]:
                found.append(_measured(folder, model, data, balance, wanted, parts, steps))
                console.print(f"overlap, {balance}, {parts} parts: {found[-1].measured_s:.3f} s a step")
        return found


def table(rows: Sequence[Overlap]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells."""
    columns = [
        "emulated speeds",
        "clients, s",
        "server, s",
        "predicted, s (virtual)",
        "measured, s",
        "slower + one fill, s",
        "measured by that",
    ]
    cells = []
    for row in rows:
        numbers = (row.clients_s, row.server_s, row.predicted_s, row.measured_s, row.bound_s)
        ratio = row.measured_s / row.bound_s
        name = f"{row.balance}, {row.microbatches} parts"
        cells.append([name, *(f"{number:.2f}" for number in numbers), f"{ratio:.2f}"])
    return columns, cells


def _measured(
    folder: Path, model: Path, data: Path, balance: str, wanted: tuple[float, float], parts: int, steps: int
) -> Overlap:
    from hsplit.actors.executor import SERVER
    from hsplit.actors.ray_executor import RayExecutor
    from hsplit.actors.scheduler import Scheduler
    from hsplit.coordinator import Coordinator
    from hsplit.models.source import find_model
    from hsplit.observe.silent_display import SilentDisplay
    from hsplit.preparation import read_inputs
    from hsplit.run_directory import RunDirectory

    def configured(client_tflops: float, server_tflops: float) -> Any:
        return _configured(folder, model, data, client_tflops, server_tflops, parts)

    # Speeds that make the phases as long as wanted: computing is in proportion to them, sending is not.
    unit = 1e-3
    trial = configured(unit, unit)
    calls = Scheduler(trial, model).call_times_s(Scheduler(trial, model).plan())
    fast = configured(1e9, 1e9)
    sending = Scheduler(fast, model).call_times_s(Scheduler(fast, model).plan())["client-0"]
    sent_s = (sending["up"] + sending["down"]) * parts
    computed_s = (calls["client-0"]["up"] + calls["client-0"]["down"]) * parts - sent_s
    server_s = calls[SERVER]["step"] * parts
    run = configured(unit * computed_s / (wanted[0] - sent_s), unit * server_s / wanted[1])
    executor = RayExecutor(f"overlap-{balance}-{parts}", run, model)
    try:
        directory = RunDirectory.create(folder, f"{balance.replace(' ', '-')}-{parts}")
        coordinator = Coordinator(run, executor, directory, read_inputs(run, find_model(str(model))), SilentDisplay())
        coordinator.start()
        coordinator.begin_round()
        predicted = coordinator._step_times_s[-1]
        seconds = []
        # The first steps of a round are also measured for memory, which takes time.
        for step in range(2 + steps):
            begun = time.perf_counter()
            coordinator.local_step(step)
            seconds.append(time.perf_counter() - begun)
    finally:
        executor.close()
    bound = max(wanted) + min(wanted) / parts
    return Overlap(balance, parts, *wanted, bound, predicted, median(seconds[2:]))


def _configured(folder: Path, model: Path, data: Path, client_tflops: float, server_tflops: float, parts: int) -> Any:
    from hsplit.config import load_run_config
    from hsplit.preparation import settled

    cluster, policy = folder / "cluster.yaml", folder / "policy.yaml"
    speeds = {"client_tflops": f"{client_tflops:.12f}", "server_tflops": f"{server_tflops:.12f}"}
    cluster.write_text(CLUSTER.format(model=model, data=data, parts=parts, **speeds))
    policy.write_text(POLICY)
    return settled(load_run_config(cluster, policy, ["job.dtype=fp32"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    console = Console()
    rows = overlaps(3, console)
    console.print(markdown_table(*table(rows)))
    console.print([asdict(row) for row in rows][-1])


if __name__ == "__main__":
    main()
