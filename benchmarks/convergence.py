"""Convergence against budget heterogeneity: the protocol of METHOD 9.

    hsplit bench convergence --data devset.csv          # or: python -m benchmarks.convergence
    hsplit bench convergence --quick                    # 15 minutes, built-in texts
    hsplit bench convergence --list                     # the cells to run, and their time here

Clients draw memory, compute and bandwidth with a fixed mean and a coefficient of variation ``h``. Every **cell** is one
policy (or a variant of one), one ``h``, one seed and one learning rate, run in this process by the product's own
coordinator, clients, server and scheduler on SmolLM2-135M. Validation perplexity is that of all clients' held-out texts
after every round, even if a policy leaves out some clients. Finished cells stay in ``cells/``: a stopped run continues
with the next one, and ``--report`` makes tables, plots and the page of the finished cells.

The same in every cell (``benchmarks/README.md`` says when each of these was settled, some of it after trial runs):

- five clients; their mean memory is the papers' 12.5 GB for 6.74e9 parameters, scaled to the model in use;
- a draw is rescaled so that its mean and its coefficient of variation are exact in every sample, and the clients'
  places in it are the same at every ``h`` of a seed;
- 2 TFLOP/s at the server and 0.5 at the mean client, 200 Mbit/s, 5 ms: for the compute and messages of a 7B model that
  would be 80 and 20 TFLOP/s and 1 Gbit/s;
- ranks up to 8, and a residual of at most 8 directions; one base in bf16 for all;
- ``cenlora`` and ``ft`` are shown at the server's speed, and at the mean client's;
- each policy's learning rate is the best of the same four factors around its usual one, after half the rounds, at one
  ``h`` and on a seed used for nothing else;
- a policy under which clients are unavailable gets as many more rounds as make up for their tokens;
- the target is the mean perplexity that ``cenlora`` has after two thirds of its rounds; the time to it is interpolated
  between rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import init_empty_weights
from rich.console import Console

from benchmarks import common
from benchmarks.policies import Judge
from hsplit.actors.server import Server
from hsplit.config import SERVER, RunConfig
from hsplit.config.reading import read_json
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.models.lookup import find_model
from hsplit.models.spec import ModelSpec
from hsplit.observe.events import read_events
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import MetricsRow, residual_cuts
from hsplit.planning.plan import Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Coordinator

LEVELS = (0.0, 0.3, 0.6, 0.9)
SEEDS = (0, 1, 2)
TUNING_LEVEL, TUNING_SEED = 0.6, 100
# At the first clients train many layers, at the second few or none.
ABLATION_LEVELS = (0.0, 0.6)
# Around a policy's usual rate: adapters', and that of all weights.
LR_FACTORS = (0.5, 1.0, 2.0, 4.0)
USUAL_LR, FT_LR = 1e-3, 5e-5
CLIENTS = 5
# The papers' mean budget for LLaMA-2-7B, bytes for each of its parameters.
PAPER_GB, PAPER_PARAMETERS = 12.5, 6.74e9
SERVER_TFLOPS, MEAN = 2.0, {"tflops": 0.5, "bandwidth_mbps": 200.0}
LATENCY_MS = 5
JOB = [
    *("job.base=bf16", "job.dtype=bf16", "job.keep_checkpoints=1"),
    *("job.pipeline.microbatches=2", "job.pipeline.ahead=true"),
    # Small ranks, and a residual of no more directions than the largest has.
    *("job.rank_set=[1, 2, 4, 8]", "job.residual.max_rank=8"),
]
TARGET_PART = 2 / 3


@dataclass(frozen=True)
class Variant:
    """A policy file with overrides.

    Attributes:
        policy: its name.
        overrides: ``KEY=VALUE`` of policy and job.
        lr_of: the variant whose learning rate it takes; its own name if it is tuned itself.
    """

    policy: str
    overrides: tuple[str, ...] = ()
    lr_of: str = ""


POLICIES = {
    name: Variant(name)
    for name in ("hsplitlora", "splitlora", "hetlora", "fedlora", "flora", "flexlora", "raflora", "cenlora", "ft")
}
HEADLINE = ("hsplitlora", "splitlora", "cenlora")
"""The policies with every seed; the others have the first."""
NOTHING_OFF = "nothing off"
_OFF = {
    "importance equal": ("policy.importance.metric=equal",),
    "ranks uniform": ("policy.ranks=uniform",),
    "split uniform": ("policy.split=uniform",),
    "FedAvg": ("policy.aggregation=fedavg", "policy.ranks=uniform"),
}
# With room for the largest rank everywhere, importance decides on little. Here ranks have to be chosen.
_TIGHT, _TIGHT_SERVER = "tight server", "server.memory_gb=0.82"
_CHOICES: dict[str, tuple[str, ...]] = {
    "": (),
    ", importance equal": _OFF["importance equal"],
    ", ranks uniform": _OFF["ranks uniform"],
}
ABLATIONS = {
    # The same again, on another device than the headline's: the effect of rounding.
    NOTHING_OFF: Variant("hsplitlora", (), "hsplitlora"),
    **{name: Variant("hsplitlora", own, "hsplitlora") for name, own in _OFF.items()},
    "all four": Variant("hsplitlora", tuple(dict.fromkeys(o for own in _OFF.values() for o in own)), "hsplitlora"),
    "as published": Variant(
        "hsplitlora",
        ("policy.reinit=random", "policy.moments=drop", "policy.init=independent", "policy.freeze=never"),
        "hsplitlora",
    ),
    "reinit random": Variant("hsplitlora", ("policy.reinit=random",), "hsplitlora"),
    "reinit svd": Variant("hsplitlora", ("policy.reinit=svd", "policy.moments=fit"), "hsplitlora"),
    "moments drop": Variant("hsplitlora", ("policy.moments=drop",), "hsplitlora"),
    "init independent": Variant("hsplitlora", ("policy.init=independent",), "hsplitlora"),
    "rates scaled": Variant("hsplitlora", ("policy.lr_scaling=sqrt",), "hsplitlora"),
    "everybody trains": Variant("hsplitlora", ("policy.freeze=never",), "hsplitlora"),
    "nobody ahead": Variant("hsplitlora", ("job.pipeline.ahead=false",), "hsplitlora"),
    "server nf4": Variant("hsplitlora", ("job.base=nf4",), "hsplitlora"),
    "wire int8": Variant("hsplitlora", ("job.wire=int8",), "hsplitlora"),
    **{f"{_TIGHT}{name}": Variant("hsplitlora", (_TIGHT_SERVER, *own), "hsplitlora") for name, own in _CHOICES.items()},
}
VARIANTS = POLICIES | ABLATIONS


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        variant: its name in :data:`VARIANTS`.
        h: coefficient of variation of the clients' budgets.
        seed: of budgets, data and adapters.
        lr: learning rate.
    """

    variant: str
    h: float
    seed: int
    lr: float

    @property
    def key(self) -> str:
        """Of its file."""
        return f"{self.variant.replace(' ', '_')}-h{self.h:g}-s{self.seed}-lr{self.lr:g}"


