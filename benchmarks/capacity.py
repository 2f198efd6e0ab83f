"""Where ranks, depth and holders apart change the loss: the constants of the objective (METHOD 5).

    hsplit bench capacity --data devset.csv train.jsonl     # or: python -m benchmarks.capacity; hours
    hsplit bench capacity --list                            # the runs that are left

SmolLM2-135M in this process, a step of ten examples, validated as it learns. Three sweeps on each data set:

- **rank**: centralized LoRA (``cenlora``) at ranks 1 to 32;
- **frozen**: five clients hold the first layers and only compute forward; the server trains the rest;
- **apart**: five clients hold the first layers and train them, each its own copy, aggregated after every ten steps.

Centralized LoRA at rank 8 is also the first setting of the other two, with no layers. Each sweep says how many tokens a
setting needs to the loss that the worst of its settings ends with, as a share of the most: ``learning ** -gamma`` in
METHOD 5's objective, where ``learning`` is the sum of ``log2(1 + rank) ** rho`` over all parameters' shares. ``gamma``
is fitted to frozen layers, ``rho`` to ranks given that, and ``kappa`` to layers apart, whose discount is ``(sum of
squared token shares) ** kappa``. A spread of the final loss below three times that of seeds says that on these data the
sweep shows nothing, and the table says so.

Data are files as ``job.data.source`` reads them, JSON lines of questions and answers, or ``tasks``: a mixture of
procedural tasks of the package ``reasoning-gym`` (``pip install reasoning-gym``). Finished runs stay in ``cells/``.
"""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import common
from benchmarks.common import Table
from hsplit.config import RunConfig
from hsplit.config.reading import from_json
from hsplit.errors import InputError
from hsplit.observe.observer import SilentDisplay
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import Plan
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.ranks import captured_by
from hsplit.planning.scheduler import Review, Scheduler

CLIENTS, BATCH, STEPS, ROUNDS = 5, 2, 10, 8
RANKS, DEPTHS, SEEDS = (1, 2, 4, 8, 16, 32), (1, 8, 15, 22, 30), (0, 1, 2)
USUAL_RANK = 8
SWEEPS = ("rank", "frozen", "apart")
TASKS = "tasks"
# Tasks whose answers a small model can learn, a few tokens each.
TASK_NAMES = (
    *("chain_sum", "basic_arithmetic", "letter_counting", "number_sorting", "word_sorting", "spell_backward"),
    *("base_conversion", "caesar_cipher", "leg_counting", "gcd", "number_filtering", "simple_equations"),
)
TASK_EXAMPLES = 4000
PAIRS = (("question", "answer"), ("context", "completion"))
"""Names of prompt and response in JSON lines that are not read as they are."""
FEW_SEEDS_SPREAD = 3.0
"""A sweep shows something if its settings differ by this many times the spread over seeds."""
CLUSTER = """
server: {memory_gb: 64, tflops: 2}
clients:
  - {name: client, count: %d, memory_gb: 16, tflops: 0.5, bandwidth_mbps: 200}
"""
POLICY = """
split: {split}
ranks: {rank}
freeze: never
importance: {{metric: equal}}
replan: {{tau: null, measured: false}}
init: shared
reinit: mean
moments: keep
"""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: name of the data set.
        sweep: ``rank``, ``frozen`` or ``apart``.
        value: the rank, or the number of layers.
        seed: of data and adapters.
    """

    data: str
    sweep: str
    value: int
    seed: int

    @property
    def key(self) -> str:
        """Of its file."""
        return f"{self.data}-{self.sweep}{self.value}-s{self.seed}"


class FrozenClients(Scheduler):
    """Plans in which clients only compute forward."""

    def first(self, fleet: Fleet, state: PlanningState) -> Review:
        """Make the first plan; there is no other."""
        review = super().first(fleet, state)
        return replace(review, plan=frozen(review.made))


def frozen(plan: Plan) -> Plan:
    """Return ``plan`` with every client's ranks at 0."""
    clients = tuple(replace(part, ranks=dict.fromkeys(part.ranks, 0)) for part in plan.clients)
    return replace(plan, clients=clients)


