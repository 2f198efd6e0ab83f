"""The record of a run: the files of its directory, as far as they exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hsplit.config.reading import displayed, read_json, read_yaml
from hsplit.config.section import STRICT
from hsplit.data.description import ClientShare
from hsplit.errors import InputError
from hsplit.observe.events import ROUTINE_EVENTS, plan_of, read_events
from hsplit.observe.run_list import State, last_state
from hsplit.observe.tables import LAG, MetricsRow, PlanRow, TimingRow, read_rows, residual_cuts
from hsplit.observe.wording import layer_of
from hsplit.planning.plan import Plan
from hsplit.run_directory import RunDirectory

_SHARE = TypeAdapter(ClientShare)


@dataclass(frozen=True)
class PlanHistory:
    """The scheduler's decisions, by the number of rounds done at that time (0: before any training).

    Attributes:
        plans: every plan put in force, oldest first, without mere repetitions of the plan before.
        importance: share of each weight in the sum of ``H_w`` (METHOD 3), by weight name; empty before any probe.
        reasons: for the plan of that round; the first plan has none.
    """

    plans: Mapping[int, Plan] = field(default_factory=dict)
    importance: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    reasons: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[int, ...]:
        """Numbers of rounds done at which the plan or the importance changed, in order."""
        return tuple(sorted(self.plans.keys() | self.importance.keys()))

    def plan_after(self, done: int) -> Plan | None:
        """Return the plan in force after ``done`` rounds, ``None`` if none is known."""
        made = [round for round in self.plans if round <= done]
        return self.plans[max(made)] if made else None

    def importance_after(self, done: int) -> Mapping[str, float] | None:
        """Return the shares known after ``done`` rounds, ``None`` before the first probe."""
        probed = [round for round in self.importance if round <= done]
        return self.importance[max(probed)] if probed else None


@dataclass(frozen=True)
class Holding:
    """The layers of a holder.

    Attributes:
        name: the holder's name.
        ranks: total LoRA rank of each layer it holds; None if only the split is known.
    """

    name: str
    ranks: Mapping[int, int | None]


@dataclass(frozen=True)
class RunRecord:
    """A run, as read from its directory.

    Attributes:
        name: the run's name, or its path if two runs have the same name.
        config: the resolved configuration as plain mappings, of any version.
        metrics: rows of ``metrics.csv``, round 0 first.
        plan_rows: rows of ``plan.csv``, of all its rounds.
        timing: rows of ``timing.csv``, of all its rounds; runs of older versions have none.
        history: every plan and every importance in the events.
        plan: the plan in force: the last of the history, else the newest checkpoint's; None if there is none.
        events: all but the routine ones, oldest first.
        cuts: largest part of a weight's residual that ``residual.max_rank`` cut, by round, where the events have it.
        lags: largest part of a weight's aggregated adapters that ``pace.residual_wait`` kept back, by round, likewise.
        data: how the shared data were read, in a line; empty where there are none, and for runs of older versions.
        shares: each client's part of the shared data, where it is known.
        client_tokens: supervised tokens that each client has trained on; empty for runs of older versions.
        state: ``complete``, ``running``, ``stopped``, ``failed`` or ``interrupted``.
        reason: cause of a failure; empty otherwise.
    """

    name: str
    config: Mapping[str, Any]
    metrics: tuple[MetricsRow, ...]
    plan_rows: tuple[PlanRow, ...]
    timing: tuple[TimingRow, ...]
    history: PlanHistory
    plan: Plan | None
    events: tuple[Mapping[str, Any], ...]
    cuts: Mapping[int, float] = field(default_factory=dict)
    lags: Mapping[int, float] = field(default_factory=dict)
    data: str = ""
    shares: Mapping[str, ClientShare] = field(default_factory=dict)
    client_tokens: Mapping[str, int] = field(default_factory=dict)
    state: State = "interrupted"
    reason: str = ""

    def setting(self, *keys: str) -> Any:
        """Return the value at ``keys`` of the configuration, None if there is none."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def validated(self) -> bool:
        """True if any held-out token was scored; without one, every validation loss is a plain 0."""
        return any(row.val_loss for row in self.metrics)

    @property
    def trains_weights(self) -> bool:
        """True if every weight is trained, and no adapter."""
        return bool(self.setting("policy", "train") == "weights")

    @property
    def last_plan_rows(self) -> tuple[PlanRow, ...]:
        """The rows of ``plan.csv`` of the last round in it."""
        last = max((row.round for row in self.plan_rows), default=0)
        return tuple(row for row in self.plan_rows if row.round == last)

    @property
    def rounds_done(self) -> int:
        """Number of training rounds in the tables."""
        return max([row.round for row in self.metrics] + [row.round for row in self.plan_rows], default=0)

    def clients(self) -> list[Mapping[str, Any]]:
        """Return the clients of the configuration, and those that joined later."""
        declared = self.setting("clients")
        clients = [c for c in declared if isinstance(c, Mapping)] if isinstance(declared, list) else []
        known = {client.get("name") for client in clients}
        declared_later = [e["declared"] for e in self.events if isinstance(e.get("declared"), Mapping)]
        later = {client.get("name"): client for client in declared_later}
        return [*clients, *(client for name, client in later.items() if name not in known)]

    @property
    def participants(self) -> list[str]:
        """Names of the clients that had a part in any plan."""
        planned = [client.name for plan in self.history.plans.values() for client in plan.available]
        tabled = [row.name for row in self.plan_rows if row.kind == "client" and row.available]
        newest = [] if self.plan is None else [client.name for client in self.plan.available]
        return list(dict.fromkeys([*planned, *tabled, *newest]))

    def holdings(self) -> list[Holding]:
        """Return the layers of every holder that takes part, the server last; without a plan, from the splits."""
        if (plan := self.plan) is not None:
            held = [(client, range(client.split or 0)) for client in plan.available]
            held.append((plan.server, range(plan.server.split or 0, plan.layers)))
            known = not self.trains_weights
            return [Holding(h.name, _ranks(h.ranks, own) if known else dict.fromkeys(own)) for h, own in held]
        splits = {r.name: r.split for r in self.last_plan_rows if r.split is not None and r.kind == "client"}
        deepest = max(splits.values(), default=0)
        unknown = [Holding(name, dict.fromkeys(range(split))) for name, split in splits.items()]
        # the table lacks the model's number of layers: the server's are shown up to the deepest client's
        first = [r for r in self.last_plan_rows if r.kind == "server" and r.split is not None]
        unknown += [Holding(r.name, dict.fromkeys(range(r.split or 0, deepest))) for r in first]
        return unknown


