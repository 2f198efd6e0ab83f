"""State of planning from round to round: the holders to plan for, and the findings of earlier rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hsplit.config import ClientConfig, RunConfig
from hsplit.config.section import EXACT, Whole
from hsplit.planning.budgets import BudgetRequest
from hsplit.planning.importance import Score


@dataclass(frozen=True)
class Shortage:
    """A holder that has run out of memory.

    Attributes:
        times: how often.
        held_bytes: bytes that it held by the plan under which it happened last; 0 if there was no plan.
    """

    times: int
    held_bytes: int


@dataclass(frozen=True)
class Fleet:
    """Holders to plan for.

    Attributes:
        clients: every client of the run as declared, those that joined included, in their order.
        joining: names of clients that have joined since the last plan, for the first time or again.
        aside: names of clients that have been set aside.
        left: names of clients that have left.
        shortages: by client name, or ``server`` for any of the servers.
        examples, vocabulary: number of examples to train on in a client's data, and of distinct token ids, by its name;
            unknown for the others.
    """

    clients: tuple[ClientConfig, ...]
    joining: frozenset[str] = frozenset()
    aside: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    shortages: Mapping[str, Shortage] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    vocabulary: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of_run(run: RunConfig) -> Fleet:
        """The fleet of a run that has not begun."""
        return Fleet(run.clients)

    @property
    def planned(self) -> list[str]:
        """Names of the clients that a plan can give a part to, in their order."""
        return [c.name for c in self.clients if c.name not in self.aside and c.name not in self.left]


@dataclass(frozen=True)
class PlanningState:
    """Findings of earlier rounds that decide later plans; plain data, for a checkpoint.

    Attributes:
        budgets: changes of budgets in force, by holder and field, in the units of the cluster file.
        excess: largest ratio of measured to predicted bytes of a client, by its name, where above 1.
        shrunk: divisor of the memory of a holder that ran out of it.
        shortages: how many shortages of each holder ``shrunk`` accounts for.
        planned: clients that the last plan could give a part to; ``None`` before the first.
        pending: reasons for a new plan that ``min_rounds`` has put off.
        planned_in: rounds done at the last plan.
        planned_with: importance by weight name of the last plan; empty: equal importance.
        history: ``H_w`` by weight name; empty before the first probe.
        probed_in: rounds done at the last probe; 0: none yet.
        probe_after: rounds from there to the next probe.
    """

    budgets: dict[str, dict[str, float]] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    shrunk: dict[str, float] = field(default_factory=dict)
    shortages: dict[str, Whole] = field(default_factory=dict)
    planned: list[str] | None = None
    pending: list[str] = field(default_factory=list)
    planned_in: Whole = 0
    planned_with: dict[str, Score] = field(default_factory=dict)
    history: dict[str, Score] = field(default_factory=dict)
    probed_in: Whole = 0
    probe_after: Whole = 1
    __pydantic_config__ = EXACT

    def probe_due(self, round_: int) -> bool:
        """True if importance is to be probed with ``round_`` rounds done.

        A probe takes nearly as long as a local step, and importance moves most early in training. So with
        ``importance.back_off`` the number of rounds to the next probe doubles each time that a probe gave no reason
        for another plan, and is 1 again after one that did.
        """
        return round_ >= self.probed_in + self.probe_after

    def with_budgets(self, requests: Iterable[BudgetRequest]) -> PlanningState:
        """The state with ``requests`` in force, the later winning."""
        budgets = {holder: dict(values) for holder, values in self.budgets.items()}
        for request in requests:
            budgets.setdefault(request.holder, {}).update(request.values)
        return replace(self, budgets=budgets)

    def changes_of(self, fleet: Fleet) -> list[str]:
        """Clients that have come or gone since the last plan, as reasons for another."""
        if self.planned is None:
            return []
        now = fleet.planned
        came = [f"{name} has joined" for name in now if name not in self.planned or name in fleet.joining]
        removed = [name for name in self.planned if name not in now]
        return came + [f"{name} is set aside" if name in fleet.aside else f"{name} has left" for name in removed]


def in_force(clients: Sequence[ClientConfig], state: PlanningState) -> list[ClientConfig]:
    """``clients`` with the budgets in force."""
    return [client.changed(state.budgets.get(client.name, {})) for client in clients]