def cells(data: Sequence[str]) -> list[Cell]:
    """All runs: the ends of every sweep first, then what is between them."""
    steps = [("rank", rank) for rank in (1, 32, 8)] + [(s, k) for k in (15, 30) for s in ("frozen", "apart")]
    rest = [("rank", rank) for rank in RANKS] + [(s, k) for k in DEPTHS for s in ("frozen", "apart")]
    settings = list(dict.fromkeys([*steps, *rest]))
    # With all layers frozen nothing learns.
    settings.remove(("frozen", 30))
    return [Cell(name, sweep, value, seed) for sweep, value in settings for seed in SEEDS for name in data]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left, and make the tables."""
    parser = common.flags_of("capacity", __doc__)
    parser.add_argument("--data", nargs="+", default=["restaurants"], help="files, built-in texts, or 'tasks'")
    parser.add_argument("--model", help="as job.model")
    common.cell_flags(parser)
    options = parser.parse_args(arguments)
    console, header = Console(width=140), common.header_of("capacity", arguments, "torch", "transformers")
    sources = {Path(source).stem: source for source in options.data}
    every = common.finished_cells(
        cells(list(sources)),
        options,
        console,
        header,
        run=lambda cell: run_cell(cell, sources[cell.data], options.model),
        outcome=lambda found: f"loss {found['curve'][-1][1]:.4f} after {found['curve'][-1][0]:,} tokens",
    )
    if not every:
        return
    table = swept(every)
    title = f"Loss after {ROUNDS * STEPS} steps, and tokens to the worst setting's loss: mean and range over seeds"
    common.show_table(console, *table, title=title)
    fits = fitted(every)
    common.show_table(console, *fits, title="Constants of METHOD 5")
    texts = [common.titled(title, table), common.titled("Constants of METHOD 5", fits)]
    common.write_markdown(options.to / "capacity.md", header, texts)
    plot(every, options.to / "capacity.svg")


# -- runs -------------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, source: str, model: str | None = None) -> dict[str, Any]:
    """Train; returns tokens and pooled validation loss of every round."""
    with tempfile.TemporaryDirectory() as name:
        run = configured(Path(name), cell, as_read(source, Path(name), cell.seed), model)
        found, inputs = common.read(run)
        scheduler = FrozenClients(run, found.spec) if cell.sweep == "frozen" else None
        with common.in_process(run, found.directory, inputs, SilentDisplay(), scheduler=scheduler) as (coordinator, _):
            wall_s = common.seconds_of(coordinator.run)
            curve = [(row.tokens, row.val_loss) for row in coordinator.rows]
            plan = coordinator.context.plan
    learning = learning_of(plan, CostModel.of_run(found.spec, run))
    return {**asdict(cell), "curve": curve, "learning": learning, "wall_s": wall_s}


def configured(folder: Path, cell: Cell, source: str, model: str | None) -> RunConfig:
    """The configuration of one run."""
    rank = cell.value if cell.sweep == "rank" else USUAL_RANK
    policy = "cenlora" if cell.sweep == "rank" else POLICY.format(split=cell.value, rank=rank)
    overrides = [
        *(f"job.data.source={source}", f"job.seed={cell.seed}", f"job.batch_size={BATCH}"),
        *(f"job.rounds={ROUNDS}", f"job.local_steps={STEPS}", "job.base=bf16", "job.dtype=bf16"),
        *("job.keep_checkpoints=1", f"job.rank_set=[{rank}]"),
        *([f"policy.ranks={rank}"] if cell.sweep == "rank" else []),
        *([f"job.model={model}"] if model else []),
    ]
    return common.configured(folder, CLUSTER % CLIENTS, policy, overrides)


def as_read(source: str, folder: Path, seed: int) -> str:
    """Return a source that hsplit reads: ``source``, or a table made of it in ``folder``.

    Raises:
        InputError: JSON lines without any pair of names that is known.
    """
    if source == TASKS:
        return str(_table(folder / "tasks.csv", task_examples(seed)))
    path = Path(source)
    if path.suffix != ".jsonl":
        return source
    rows = [from_json(line, dict[str, Any], str(path)) for line in path.read_text().splitlines() if line]
    for prompt, response in PAIRS:
        if all(prompt in row and response in row for row in rows):
            return str(_table(folder / f"{path.stem}.csv", ((row[prompt], row[response]) for row in rows)))
    return source


def _table(path: Path, pairs: Iterator[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response"])
        writer.writerows(pairs)
    return path


def task_examples(seed: int, count: int = TASK_EXAMPLES) -> Iterator[tuple[str, str]]:
    """Draw questions and answers of all tasks in turn.

    Raises:
        InputError: the package is not installed.
    """
    try:
        from reasoning_gym import create_dataset
    except ImportError:
        raise InputError("--data tasks: takes the package reasoning-gym (pip install reasoning-gym)") from None
    each = -(-count // len(TASK_NAMES))
    drawn = [create_dataset(name, size=each, seed=seed) for name in TASK_NAMES]
    for index in range(count):
        example = drawn[index % len(drawn)][index // len(drawn)]
        yield example["question"], str(example["answer"])


def learning_of(plan: Plan, cost: CostModel) -> dict[str, float]:
    """Parameters' shares times ``log2(1 + rank)``, of what is trained together and of what clients train apart."""
    weights = cost.model.weights
    total = sum(weight.parameters for weight in weights)
    share = {weight.name: weight.parameters / total for weight in weights}
    own = plan.clients[0].ranks
    apart = sum(share[name] * float(captured_by(np.array(rank))) for name, rank in own.items())
    server = sum(share[name] * float(captured_by(np.array(rank))) for name, rank in plan.server.ranks.items())
    # On a single node the one client has everything.
    alone = len(plan.available) == 1
    return {"together": server + (apart if alone else 0.0), "apart": 0.0 if alone else apart}


