"""Convergence against budget heterogeneity: the protocol of METHOD 9.

    hsplit bench convergence --data FOLDER              # or: python -m benchmarks.convergence
    hsplit bench convergence --quick                    # 15 minutes, built-in texts
    hsplit bench convergence --list                     # the runs that are left, and their time here

What is compared is fixed by a file, ``benchmarks/convergence.yaml``, whose hash is in every result. A **cell** is one
variant of a policy, one data set, one ``h``, one seed and one learning rate, run in this process by the product's own
coordinator, clients, server and scheduler. Validation perplexity is that of all clients' held-out texts after every
round, even if a policy leaves out some clients. Finished cells stay in ``cells/``, a folder for each protocol: a
stopped command continues with the next one, several at the same time share the cells out, and ``--report`` makes
tables, plots and the page of the finished cells.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from benchmarks import common
from benchmarks.policies import Judge
from benchmarks.protocol import DEFAULT, Protocol, Variant, budgets, cluster_text
from hsplit.actors.server import Server
from hsplit.config import SERVER, RunConfig
from hsplit.config.reading import read_json
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.events import read_events
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import MetricsRow, residual_cuts
from hsplit.planning.plan import Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.coordinator import Coordinator

QUICK = DEFAULT.with_name("convergence-quick.yaml")
SINGLE = ("cenlora", "ft")
"""Policies of one node with all clients' data: the same at every ``h``."""
_WAIT_S = 5.0
# Of the protocol's SHA-256, in the name of its cells' folder.
_DIGITS = 12


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        variant: its name.
        data: name of the data set.
        h: coefficient of variation of the clients' budgets.
        seed: of budgets, data and adapters.
        lr: learning rate.
    """

    variant: str
    data: str
    h: float
    seed: int
    lr: float

    @property
    def key(self) -> str:
        """Of its file."""
        name = f"{self.variant}-{self.data}-h{self.h:g}-s{self.seed}-lr{self.lr:g}"
        return name.replace(" ", "_").replace(",", "")


# -- one cell -------------------------------------------------------------------------------------------------------


def drawn_run(
    protocol: Protocol, h: float, seed: int, policy: str, changes: Sequence[str]
) -> tuple[RunConfig, list[dict[str, float]]]:
    """The run of one draw of budgets, and the clients' budgets."""
    drawn = budgets(protocol, h, seed)
    with tempfile.TemporaryDirectory() as name:
        every = [f"job.model={protocol.model}", f"job.seed={seed}", *protocol.job, *changes]
        return common.configured(Path(name), cluster_text(protocol, drawn), policy, every), drawn


