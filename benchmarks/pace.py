"""Pace of a fleet: speed against what the budgets allow, and the cost of each lever in learning (METHOD 10).

    hsplit bench pace --data devset.csv              # or: python -m benchmarks.pace; both parts, hours
    hsplit bench pace --data devset.csv --only speed # a minute: plans alone
    hsplit bench pace --only learning --list         # the runs that are left

**Speed** (virtual): budgets as in ``benchmarks/convergence.yaml``, and further seeds. For each level of
heterogeneity and seed the plans of ``splitlora`` and ``hsplitlora`` without ``policy.pace`` and with all of it: seconds
of local steps for ten examples, of the exchange at a round's end beside them, the speed as a share of the bound, and
what binds. The bound is that of the plan's own stored forms and wire formats, with every client training, one example
at a time at the smallest ranks.

**Learning**: perplexity at equal tokens with and without each lever, everything else alike, on SmolLM2-135M in this
process: five clients, three seeds, at two levels of heterogeneity, and with data that differ (a Dirichlet partition)
also the worst client's perplexity. Codes on clients and own rows of the embedding change no number and are not among
the levers. Finished runs stay in ``cells/``: a stopped experiment continues with the next one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from benchmarks import common, convergence, protocol
from benchmarks.common import Table
from hsplit.config import RunConfig
from hsplit.data.local_data import LocalData
from hsplit.models.lookup import find_model
from hsplit.models.tokenizer import load_tokenizer
from hsplit.observe.observer import SilentDisplay
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import equal_importance
from hsplit.planning.planner import make_plan
from hsplit.run.inputs import read_inputs

PROTOCOL = protocol.Protocol.read(protocol.DEFAULT)
# The job of the learning runs in docs/pace.md, whose residuals have at most 8 directions.
JOB = [
    *("job.base=bf16", "job.dtype=bf16", "job.keep_checkpoints=1"),
    *("job.pipeline.microbatches=2", "job.pipeline.ahead=true"),
    *("job.rank_set=[1, 2, 4, 8]", "job.residual.max_rank=8"),
]
LEARNING = PROTOCOL.model_copy(update={"job": JOB})
LEVELS, SEEDS = PROTOCOL.levels, (0, 1, 2, *range(10, 20))
PLANNED = ("batch_size=planned", "periods=planned", "stored=planned", "embedding=own", "wire=planned")
PACED = (*PLANNED, "exchange=compute", "residual_wait=0.25", "server_step=group")
OFF = (
    *("batch_size=equal", "periods=none", "stored=dense", "embedding=whole", "wire=job", "exchange=whole"),
    *("residual_wait=0", "server_step=cycle"),
)
POLICIES = {
    "splitlora": ("splitlora", OFF),
    "splitlora, paced": ("splitlora", PACED),
    "hsplitlora, no pace": ("hsplitlora", OFF),
    "hsplitlora": ("hsplitlora", PACED),
}
LEARNING_LEVELS, LEARNING_SEEDS = (0.0, 0.9), (0, 1, 2)
NOTHING = "nothing"
LEVERS: dict[str, tuple[str, ...]] = {
    NOTHING: (),
    "everything": (
        *(f"policy.pace.{key}" for key in PLANNED),
        "policy.pace.exchange=compute",
        "policy.pace.residual_wait=0.25",
    ),
    "rows": ("policy.pace.batch_size=planned",),
    "wire int4": ("job.wire=int4",),
    "exchange as computed": ("policy.pace.exchange=compute",),
    "residual waits": ("policy.pace.residual_wait=0.25",),
    "a step a group": (
        *("policy.pace.batch_size=planned", "policy.pace.periods=planned"),
        "policy.pace.server_step=group",
    ),
    "rows, weighted by data": ("policy.pace.batch_size=planned", "policy.pace.weights=data"),
    "wire int8": ("job.wire=int8",),
    "periods": ("policy.pace.batch_size=planned", "policy.pace.periods=planned"),
    "periods, ahead": (
        *("policy.pace.batch_size=planned", "policy.pace.periods=planned"),
        "policy.pace.ahead=true",
    ),
}
DATA = {"iid": (), "dirichlet 0.1": ("job.data.partition={dirichlet: 0.1}",)}
ROUNDS, STEPS = 4, 10


@dataclass(frozen=True)
class Speed:
    """One plan; all seconds are virtual.

    Attributes:
        policy: its name in :data:`POLICIES`.
        h, seed: of the budgets.
        clients: that take part.
        ten_s: seconds of local steps for ten examples.
        exchange_s: of the round's end beside them.
        bound_s: least seconds for ten examples that the budgets allow, and ``share`` of the bound that is reached.
        binding: the holder that the speed follows from.
        captured: importance that the plan captures.
    """

    policy: str
    h: float
    seed: int
    clients: int
    ten_s: float
    exchange_s: float
    bound_s: float
    share: float
    binding: str
    captured: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the tables."""
    parser = common.flags_of("pace", __doc__)
    parser.add_argument("--data", help="CSV of the texts (E2E's development set); built-in texts by default")
    parser.add_argument("--only", choices=("speed", "learning"), help="one part")
    common.cell_flags(parser)
    parser.add_argument("--model", help="as job.model")
    parser.add_argument(
        "--objective", help="first part: policy.objective, such as '{gamma: 0.1}': speed counts for more"
    )
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args(arguments)
    console = Console(width=150)
    header = common.header_of("pace", arguments, "torch", "transformers")
    texts = []
    if options.only != "learning":
        texts.append(_speeds(options, console, header))
    if options.only != "speed":
        texts.append(_learning(options, console, header))
    if any(texts):
        common.write_markdown(options.to / "pace.md", header, [text for text in texts if text])


