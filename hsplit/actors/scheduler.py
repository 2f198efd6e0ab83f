"""The scheduler: knows what matters, what each choice costs and who has what, and makes the plans. Ray-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hsplit.actors.executor import SERVER
from hsplit.config import Client, RunConfig, ServerSpec
from hsplit.errors import InputError
from hsplit.models.segment import model_config
from hsplit.scheduling.budgets import BudgetRequest
from hsplit.scheduling.clock import VirtualClock
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.importance import ImportanceHistory, ImportanceReport, equal_importance, scores
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.planner import EQUAL, plan, smallest_part_bytes

# How much more than planned a holder is taken to need that ran out of memory, each time.
_SHRINK = 1.25
# How many budgets of a server that ran out of memory are tried, from the least, before the whole one.
_RELAXED = 6

_Holder = TypeVar("_Holder", Client, ServerSpec)


@dataclass(frozen=True)
class Review:
    """What the scheduler found at a round's end.

    Attributes:
        plan: the plan from now on; ``None``: the plan in force stays.
        reasons: why it was planned anew, in words; empty when it was not.
        importance: ``H_w`` by weight name, where a probe was made.
    """

    plan: Plan | None
    reasons: tuple[str, ...]
    importance: dict[str, float] | None


class Scheduler:
    """Makes the first plan, and at each round's end looks whether another one is due (METHOD 5).

    Args:
        config: the run's configuration.
        directory: model directory; no tensor is read from it.
    """

    def __init__(self, config: RunConfig, directory: Path) -> None:
        self._config = config
        policy, job = config.policy, config.job
        self.cost = CostModel.of_run(model_config(directory), config)
        self._budgets: dict[str, dict[str, float]] = {}
        # By client: how much more than predicted its plans really took, at most; 1 and below never counts.
        self._excess: dict[str, float] = {}
        # Clients that are given nothing any more: set aside, or gone of their own will.
        self._aside: set[str] = set()
        self._left: set[str] = set()
        # Those who came while the run was under way.
        self._joined: dict[str, Client] = {}
        # Whether somebody has come or gone, for whom ``min_rounds`` does not wait.
        self._due = False
        # How often a client, or the server, has run out of memory, and what share of its budget it is given since: one
        # by this.
        self._shortages: dict[str, int] = {}
        self._shrunk: dict[str, float] = {}
        # Why those who ran out of memory have no smaller part in the last plan; empty if they have.
        self._lacking = ""
        # Reasons for a new plan that ``min_rounds`` has put off.
        self._pending: list[str] = []
        self._planned_in = 0
        self._planned_with: Mapping[str, float] = equal_importance(self.cost.model.weights)
        weighed = policy.importance
        self._history = ImportanceHistory(rounds=job.rounds, lam_0=weighed.lam_0, lam_min=weighed.lam_min)
        # Rounds done at the last probe (0: none yet), and how many more to do before the next.
        self._probed_in, self._probe_after = 0, 1

    # -- planning -------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The first plan; no score exists yet, so every parameter matters alike.

        Raises:
            InputError: see :func:`hsplit.scheduling.planner.plan`.
        """
        return self._plan(self._planned_with, None, EQUAL)

    def probe_due(self, round_: int) -> bool:
        """Whether importance is to be probed with ``round_`` rounds done.

        A probe takes nearly as long as a local step, and early in training importance moves most. So with
        ``importance.back_off`` the next one waits twice as many rounds each time that one was no reason for another
        plan, and is due in the next round again where it was.
        """
        return round_ >= self._probed_in + self._probe_after

    def review(
        self,
        round_: int,
        current: Plan,
        reports: Sequence[ImportanceReport],
        measured_bytes: Mapping[str, int],
        requests: Sequence[BudgetRequest],
    ) -> Review:
        """Look at a round's end whether another plan is due.

        Args:
            round_: rounds done.
            current: the plan in force.
            reports: of the importance probe; empty where none was made.
            measured_bytes: peaks by holder name, where measured.
            requests: changes of budgets, the later winning.

        Raises:
            InputError: nothing fits the budgets any more.
        """
        settings = self._config.policy.replan
        reasons = list(self._pending)
        for request in requests:
            self._budgets.setdefault(request.holder, {}).update(request.values)
            new = ", ".join(f"{field} {value:g}" for field, value in request.values.items())
            reasons.append(f"the budget of {request.holder} is now {new}")
        if settings.measured and self._config.policy.placement != "single":
            # A single node has nobody to give anything to.
            reasons += self._overruns(current, measured_bytes)
        importance = self._history.scores or self._planned_with
        if reports:
            importance = self._history.blend(
                round_, scores(reports, self.cost.model.weights, self._config.policy.importance.metric)
            )
            moved = self._history.moved(self._planned_with)
            far = settings.tau is not None and moved > settings.tau
            if far:
                reasons.append(f"normalized importance moved by {moved:.2f} in L1")
            waited, self._probed_in, self._probe_after = self._probe_after, round_, 1
            if self._config.policy.importance.back_off and not far:
                self._probe_after = 2 * waited
        probed = dict(importance) if reports else None
        if not reasons:
            return Review(None, (), probed)
        if round_ - self._planned_in < settings.min_rounds and not self._due and self._holds(current):
            self._pending = reasons
            return Review(None, (), probed)
        probed_until = f"probes until round {self._probed_in}" if self._probed_in else current.importance
        made = self._plan(importance, current, probed_until)
        self._pending, self._planned_in, self._planned_with = [], round_, dict(importance)
        self._due = False
        reasons += [self._lacking] if self._lacking else []
        if reports and self._config.policy.importance.back_off and made.gives_the_same_as(current):
            # Importance has moved, and nobody with it.
            self._probe_after = 2 * waited
        return Review(made, tuple(reasons), probed)

    def set_aside(self, name: str) -> None:
        """Give client ``name`` nothing from the next plan on, which is due."""
        if name not in self._aside:
            self._aside.add(name)
            self._pending.append(f"{name} is set aside")

    def join(self, client: Client, requests: Sequence[BudgetRequest] = ()) -> None:
        """Plan for ``client`` from the plan on that the next review makes; also one that had left or was set aside.

        Args:
            client: who comes.
            requests: changes of budgets that hold by then.

        Raises:
            InputError: there is no plan with it: the server has no room. It has no part then.
        """
        name, before = client.name, (self._left, self._aside, self._joined)
        self._left, self._aside = self._left - {name}, self._aside - {name}
        if all(name != declared.name for declared in self._config.clients):
            self._joined = self._joined | {name: client}
        try:
            self._try_plan(requests)
        except InputError:
            self._left, self._aside, self._joined = before
            raise
        self._changes(f"{name} has joined")

    def leave(self, name: str, requests: Sequence[BudgetRequest] = ()) -> None:
        """Plan without client ``name`` from the plan on that the next review makes.

        Args:
            name: who goes.
            requests: changes of budgets that hold by then.

        Raises:
            InputError: there is no plan without it: nobody else fits. It keeps its part then.
        """
        before = self._left, self._joined
        self._left = self._left | {name}
        self._joined = {other: client for other, client in self._joined.items() if other != name}
        try:
            self._try_plan(requests)
        except InputError:
            self._left, self._joined = before
            raise
        self._changes(f"{name} has left")

    def _try_plan(self, requests: Sequence[BudgetRequest]) -> None:
        budgets = self._budgets
        self._budgets = {holder: dict(values) for holder, values in budgets.items()}
        try:
            for request in requests:
                self._budgets.setdefault(request.holder, {}).update(request.values)
            self._plan(self._planned_with, None, EQUAL)
        finally:
            self._budgets = budgets

    def _changes(self, reason: str) -> None:
        self._pending.append(reason)
        self._due = True

    def ran_out_of_memory(self, name: str, times: int, held_bytes: int = 0) -> None:
        """Give a client, or ``server``, less to hold from the next plan on, which is due.

        Args:
            name: whom.
            times: how often it has happened by now; to say it again changes nothing.
            held_bytes: what it held by the plan with which it happened last; its next part takes less.
        """
        had = self._shortages.get(name, 0)
        if had >= times:
            return
        self._shortages[name] = times
        shrunk = self._shrunk.get(name, 1.0) * _SHRINK ** (times - had)
        declared_bytes = self._declared_bytes(name)
        if 0 < held_bytes <= declared_bytes / shrunk:
            # It held much less than it declared, and would hold the same again.
            shrunk = _SHRINK * declared_bytes / held_bytes
        self._shrunk[name] = shrunk
        self._pending.append(f"{name} ran out of memory")

    def _declared_bytes(self, name: str) -> float:
        """The budget in force of a client or ``server``; 0 for a client that is not known."""
        holders = {SERVER: self._server(), **{client.name: client for client in self._declared()}}
        return holders[name].memory_bytes if name in holders else 0.0

    def _plan(self, importance: Mapping[str, float], current: Plan | None, source: str) -> Plan:
        """A plan in which those who ran out of memory hold less, the server as much less as there is a plan for.

        Raises:
            InputError: there is none by the budgets in force.
        """
        server, clients, shrunk = self._server(), self._clients(), self._shrunk.get(SERVER, 1.0)
        self._lacking = ""
        for divisor in dict.fromkeys([*(max(1.0, shrunk / _SHRINK**i) for i in range(_RELAXED)), 1.0]):
            try:
                return plan(
                    clients, _given(server, divisor), self.cost, importance, self._config.policy, current, source
                )
            except InputError as error:
                if divisor == 1.0:
                    raise
                # To be left without a plan helps nobody: it is tried with more, and the run says what it lacked.
                self._lacking = self._lacking or f"there is no plan with so little ({error})"
        raise AssertionError("the budgets as they are come last")

    def _server(self) -> ServerSpec:
        """The server with the budget in force."""
        return self._config.server.changed(self._budgets.get(SERVER, {}))

    def _clients(self) -> list[Client]:
        """The clients with the budgets in force, less what measurements and shortages of memory took off them.

        Who was short of memory keeps what the smallest part takes: without any part it would be of no use at all.
        """
        least_bytes = smallest_part_bytes(self.cost, self._config.policy) if self._shrunk else 0
        clients = []
        for client in self._declared():
            if client.name in self._aside | self._left:
                continue
            given = _given(client, self._excess.get(client.name, 1.0))
            shrunk = self._shrunk.get(client.name, 1.0)
            if shrunk > 1:
                given = _given(given, min(shrunk, max(1.0, given.memory_bytes / least_bytes)))
            clients.append(given)
        return clients

    def _declared(self) -> list[Client]:
        if self._config.policy.placement == "single":
            # The one node is the server's, and has what the aggregator beside it leaves.
            server = self._server()
            (node,) = self._config.model_copy(update={"server": server}).participants
            left = server.memory_bytes - self.cost.server_bytes([self.cost.model.layers], {})
            return [node.changed({"memory_gb": max(left, 0) / 1e9})]
        clients = [*self._config.clients, *self._joined.values()]
        return [client.changed(self._budgets.get(client.name, {})) for client in clients]

    def _overruns(self, current: Plan, measured_bytes: Mapping[str, int]) -> list[str]:
        """Give clients that took more than they declared less to hold from now on."""
        found = []
        for part in current.available:
            measured = measured_bytes.get(part.name, 0)
            if measured > part.declared_bytes:
                self._excess[part.name] = max(self._excess.get(part.name, 1.0), measured / part.predicted_bytes)
                found.append(
                    f"{part.name} took {measured / 1e6:.1f} MB, {(measured - part.declared_bytes) / 1e6:.1f} more than "
                    "it declared"
                )
        return found

    def _holds(self, current: Plan) -> bool:
        """Whether everybody still fits what ``current`` gives it."""
        budgets = {client.name: client.memory_bytes for client in self._clients()}
        budgets |= dict.fromkeys(self._aside | self._left, 0)
        budgets[SERVER] = _given(self._server(), self._shrunk.get(SERVER, 1.0)).memory_bytes
        return all(budgets[part.name] >= part.predicted_bytes for part in (current.server, *current.available))

    # -- the virtual clock (METHOD 8) -----------------------------------------------------------------------------

    def step_times_s(self, plan: Plan, clients: Sequence[str] | None = None) -> list[float]:
        """Virtual seconds of each local step of a round of ``clients`` (by default all available) under ``plan``."""
        return self._clock().steps_s(plan, clients)

    def call_times_s(self, plan: Plan, clients: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
        """Virtual seconds of each call of a local step of ``clients`` (by default all available), by holder."""
        return self._clock().call_s(plan, clients)

    def probe_time_s(self, plan: Plan, clients: Sequence[str] | None = None) -> float:
        """Virtual seconds of one importance probe of ``clients`` (by default all available)."""
        return self._clock().probe_s(plan, self._config.policy.importance.tokens, clients)

    def aggregation_time_s(
        self, plan: Plan, clients: Sequence[str], up_bytes: Mapping[str, int], down_bytes: Mapping[str, int]
    ) -> float:
        """Virtual seconds of a round's end: adapters up, the aggregation, residual changes and restarts down.

        Args:
            plan: the plan in force.
            clients: who trained in the round.
            up_bytes, down_bytes: by client name.
        """
        return self._clock().aggregation_s(plan, self._config.policy, up_bytes, down_bytes, clients)

    def reconfiguration_time_s(self, before: Plan, after: Plan, down_bytes: Mapping[str, int]) -> float:
        """Virtual seconds of moving layers, residuals and restarts after a change of plan."""
        return self._clock().reconfiguration_s(before, after, down_bytes)

    def validation_time_s(self, plan: Plan, batches: Mapping[str, int]) -> float:
        """Virtual seconds of one validation under ``plan``; ``batches`` by client name."""
        return self._clock().validation_s(plan, batches)

    def _clock(self) -> VirtualClock:
        return VirtualClock(self.cost, *self.budgets())

    def budgets(self) -> tuple[list[Client], ServerSpec]:
        """Clients and server with the budgets in force, as declared."""
        return self._declared(), self._server()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that decides later plans, for a checkpoint's JSON."""
        return {
            "budgets": self._budgets,
            "excess": self._excess,
            "aside": sorted(self._aside),
            "left": sorted(self._left),
            "joined": [client.model_dump() for client in self._joined.values()],
            "shortages": self._shortages,
            "shrunk": self._shrunk,
            "pending": self._pending,
            "planned_in": self._planned_in,
            "planned_with": dict(self._planned_with),
            "history": self._history.to_json(),
            "probed_in": self._probed_in,
            "probe_after": self._probe_after,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        self._budgets = {name: dict(values) for name, values in state["budgets"].items()}
        self._excess = dict(state["excess"])
        self._aside, self._shortages = set(state["aside"]), dict(state["shortages"])
        self._shrunk = dict(state.get("shrunk", {}))
        self._left, self._due = set(state["left"]), False
        self._joined = {c.name: c for c in map(Client.model_validate, state["joined"])}
        self._pending = list(state["pending"])
        self._planned_in, self._planned_with = state["planned_in"], state["planned_with"]
        self._history = ImportanceHistory.from_json(state["history"])
        self._probed_in, self._probe_after = state["probed_in"], state["probe_after"]


def _given(holder: _Holder, shrunk: float) -> _Holder:
    """``holder`` with its memory divided by ``shrunk``, where that is more than 1."""
    return holder.changed({"memory_gb": holder.memory_gb / shrunk}) if shrunk > 1 else holder