def load_run(path: str | Path) -> RunRecord:
    """Read a run's directory; files that do not exist yet count as empty.

    Raises:
        InputError: the directory is not a run, or one of its files is invalid.
    """
    directory = RunDirectory.open(path)
    config = read_yaml(directory.config)
    metrics = read_rows(directory.metrics, MetricsRow) if directory.metrics.is_file() else []
    plan_rows = read_rows(directory.plan, PlanRow) if directory.plan.is_file() else []
    timing = read_rows(directory.timing, TimingRow) if directory.timing.is_file() else []
    events = read_events(directory.events)
    history = plan_history(events)
    data, shares = _data(events)
    state, reason = last_state(events)
    rounds = config.get("job", {}).get("rounds") if isinstance(config.get("job"), Mapping) else None
    if metrics and metrics[-1].round == rounds:
        # a complete run writes its report just before its last event
        state, reason = "complete", ""
    elif state == "interrupted" and directory.is_driven:
        state = "running"
    return RunRecord(
        name=directory.name,
        config=config,
        metrics=tuple(metrics),
        plan_rows=tuple(plan_rows),
        timing=tuple(timing),
        history=history,
        plan=history.plans[max(history.plans)] if history.plans else _newest_plan(directory.checkpoints),
        events=tuple(event for event in events if event["event"] not in ROUTINE_EVENTS),
        cuts=residual_cuts(events),
        lags=residual_cuts(events, field=LAG),
        data=data,
        shares=shares,
        client_tokens=_client_tokens(events),
        state=state,
        reason=reason,
    )


