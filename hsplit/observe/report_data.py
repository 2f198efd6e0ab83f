"""What a report is made of: the files of a run's directory, read as far as they are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsplit.config.files import displayed, read_json, read_yaml
from hsplit.config.section import STRICT
from hsplit.errors import InputError
from hsplit.observe.events import ROUTINE_EVENTS, read_events
from hsplit.observe.metrics import MetricsRow, PlanRow, read_rows
from hsplit.observe.plan_history import PlanHistory, plan_history, plan_or_none
from hsplit.observe.residual_cuts import residual_cuts
from hsplit.observe.timing import TimingRow
from hsplit.observe.wording import layer_of
from hsplit.run_directory import RunDirectory
from hsplit.scheduling.plan import Plan


@dataclass(frozen=True)
class Holding:
    """Which layers a holder holds.

    Attributes:
        name: the holder's name.
        ranks: total LoRA rank by layer it holds; None where only the split is known.
    """

    name: str
    ranks: Mapping[int, int | None]


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it.

    Attributes:
        name: the run's name; told apart from others' by its path where two runs have the same.
        config: the resolved configuration as plain mappings, of whichever version wrote it.
        metrics: rows of ``metrics.csv``, round 0 first.
        plan_rows: rows of ``plan.csv``, of all its rounds.
        timing: rows of ``timing.csv``, of all its rounds; runs of older versions have none.
        history: every plan and every importance that the events tell of.
        plan: the plan in force: the last of the history, else the newest checkpoint's; None if there is none.
        events: all but the routine ones, oldest first.
        cuts: largest part of a weight's residual that ``residual.max_rank`` cut, by round, where the events tell.
    """

    name: str
    config: Mapping[str, Any]
    metrics: tuple[MetricsRow, ...]
    plan_rows: tuple[PlanRow, ...]
    timing: tuple[TimingRow, ...]
    history: PlanHistory
    plan: Plan | None
    events: tuple[Mapping[str, Any], ...]
    cuts: Mapping[int, float]

    def setting(self, *keys: str) -> Any:
        """The value at ``keys`` of the configuration, None if there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def last_plan_rows(self) -> tuple[PlanRow, ...]:
        """The rows of ``plan.csv`` of the last round in it."""
        last = max((row.round for row in self.plan_rows), default=0)
        return tuple(row for row in self.plan_rows if row.round == last)

    @property
    def rounds_done(self) -> int:
        """How many rounds of training the tables know of."""
        return max([row.round for row in self.metrics] + [row.round for row in self.plan_rows], default=0)

    def clients(self) -> list[Mapping[str, Any]]:
        """The clients of the configuration, and those that joined later."""
        declared = self.setting("clients")
        clients = [c for c in declared if isinstance(c, Mapping)] if isinstance(declared, list) else []
        known = {client.get("name") for client in clients}
        declared_later = [e["declared"] for e in self.events if isinstance(e.get("declared"), Mapping)]
        later = {client.get("name"): client for client in declared_later}
        return [*clients, *(client for name, client in later.items() if name not in known)]

    def holdings(self) -> list[Holding]:
        """The layers of every holder that takes part, the server last; without a plan, from the splits."""
        if self.plan is not None:
            plan = self.plan
            holdings = [Holding(c.name, _ranks(c.ranks, range(c.split or 0))) for c in plan.available]
            server = _ranks(plan.server.ranks, range(plan.server.split or 0, plan.layers))
            return [*holdings, Holding(plan.server.name, server)]
        splits = {r.name: r.split for r in self.last_plan_rows if r.split is not None and r.kind == "client"}
        deepest = max(splits.values(), default=0)
        unknown = [Holding(name, dict.fromkeys(range(split))) for name, split in splits.items()]
        # how many layers the model has is not in the table: the server's are shown as far as the deepest client's
        first = [r for r in self.last_plan_rows if r.kind == "server" and r.split is not None]
        unknown += [Holding(r.name, dict.fromkeys(range(r.split or 0, deepest))) for r in first]
        return unknown


def load_run(path: str | Path) -> RunRecord:
    """Reads a run's directory; files that are not there yet count as empty.

    Raises:
        InputError: it is no run, or one of its files is not what a run writes.
    """
    directory = RunDirectory.open(path)
    metrics = read_rows(directory.metrics, MetricsRow) if directory.metrics.is_file() else []
    plan_rows = read_rows(directory.plan, PlanRow) if directory.plan.is_file() else []
    timing = read_rows(directory.timing, TimingRow) if directory.timing.is_file() else []
    events = read_events(directory.events)
    history = plan_history(events)
    return RunRecord(
        name=directory.name,
        config=read_yaml(directory.config),
        metrics=tuple(metrics),
        plan_rows=tuple(plan_rows),
        timing=tuple(timing),
        history=history,
        plan=history.plans[max(history.plans)] if history.plans else _newest_plan(directory.checkpoints),
        events=tuple(event for event in events if event["event"] not in ROUTINE_EVENTS),
        cuts=residual_cuts(events),
    )


def load_runs(paths: list[Path]) -> list[RunRecord]:
    """The runs at ``paths``, in that order, with names that differ.

    Raises:
        InputError: a path is no run, or none is given.
    """
    if not paths:
        raise InputError("hsplit report: give at least one run's directory, as runs/NAME")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        replace(run, name=displayed(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


@dataclass(frozen=True)
class _State:
    """The part of a checkpoint's state that a report shows."""

    plan: dict[str, Any] | None = None
    __pydantic_config__ = STRICT


def _newest_plan(checkpoints: Path) -> Plan | None:
    """The plan in the last checkpoint that has a readable one; a damaged one costs only its detail."""
    for state in sorted(checkpoints.glob("round-*/state.json"), reverse=True):
        try:
            plan = plan_or_none(read_json(state, _State).plan)
        except InputError:
            continue
        if plan is not None:
            return plan
    return None


def _ranks(ranks: Mapping[str, int], layers: range) -> dict[int, int | None]:
    totals: dict[int, int | None] = dict.fromkeys(layers, 0)
    for weight, rank in ranks.items():
        layer = layer_of(weight)
        if layer is not None:
            totals[layer] = (totals.get(layer) or 0) + rank
    return totals