@dataclass(frozen=True)
class Scale:
    """Extent of the grid.

    Attributes:
        rounds, local_steps: of a run in which all clients take part.
        levels, seeds: of the headline cells.
        policies, ablations: their names.
        ablation_levels: of the ablations.
        factors: of the learning rates that are tried.
    """

    rounds: int = 4
    local_steps: int = 10
    levels: tuple[float, ...] = LEVELS
    seeds: tuple[int, ...] = SEEDS
    policies: tuple[str, ...] = tuple(POLICIES)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    ablation_levels: tuple[float, ...] = ABLATION_LEVELS
    factors: tuple[float, ...] = LR_FACTORS

    def rounds_of(self, cell: Cell) -> int:
        """Return the rounds of one cell; learning rates are compared after half of them."""
        return math.ceil(self.rounds / 2) if cell.seed == TUNING_SEED else self.rounds


QUICK = Scale(rounds=3, local_steps=4, levels=(0.0, 0.9), seeds=(0,), policies=HEADLINE, ablations=(), factors=(1.0,))


# -- budgets --------------------------------------------------------------------------------------------------------


def draws(count: int, h: float, seed: int, field: str) -> list[float]:
    """Draw lognormal values with mean 1 and coefficient of variation ``h``, both exact in the sample.

    The same standard normal numbers serve every ``h``, so that a client keeps its place.
    """
    source = random.Random(f"{seed}:{field}")
    normal = [source.gauss(0.0, 1.0) for _ in range(count)]
    if h == 0:
        return [1.0] * count

    def scaled(sigma: float) -> list[float]:
        values = [math.exp(sigma * z) for z in normal]
        return [value / fmean(values) for value in values]

    low, high = 0.0, 16.0
    for _ in range(100):
        sigma = (low + high) / 2
        variation = math.sqrt(fmean((value - 1) ** 2 for value in scaled(sigma)))
        low, high = (sigma, high) if variation < h else (low, sigma)
    return scaled(high)