def run_cell(
    protocol: Protocol,
    cell: Cell,
    variant: Variant,
    data: Sequence[str],
    console: Console,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train, and return the result: the cell, budgets, plans, a row a round, and the cap's cut in each.

    Args:
        protocol: what is fixed.
        cell, variant: what is run.
        data: changes that name the data.
        console: where rounds are shown.
        device: where to compute.
    """
    planned = protocol.rates.rounds if cell.seed == protocol.rates.seed else protocol.rounds
    length = [f"job.rounds={planned}", f"job.local_steps={protocol.local_steps}", f"job.lr={cell.lr:g}"]
    run, drawn = drawn_run(protocol, cell.h, cell.seed, variant.policy, [*length, *data, *variant.changes])
    source, inputs = common.read(run)
    found: dict[str, Any] = {
        **asdict(cell),
        "protocol": protocol.sha256,
        "policy": variant.policy,
        "changes": list(variant.changes),
        # As they were then: a file of policies/ may change.
        "settings": run.policy.model_dump(mode="json"),
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
    taking_part = len(run.clients) if single else len(plan.available)
    found |= {"available": taking_part, "data_lost": lost / sum(sizes.values())}
    judge = None
    if not single and len(plan.available) < len(plan.clients):
        rounds = math.ceil(planned * len(plan.clients) / len(plan.available))
        run = run.model_copy(update={"job": run.job.model_copy(update={"rounds": rounds})})
        # On all held-out texts, where the run itself has those of available clients only.
        judge = Judge(run, source, inputs, device)
    watch = _Curve(console, judge)
    with common.in_process(run, source.directory, inputs, watch, device=device) as (coordinator, directory):
        watch.coordinator = coordinator
        wall_s = common.seconds_of(coordinator.run)
        cuts = residual_cuts(read_events(directory.events))
    return found | {"rows": watch.figures, "plans": watch.plans, "cuts": cuts, "wall_s": wall_s}


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
        parts = [
            (part.name, part.available, part.split, part.rank_total, part.rows, part.every, part.stored, part.wire)
            for part in (plan.server, *plan.clients)
        ]
        speed = None if plan.speed is None else plan.speed.share
        made = {"makespan_s": plan.makespan_s, "captured": plan.captured_importance, "of_bound": speed}
        self.plans.append(made | {"parts": parts})

    def round_done(self, row: MetricsRow, *more: Any) -> None:
        if (perplexity := self._perplexity(row)) is None:
            return
        kept = {k: v for k, v in asdict(row).items() if k != "val_loss"}
        kept["ppl"] = perplexity
        self.figures.append(kept)
        shown = f"  round {row.round}: perplexity {perplexity:.3f}, {row.train_virtual_time_s:.1f} s (virtual)"
        self._console.print(shown)


# -- the grid -------------------------------------------------------------------------------------------------------


class Cells:
    """Finished cells of one protocol on disk.

    Args:
        folder: where their files are.
        protocol: theirs.
    """

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self.protocol, self._folder = protocol, folder / protocol.sha256[:_DIGITS]

    def find(self, cell: Cell) -> dict[str, Any] | None:
        path = self._folder / f"{cell.key}.json"
        return read_json(path, dict[str, Any]) if path.is_file() else None

    def keep(self, cell: Cell, found: Mapping[str, Any]) -> None:
        write_text_atomically(self._folder / f"{cell.key}.json", json.dumps(found, indent=1) + "\n")

    def all(self) -> list[dict[str, Any]]:
        found = [read_json(path, dict[str, Any]) for path in sorted(self._folder.glob("*.json"))]
        return [cell for cell in found if cell["protocol"] == self.protocol.sha256]

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Claim a cell until the block, or this process, ends; false where another process has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{cell.key}.claim"
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                # Another process may have finished it before the claim.
                yield self.find(cell) is None
            finally:
                path.unlink(missing_ok=True)


def usual_lr(protocol: Protocol, policy: str) -> float:
    """Return the centre of the tuned learning rates."""
    return protocol.rates.weights if policy == "ft" else protocol.rates.usual


def tuned_variants(protocol: Protocol) -> dict[str, Variant]:
    """Find the variants whose rates are tuned, on the main data set, by name."""
    every = [protocol.variant(name, part) for part, own in protocol.parts.items() for name in own.variants]
    return {one.name: one for one in every if one.rate_of == one.name and one.data == protocol.main_data}


def tuned_at(protocol: Protocol, policy: str, h: float) -> float:
    """Return the ``h`` at which the rate for a policy at ``h`` is tuned."""
    return protocol.levels[0] if policy in SINGLE else h


def tuning(cells: Cells, name: str, h: float) -> tuple[float | None, list[Cell]]:
    """Return the learning rate of a variant at ``h`` that ended best, or the cells that have to run first.

    Where no client could run, for lack of memory, it is the usual one.
    """
    protocol = cells.protocol
    variant, rates = tuned_variants(protocol)[name], protocol.rates
    usual, factors, h = usual_lr(protocol, variant.policy), list(rates.factors), tuned_at(protocol, variant.policy, h)
    if len(factors) == 1:
        return usual * factors[0], []
    for extended in range(rates.beyond + 1):
        tried = [Cell(name, variant.data, h, rates.seed, usual * factor) for factor in factors]
        found = [cells.find(cell) for cell in tried]
        missing = [cell for cell, one in zip(tried, found, strict=True) if one is None]
        if missing:
            return None, missing
        ends = [one["rows"][-1]["ppl"] if one and one["rows"] else math.inf for one in found]
        best = min(range(len(ends)), key=ends.__getitem__)
        if math.isinf(ends[best]):
            return usual, []
        if 0 < best < len(factors) - 1 or extended == rates.beyond:
            return tried[best].lr, []
        factors = [factors[0] / 2, *factors] if best == 0 else [*factors, 2 * factors[-1]]
    raise AssertionError("the last extension returns")


@dataclass(frozen=True)
class Wanted:
    """A run of a part, without its rate.

    Attributes:
        part: name of the part.
        variant: what is run.
        h, seed: see :class:`Cell`.
    """

    part: str
    variant: Variant
    h: float
    seed: int


def wanted(protocol: Protocol, parts: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Wanted]:
    """List the runs in their order: part by part, seed by seed.

    Args:
        protocol: what is fixed.
        parts, seeds: the only ones; all by default.
    """
    found = []
    for part, own in protocol.parts.items():
        for seed in own.seeds:
            if (parts and part not in parts) or (seeds and seed not in seeds):
                continue
            for name in own.variants:
                variant = protocol.variant(name, part)
                levels = own.levels or protocol.levels
                found += [Wanted(part, variant, h, seed) for h in levels[: 1 if variant.policy in SINGLE else None]]
    return found


def pending(cells: Cells, every: Sequence[Wanted]) -> list[tuple[Cell, Variant]]:
    """List the runs that are left and can be made now: those that a rate depends on first."""
    tuned, runs = tuned_variants(cells.protocol), dict[str, tuple[Cell, Variant]]()
    for one in every:
        lr, missing = tuning(cells, one.variant.rate_of, one.h)
        if lr is not None:
            missing = [Cell(one.variant.name, one.variant.data, one.h, one.seed, lr)]
            missing = [cell for cell in missing if cells.find(cell) is None]
        for cell in missing:
            runs.setdefault(cell.key, (cell, one.variant if lr is not None else tuned[one.variant.rate_of]))
    return list(runs.values())


def cost_line(cells: Cells, every: Sequence[Wanted]) -> str:
    """Describe the runs that are left, and their time at the pace of the finished ones."""
    protocol = cells.protocol
    rates = {(one.variant.rate_of, tuned_at(protocol, one.variant.policy, one.h)) for one in every}
    tuned = len(rates) * len(protocol.rates.factors) if len(protocol.rates.factors) > 1 else 0
    done = cells.all()
    of_rates = sum(cell["seed"] == protocol.rates.seed for cell in done)
    walls = [cell["wall_s"] for cell in done if "wall_s" in cell]
    left = len(every) - sum(is_done(cells, one) for one in every)
    hours = (left + max(tuned - of_rates, 0) * protocol.rates.rounds / protocol.rounds) * fmean(walls or [0]) / 3600
    pace = f"; {fmean(walls) / 60:.1f} minutes each so far, about {hours:.1f} h of one core more" if walls else ""
    return (
        f"protocol {protocol.sha256[:_DIGITS]}: {len(every)} runs, {left} left; at least {tuned} shorter ones for"
        f" learning rates, {of_rates} done{pace}"
    )


def is_done(cells: Cells, one: Wanted) -> bool:
    """True if a run has been made."""
    lr, _ = tuning(cells, one.variant.rate_of, one.h)
    return lr is not None and cells.find(Cell(one.variant.name, one.variant.data, one.h, one.seed, lr)) is not None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the cells that are missing, and write tables, plots and the page."""
    options = _options(arguments)
    console = Console(width=140)
    protocol = Protocol.read(QUICK if options.quick else options.protocol)
    cells = Cells(options.to / "cells", protocol)
    every = wanted(protocol, options.parts or (), options.seeds or ())
    console.print(cost_line(cells, every))
    if options.list:
        console.print("\n".join(cell.key for cell, _ in pending(cells, every)))
        return
    if not options.report:
        _run(cells, every, options, console)
    # Imported here, since it takes names from this module.
    from benchmarks import convergence_page

    header = common.header_of("convergence", arguments, "torch", "transformers")
    convergence_page.write_results(options.to, cells, header, console)


def _run(cells: Cells, every: Sequence[Wanted], options: argparse.Namespace, console: Console) -> None:
    """Run what is left; what other processes run is waited for, where a rate depends on it."""
    begun = time.monotonic()
    data = {
        name: cells.protocol.data_changes(name, options.data.expanduser().resolve())
        for name in {one.variant.data for one in every} | {cells.protocol.main_data}
    }
    # Looked up again after each: finished cells decide on learning rates.
    while left := pending(cells, every):
        for cell, variant in left:
            if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                console.print("time is up; the same command goes on from here")
                return
            with cells.claimed(cell) as mine:
                if mine:
                    console.print(cell.key)
                    made = run_cell(cells.protocol, cell, variant, data[cell.data], console, options.device)
                    cells.keep(cell, made)
                    break
        else:
            time.sleep(_WAIT_S)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.flags_of("convergence", __doc__)
    parser.add_argument("--protocol", type=Path, default=DEFAULT, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path(), metavar="FOLDER", help="of the protocol's files")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda; default: cpu")
    parser.add_argument("--quick", action="store_true", help="three policies, two levels, one seed, few steps")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these")
    parser.add_argument("--minutes", type=float, help="begin no further cell after so long")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("--report", action="store_true", help="only tables, plots and page, from finished cells")
    options = parser.parse_args(arguments)
    if options.quick and options.to == parser.get_default("to"):
        options.to = options.to.with_name("convergence-quick")
    return options


if __name__ == "__main__":
    main()
