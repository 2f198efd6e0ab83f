"""Every policy of the papers on one cluster and the same number of tokens (METHOD 7).

    hsplit bench policies [--cluster hetero] [--policies NAME ...] [--set KEY=VALUE ...] [--to FOLDER]

Runs in this process, without Ray, with the product's coordinator, clients, server and scheduler. A policy under which
clients are unavailable trains fewer clients a step; it gets as many more local steps a round as make up for that, so
that all policies see about the same number of tokens, which the table shows. The clients' own validation depends on
their availability; compare the last column's perplexity: the final model on all clients' held-out examples, computed
on the run's base without a split.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import common
from benchmarks.common import Table
from hsplit.actors.whole_client import WholeClient
from hsplit.config import SERVER, Policy, RunConfig, load_run_config
from hsplit.config.cluster import CENTRAL
from hsplit.lora.holder import RoundUpdate
from hsplit.lora.learned import WEIGHT, learned, of_kind
from hsplit.lora.residual import ResidualUpdate
from hsplit.models.lookup import ModelSource
from hsplit.models.segment import BaseModel
from hsplit.observe.observer import SilentDisplay
from hsplit.observe.tables import MetricsRow, perplexities
from hsplit.observe.wording import figure_text
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.scheduler import Scheduler
from hsplit.run.checkpoint import latest_checkpoint, read_checkpoint
from hsplit.run.coordinator import Inputs
from hsplit.run.inputs import resolved_config
from hsplit.run_directory import RunDirectory

POLICIES = (
    *("hsplitlora", "splitlora", "hetlora", "fedlora", "flora", "flexlora", "raflora", "florist", "fed-plora"),
    *("cenlora", "ft"),
)
# Full fine-tuning diverges at LoRA's learning rates.
FT_LR = 5e-5


@dataclass(frozen=True)
class Row:
    """One policy's run.

    Attributes:
        policy: its name.
        dtype: of the computations.
        lr: learning rate.
        steps: optimizer steps.
        tokens: supervised tokens trained on.
        available, clients: clients that took part; declared ones. A single node counts for all: it has their data.
        data_lost: part of the examples that belong to unavailable clients.
        captured_importance: of the last plan.
        client_mb: largest predicted peak of a participant, MB.
        bytes_up_mb, bytes_down_mb: sent over the whole run, validation included, MB.
        virtual_time_s: at the declared budgets (virtual).
        wall_time_s: in this process.
        val_ppl: final perplexity as the run itself reports it, on the available clients' held-out examples.
        ppl: perplexity of the final model on all clients' held-out examples.
    """

    policy: str
    dtype: str
    lr: float
    steps: int
    tokens: int
    available: int
    clients: int
    data_lost: float
    captured_importance: float
    client_mb: float
    bytes_up_mb: float
    bytes_down_mb: float
    virtual_time_s: float
    wall_time_s: float
    val_ppl: float
    ppl: float


class _Quiet(SilentDisplay):
    """A display of a run's notes, and nothing else."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.plans: list[Plan] = []

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def round_done(self, row: MetricsRow, *more: Any) -> None:
        super().round_done(row, *more)
        self._console.print(
            f"  round {row.round}: validation perplexity {figure_text(row.val_ppl)}, {row.tokens:,} tokens"
        )

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._console.print(f"  {text}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the policies and write ``policies.csv`` and ``policies.md``."""
    parser = common.flags_of("policies", __doc__)
    parser.add_argument("--cluster", default="hetero")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="NAME")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ft-lr", type=float, default=FT_LR, help="learning rate of full fine-tuning")
    given = parser.parse_args(arguments)
    console = Console()
    rows = []
    for name in given.policies:
        console.print(name)
        rows.append(measured(given.cluster, name, given.overrides, given.ft_lr, console))
        # After each, so that a long experiment keeps its finished rows.
        _write(given.to, rows, [given.cluster, *given.overrides])
    common.show_table(console, *_table(rows))


def measured(cluster: str, policy: str, overrides: Sequence[str], ft_lr: float, console: Console) -> Row:
    """Run one policy and measure its result."""
    run = resolved_config(load_run_config(cluster, policy, overrides))
    source, inputs = common.read(run)
    if run.policy.train == "weights":
        run = _with_job(run, lr=ft_lr)
    plan, display = Scheduler(run, source.spec).plan(), _Quiet(console)
    if run.policy.placement == "full":
        more = len(plan.clients) / len(plan.available)
        run = _with_job(run, local_steps=round(run.job.local_steps * more))
    with common.in_process(run, source.directory, inputs, display) as (coordinator, directory):
        begun = time.monotonic()
        coordinator.run()
        wall = time.monotonic() - begun
        perplexity = final_perplexity(run, source, inputs, directory)
    last, final_plan = display.rows[-1], display.plans[-1]
    sizes = {name: len(share or ()) for name, share in inputs.shares.items()}
    lost = sum(sizes.get(c.name, 0) for c in final_plan.clients if not c.available)
    single = run.policy.placement == "single"
    return Row(
        policy=policy,
        dtype=run.job.dtype,
        lr=run.job.lr,
        steps=last.step,
        tokens=last.tokens,
        available=len(run.clients) if single else last.available_clients,
        clients=len(run.clients),
        data_lost=lost / sum(sizes.values()),
        captured_importance=last.captured_importance,
        client_mb=max(c.predicted_bytes for c in final_plan.available) / 1e6,
        bytes_up_mb=sum(row.bytes_up for row in display.rows) / 1e6,
        bytes_down_mb=sum(row.bytes_down for row in display.rows) / 1e6,
        virtual_time_s=last.virtual_time_s,
        wall_time_s=wall,
        val_ppl=perplexities(display.rows)[-1][1],
        ppl=perplexity,
    )


