"""Time of planning as the number of clients grows, and the gain from planning.

    python benchmarks/planner.py                    # or: hsplit bench planner

First part: clients of as many different budgets, drawn, plan for a Llama-2-7B that is built as its configuration
alone, by the default policy, and by the same without ``policy.pace``, where all clients wait for all. All seconds are
processor time of ``planner.make_plan`` on one core, so that other work on the machine counts as little as it can. The
first plan is timed apart, since the cost model counts new shapes as it meets them, and keeps the results. A server with
ample memory gives every adapter the largest rank; a short one has 80 % of the memory of that plan, so that splits and
ranks compete for its memory.

Second part: captured importance times examples a second, as plans maximize it (with the round's end's part), on a
cluster file by the default policy; against the same policy without pace, with every client training, and with uniform
splits and ranks, and against splits chosen by memory alone, without pace.
"""

from __future__ import annotations

import os

# Before numpy and torch read them.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from dataclasses import asdict, dataclass, replace  # noqa: E402
from itertools import groupby  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks import common  # noqa: E402
from benchmarks.common import Table  # noqa: E402
from hsplit.config import Job, Pace, Policy, load_run_config  # noqa: E402
from hsplit.errors import InputError  # noqa: E402
from hsplit.models.lookup import find_model  # noqa: E402
from hsplit.observe.wording import number_text  # noqa: E402
from hsplit.planning.budgets import Budget, budget_of  # noqa: E402
from hsplit.planning.cost.model import CostModel  # noqa: E402
from hsplit.planning.holder_plans import planned  # noqa: E402
from hsplit.planning.importance import equal_importance  # noqa: E402
from hsplit.planning.plan import Plan  # noqa: E402
from hsplit.planning.planner import EQUAL, make_plan  # noqa: E402
from hsplit.planning.problem import Problem, minimal_bytes  # noqa: E402
from hsplit.planning.rank_rules import RANK_RULES  # noqa: E402
from hsplit.run.inputs import read_fleet, resolved_config  # noqa: E402
from hsplit.simulation.fleet import shape_of  # noqa: E402

MODELS = {"llama-2-7b": "meta-llama/Llama-2-7b-hf"}
# Share of the plan's memory at a server with ample memory.
SHORT = 0.8


@dataclass(frozen=True)
class Timing:
    """One row of the first table.

    Attributes:
        pace: true if rows, turns and forms are planned too.
        server_memory: ``ample`` or ``short``.
        clients, distinct_budgets: their number, and the number of different ones.
        first_s: processor seconds of the first plan, counting of the cost model included.
        seconds_min, seconds_median: processor seconds of planning once that is known, over the repeats.
        seconds_per_client: of the median.
        growth_exponent: of the median seconds against the next smaller number of clients.
        objective: captured importance times examples a second (virtual), with the round's end's part.
    """

    pace: bool
    server_memory: str
    clients: int
    distinct_budgets: int
    first_s: float
    seconds_min: float
    seconds_median: float
    seconds_per_client: float
    growth_exponent: float | None
    objective: float