def budgets(h: float, seed: int, memory_gb: float) -> list[dict[str, float]]:
    """Budgets of the clients, in the fields of a cluster file; ``memory_gb`` is their mean."""
    fields = {"memory_gb": memory_gb, **MEAN}
    columns = {field: [mean * d for d in draws(CLIENTS, h, seed, field)] for field, mean in fields.items()}
    return [{field: values[i] for field, values in columns.items()} for i in range(CLIENTS)]


def mean_memory_gb(parameters: int) -> float:
    """The papers' mean budget, scaled to a model of so many parameters."""
    return PAPER_GB * parameters / PAPER_PARAMETERS


# -- one cell -------------------------------------------------------------------------------------------------------


def usual_lr(variant: str) -> float:
    """Return the centre of the tuned learning rates."""
    return FT_LR if VARIANTS[variant].policy == "ft" else USUAL_LR


def drawn_run(h: float, seed: int, policy: str, overrides: Sequence[str]) -> tuple[RunConfig, list[dict[str, float]]]:
    """The run of one draw of budgets, with :data:`JOB`, and the clients' budgets."""
    with tempfile.TemporaryDirectory() as name:

        def configured(clients: Sequence[Mapping[str, float]]) -> RunConfig:
            lines = [f"server: {{memory_gb: 64, tflops: {SERVER_TFLOPS}}}", "clients:"]
            for i, own in enumerate(clients):
                budget = ", ".join(f"{field}: {value:.9f}" for field, value in own.items())
                lines.append(f"  - {{name: client-{i}, latency_ms: {LATENCY_MS}, {budget}}}")
            return common.configured(Path(name), "\n".join([*lines, ""]), policy, [*JOB, *overrides])

        source = find_model(configured([{"memory_gb": 1.0, **MEAN}]).job.model)
        drawn = budgets(h, seed, mean_memory_gb(_parameters(source.directory)))
        return configured(drawn), drawn


def run_cell(
    cell: Cell, scale: Scale, data: str | None, model: str | None, console: Console, device: str = "cpu"
) -> dict[str, Any]:
    """Train, and return the result: the cell, budgets, plan, a row a round, and the cap's cut in each."""
    variant = VARIANTS[cell.variant]
    planned_rounds = scale.rounds_of(cell)
    settings = [f"job.rounds={planned_rounds}", f"job.local_steps={scale.local_steps}"]
    settings += [f"job.seed={cell.seed}", f"job.lr={cell.lr:g}"]
    settings += [f"job.model={model}"] if model else []
    settings += [f"job.data.source={data}"] if data else []
    run, drawn = drawn_run(cell.h, cell.seed, variant.policy, [*settings, *variant.overrides])
    source, inputs = common.read(run)
    found: dict[str, Any] = {
        **asdict(cell),
        "policy": variant.policy,
        "overrides": list(variant.overrides),
        "budgets": drawn,
        "device": common.device_name(device),
    }
    try:
        plan = Scheduler(run, source.spec).plan()
    except InputError as nobody:
        # The papers' device unavailability, at its worst: a result of its own.
        console.print(f"  {nobody}")
        return found | {"available": 0, "data_lost": 1.0, "rows": []}
    single = run.policy.placement == "single"
    sizes = {name: len(share or ()) for name, share in inputs.shares.items()}
    lost = sum(sizes.get(c.name, 0) for c in plan.clients if not c.available)
    found |= {"available": CLIENTS if single else len(plan.available), "data_lost": lost / sum(sizes.values())}
    judge = None
    if not single and len(plan.available) < len(plan.clients):
        rounds = math.ceil(planned_rounds * len(plan.clients) / len(plan.available))
        run = run.model_copy(update={"job": run.job.model_copy(update={"rounds": rounds})})
        # On all held-out texts, where the run itself has those of available clients only.
        judge = Judge(run, source, inputs, device)
    watch = _Curve(console, judge)
    with common.in_process(run, source.directory, inputs, watch, device=device) as (coordinator, directory):
        watch.coordinator = coordinator
        wall_s = common.seconds_of(coordinator.run)
        cuts = residual_cuts(read_events(directory.events))
    return found | {"rows": watch.figures, "plans": watch.plans, "cuts": cuts, "wall_s": wall_s}


