"""Rounds of a simulated run, in the order of :mod:`hsplit.run.coordinator`, timed by the virtual clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from hsplit.config import SERVER, RunConfig
from hsplit.errors import InputError
from hsplit.planning.budgets import BudgetRequest
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.counted_model import prefix
from hsplit.planning.cost.serving import drawn_cohort
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.planning_state import Fleet, PlanningState
from hsplit.planning.scheduler import Scheduler
from hsplit.simulation.fleet import Traffic, links


@dataclass(frozen=True)
class Round:
    """One simulated round. All seconds are virtual; bytes are of full batches, and of residuals at their cap.

    Attributes:
        round: counted from 1; 0 is the validation before training.
        present, training: number of present clients, and of those that train.
        virtual_time_s: since the run's start.
        train_virtual_time_s: of that, without the validations.
        round_s: of the whole round.
        step_s: of one local step.
        steps_s, aggregation_s, validation_s, probe_s, replanning_s: parts of ``round_s``.
        server_share: the server's part of a local step, 0 to 1.
        bottleneck: largest part of a local step: ``server``, or ``compute`` or ``link`` of the slowest clients.
        holder: the bottleneck's holder.
        bytes_up, bytes_down: from and to all clients.
    """

    round: int
    present: int
    training: int
    virtual_time_s: float
    round_s: float
    step_s: float
    steps_s: float
    aggregation_s: float
    validation_s: float
    probe_s: float
    replanning_s: float
    server_share: float
    bottleneck: str
    holder: str
    bytes_up: int
    bytes_down: int
    train_virtual_time_s: float


@dataclass(frozen=True)
class Simulated:
    """A simulated run.

    Attributes:
        plan: the first plan.
        rounds: from round 0 on.
        plans: number of plans made.
    """

    plan: Plan
    rounds: tuple[Round, ...]
    plans: int


def simulated(
    run: RunConfig,
    scheduler: Scheduler,
    rounds: int,
    traffic: Traffic | None = None,
    validation_batches: Mapping[str, int] | None = None,
) -> Simulated:
    """Simulate the rounds of a run without training.

    Absent clients are lost, as in a run: the plan stays, the others continue, and they return with their part. Budgets
    change by the cluster file's ``schedule``, and the scheduler replans for them. Importance stays equal, since nothing
    is learned, so it causes no new plan.

    Args:
        run: resolved configuration, with a concrete ``job.dtype``.
        scheduler: of this run, fresh.
        rounds: number of rounds.
        traffic: lost clients and links; by default all are present, with declared links.
        validation_batches: number by client; by default those of ``job.validation.max_examples`` examples.

    Raises:
        InputError: there is no plan, or a round has no client.
    """
    if run.policy.placement == "single":
        raise InputError("policy: placement: 'single' has one node and nothing to simulate; choose another policy")
    return _Simulation(run, scheduler, traffic or Traffic(), validation_batches).simulated(rounds)


class _Simulation:
    def __init__(
        self, run: RunConfig, scheduler: Scheduler, traffic: Traffic, batches: Mapping[str, int] | None
    ) -> None:
        self._run, self._job, self._scheduler, self._traffic = run, run.job, scheduler, traffic
        self._batches, self._exchange = batches, _Exchange(run, scheduler)
        self._each = math.ceil(run.job.validation.max_examples / run.job.batch_size)
        self._scheduled = [
            (change.round, BudgetRequest(name, change.values()))
            for name, holder in [(SERVER, run.server), *((c.name, c) for c in run.clients)]
            for change in holder.schedule
        ]
        self._time_s = self._validation_s = 0.0

    def simulated(self, rounds: int) -> Simulated:
        fleet, state = Fleet.of_run(self._run), PlanningState()
        begun = self._scheduler.first(fleet, state)
        plan = first = begun.made
        state = begun.state
        clients, server = self._scheduler.budgets(fleet, state)
        done: list[Round] = []
        plans = 1
        available = {client.name for client in plan.available}
        before = {client.name for client in plan.available}
        for round_, links_now in enumerate(islice(links(clients, self._traffic, self._job.seed), rounds), 1):
            here = [c.name for c, there in zip(clients, links_now.present.tolist(), strict=True) if there]
            clock = VirtualClock(self._scheduler.cost, links_now.budgets(clients), server)
            if round_ == 1:
                done.append(self._start(clock, plan, [name for name in here if name in available]))
            probe_s = replanning_s = 0.0
            down = 0
            if round_ > 1:
                requests = [request for when, request in self._scheduled if when == round_]
                probed = drawn_cohort([n for n in here if n in available], self._job.seed, round_, self._most)
                probes = self._run.policy.probes and self._scheduler.probe_matters(plan, fleet, state, {}, requests)
                if probes and probed:
                    watched = self._run.policy.placement == "split"
                    seconds = clock.watched_s if watched else clock.probe_s
                    probe_s = seconds(plan, self._run.policy.importance.tokens, probed)
                review = self._scheduler.review(round_ - 1, plan, fleet, state, (), {}, requests)
                state = review.state
                if requests:
                    clients, server = self._scheduler.budgets(fleet, state)
                    clock = VirtualClock(self._scheduler.cost, links_now.budgets(clients), server)
                if review.plan is not None:
                    moved = self._exchange.moved(plan, review.plan, here)
                    replanning_s, down = clock.reconfiguration_s(plan, review.plan, moved), sum(moved.values())
                    plan, plans = review.plan, plans + 1
                    available = {client.name for client in plan.available}
            present = [name for name in here if name in available]
            if not present:
                raise InputError(f"round {round_}: no client is there; lower --leave, or raise --return")
            returned = self._exchange.whole(plan, [name for name in present if name not in before])
            validated = self._validated(present) if self._validates(round_, rounds) else {}
            done.append(self._round(round_, clock, plan, present, validated, probe_s, replanning_s, down + returned))
            before = set(present)
        return Simulated(first, tuple(done), plans)

    @property
    def _most(self) -> int | None:
        return self._job.clients_per_round

    def _start(self, clock: VirtualClock, plan: Plan, present: Sequence[str]) -> Round:
        validation_s = clock.validation_s(plan, self._validated(present))
        return self._row(0, clock, plan, present, present, validation_s=validation_s)

    def _round(
        self,
        round_: int,
        clock: VirtualClock,
        plan: Plan,
        present: Sequence[str],
        validated: Mapping[str, int],
        probe_s: float,
        replanning_s: float,
        down: int,
    ) -> Round:
        job, cohort = self._job, drawn_cohort(present, self._job.seed, round_, self._most)
        each_s = clock.steps_s(plan, cohort, (round_ - 1) * job.local_steps)
        ups, downs = self._exchange.aggregated(plan, cohort, present)
        finished = clock.finished_s(plan, cohort, (round_ - 1) * job.local_steps)
        aggregation_s = clock.aggregation_s(plan, self._run.policy, ups, downs, cohort, finished)
        validation_s = clock.validation_s(plan, validated)
        sent, received = self._step_bytes(round_, plan, cohort)
        return self._row(
            round_,
            clock,
            plan,
            present,
            cohort,
            each_s=each_s,
            aggregation_s=aggregation_s,
            validation_s=validation_s,
            probe_s=probe_s,
            replanning_s=replanning_s,
            bytes_up=sent + sum(ups.values()),
            bytes_down=received + sum(downs.values()) + down,
        )

    def _step_bytes(self, round_: int, plan: Plan, cohort: Sequence[str]) -> tuple[int, int]:
        """Bytes of all messages of a round's local steps, from the clients and to them, each in its own format."""
        job, model, training = self._job, self._scheduler.cost.model, set(cohort)
        first = (round_ - 1) * job.local_steps
        sent = received = 0
        for part in plan.available:
            if part.name in training:
                wire = model.wire_bytes(part.split or 0, part.wire, part.rows or job.batch_size)
                batches = job.grad_accumulation * part.turns(first, first + job.local_steps)
                sent += batches * wire.to_server
                # No gradient comes back to forward-only clients.
                received += batches * (wire.deep + (0 if part.forward_only else wire.down))
        return sent, received

    def _row(
        self,
        round_: int,
        clock: VirtualClock,
        plan: Plan,
        present: Sequence[str],
        cohort: Sequence[str],
        *,
        each_s: Sequence[float] = (),
        aggregation_s: float = 0.0,
        validation_s: float = 0.0,
        probe_s: float = 0.0,
        replanning_s: float = 0.0,
        bytes_up: int = 0,
        bytes_down: int = 0,
    ) -> Round:
        # Added in the order of a run, for the same rounding.
        for seconds in (probe_s, replanning_s, *each_s):
            self._time_s += seconds
        self._time_s += aggregation_s
        self._time_s += validation_s
        self._validation_s += validation_s
        waits = clock.waits_s(plan, cohort)
        bottleneck = max(waits, key=lambda what: waits[what][1])
        return Round(
            round=round_,
            present=len(present),
            training=len(cohort) if round_ else 0,
            virtual_time_s=self._time_s,
            round_s=probe_s + replanning_s + sum(each_s) + aggregation_s + validation_s,
            step_s=each_s[-1] if each_s else 0.0,
            steps_s=sum(each_s),
            aggregation_s=aggregation_s,
            validation_s=validation_s,
            probe_s=probe_s,
            replanning_s=replanning_s,
            server_share=waits["server"][1] / sum(seconds for _, seconds in waits.values()),
            bottleneck=bottleneck,
            holder=waits[bottleneck][0],
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            train_virtual_time_s=self._time_s - self._validation_s,
        )

    def _validates(self, round_: int, rounds: int) -> bool:
        return round_ % self._job.validation.every == 0 or round_ == rounds

    def _validated(self, present: Sequence[str]) -> dict[str, int]:
        if self._batches is None:
            return dict.fromkeys(present, self._each)
        return {name: self._batches[name] for name in present}