# -- what they show ---------------------------------------------------------------------------------------------------


def tokens_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Tokens until the loss is at most ``target``, straight between validations; ``None``: it never is."""
    for (before, high), (after, low) in pairwise(curve):
        if low <= target < high:
            return before + (after - before) * (high - target) / (high - low)
    return None


@dataclass(frozen=True)
class Setting:
    """All seeds of one setting: final losses, tokens to the target, and what it learns by METHOD 5."""

    data: str
    sweep: str
    value: int
    losses: list[float]
    tokens: list[float]
    learning: Mapping[str, float]


def settings_of(found: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Gather runs; a target is the loss that the worst setting of the sweep with that seed ends with."""
    settings = []
    for data, sweep in sorted({(one["data"], one["sweep"]) for one in found}):
        own = [one for one in found if (one["data"], one["sweep"]) == (data, sweep)]
        if sweep != "rank":
            usual = (one for one in found if (one["data"], one["sweep"], one["value"]) == (data, "rank", USUAL_RANK))
            seeds = {one["seed"] for one in own}
            own += [{**one, "sweep": sweep, "value": 0} for one in usual if one["seed"] in seeds]
        target = {
            seed: max(one["curve"][-1][1] for one in own if one["seed"] == seed) for seed in {o["seed"] for o in own}
        }
        for value in sorted({one["value"] for one in own}):
            runs = [one for one in own if one["value"] == value]
            tokens = [tokens_to(run["curve"], target[run["seed"]]) or run["curve"][-1][0] for run in runs]
            losses = [run["curve"][-1][1] for run in runs]
            settings.append(Setting(data, sweep, value, losses, tokens, runs[0]["learning"]))
    return settings