def final_perplexity(run: RunConfig, source: ModelSource, inputs: Inputs, directory: RunDirectory) -> float:
    """Return the perplexity of the run's last checkpoint on every client's held-out examples."""
    checkpoint, _ = latest_checkpoint(directory.checkpoints)
    _, tensors = read_checkpoint(checkpoint)
    judge = Judge(run, source, inputs)
    if run.policy.train == "weights":
        return judge.of_weights(tensors[CENTRAL])
    return judge.of_adapters(tensors[SERVER])


class Judge:
    """Measures models of a run on every client's held-out examples, on the run's base without a split.

    Args:
        run, source, inputs: the run's settings, its model and all clients' data.
        device: where to compute.
    """

    def __init__(self, run: RunConfig, source: ModelSource, inputs: Inputs, device: str = "cpu") -> None:
        policy = run.policy if run.policy.train == "weights" else Policy(placement="single", aggregation="none")
        base = BaseModel.of_job(source.spec, run.job)
        self._whole = WholeClient(CENTRAL, run.job, policy, base, device, measure=False)
        self._whole.load_data(inputs.shares, None)
        self._whole.configure(HolderPlan("judge", "client", True, source.spec.layers))
        self._batches = len(self._whole.data.validation)

    def of_adapters(self, server: Mapping[str, Tensor]) -> float:
        """Return the perplexity of adapters, from the server's state after an aggregation."""
        terms = {name: ResidualUpdate(0, term) for name, term in learned(server).items()}
        self._whole.restart(RoundUpdate(0, terms, {}))
        return self._perplexity()

    def of_weights(self, node: Mapping[str, Tensor]) -> float:
        """Perplexity of the weights in the state of a single node that trains them."""
        assert of_kind(WEIGHT, node)
        self._whole.resume_state(dict(node), RoundUpdate(0, {}, {}))
        return self._perplexity()

    def _perplexity(self) -> float:
        losses = [self._whole.validate(index) for index in range(self._batches)]
        return math.exp(sum(loss.loss_sum for loss in losses) / sum(loss.tokens for loss in losses))


def _with_job(run: RunConfig, **changes: Any) -> RunConfig:
    return run.model_copy(update={"job": run.job.model_copy(update=changes)})


COLUMNS = {
    "policy": "policy",
    "ppl": "perplexity, everybody's data",
    "val_ppl": "perplexity, own report",
    "tokens": "tokens",
    "steps": "steps",
    "lr": "lr",
    "available": "clients available",
    "data_lost": "data lost",
    "captured_importance": "captured importance",
    "client_mb": "client memory, MB (predicted)",
    "bytes_up_mb": "MB up",
    "bytes_down_mb": "MB down",
    "virtual_time_s": "s (virtual)",
}


def _cells(row: Row) -> list[str]:
    shown = {
        **{key: str(value) for key, value in asdict(row).items()},
        "ppl": f"{row.ppl:.3f}",
        "val_ppl": f"{row.val_ppl:.3f}",
        "tokens": f"{row.tokens:,}",
        "lr": f"{row.lr:g}",
        "available": f"{row.available} of {row.clients}",
        "data_lost": f"{row.data_lost:.0%}",
        "captured_importance": f"{row.captured_importance:.2f}",
        "client_mb": f"{row.client_mb:.0f}",
        "bytes_up_mb": f"{row.bytes_up_mb:.1f}",
        "bytes_down_mb": f"{row.bytes_down_mb:.1f}",
        "virtual_time_s": f"{row.virtual_time_s:.0f}",
    }
    return [shown[key] for key in COLUMNS]


def _table(rows: Sequence[Row]) -> Table:
    return list(COLUMNS.values()), [_cells(row) for row in rows]


def _write(out: Path, rows: Sequence[Row], setting: Sequence[str]) -> None:
    common.write_rows(out / "policies.csv", rows, {})
    told = (
        f"`hsplit bench policies --cluster {setting[0]}{''.join(f' --set {o}' for o in setting[1:])}`,"
        f" computed in {rows[0].dtype}, torch {torch.__version__} on a CPU. One seed: differences of a few hundredths"
        " mean nothing."
    )
    (out / "policies.md").write_text(f"{told}\n\n{common.markdown_table(*_table(rows))}")


if __name__ == "__main__":
    main()
