"""Gain from cutting batches into microbatches, on emulated speeds (``clock: emulated``).

    python -m benchmarks.overlap            # a part of: hsplit bench throughput

A tiny random model, so that computing takes next to nothing of the declared time; real actors, messages and waiting.
Seconds are of the wall. Three balances of clients and server are declared; in each, a step is measured with some of 1
to 8 microbatches and compared with the virtual clock's prediction and with the slower side plus one fill: the time
of one part at the other side, which cannot be hidden.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from hsplit.config import RunConfig

# Declared seconds of the clients' and the server's phase of a whole batch.
BALANCES = {"clients slower": (1.6, 0.8), "even": (1.2, 1.2), "server slower": (0.8, 1.6)}
# Numbers of microbatches of each setting; every setting starts new actors.
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
    with common.local_ray(8) as folder:
        model, data = common.tiny_model(folder / "model"), common.texts(folder / "texts.csv")
        found = []
        for balance, wanted in BALANCES.items():
            for parts in PARTS[balance]:
                found.append(_measured(folder, model, data, balance, wanted, parts, steps))
                console.print(f"overlap, {balance}, {parts} parts: {found[-1].measured_s:.3f} s a step")
        return found


def table(rows: Sequence[Overlap]) -> Table:
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
    def configured(client_tflops: float, server_tflops: float) -> RunConfig:
        speeds = {"client_tflops": f"{client_tflops:.12f}", "server_tflops": f"{server_tflops:.12f}"}
        cluster = CLUSTER.format(model=model, data=data, parts=parts, **speeds)
        return common.configured(folder, cluster, POLICY, ["job.dtype=fp32"])

    # Speeds that make the phases as long as wanted: computing is in proportion to them, sending is not.
    unit = 1e-3
    calls = common.call_times_s(configured(unit, unit), model)
    sending = common.call_times_s(configured(1e9, 1e9), model)["client-0"]
    sent_s = (sending["up"] + sending["down"]) * parts
    computed_s = (calls["client-0"]["up"] + calls["client-0"]["down"]) * parts - sent_s
    server_s = common.joined_turn_s(calls) * parts
    run = configured(unit * computed_s / (wanted[0] - sent_s), unit * server_s / wanted[1])
    with common.on_ray(f"overlap-{balance.replace(' ', '-')}-{parts}", run, model, folder) as (coordinator, _):
        coordinator.start()
        coordinator.begin_round()
        predicted = coordinator.step_times_s[-1]
        # The first steps of a round are also measured for memory, which takes time.
        seconds = [common.seconds_of(coordinator.local_step, step) for step in range(2 + steps)]
    bound = max(wanted) + min(wanted) / parts
    return Overlap(balance, parts, *wanted, bound, predicted, median(seconds[2:]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="overlap", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=3, help="local steps that are timed (default: 3)")
    console = Console()
    rows = overlaps(parser.parse_args(arguments).steps, console)
    console.print(common.markdown_table(*table(rows)))
    console.print([asdict(row) for row in rows][-1])


if __name__ == "__main__":
    main()