def swept(found: Sequence[Mapping[str, Any]]) -> Table:
    """Columns and cells: every setting, with the spread of its sweep against that of seeds."""
    columns = ["data", "sweep", "value", "loss", "tokens to the worst", "learning", "spread / seeds", "seeds"]
    rows, every = [], settings_of(found)
    for one in every:
        own = [other for other in every if (other.data, other.sweep) == (one.data, one.sweep)]
        means = [statistics.fmean(other.losses) for other in own]
        # Differences between settings of one seed: seeds draw other data too.
        noise = statistics.fmean(_seeds_spread(own))
        ratio = (max(means) - min(means)) / noise if noise > 0 else math.inf
        rows.append(
            [
                *(one.data, one.sweep, str(one.value)),
                f"{statistics.fmean(one.losses):.4f} ({min(one.losses):.4f} to {max(one.losses):.4f})",
                f"{statistics.fmean(one.tokens):,.0f}",
                f"{sum(one.learning.values()):.3f}",
                f"{ratio:.1f}" + ("" if ratio >= FEW_SEEDS_SPREAD else ", shows nothing"),
                str(len(one.losses)),
            ]
        )
    return columns, rows


def _seeds_spread(settings: Sequence[Setting]) -> list[float]:
    """Standard deviation over seeds of each setting's difference to the sweep's mean of that seed."""
    complete = [one for one in settings if len(one.losses) == max(len(other.losses) for other in settings)]
    losses = np.array([one.losses for one in complete])
    return list((losses - losses.mean(axis=0)).std(axis=1, ddof=1)) if losses.shape[1] > 1 else [0.0]


def fitted(found: Sequence[Mapping[str, Any]]) -> Table:
    """Columns and cells: ``gamma``, ``rho`` and ``kappa``, by data set."""
    rows, every = [], settings_of(found)
    for data in sorted({one.data for one in every}):
        by = {sweep: [one for one in every if (one.data, one.sweep) == (data, sweep)] for sweep in SWEEPS}
        if len(by["frozen"]) < 2 or (gamma := gamma_of(by["frozen"])) <= 0:
            continue
        rows.append([data, "gamma", f"{gamma:.3f}", str(len(by["frozen"]))])
        if len(by["rank"]) > 1:
            rows.append([data, "rho", f"{gamma_of(by['rank']) / gamma:.3f}", str(len(by["rank"]))])
        if len(by["apart"]) > 1:
            rows.append([data, "kappa", f"{kappa_of(by['apart'], gamma):.3f}", str(len(by["apart"]))])
    return ["data", "constant", "value", "settings"], rows


def gamma_of(settings: Sequence[Setting]) -> float:
    """Slope of the logarithm of tokens over that of learning, least squares, with its sign turned."""
    learning = np.log([one.learning["together"] for one in settings])
    tokens = np.log([statistics.fmean(one.tokens) for one in settings])
    return float(-np.polyfit(learning, tokens, 1)[0])


def kappa_of(settings: Sequence[Setting], gamma: float) -> float:
    """Discount of layers apart that explains the tokens of ``settings`` best, by steps of 0.005 up to 1."""

    def error(kappa: float) -> float:
        discount = CLIENTS**-kappa
        learning = [one.learning["together"] + discount * one.learning["apart"] for one in settings]
        tokens = np.log([statistics.fmean(one.tokens) for one in settings])
        expected = -gamma * np.log(learning)
        return float(np.var(tokens - expected))

    return min(np.linspace(0, 1, 201), key=error).item()


def plot(found: Sequence[Mapping[str, Any]], to: Path) -> None:
    """Final loss against the swept value, a panel a sweep and data set."""
    every = settings_of(found)
    panels = sorted({(one.data, one.sweep) for one in every})
    columns = sorted({sweep for _, sweep in panels})
    data = sorted({name for name, _ in panels})
    figure = common.new_figure(3.4 * len(columns), 2.8 * len(data))
    for index, (name, sweep) in enumerate((name, sweep) for name in data for sweep in columns):
        own = [one for one in every if (one.data, one.sweep) == (name, sweep)]
        axes = figure.add_subplot(len(data), len(columns), index + 1)
        for one in own:
            axes.plot([one.value] * len(one.losses), one.losses, ".", color="tab:gray")
        axes.plot([one.value for one in own], [statistics.fmean(one.losses) for one in own], "o-")
        if sweep == "rank":
            axes.set_xscale("log", base=2)
        axes.set(title=f"{name}: {sweep}", xlabel="rank" if sweep == "rank" else "layers", ylabel="loss")
    common.save_figure(figure, to)


if __name__ == "__main__":
    main()