# -- speed ----------------------------------------------------------------------------------------------------------


def drawn(
    of: protocol.Protocol, h: float, seed: int, policy: str, overrides: Sequence[str], options: argparse.Namespace
) -> RunConfig:
    """The run of one draw of budgets."""
    own = [f"job.data.source={options.data}"] if options.data else []
    own += [f"job.model={options.model}"] if options.model else []
    run, _ = convergence.drawn_run(of, h, seed, policy, [*own, *overrides])
    return run


def _speed(name: str, h: float, seed: int, options: argparse.Namespace, known: dict[int, dict[str, int]]) -> Speed:
    """Plan one draw; ``known`` has the distinct token ids of each client by seed."""
    policy, pace = POLICIES[name]
    objective = [f"policy.objective={options.objective}"] if options.objective else []
    run = drawn(PROTOCOL, h, seed, policy, [*objective, *(f"policy.pace.{key}" for key in pace)], options)
    source = find_model(run.job.model)
    if seed not in known:
        # As clients report when they have read their texts.
        tokenizer, shares = load_tokenizer(source.directory), read_inputs(run, source).shares
        own = {client: LocalData(client, share or [], tokenizer, run.job) for client, share in shares.items()}
        known[seed] = {
            client: len({token for example in [*data.train, *data.held_out] for token in example.ids})
            for client, data in own.items()
        }
    cost = CostModel.of_run(source.spec, run)
    equal = equal_importance(cost.model.weights)
    plan = make_plan(run.clients, run.server, cost, equal, run.policy, vocabulary=known[seed])
    assert plan.speed is not None
    return Speed(
        policy=name,
        h=h,
        seed=seed,
        clients=len(plan.available),
        ten_s=10 / plan.speed.rows_per_s,
        exchange_s=10 / plan.speed.rows_per_s * plan.exchange_s / plan.makespan_s,
        bound_s=10 / plan.speed.bound_rows_per_s,
        share=plan.speed.share,
        binding=plan.speed.binding,
        captured=plan.captured_importance,
    )


