"""What the scheduler decided over a run, from the run's events: its plans, and the importance that was probed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsplit.scheduling.plan import Plan


@dataclass(frozen=True)
class PlanHistory:
    """The scheduler's decisions, each by the number of rounds done when it was made (0: before any training).

    Attributes:
        plans: every plan that was put in force, oldest first; what only repeats the plan before it is left out.
        importance: share of each weight in the sum of ``H_w`` (METHOD 3), by weight name; empty before any probe.
        reasons: why the plan of that round was made; the first plan has none.
    """

    plans: Mapping[int, Plan] = field(default_factory=dict)
    importance: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    reasons: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def changed(self) -> tuple[int, ...]:
        """Every number of rounds done at which the plan or the importance became another one, in order."""
        return tuple(sorted(self.plans.keys() | self.importance.keys()))

    def plan_after(self, done: int) -> Plan | None:
        """The plan in force once ``done`` rounds are done, ``None`` where none is known."""
        made = [round for round in self.plans if round <= done]
        return self.plans[max(made)] if made else None

    def importance_after(self, done: int) -> Mapping[str, float] | None:
        """The shares known once ``done`` rounds are done, ``None`` before the first probe."""
        probed = [round for round in self.importance if round <= done]
        return self.importance[max(probed)] if probed else None


def plan_history(events: Iterable[Mapping[str, Any]]) -> PlanHistory:
    """The decisions in ``events`` (``planned``, ``importance``, ``replanned``), oldest first.

    A resumed run does the rounds since its checkpoint again: an event takes the place of those of its round and of
    later ones that stand before it. Events that are not what a coordinator writes are left out.
    """
    plans: dict[int, Plan] = {}
    importance: dict[int, Mapping[str, float]] = {}
    reasons: dict[int, tuple[str, ...]] = {}
    for event in events:
        done, kind = event.get("round"), event.get("event")
        if not isinstance(done, int) or isinstance(done, bool) or done < 0:
            continue
        if kind == "planned" and (plan := plan_or_none(event.get("plan"))) is not None:
            _forget_later(done, plans, importance, reasons)
            plans[done] = plan
        elif kind == "importance" and (shares := _shares(event.get("scores"))):
            _forget_later(done, plans, importance, reasons)
            importance[done] = shares
        elif kind == "replanned" and isinstance(event.get("reasons"), list):
            reasons[done] = tuple(map(str, event["reasons"]))
    kept = {done: plan for done, plan in plans.items() if plan != _before(plans, done)}
    return PlanHistory(kept, importance, {done: why for done, why in reasons.items() if done in kept})


def plan_or_none(data: Any) -> Plan | None:
    """The plan that ``Plan.to_json`` made ``data`` of, ``None`` if it is not one."""
    try:
        return Plan.from_json(data)
    except ValueError:
        return None


def _shares(scores: Any) -> dict[str, float]:
    """``scores`` as shares of their sum; empty if they are no scores or all 0."""
    if not isinstance(scores, Mapping):
        return {}
    # infinite and undefined scores stand in the file as text
    known = {str(name): float(score) for name, score in scores.items() if isinstance(score, int | float)}
    total = math.fsum(score for score in known.values() if score > 0)
    return {name: max(score, 0.0) / total for name, score in known.items()} if 0 < total < math.inf else {}


def _forget_later(done: int, *decisions: dict[int, Any]) -> None:
    for by_round in decisions:
        for later in [round for round in by_round if round > done]:
            del by_round[later]


def _before(plans: Mapping[int, Plan], done: int) -> Plan | None:
    earlier = [round for round in plans if round < done]
    return plans[max(earlier)] if earlier else None