def load_runs(paths: list[Path]) -> list[RunRecord]:
    """Read the runs at ``paths``, in that order, with distinct names.

    Raises:
        InputError: a path is not a run, or there is no path.
    """
    if not paths:
        raise InputError("hsplit report: give at least one run's directory, as runs/NAME")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        replace(run, name=displayed(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def _data(events: Iterable[Mapping[str, Any]]) -> tuple[str, dict[str, ClientShare]]:
    """Return what the last event about the shared data says; parts that are invalid are left out."""
    read = [event for event in events if event["event"] == "shares"]
    if not read:
        return "", {}
    shares: dict[str, ClientShare] = {}
    clients = read[-1].get("clients")
    for name, share in clients.items() if isinstance(clients, Mapping) else ():
        with suppress(ValidationError):
            shares[str(name)] = _SHARE.validate_python(share)
    return str(read[-1].get("text", "")), shares


def _client_tokens(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the counts of the last round that ended; empty if the events have none."""
    counts = [event.get("client_tokens") for event in events if event["event"] == "round"]
    last = counts[-1] if counts and isinstance(counts[-1], Mapping) else {}
    return {str(name): tokens for name, tokens in last.items() if isinstance(tokens, int)}


@dataclass(frozen=True)
class _State:
    """The part of a checkpoint's state that a report uses."""

    plan: dict[str, Any] | None = None
    __pydantic_config__ = STRICT


def _newest_plan(checkpoints: Path) -> Plan | None:
    """Return the plan of the last checkpoint with a readable one; damaged ones are skipped."""
    for state in sorted(checkpoints.glob("round-*/state.json"), reverse=True):
        try:
            plan = plan_of({"plan": read_json(state, _State).plan})
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


# -- plans and importance over the rounds ---------------------------------------------------------------------------


def plan_history(events: Iterable[Mapping[str, Any]]) -> PlanHistory:
    """Return the decisions in ``events`` (``planned``, ``importance``, ``replanned``), oldest first.

    A resumed run repeats the rounds since its checkpoint: an event replaces earlier events of its round and of later
    rounds. Invalid events are left out.
    """
    decided: dict[int, dict[str, Any]] = {}
    for event in events:
        done, kind = event.get("round"), str(event.get("event"))
        if not isinstance(done, int) or isinstance(done, bool) or done < 0 or kind not in _DECISIONS:
            continue
        if found := _DECISIONS[kind](event):
            decided = {round: known for round, known in decided.items() if round <= done}
            decided.setdefault(done, {})[kind] = found

    def of(kind: str) -> dict[int, Any]:
        return {done: known[kind] for done, known in sorted(decided.items()) if kind in known}

    plans = of("planned")
    before = dict(zip(plans, [None, *plans.values()], strict=False))
    kept = {done: plan for done, plan in plans.items() if plan != before[done]}
    return PlanHistory(kept, of("importance"), {done: why for done, why in of("replanned").items() if done in kept})


def _reasons(event: Mapping[str, Any]) -> tuple[str, ...]:
    reasons = event.get("reasons")
    return tuple(map(str, reasons)) if isinstance(reasons, list) else ()


def _shares(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of ``event`` as shares of their sum; empty if they are invalid or all 0."""
    scores = event.get("scores")
    if not isinstance(scores, Mapping):
        return {}
    # Infinite and undefined scores are text in the file; of a curve the end counts.
    sizes = {name: score[-1] if isinstance(score, list) and score else score for name, score in scores.items()}
    known = {str(name): float(size) for name, size in sizes.items() if isinstance(size, int | float)}
    total = math.fsum(score for score in known.values() if score > 0)
    return {name: max(score, 0.0) / total for name, score in known.items()} if 0 < total < math.inf else {}


_DECISIONS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "planned": plan_of,
    "importance": _shares,
    "replanned": _reasons,
}