def _speeds(options: argparse.Namespace, console: Console, header: Mapping[str, Any]) -> str:
    rows, known = [], dict[int, dict[str, int]]()
    for h in options.levels:
        # Equal budgets are the same for every seed.
        for seed in options.seeds if h else options.seeds[:1]:
            rows += [_speed(name, h, seed, options, known) for name in POLICIES]
            shown = ", ".join(f"{row.policy} {row.ten_s:.3f} s ({row.share:.0%})" for row in rows[-len(POLICIES) :])
            console.print(f"h {h:g}, seed {seed}: {shown}")
    common.write_rows(options.to / "speed.csv", rows, header)
    columns = ["h", "policy", "clients", "s for ten: mean", "least to most", "exchange", "share of the bound", "least"]
    cells = []
    for h in options.levels:
        for name in POLICIES:
            own = [row for row in rows if (row.h, row.policy) == (h, name)]
            seconds, shares = [row.ten_s for row in own], [row.share for row in own]
            cells.append(
                [
                    f"{h:g}",
                    name,
                    f"{statistics.fmean(row.clients for row in own):.1f}",
                    f"{statistics.fmean(seconds):.3f}",
                    f"{min(seconds):.3f} to {max(seconds):.3f}",
                    f"{statistics.fmean(row.exchange_s for row in own):.3f}",
                    f"{statistics.fmean(shares):.1%}",
                    f"{min(shares):.1%}",
                ]
            )
    table: Table = (columns, cells)
    title = f"Seconds of local steps for ten examples (virtual), {len(options.seeds)} seeds"
    common.show_table(console, *table, title=title)
    return common.titled(title, table)


# -- learning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        lever: its name in :data:`LEVERS`.
        data: its name in :data:`DATA`.
        h, seed: of budgets, data and adapters.
    """

    lever: str
    data: str
    h: float
    seed: int

    @property
    def key(self) -> str:
        """Of its file."""
        return f"{self.lever}-{self.data}-h{self.h:g}-s{self.seed}".replace(" ", "_").replace(",", "")


def cells() -> list[Cell]:
    """All runs, lever by lever: iid data at both levels, and data that differ at the first level."""
    settings = [("iid", h) for h in LEARNING_LEVELS] + [("dirichlet 0.1", LEARNING_LEVELS[0])]
    return [Cell(lever, data, h, seed) for lever in LEVERS for seed in LEARNING_SEEDS for data, h in settings]


def run_cell(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the perplexity of what was learned: everybody's, and each client's."""
    # What is learned is scored at the end, on more texts.
    length = [f"job.rounds={ROUNDS}", f"job.local_steps={STEPS}", f"job.validation.every={ROUNDS}"]
    own = [*LEVERS[cell.lever], *DATA[cell.data], *length]
    off = [f"policy.pace.{key}" for key in OFF]
    run = drawn(LEARNING, cell.h, cell.seed, "hsplitlora", [*off, "policy.freeze=never", *own], options)
    source, inputs = common.read(run)
    with common.in_process(run, source.directory, inputs, SilentDisplay()) as (coordinator, directory):
        wall_s = common.seconds_of(coordinator.run)
        rows = [asdict(row) for row in coordinator.rows]
        found = common.learned_losses(run, source.directory, coordinator, directory)
        plan = coordinator.context.plan.to_json()
    return {
        **asdict(cell),
        **common.perplexities(found),
        "rows": rows,
        "plan": plan,
        "wall_s": wall_s,
    }


def _learning(options: argparse.Namespace, console: Console, header: Mapping[str, Any]) -> str:
    every = common.finished_cells(
        cells(),
        options,
        console,
        header,
        run=lambda cell: run_cell(cell, options),
        outcome=common.said,
    )
    if not every:
        return ""
    table = _learning_table(every)
    title = f"Perplexity after {ROUNDS} rounds of {STEPS} steps, at equal tokens: mean and range over the seeds"
    common.show_table(console, *table, title=title)
    return common.titled(title, table)


def _learning_table(found: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["data", "h", "lever", "perplexity", "against nothing", "worst client", "against nothing", "seeds"]
    by = {(one["data"], one["h"], one["lever"], one["seed"]): one for one in found}
    rows = []
    for data, h in dict.fromkeys((one["data"], one["h"]) for one in found):
        for lever in LEVERS:
            pairs = [
                (by[data, h, lever, seed], by[data, h, NOTHING, seed])
                for seed in LEARNING_SEEDS
                if (data, h, lever, seed) in by and (data, h, NOTHING, seed) in by
            ]
            if not pairs:
                continue
            rows.append([data, f"{h:g}", lever, *common.against(pairs), str(len(pairs))])
    return columns, rows


if __name__ == "__main__":
    main()
