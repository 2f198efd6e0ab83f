"""The report's section on the scheduler: importance, ranks and split points over the rounds, and why it planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hsplit.observe.plan_history import PlanHistory
from hsplit.observe.rank_maps import HolderGroup, RankMaps, after_text
from hsplit.observe.report_figures import MAX_HOLDERS, capped
from hsplit.observe.report_page import disclosure, plot, table, text
from hsplit.observe.split_bars import splits_svg
from hsplit.observe.wording import number_text

MAX_KINDS = 12
"""Kinds of clients with heat maps of their own; with more, their clients' mean has to do."""
_MAX_PLANS = 40


def schedule_section(history: PlanHistory, clients: Sequence[Mapping[str, Any]], rounds_done: int, key: str) -> str:
    """HTML of the section.

    Args:
        history: at least one plan in it.
        clients: the configuration's, which tell each client's kind.
        rounds_done: rounds trained so far.
        key: unique in the page; starts the figures' ids.
    """
    return (
        f"<h3>Importance and ranks</h3>{_maps(history, clients, key)}"
        f"<h3>Plans and split points</h3>{_splits(history, rounds_done, key)}{_plans(history)}"
    )


def _maps(history: PlanHistory, clients: Sequence[Mapping[str, Any]], key: str) -> str:
    newest = history.plans[max(history.plans)]
    server = HolderGroup("server", frozenset({newest.server.name}))
    names = dict.fromkeys(holder.name for plan in history.plans.values() for holder in plan.clients)
    everybody = HolderGroup(f"mean of {len(names)} clients" if len(names) > 1 else "client", frozenset(names))
    kinds = _kinds(list(names), clients)
    drawn = kinds if 1 < len(kinds) <= MAX_KINDS else []
    maps = RankMaps(history, [server, everybody, *drawn])
    main = maps.svg([server, everybody], f"{key}-maps", importance=True)
    caption = (
        "Decoder layers from the top down. A rank's shade follows log2(1 + rank); the clients' is the mean over those"
        " that train the weight, and blank where none does. Importance is each weight's share of the total; shares"
        " below a hundredth of the largest look alike."
    )
    each = [
        disclosure(f"Ranks of {kind.label}", plot(maps.svg([kind], f"{key}-kind-{number}"), "", wide=True))
        for number, kind in enumerate(drawn)
    ]
    return f"{_what_is_shown(history, maps)}{plot(main, caption, wide=True)}{''.join(each)}"


def _what_is_shown(history: PlanHistory, maps: RankMaps) -> str:
    changed = history.changed
    what = "importance or the plan" if history.importance else "plan"
    sentences = [f"The {what} {_changed(len(changed) - 1)}."]
    if len(maps.shown) < len(changed):
        at = ", ".join(map(str, maps.shown))
        sentences.append(
            f"Shown are {len(maps.shown)} of these {len(changed)} states, the first, the last and others spread"
            f" between them, new plans first: after round {at}."
        )
    if not history.importance:
        sentences.append("No importance was probed: every plan rests on equal importance per parameter.")
    return f'<p class="soft">{text(" ".join(sentences))}</p>'


def _splits(history: PlanHistory, rounds_done: int, key: str) -> str:
    names = list(dict.fromkeys(holder.name for plan in history.plans.values() for holder in plan.clients))
    if not names:
        return ""
    rounds = max(rounds_done, max(history.plans) + 1)
    svg = splits_svg(history, capped(names), rounds, f"{key}-splits")
    layers = max(plan.layers for plan in history.plans.values())
    more = f" The first {MAX_HOLDERS - 1} and the last client are shown." if len(names) > MAX_HOLDERS else ""
    caption = f"Split point of each client, of {layers} layers: how many it holds, by round. × is unavailable.{more}"
    return plot(svg, caption, wide=True)


def _plans(history: PlanHistory) -> str:
    made = sorted(history.plans)
    columns = ("in force", "why", "importance", "step (virtual)", "captured importance", "clients")
    rows = []
    for done in made[-_MAX_PLANS:]:
        plan = history.plans[done]
        why = "; ".join(history.reasons.get(done, ())) or ("the first plan" if done == 0 else "not recorded")
        rows.append(
            (
                *(after_text(done), why, plan.importance),
                *(number_text(plan.makespan_s, "s"), number_text(plan.captured_importance)),
                f"{len(plan.available)} of {len(plan.clients)}",
            )
        )
    left_out = f" The last {_MAX_PLANS} of {len(made)} plans." if len(made) > _MAX_PLANS else ""
    note = (
        "Virtual: what one local step takes at the declared budgets. Captured importance is in the unit of the scores"
        f" that a plan was made with: one made before any probe does not compare with later ones.{left_out}"
    )
    return table(columns, rows, text_columns=3, caption=note)


def _kinds(names: Sequence[str], clients: Sequence[Mapping[str, Any]]) -> list[HolderGroup]:
    """``names`` by the kind that the configuration gives them; one that it does not know is a kind of its own."""
    known = {client.get("name"): client.get("kind") for client in clients}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(str(known.get(name) or name), []).append(name)
    return [
        HolderGroup(f"{kind} (mean of {len(own)})" if len(own) > 1 else kind, frozenset(own))
        for kind, own in members.items()
    ]


def _changed(count: int) -> str:
    times = {1: "once", 2: "twice"}.get(count, f"{count} times")
    return f"changed {times} after the start" if count > 0 else "never changed"
