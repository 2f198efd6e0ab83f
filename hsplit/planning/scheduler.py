"""The scheduler: makes a run's plans from importance, costs and budgets. Free of Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hsplit.config import SERVER, ClientConfig, RunConfig, ServerConfig
from hsplit.errors import InputError
from hsplit.models.spec import ModelSpec
from hsplit.planning.budgets import BudgetRequest
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import ImportanceHistory, ImportanceReport, Score, equal_importance, rounded, scores
from hsplit.planning.indifference import indifferent_to_scores
from hsplit.planning.paced_plan import unread_bytes
from hsplit.planning.plan import Plan
from hsplit.planning.planner import EQUAL, check_plan, make_plan, smallest_part_bytes
from hsplit.planning.planning_state import Fleet, PlanningState, in_force

# Divisor of a holder's memory each time that it ran out of it.
_SHRINK = 1.25
# Number of smaller budgets of a server that ran out of memory that are tried, from the least, before the whole one.
_RELAXED = 6

_Holder = TypeVar("_Holder", ClientConfig, ServerConfig)


@dataclass(frozen=True)
class Review:
    """Result of the scheduler's look at a run.

    Attributes:
        plan: the plan from now on; ``None``: the plan in force stays.
        reasons: why the plan differs from the one before, in words; empty where there is none.
        importance: ``H_w`` by weight name, where a probe was made.
        state: for the next review.
    """

    plan: Plan | None
    reasons: tuple[str, ...]
    importance: dict[str, Score] | None
    state: PlanningState

    @property
    def made(self) -> Plan:
        """The plan, where there is one for certain."""
        assert self.plan is not None
        return self.plan


class Scheduler:
    """Makes the first plan, and at each round's end another one if it is due (METHOD 5).

    It keeps nothing between two calls: it gets the state of planning and returns the new one.

    Args:
        config: the run's configuration.
        model: the model; no tensor of it is read.
    """

    def __init__(self, config: RunConfig, model: ModelSpec) -> None:
        self._config = config
        self.cost = CostModel.of_run(model, config)

    # -- planning -------------------------------------------------------------------------------------------------

    def plan(self, fleet: Fleet | None = None) -> Plan:
        """Make the plan that a run begins with if all its clients are there; errors as :meth:`first`.

        Args:
            fleet: what is known of the clients' data too; by default nothing is.
        """
        return self.first(fleet or Fleet.of_run(self._config), PlanningState()).made

    def check_start(self) -> None:
        """Check that a run can have a plan, with all its clients there; no data are read yet.

        Raises:
            InputError: there is none, even if every client could do without the embedding; otherwise as :meth:`first`.
        """
        fleet, state = Fleet.of_run(self._config), PlanningState()
        clients, unread = self._clients(fleet, state), {client.name: 0 for client in fleet.clients}
        check_plan(clients, self._server(state), self.cost, self._importance(state), self._config.policy, unread)

    def first(self, fleet: Fleet, state: PlanningState) -> Review:
        """Make the first plan; no score exists yet, so all parameters have equal importance.

        Raises:
            InputError: see :func:`~hsplit.planning.planner.make_plan`.
        """
        state, reasons = self._with_shortages(fleet, state)
        made, _ = self._plan(fleet, state, self._importance(state), None, EQUAL)
        return Review(made, tuple(reasons), None, replace(state, planned=fleet.planned))

    def check(self, fleet: Fleet, state: PlanningState, requests: Sequence[BudgetRequest]) -> None:
        """Check that there is a plan for a changed fleet, before it changes.

        Args:
            fleet: after the change.
            state: the present one.
            requests: changes of budgets that hold by then.

        Raises:
            InputError: there is none: the server has no room, or no client fits.
        """
        self._plan(fleet, state.with_budgets(requests), self._importance(state), None, EQUAL)

    def review(
        self,
        round_: int,
        current: Plan,
        fleet: Fleet,
        state: PlanningState,
        reports: Sequence[ImportanceReport],
        measured_bytes: Mapping[str, int],
        requests: Sequence[BudgetRequest],
    ) -> Review:
        """Make another plan at a round's end if one is due.

        Args:
            round_: rounds done.
            current: the plan in force.
            fleet: the holders to plan for.
            state: as the last review returned it.
            reports: of the importance probe; empty where none was made.
            measured_bytes: peaks by holder name, where measured.
            requests: changes of budgets, the later winning.

        Raises:
            InputError: nothing fits the budgets any more.
        """
        policy = self._config.policy
        changes = state.changes_of(fleet)
        reasons = [*state.pending, *(change for change in changes if change not in state.pending)]
        state, found = self._heeded(current, fleet, state, measured_bytes, requests)
        reasons += found
        waited = state.probe_after
        if reports:
            state, moved = self._blended(state, round_, reports)
            reasons += moved
        importance = state.history or self._importance(state)
        probed = dict(importance) if reports else None
        if not reasons:
            return Review(None, (), probed, state)
        early = round_ - state.planned_in < policy.replan.min_rounds
        if early and not changes and self._holds(current, fleet, state):
            return Review(None, (), probed, replace(state, pending=reasons))
        source = f"probes until round {state.probed_in}" if state.probed_in else current.importance
        made, lacking = self._plan(fleet, state, importance, current, source)
        reasons += [lacking] if lacking else []
        if reports and policy.importance.back_off and made.gives_the_same_as(current):
            # Importance has moved, but no part of the plan.
            state = replace(state, probe_after=2 * waited)
        state = replace(state, pending=[], planned=fleet.planned, planned_in=round_, planned_with=dict(importance))
        return Review(made, tuple(reasons), probed, state)

    def probe_matters(
        self,
        current: Plan,
        fleet: Fleet,
        state: PlanningState,
        measured_bytes: Mapping[str, int],
        requests: Sequence[BudgetRequest],
    ) -> bool:
        """False if no scores could change a rank or a split of the next plan, so that none need be probed (METHOD 5).

        Args:
            current, fleet, state, measured_bytes, requests: as for the :meth:`review` that the probe would be for.
        """
        state, _ = self._heeded(current, fleet, state, measured_bytes, requests)
        # A server that ran out of memory is planned for with several budgets.
        return SERVER in state.shrunk or not indifferent_to_scores(
            self._clients(fleet, state), self._server(state), self.cost, self._config.policy
        )

    def clock(self, fleet: Fleet | None = None, state: PlanningState | None = None) -> VirtualClock:
        """Make the virtual clock for the budgets in force; by default for those of a run that has not begun."""
        return VirtualClock(self.cost, *self.budgets(fleet, state))

    def budgets(
        self, fleet: Fleet | None = None, state: PlanningState | None = None
    ) -> tuple[list[ClientConfig], ServerConfig]:
        """Clients and server with the declared budgets in force; by default of a run that has not begun."""
        state = state or PlanningState()
        return self._declared(fleet or Fleet.of_run(self._config), state), self._server(state)

    # -- private ---------------------------------------------------------------------------------------------------

    def _heeded(
        self,
        current: Plan,
        fleet: Fleet,
        state: PlanningState,
        measured_bytes: Mapping[str, int],
        requests: Sequence[BudgetRequest],
    ) -> tuple[PlanningState, list[str]]:
        """Take shortages, requests and overruns into the budgets; returns them as reasons for another plan."""
        policy = self._config.policy
        state, reasons = self._with_shortages(fleet, state)
        state = state.with_budgets(requests)
        for request in requests:
            new = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
            reasons.append(f"the budget of {request.holder} is now {new}")
        if policy.replan.measured and policy.placement != "single":
            # There is no other holder to give a single node's layers to.
            state, overruns = _overruns(state, current, measured_bytes)
            reasons += overruns
        return state, reasons

    def _importance(self, state: PlanningState) -> Mapping[str, Score]:
        """Scores that the plan in force was made with."""
        return state.planned_with or equal_importance(self.cost.model.weights)

    def _blended(
        self, state: PlanningState, round_: int, reports: Sequence[ImportanceReport]
    ) -> tuple[PlanningState, list[str]]:
        """Blend in a probe's scores; returns a reason for another plan if they have moved far."""
        settings, replan = self._config.policy.importance, self._config.policy.replan
        history = ImportanceHistory(self._config.job.rounds, settings.lam_0, settings.lam_min)
        history.scores = dict(state.history)
        found = scores(reports, self.cost.model.weights, settings.metric)
        history.blend(round_, {name: rounded(score) for name, score in found.items()})
        moved = history.moved(self._importance(state))
        far = replan.tau is not None and moved > replan.tau
        probe_after = 2 * state.probe_after if settings.back_off and not far else 1
        state = replace(state, history=history.scores, probed_in=round_, probe_after=probe_after)
        return state, [f"normalized importance moved by {moved:.2f} in L1"] if far else []

    def _with_shortages(self, fleet: Fleet, state: PlanningState) -> tuple[PlanningState, list[str]]:
        """Shrink the budgets of holders that have run out of memory; returns the reasons for another plan."""
        shrunk, heeded, reasons = dict(state.shrunk), dict(state.shortages), []
        for name, shortage in fleet.shortages.items():
            times = shortage.times - heeded.get(name, 0)
            if times <= 0:
                continue
            heeded[name] = shortage.times
            divisor = shrunk.get(name, 1.0) * _SHRINK**times
            declared_bytes = self._declared_bytes(name, fleet, state)
            if 0 < shortage.held_bytes <= declared_bytes / divisor:
                # It held much less than it declared, and would get the same part again.
                divisor = _SHRINK * declared_bytes / shortage.held_bytes
            shrunk[name] = divisor
            reasons.append(f"{name} ran out of memory")
        return replace(state, shrunk=shrunk, shortages=heeded), reasons

    def _declared_bytes(self, name: str, fleet: Fleet, state: PlanningState) -> float:
        """The budget in force of a client or ``server``; 0 for a client that is not known."""
        holders = {SERVER: self._server(state), **{client.name: client for client in self._declared(fleet, state)}}
        return holders[name].memory_bytes if name in holders else 0.0

    def _plan(
        self, fleet: Fleet, state: PlanningState, importance: Mapping[str, Score], current: Plan | None, source: str
    ) -> tuple[Plan, str]:
        """Make a plan in which holders that ran out of memory hold less, the server as little as there is a plan for.

        Returns:
            The plan, and why the server has no smaller part in it; empty if it has, or ran out of no memory.

        Raises:
            InputError: there is none by the budgets in force.
        """
        server, clients = self._server(state), self._clients(fleet, state)
        shrunk, lacking = state.shrunk.get(SERVER, 1.0), ""
        for divisor in dict.fromkeys([*(max(1.0, shrunk / _SHRINK**i) for i in range(_RELAXED)), 1.0]):
            try:
                policy, budget = self._config.policy, _divided(server, divisor)
                cost = self.cost.for_server(budget, len(clients))
                made = make_plan(
                    clients,
                    budget,
                    cost,
                    importance,
                    policy,
                    current,
                    source,
                    vocabulary=fleet.vocabulary,
                    examples=fleet.examples,
                )
                return replace(made, waits=cost.waits or not cost.pace.residual_wait), lacking
            except InputError as error:
                if divisor == 1.0:
                    raise
                # A run without a plan is worse than one that may run out of memory: try with more, and report it.
                lacking = lacking or f"there is no plan with so little ({error})"
        raise AssertionError("the budgets as they are come last")

    def _server(self, state: PlanningState) -> ServerConfig:
        """The server with the budget in force."""
        return self._config.server.changed(state.budgets.get(SERVER, {}))

    def _clients(self, fleet: Fleet, state: PlanningState) -> list[ClientConfig]:
        """The clients to plan for, with the budgets in force, less what measurements and shortages took off them.

        A client that was short of memory keeps enough for the smallest part: without any it would be of no use.
        """
        least_bytes = smallest_part_bytes(self.cost, self._config.policy) if state.shrunk else 0
        clients, declared = [], self._declared(fleet, state)
        unread = unread_bytes(self.cost, declared, fleet.vocabulary) if state.shrunk else [0.0] * len(declared)
        for client, unread_here in zip(declared, unread, strict=True):
            if client.name in fleet.aside | fleet.left:
                continue
            budget = _divided(client, state.excess.get(client.name, 1.0))
            shrunk = state.shrunk.get(client.name, 1.0)
            if shrunk > 1:
                most = budget.memory_bytes / (least_bytes - unread_here)
                budget = _divided(budget, min(shrunk, max(1.0, most)))
            clients.append(budget)
        return clients

    def _declared(self, fleet: Fleet, state: PlanningState) -> list[ClientConfig]:
        if self._config.policy.placement == "single":
            # The one node is the server's, and has what the aggregator beside it leaves.
            server = self._server(state)
            (node,) = self._config.model_copy(update={"server": server}).participants
            left = server.memory_bytes - self.cost.server_bytes([self.cost.model.layers], {})
            return [node.changed({"memory_gb": max(left, 0) / 1e9})]
        return in_force(fleet.clients, state)

    def _holds(self, current: Plan, fleet: Fleet, state: PlanningState) -> bool:
        """True if all holders still fit their parts of ``current``."""
        budgets = {client.name: client.memory_bytes for client in self._clients(fleet, state)}
        budgets |= dict.fromkeys(fleet.aside | fleet.left, 0)
        budgets[SERVER] = _divided(self._server(state), state.shrunk.get(SERVER, 1.0)).memory_bytes
        return all(budgets[part.name] >= part.predicted_bytes for part in (current.server, *current.available))


def _overruns(
    state: PlanningState, current: Plan, measured_bytes: Mapping[str, int]
) -> tuple[PlanningState, list[str]]:
    """Note clients that took more memory than they declared; returns the reasons for another plan."""
    excess, found = dict(state.excess), []
    for part in current.available:
        measured = measured_bytes.get(part.name, 0)
        if measured > part.declared_bytes:
            excess[part.name] = max(excess.get(part.name, 1.0), measured / part.predicted_bytes)
            over_mb = (measured - part.declared_bytes) / 1e6
            found.append(f"{part.name} took {measured / 1e6:.1f} MB, {over_mb:.1f} more than it declared")
    return replace(state, excess=excess), found


def _divided(holder: _Holder, divisor: float) -> _Holder:
    """``holder`` with its memory divided by ``divisor``, if that is more than 1."""
    return holder.changed({"memory_gb": holder.memory_gb / divisor}) if divisor > 1 else holder