class _Exchange:
    """Bytes of a round's end: exact for adapters, with the residual at its cap, which it reaches in a few rounds."""

    def __init__(self, run: RunConfig, scheduler: Scheduler) -> None:
        model = scheduler.cost.model
        self._model = model
        # Random restarts are drawn by each holder itself.
        self._restarts = run.policy.reinit != "random" or not model.keeps_residual
        self._residual = prefix(model.by_layer(model.residual_itemsize * model.residual_entries)).tolist()
        self._adapters: dict[int, int] = {}
        # Kept, so that no later mapping gets the id() of a freed one.
        self._kept: list[Mapping[str, int]] = []
        self._parts: dict[str, HolderPlan] = {}
        self._of: Plan | None = None

    def aggregated(
        self, plan: Plan, cohort: Iterable[str], present: Iterable[str]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes up from the training clients, and down to all present ones, by client name."""
        return {n: self._up(plan, n) for n in cohort}, {n: self._down(plan, n) for n in present}

    def moved(self, before: Plan, after: Plan, present: Iterable[str]) -> dict[str, int]:
        """Bytes down to the clients whose part a new plan changes."""
        had = {c.name: (c.split, c.ranks) for c in before.available}
        here = set(present)
        changed = [c.name for c in after.available if c.name in here and had.get(c.name) != (c.split, c.ranks)]
        return {name: self._down(after, name) for name in changed}

    def whole(self, plan: Plan, names: Iterable[str]) -> int:
        """Bytes down to clients that return."""
        return sum(self._down(plan, name) for name in names)

    def _up(self, plan: Plan, name: str) -> int:
        ranks = self._part(plan, name).ranks
        if id(ranks) not in self._adapters:
            self._kept.append(ranks)
            entries = int(self._model.rank_vector(ranks) @ self._model.sides)
            self._adapters[id(ranks)] = self._model.sent_itemsize * entries
        return self._adapters[id(ranks)]

    def _down(self, plan: Plan, name: str) -> int:
        restart = self._up(plan, name) if self._restarts else 0
        return restart + round(self._residual[self._part(plan, name).split or 0])

    def _part(self, plan: Plan, name: str) -> HolderPlan:
        if self._of is not plan:
            self._of, self._parts = plan, {client.name: client for client in plan.clients}
        return self._parts[name]