def _parameters(model: Path) -> int:
    """Weights of a model, each once."""
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        made = AutoModelForCausalLM.from_config(ModelSpec.read(model).config, trust_remote_code=False)
    made.tie_weights()
    return sum(p.numel() for p in made.parameters())


class _Curve(SilentDisplay):
    """A display that keeps every round's figures.

    Args:
        console: where rounds are shown.
        judge: measures the perplexity instead of the run itself, where there is one.
    """

    def __init__(self, console: Console, judge: Judge | None) -> None:
        super().__init__()
        self._console, self._judge = console, judge
        self.coordinator: Coordinator | None = None
        self.figures: list[dict[str, Any]] = []
        self.plans: list[dict[str, Any]] = []

    def _perplexity(self, row: MetricsRow) -> float | None:
        if self._judge is None:
            return row.val_ppl
        assert self.coordinator is not None
        executor = self.coordinator._executor
        return self._judge.of_adapters(executor.ask(SERVER, Server.state))

    def plan(self, plan: Plan) -> None:
        parts = [(c.name, c.available, c.split, c.rank_total) for c in (plan.server, *plan.clients)]
        self.plans.append({"makespan_s": plan.makespan_s, "captured": plan.captured_importance, "parts": parts})

    def round_done(self, row: MetricsRow, *more: Any) -> None:
        if (perplexity := self._perplexity(row)) is None:
            return
        kept = {k: v for k, v in asdict(row).items() if k != "val_loss"}
        kept["ppl"] = perplexity
        self.figures.append(kept)
        self._console.print(f"  round {row.round}: perplexity {kept['ppl']:.3f}, {row.virtual_time_s:.1f} s (virtual)")


# -- the grid -------------------------------------------------------------------------------------------------------