@dataclass(frozen=True)
class Worth:
    """One row of the second table; times are virtual, of one local step and of its part of the round's end."""

    configuration: str
    clients_taking_part: int
    splits: str
    only_forward: str
    captured_importance: float
    makespan_s: float
    exchange_s: float
    objective: float
    of_planned: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both parts, print their tables and write them down."""
    options = _options(arguments)
    common.keep_to_one_core()
    machine = {"seconds": "processor time on one core, measured", **common.machine_description("numpy", "torch")}
    console = Console()
    timings = _timings(options, console)
    _write(options.to / "planner.csv", timings, machine | {"model": options.model, "repeats": options.repeat})
    _draw(timings, options.to / "planner.svg", machine)
    worths = _worths(options.cluster)
    title = "captured importance times examples a second, with the round's end's part (virtual)"
    common.show_table(console, *_worth_table(worths), title=f"{options.cluster}: {title}")
    _write(options.to / "configurations.csv", worths, machine | {"cluster": options.cluster, "importance": EQUAL})
    console.print(f"written to {options.to}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Time planning on one core as clients grow in number; say what planning is worth."
    parser = common.flags_of("planner", about)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10000], metavar="N")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-2-7b")
    repeat = "how often each plan is timed after the first (default: 3)"
    parser.add_argument("--repeat", type=int, default=3, help=repeat)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn budgets (default: 0)")
    parser.add_argument("--cluster", default="hetero", help="cluster file or preset of the second part")
    options = parser.parse_args(arguments)
    if min(options.clients) < 1 or options.repeat < 1:
        parser.error("--clients and --repeat must be at least 1")
    options.clients = sorted(set(options.clients))
    return options


# -- how long planning takes --------------------------------------------------------------------------------------


def _timings(options: argparse.Namespace, console: Console) -> list[Timing]:

    job = Job(model=options.model, base="nf4", dtype="bf16")
    default = load_run_config(options.cluster).policy
    model = shape_of(MODELS[options.model])
    timings: list[Timing] = []
    for policy in (default, default.model_copy(update={"pace": Pace()})):
        begun = time.process_time()
        cost = CostModel(model, job, policy.pace)
        # The tables over splits and weights are counted once too.
        _ = cost.client.constant, cost.client.per_rank
        console.print(f"counted {len(cost.model.weights)} adapted weights once in {time.process_time() - begun:.2f} s")
        for count in options.clients:
            clients = _drawn(count, options.seed)
            # Without a limit first, to find the memory needed; compute grows with the clients.
            server = Budget("server", 10**18, 3e14 * max(1.0, count / 100))
            ample, seconds = _timed(clients, server, cost, policy, options.repeat)
            timings.append(_timing("ample", clients, seconds, ample, policy, timings))
            short = replace(server, memory_bytes=int(SHORT * ample.server.predicted_bytes))
            tight, seconds = _timed(clients, short, cost, policy, options.repeat)
            timings.append(_timing("short", clients, seconds, tight, policy, timings))
    timings.sort(key=lambda t: (not t.pace, t.server_memory))
    title = "Planning on one core, in processor seconds (what is captured a second is virtual)"
    common.show_table(console, *_timing_table(timings), title=title)
    return timings


def _drawn(count: int, seed: int) -> list[Budget]:
    """Clients that all differ: the papers' 5 to 20 GB, from a phone's compute and link to a workstation's."""
    draw = np.random.default_rng(seed)
    return [
        Budget(
            f"client-{i}",
            memory_bytes=int(draw.uniform(5e9, 20e9)),
            flops=float(10 ** draw.uniform(11.7, 13.3)),
            bandwidth_bps=float(10 ** draw.uniform(7.5, 9.0)),
            latency_s=float(draw.uniform(0.001, 0.05)),
        )
        for i in range(count)
    ]


def _timed(
    clients: list[Budget], server: Budget, cost: CostModel, policy: Policy, repeat: int
) -> tuple[Plan, list[float]]:
    importance = equal_importance(cost.model.weights)
    seconds = []
    for _ in range(1 + repeat):
        begun = time.process_time()
        made = make_plan(clients, server, cost, importance, policy)
        seconds.append(time.process_time() - begun)
    return made, seconds


def _timing(
    memory: str, clients: list[Budget], seconds: list[float], made: Plan, policy: Policy, before: list[Timing]
) -> Timing:
    first, *repeats = seconds
    median, count = statistics.median(repeats), len(clients)
    pace = policy.pace != Pace()
    smaller = [t for t in before if (t.pace, t.server_memory) == (pace, memory)]
    exponent = None
    if smaller:
        last = smaller[-1]
        exponent = math.log(median / last.seconds_median) / math.log(count / last.clients)
    return Timing(
        pace,
        memory,
        count,
        len({budget_of(c) for c in clients}),
        first,
        min(repeats),
        median,
        median / count,
        exponent,
        made.objective,
    )