class Cells:
    """Finished cells on disk.

    Args:
        folder: where their files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, cell: Cell) -> dict[str, Any] | None:
        path = self._folder / f"{cell.key}.json"
        return read_json(path, dict[str, Any]) if path.is_file() else None

    def keep(self, cell: Cell, found: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._folder / f"{cell.key}.json", json.dumps(found, indent=1) + "\n")

    def all(self) -> list[dict[str, Any]]:
        return [read_json(path, dict[str, Any]) for path in sorted(self._folder.glob("*.json"))]


def tuning_cells(scale: Scale) -> list[Cell]:
    """Learning rates tried, the same factors for each policy."""
    return [
        Cell(name, TUNING_LEVEL, TUNING_SEED, factor * usual_lr(name))
        for name in scale.policies
        for factor in scale.factors
    ]


def chosen_lr(cells: Cells, scale: Scale, variant: str) -> float | None:
    """Return the learning rate that ended best in tuning; ``None`` if not all have run.

    Where no client could run, for lack of memory, it is the usual one.
    """
    name = VARIANTS[variant].lr_of or variant
    if len(scale.factors) == 1:
        return usual_lr(name)
    tried = [cell for cell in tuning_cells(scale) if cell.variant == name]
    found = [cells.find(cell) for cell in tried]
    if not tried or any(result is None for result in found):
        return None
    ends = [result["rows"][-1]["ppl"] if result and result["rows"] else math.inf for result in found]
    best = min(range(len(ends)), key=ends.__getitem__)
    return usual_lr(name) if math.isinf(ends[best]) else tried[best].lr


def main_cells(cells: Cells, scale: Scale) -> list[Cell]:
    """The grid, as far as learning rates are known: headline policies first, then the others, then ablations."""
    wanted: list[tuple[str, float, int]] = []
    for name in (p for p in HEADLINE if p in scale.policies):
        # One node has all clients' data whatever they declare.
        levels = scale.levels[:1] if name == "cenlora" else scale.levels
        wanted += [(name, h, seed) for seed in scale.seeds for h in levels]
    for name in (p for p in scale.policies if p not in HEADLINE):
        levels = scale.levels[:1] if name == "ft" else scale.levels
        wanted += [(name, h, scale.seeds[0]) for h in levels]
    wanted += [(name, h, scale.seeds[0]) for h in scale.ablation_levels for name in scale.ablations]
    rates = {name: chosen_lr(cells, scale, name) for name, _, _ in wanted}
    return [Cell(name, h, seed, rate) for name, h, seed in wanted if (rate := rates[name]) is not None]


def pending(cells: Cells, scale: Scale) -> Iterable[Cell]:
    """Cells that have not run, in order; those of the grid once their learning rates are known."""
    tuned = tuning_cells(scale) if len(scale.factors) > 1 else []
    yield from (cell for cell in tuned if cells.find(cell) is None)
    yield from (cell for cell in main_cells(cells, scale) if cells.find(cell) is None)


def cost_line(cells: Cells, scale: Scale) -> str:
    """Describe the remaining cells, and their time at the pace of the finished ones."""
    tuned = len(tuning_cells(scale)) if len(scale.factors) > 1 else 0
    single = [p for p in scale.policies if p in ("cenlora", "ft")]
    headline = sum(
        len(scale.seeds) * (1 if p in single else len(scale.levels)) for p in HEADLINE if p in scale.policies
    )
    others = sum(1 if p in single else len(scale.levels) for p in scale.policies if p not in HEADLINE)
    total = tuned + headline + others + len(scale.ablations) * len(scale.ablation_levels)
    walls = [found["wall_s"] for found in cells.all() if "wall_s" in found]
    left = total - len(cells.all())
    pace = (
        f"{fmean(walls) / 60:.1f} minutes each so far, about {left * fmean(walls) / 3600:.1f} h more" if walls else ""
    )
    return f"{total} cells ({tuned} for learning rates, {headline} headline), {left} to run{': ' * bool(pace)}{pace}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and write tables, plots and the page."""
    options = _options(arguments)
    console = Console(width=140)
    scale = QUICK if options.quick else replace(Scale(), **_given(options))
    cells = Cells(options.to / "cells")
    console.print(cost_line(cells, scale))
    if not options.list and not options.report:
        begun = time.monotonic()
        # Computed again after each: finished cells decide on learning rates.
        while (cell := next(iter(pending(cells, scale)), None)) is not None:
            if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                console.print("time is up; the same command goes on from here")
                break
            console.print(cell.key)
            cells.keep(cell, run_cell(cell, scale, options.data, options.model, console, options.device))
    if not options.list:
        # Imported here, since it takes the names of the protocol from this module.
        from benchmarks import convergence_page

        header = common.header_of("convergence", arguments, "torch")
        convergence_page.write_results(options.to, cells, scale, header, console)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    names = ("rounds", "local_steps", "levels", "seeds", "policies", "ablations", "ablation_levels")
    return {name: _tuple(getattr(options, name)) for name in names if getattr(options, name) is not None}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("convergence", __doc__)
    parser.add_argument("--data", metavar="FILE", help="texts; default: the built-in generator")
    parser.add_argument("--model", help="default: the job's own")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda; default: cpu")
    parser.add_argument("--quick", action="store_true", help="three policies, two levels, one seed, few steps")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--local-steps", type=int)
    parser.add_argument("--levels", type=float, nargs="+", metavar="H")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES))
    parser.add_argument("--ablations", nargs="*", choices=list(ABLATIONS))
    parser.add_argument("--ablation-levels", type=float, nargs="+", metavar="H")
    parser.add_argument("--minutes", type=float, help="begin no further cell after so long")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--report", action="store_true", help="only tables, plots and page, from finished cells")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