def _timing_table(timings: list[Timing]) -> Table:
    columns = [
        "pace",
        "server\nmemory",
        "clients",
        "distinct\nbudgets",
        "first",
        "min",
        "median",
        "a client\n(ms)",
        "growth",
    ]
    cells = [
        [
            "planned" if t.pace else "none",
            t.server_memory,
            str(t.clients),
            str(t.distinct_budgets),
            f"{t.first_s:.3f}",
            f"{t.seconds_min:.3f}",
            f"{t.seconds_median:.3f}",
            f"{t.seconds_per_client * 1e3:.2f}",
            "" if t.growth_exponent is None else f"{t.growth_exponent:.2f}",
            number_text(t.objective),
        ]
        for t in timings
    ]
    return [*columns, "objec-\ntive"], cells


def _draw(timings: list[Timing], path: Path, machine: dict[str, str]) -> None:
    figure = common.new_figure(6.4, 4.0)
    axes = figure.subplots()
    for (pace, memory), rows in groupby(timings, key=lambda t: (t.pace, t.server_memory)):
        own = list(rows)
        label = f"pace {'planned' if pace else 'none'}, server memory {memory}"
        axes.loglog([t.clients for t in own], [t.seconds_median for t in own], "o-", label=label)
    axes.set(xlabel="clients, all of different budgets", ylabel="processor seconds to plan (median)")
    axes.set_title(machine["processor"], fontsize="small")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    common.save_figure(figure, path)


# -- the gain from planning ---------------------------------------------------------------------------------------


def _worths(cluster: str) -> list[Worth]:
    run = resolved_config(load_run_config(cluster))
    source = find_model(run.job.model)
    # As hsplit plan does: which rows of the embedding each client holds follows from its texts.
    fleet, unread = read_fleet(run, source)
    if unread:
        raise InputError(f"{cluster}: job.data: what the clients' texts use is not known: {unread}")
    spec = source.spec
    costs = {pace: CostModel(spec, run.job, pace) for pace in (run.policy.pace, Pace())}
    importance = equal_importance(costs[Pace()].model.weights)

    def by(**choices: str | Pace) -> Plan:
        policy = run.policy.model_copy(update=choices)
        cost = costs[policy.pace]
        return make_plan(
            run.clients,
            run.server,
            cost,
            importance,
            policy,
            vocabulary=fleet.vocabulary,
            examples=fleet.examples,
        )

    best, waiting = by(), costs[Pace()]
    smallest = minimal_bytes(waiting, waiting.rank_set[0])[1]
    taking_part = [c for c in run.clients if c.memory_bytes >= smallest]
    problem = Problem(
        taking_part, run.server, waiting, importance, np.array(waiting.rank_set), RANK_RULES["importance"]
    )
    by_memory = planned(problem, problem.deepest, run.clients, int(problem.needed[1]), EQUAL)
    made = {
        "planned": best,
        "planned, everybody trains": by(freeze="never"),
        "planned, no pace": by(pace=Pace()),
        "uniform split and rank": by(split="uniform", ranks="uniform", freeze="never"),
        "by memory alone": by_memory,
    }
    return [_worth(name, each, best.objective) for name, each in made.items()]


def _worth(name: str, made: Plan, reference: float) -> Worth:
    splits = " ".join(str(c.split) for c in made.available)
    forward = " ".join(c.name for c in made.available if c.name in made.forward_only)
    seconds = made.makespan_s, made.exchange_s
    worth = made.objective, made.objective / reference
    return Worth(name, len(made.available), splits, forward, made.captured_importance, *seconds, *worth)


def _worth_table(worths: list[Worth]) -> Table:
    columns = ["configuration", "clients", "splits", "only\nforward", "captured", "step", "round's\nend"]
    cells = []
    for w in worths:
        seconds = number_text(w.makespan_s, "s"), number_text(w.exchange_s, "s")
        figures = number_text(w.captured_importance), *seconds, number_text(w.objective)
        parts = str(w.clients_taking_part), w.splits, w.only_forward
        cells.append([w.configuration, *parts, *figures, f"{w.of_planned:.1%}"])
    return [*columns, "objec-\ntive", "of\nplanned"], cells


# -- writing ------------------------------------------------------------------------------------------------------


def _write(path: Path, rows: Sequence[Timing | Worth], header: dict[str, Any]) -> None:
    """A CSV and a JSON file of the same figures."""
    records = [asdict(row) for row in rows]
    common.write_rows(path, records, header)
    path.with_suffix(".json").write_text(json.dumps({**header, "rows": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
