"""Plans in which splits, rows, periods, stored forms and wire formats are chosen together (METHOD 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import numpy as np

from hsplit.config import Pace, Policy
from hsplit.config.job import Wire
from hsplit.config.section import is_reference
from hsplit.errors import InputError
from hsplit.planning.bound import speed_bound
from hsplit.planning.budgets import Budget, ClientBudget, ServerBudget
from hsplit.planning.choices import FEW, MAX_TIMES_ROWS, Choice, Choices, Flags, PacedProblem, place_of_choice, turns_of
from hsplit.planning.cost.clock import VirtualClock
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.cost.step_time import Loads
from hsplit.planning.importance import Score
from hsplit.planning.one_rank import OneRankProblem
from hsplit.planning.pace import GAIN, MAX_SIMULATED, PaceSearch, distinct
from hsplit.planning.plan import HolderPlan, Plan, Speed
from hsplit.planning.problem import Problem
from hsplit.planning.rank_rules import Holders, RankRule
from hsplit.planning.ranks import Levels, at_levels
from hsplit.planning.split_rules import find_split_rule
from hsplit.planning.wire import wires_within

Stored = Literal["dense", "codes"]

MAX_POLISHED = 40
"""Most changes that are tried to a plan in the end; only with few clients."""
# Uniform splits whose best rows and periods are improved client by client.
_CLIMBED = 4
NEAR = 0.97
"""Least estimated objective of a change that is tried, in parts of that of the plan."""
LINK_PART = 0.5
"""Most seconds of a client's link for its fair share of the rows, as a part of a step in which nothing waits: beyond
that the link binds, and the next narrower format is taken."""


def paces(pace: Pace) -> bool:
    """True if plans choose more than splits and ranks."""
    chosen_alone = {"min_share", "weights", "server_step", "residual_wait"}
    return pace.model_dump(exclude=chosen_alone) != Pace().model_dump(exclude=chosen_alone)


def stored_forms(cost: CostModel) -> tuple[Stored, ...]:
    """Forms in which the policy lets a client store the base, the faster first."""
    if not cost.model.quantized:
        return ("dense",)
    forms: dict[str, tuple[Stored, ...]] = {"dense": ("dense",), "codes": ("codes",), "planned": ("dense", "codes")}
    return forms[cost.pace.stored]


def least_rows(cost: CostModel) -> int:
    """Fewest examples that a client may bring to a step."""
    return 1 if cost.pace.batch_size == "planned" else cost.model.job.batch_size


def needed_bytes(cost: CostModel, rank: int, rows: int) -> Floats:
    """Bytes of a client at each split in the stored form that takes least, every weight at ``rank``, ``(L + 1,)``."""
    held = np.arange(cost.model.layers + 1)[:, None] > cost.model.weight_layer
    tables = [cost.client_memory(rows, form) for form in stored_forms(cost)]
    needed: Floats = np.min([table.constant + rank * (held @ table.per_rank) for table in tables], axis=0)
    return needed


def unread_bytes(cost: CostModel, clients: Sequence[ClientBudget], vocabulary: Mapping[str, int]) -> Floats:
    """Bytes of the embedding that each client does not hold, ``(N,)``.

    Args:
        cost: what parts cost.
        clients: budgets of the clients.
        vocabulary: number of distinct token ids in a client's texts by name; the whole embedding where it is not known.
    """
    if cost.pace.embedding == "whole" or cost.model.tail_at_client:
        return np.zeros(len(clients))
    whole = cost.client_memory(cost.model.job.batch_size)
    saved = {
        rows: float(whole.constant[0] - whole.with_embedding(rows).constant[0]) for rows in set(vocabulary.values())
    }
    return np.array([saved[vocabulary[c.name]] if c.name in vocabulary else 0.0 for c in clients])


def fleet_bound(cost: CostModel, problem: Problem, rank: int, wires: Sequence[str], shares: Floats) -> float:
    """Most examples a second that the budgets of a problem's clients allow (METHOD 10), virtual.

    For clients that train what they hold: one that only computes forward takes less time.

    Args:
        cost: what parts cost.
        problem: of the clients; memory counts for one example a batch.
        rank: of every weight.
        wires: format of each kind's messages.
        shares: each client's share of the data, ``(N,)``.
    """
    count, layers = len(problem.distinct), cost.model.layers + 1
    # A message's latency is shared by all its rows.
    most = cost.model.job.batch_size * (MAX_TIMES_ROWS if cost.pace.batch_size == "planned" else 1)
    loads = Loads(np.full(count, most), wires, np.zeros(count, dtype=bool))
    times = cost.times.all_client_times(problem.distinct, 1, loads).sum(axis=2)
    times /= most * cost.model.job.grad_accumulation
    splits, ones = np.arange(layers), np.ones(layers, dtype=np.int64)
    server_s = np.sum(cost.times.turn_times(problem.server, splits, ones), axis=0) / cost.model.servers
    deepest = (needed_bytes(cost, rank, 1) <= problem.memory[:, None]).sum(axis=1) - 1
    least = cost.pace.min_share * shares
    return speed_bound(times[problem.kind], server_s, np.maximum(deepest, 1)[problem.kind], least)


_Found = tuple[Plan, Choice]


def _best(found: Sequence[_Found]) -> _Found:
    """Return the plan with the largest objective, the first among ties."""
    best = found[0]
    for one in found[1:]:
        if one[0].objective > best[0].objective * (1 + GAIN):
            best = one
    return best


class PacedPlanner:
    """Makes the plan of one fleet.

    Args:
        clients: every declared client.
        server, cost, importance, policy: as for :func:`~hsplit.planning.planner.make_plan`.
        rank_set: ranks to choose from, ``(Q,)``.
        rule: chooses the ranks of each holder.
        vocabulary: distinct token ids by client, see :func:`unread_bytes`.
        examples: number of each client's examples by name; where it is not known all have as many.
        source: where the importance comes from, in words.
    """

    def __init__(
        self,
        clients: Sequence[ClientBudget],
        server: ServerBudget,
        cost: CostModel,
        importance: Mapping[str, Score],
        policy: Policy,
        rank_set: Ints,
        rule: RankRule,
        vocabulary: Mapping[str, int],
        examples: Mapping[str, int],
        source: str,
    ) -> None:
        self._declared, self._server, self._cost = clients, server, cost
        self._policy, self._pace, self._rank_set, self._rule, self._source = policy, policy.pace, rank_set, rule, source
        self._searched: tuple[PacedProblem, PaceSearch] | None = None
        # By split, rows, stored form and kind.
        self._known_levels = dict[tuple[int, int, int, int], Levels]()
        self._smallest = policy.split if isinstance(policy.split, int) else 1
        self._rank = int(rank_set[0])
        unread = unread_bytes(cost, clients, vocabulary)
        self.needed = needed_bytes(cost, self._rank, least_rows(cost))
        held = [i for i, c in enumerate(clients) if c.memory_bytes + unread[i] >= self.needed[self._smallest]]
        self._unread = unread[held]
        # What the embedding leaves unread is as good as memory.
        self._clients = [
            Budget(c.name, c.memory_bytes + int(u), c.flops, c.bandwidth_bps, c.latency_s)
            for c, u in ((clients[i], unread[i]) for i in held)
        ]
        counts = np.array([examples.get(c.name, 1) for c in self._clients], dtype=np.float64)
        self._shares: Floats = counts / max(counts.sum(), 1.0)
        if self._clients:
            kind = OneRankProblem if rule.one_for_all else Problem
            usual = needed_bytes(cost, self._rank, cost.model.job.batch_size)
            apart = is_reference(policy.split)
            self._problem = kind(
                self._clients,
                server,
                cost,
                importance,
                rank_set,
                rule,
                needed=usual,
                apart=apart,
                constants=policy.objective,
            )

    @property
    def available(self) -> list[str]:
        """Names of the clients that fit the smallest part."""
        return [client.name for client in self._clients]

    # -- the choice -------------------------------------------------------------------------------------------------

    def plan(self, current: Plan | None, near: bool = False) -> Plan:
        """Make the plan.

        Args:
            current: the plan in force; its choice stays unless another one is better.
            near: with few clients only improve the plan in force.

        Raises:
            InputError: no choice fits the server, or the rows cannot be dealt out.
        """
        lacking = np.inf
        for shallowest in self._shallowest():
            found = list[_Found]()
            for choice in self._chosen(shallowest, current, near):
                made, lacks = self._made(choice)
                lacking = min(lacking, lacks)
                # A plan in which nobody trains anything is none.
                if lacks <= 0 and made.captured_importance > 0:
                    found.append((self._timed(made, choice), choice))
            if found:
                first = _best(found)
                # With others frozen, the search may lead further.
                others = [one for one in found if (one[1].frozen != first[1].frozen).any()]
                starts = [first, *([_best(others)] if others else [])]
                return self._plainest(*_best([self._polished(*one) for one in starts]))
        if np.isinf(lacking) or lacking <= 0:
            raise InputError(
                "policy: pace: no rows, splits and periods of a step fit these clients: raise memory_gb, lower"
                " pace.min_share, or set pace.batch_size to 'equal'"
            )
        raise InputError(
            f"server: memory_gb: {self._server.memory_bytes / 1e9:.3f} is {lacking / 1e9:.3f} GB too little"
            f" for its layers and {len(self._clients)} clients; raise it, or lower job.batch_size,"
            " job.max_length or job.residual.max_rank"
        )

    def check(self) -> None:
        """Check that there is a plan; errors as :meth:`plan`. A good one is looked for only where no plain one does."""
        if self._policy.split == "planned":
            layers = np.arange(self._cost.model.layers + 1)
            search = self._search(np.broadcast_to(layers >= 1, (len(self._problem.members), len(layers))))[1]
            for choice in search.alike():
                made, lacking = self._made(choice)
                if lacking <= 0 and made.captured_importance > 0:
                    return
        self.plan(None)

    def _polished(self, plan: Plan, choice: Choice) -> _Found:
        """Change one thing after another in the plan of ``choice`` as long as the objective grows.

        Estimates say which changes are worth being made and simulated.
        """
        searched, tried = self._searched, 0
        while searched is not None and tried < MAX_POLISHED:
            paced, search = searched
            better: _Found | None = None
            for other in paced.ranked(search.neighbours(choice), NEAR * choice.objective)[: MAX_POLISHED - tried]:
                made, lacking = self._made(other)
                tried += 1
                if lacking <= 0 and made.captured_importance > 0:
                    made = self._timed(made, other)
                    if made.objective > plan.objective * (1 + 1e-4):
                        better = made, other
                        break
            if better is None:
                break
            plan, choice = better
        return plan, choice

    def _plainest(self, plan: Plan, choice: Choice) -> Plan:
        """Store dense what codes gain nothing for: they are dequantized in every pass."""
        if self._searched is None:
            return plan
        paced = self._searched[0]
        for client in np.flatnonzero(choice.codes):
            codes = choice.codes.copy()
            codes[client] = False
            for other in paced.ranked(paced.legal(replace(choice, codes=codes).alone)):
                made = self._timed(self._made(other)[0], other)
                if not other.codes[client] and made.objective > plan.objective * (1 - GAIN):
                    plan, choice = made, other
        return plan

    def _shallowest(self) -> list[int]:
        """Least splits to try: deeper ones leave the server less to hold."""
        layers = self._cost.model.layers
        return [1, *(k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if k <= layers)]

    def _chosen(self, shallowest: int, current: Plan | None, near: bool) -> list[Choice]:
        split, problem = self._policy.split, self._problem
        layers = np.arange(self._cost.model.layers + 1)
        if split == "planned":
            allowed = np.broadcast_to(layers >= shallowest, (len(problem.members), len(layers)))
            paced, search = self._search(allowed)
            self._searched = (paced, search) if paced.few else None
            return search.best(self._in_force(paced, current), near)
        if shallowest > 1:
            return []
        if split != "uniform":
            splits = find_split_rule(split)(problem, current)
            allowed = np.zeros((len(problem.members), len(layers)), dtype=bool)
            allowed[problem.kind, splits] = True
            paced, search = self._search(allowed)
            return search.best(self._in_force(paced, current), near)
        deepest = int((self.needed <= problem.memory[:, None]).sum(axis=1).min()) - 1
        by_split = list[tuple[list[Choice], PaceSearch]]()
        for k in range(1, deepest + 1):
            search = self._search(np.broadcast_to(layers == k, (len(problem.members), len(layers))))[1]
            if own := search.best(climb=False):
                by_split.append((own, search))
        by_split.sort(key=lambda one: place_of_choice(one[0][0]))
        climbed = [search.climbed(own[0]) for own, search in by_split[:_CLIMBED] if len(self._clients) <= FEW]
        return distinct([*climbed, *(choice for own, _ in by_split for choice in own)])[:MAX_SIMULATED]

    def _search(self, allowed: Flags) -> tuple[PacedProblem, PaceSearch]:
        paced = PacedProblem(
            self._problem, self._pace, allowed, self._policy.freezes, stored_forms(self._cost), self.wires, self._shares
        )
        return paced, PaceSearch(paced)

    def _in_force(self, paced: PacedProblem, current: Plan | None) -> Choice | None:
        """The choice of the plan in force, where it is one for these clients and budgets."""
        if current is None:
            return None
        parts = {part.name: part for part in current.available}
        if parts.keys() != set(self.available):
            return None
        own = [parts[client.name] for client in self._clients]
        batch = self._cost.model.job.batch_size
        choices = Choices(
            np.array([[part.split or 0 for part in own]], dtype=np.int64),
            np.array([[part.rows or batch for part in own]], dtype=np.int64),
            np.array([[part.every for part in own]], dtype=np.int64),
            np.array([[part.forward_only for part in own]], dtype=bool),
            np.array([[part.stored == "codes" for part in own]], dtype=bool),
        )
        return next(iter(paced.ranked(paced.legal(choices))), None)

    @cached_property
    def wires(self) -> list[Wire]:
        """Format of each kind's messages."""
        job, problem = self._cost.model.job, self._problem
        formats = wires_within(job.wire) if self._pace.wire == "planned" else (job.wire,)
        if len(formats) == 1:
            return [job.wire] * len(problem.distinct)
        period_s = len(self._clients) * job.batch_size / self._bound([formats[-1]] * len(problem.distinct))
        chosen: list[Wire] = []
        for kind in problem.distinct:
            fair = [self._link_s(wire, kind) * job.batch_size for wire in formats]
            fitting = [wire for wire, seconds in zip(formats, fair, strict=True) if seconds <= LINK_PART * period_s]
            chosen.append(fitting[0] if fitting else formats[-1])
        return chosen

    def _link_s(self, wire: str, client: ClientBudget) -> float:
        one = self._cost.model.wire_bytes(1, wire, 1)
        return 8 * (one.up + one.deep + one.slope + one.down) / client.bandwidth_bps

    # -- the bound --------------------------------------------------------------------------------------------------

    @cached_property
    def bound(self) -> float:
        """Most examples a second that these budgets allow in the plan's wire formats (METHOD 10)."""
        return self._bound(self.wires)

    def _bound(self, wires: Sequence[str]) -> float:
        return fleet_bound(self._cost, self._problem, self._rank, wires, self._shares)

    # -- the plan ---------------------------------------------------------------------------------------------------

    def _made(self, choice: Choice) -> tuple[Plan, float]:
        """The plan of a choice without its seconds, and the bytes that the server lacks for it."""
        cost, problem = self._cost, self._problem
        brought = choice.rows / choice.every
        share = brought / brought.sum()
        server_ranks, lacking = self._server_levels(choice)
        names = np.array([w.name for w in cost.model.weights], dtype=object)
        gains, wires = np.zeros(len(self._clients)), self.wires
        (by_layer,) = problem.discounts_of(choice.splits[None], share[None], choice.frozen[None])
        discount = by_layer[cost.model.weight_layer]
        held: list[tuple[dict[str, int], int]] = [({}, 0)] * len(self._clients)
        keys = np.stack([choice.splits, choice.rows, choice.codes], axis=1)
        alike = [np.flatnonzero((keys == key).all(axis=1)) for key in np.unique(keys, axis=0)]
        common: int | None = None
        if self._rule.one_for_all:
            largest = list[int]()
            for members in alike:
                split, rows, codes = keys[members[0]].tolist()
                holders = self._holders(split, rows, codes, problem.kind[members])
                largest.append(int(holders.largest_common_levels().min()))
            common = max(0, min([*largest, server_ranks[1]]))
        for members in alike:
            split, rows, codes = keys[members[0]].tolist()
            flags = problem.held[split]
            levels: Levels = np.full((len(members), len(flags)), common or 0, dtype=np.int8)
            if common is None:
                levels = self._levels(split, rows, codes, problem.kind[members])
            ranks = problem.rank_set[levels[:, flags]] * ~choice.frozen[members][:, None]
            gains[members] = (at_levels(problem.values[flags], levels[:, flags]) * (ranks > 0)) @ discount[flags]
            distinct, of_member = np.unique(ranks, axis=0, return_inverse=True)
            made: list[tuple[dict[str, int], int]] = []
            for row in distinct:
                by_name = dict(zip(map(str, names[flags]), row.tolist(), strict=True))
                made.append((by_name, cost.client_bytes(split, by_name, rows, "codes" if codes else "dense")))
            for member, which in zip(members.tolist(), of_member.tolist(), strict=True):
                held[member] = made[which]
        placed = {client.name: i for i, client in enumerate(self._clients)}
        parts = []
        for client in self._declared:
            i = placed.get(client.name)
            if i is None:
                missing = int(np.ceil(self.needed[self._smallest])) - client.memory_bytes
                part = HolderPlan(client.name, "client", False, None, {}, client.memory_bytes, lacking_bytes=missing)
                parts.append(part)
                continue
            by_name, used = held[i]
            parts.append(
                HolderPlan(
                    client.name,
                    "client",
                    available=True,
                    split=int(choice.splits[i]),
                    ranks=by_name,
                    declared_bytes=client.memory_bytes,
                    predicted_bytes=used - int(self._unread[i]),
                    rows=int(choice.rows[i]),
                    group=int(choice.group[i]),
                    every=int(choice.every[i]),
                    offset=int(choice.offset[i]),
                    stored="codes" if choice.codes[i] else "dense",
                    wire=wires[int(problem.kind[i])] if self._pace.wire == "planned" else "",
                    weight=self._weight(i, share),
                    captured_share=share[i] * gains[i],
                )
            )
        at_server = server_ranks[0] if common is None else np.full(len(problem.worth), common)
        first = int(choice.splits.min())
        flags = cost.model.weight_layer >= first
        passing = (share[:, None] * (choice.splits[:, None] <= cost.model.weight_layer)).sum(axis=0)
        deep_gain = float((at_levels(problem.values, at_server) * passing) @ discount)
        captured = float(share @ gains) + deep_gain
        deep_ranks = dict(zip(map(str, names[flags]), problem.rank_set[at_server[flags]].tolist(), strict=True))
        whole = captured if captured > 0 else 1.0
        parts = [replace(part, captured_share=float(part.captured_share / whole)) for part in parts]
        deep = HolderPlan(
            "server",
            "server",
            available=True,
            split=first,
            ranks=deep_ranks,
            declared_bytes=self._server.memory_bytes,
            predicted_bytes=self._server_bytes(choice, deep_ranks),
            captured_share=deep_gain / whole,
        )
        rough = Plan(
            cost.model.layers,
            cost.with_working_copy(deep),
            tuple(parts),
            0.0,
            captured,
            self._source,
            cost.model.servers,
            groups=choice.groups,
            gamma=problem.constants.gamma,
            rows=float(brought.sum()) * cost.model.job.grad_accumulation,
        )
        return rough, lacking

    def _timed(self, plan: Plan, choice: Choice) -> Plan:
        """``plan`` with its seconds, by the virtual clock."""
        clock = VirtualClock(self._cost, self._clients, self._server)
        seconds, busy = clock.step_s(plan), clock.busy_s(plan)
        parts = tuple(replace(part, step_time_s=busy.get(part.name, 0.0)) for part in plan.clients)
        return replace(
            plan,
            server=replace(plan.server, step_time_s=busy[plan.server.name]),
            clients=parts,
            makespan_s=seconds,
            exchange_s=choice.exchange_s,
            speed=Speed(plan.rows / seconds, self.bound, clock.binding(plan)),
        )

    def _weight(self, client: int, share: Floats) -> float:
        """Weight of a client's loss beside its tokens' number."""
        if self._pace.weights == "tokens":
            return 1.0
        return float(min(self._shares[client] / share[client], MAX_WEIGHT))

    def _levels(self, split: int, rows: int, codes: int, kinds: Ints) -> Levels:
        """Levels of clients of some kinds at one split, number of rows and stored form, ``(M, W)``."""
        known = self._known_levels
        if new := [kind for kind in dict.fromkeys(kinds.tolist()) if (split, rows, codes, kind) not in known]:
            levels = self._rule.levels(self._holders(split, rows, codes, np.array(new)))
            known |= {(split, rows, codes, kind): own for kind, own in zip(new, levels, strict=True)}
        return np.stack([known[split, rows, codes, kind] for kind in kinds.tolist()])

    def _holders(self, split: int, rows: int, codes: int, kinds: Ints) -> Holders:
        """Clients of some kinds at one split, number of rows and stored form as a rank rule sees them."""
        cost, problem = self._cost, self._problem
        tables = cost.client_memory(rows, "codes" if codes else "dense")
        held = problem.held[split]
        prices = held * tables.per_rank
        slack = problem.memory[kinds] - tables.constant[split] - self._rank * prices.sum()
        names = tuple(w.name for w in cost.model.weights)
        return Holders(
            "client", names, problem.values, problem.worth, held.astype(np.int64), prices, slack, self._rank_set
        )

    def _server_levels(self, choice: Choice) -> tuple[tuple[Ints, int], float]:
        """The server's levels, with the largest common one, and the bytes that it lacks at the smallest ranks."""
        cost, problem = self._cost, self._problem
        turns = self._turns(choice)
        counts = np.repeat(cost.model.clients_at(choice.splits)[None], len(turns), axis=0)
        constant, prices = cost.server.constant(counts, turns), cost.server.per_rank(counts, turns)
        needed = constant + self._rank * prices.sum(axis=1)
        worst, names = int(needed.argmax()), tuple(w.name for w in cost.model.weights)
        joined = cost.model.joined_clients(counts[:1])[:, cost.model.weight_layer]

        def holders_of(fixed: float, price: Floats) -> Holders:
            slack = np.array([self._server.memory_bytes - fixed - self._rank * price.sum()])
            return Holders("server", names, problem.values, problem.worth, joined, price[None], slack, self._rank_set)

        holders = holders_of(float(constant[worst]), prices[worst])
        levels = self._rule.levels(holders)[0].astype(np.int64)
        common = int(holders.largest_common_levels()[0])
        for ranks in (self._rank_set[levels], np.full(len(levels), self._rank_set[max(common, 0)])):
            if (constant + prices @ ranks).max() > max(self._server.memory_bytes, needed[worst]):
                # With larger ranks a turn of more rows takes more: what no turn exceeds.
                holders = holders_of(float(constant.max()), prices.max(axis=0))
                levels = self._rule.levels(holders)[0].astype(np.int64)
                common = int(holders.largest_common_levels()[0])
                break
        return (levels, common), float(needed[worst] - self._server.memory_bytes)

    def _turns(self, choice: Choice) -> Ints:
        """Examples that join each turn of the server at each split, ``(G, L + 1)``."""
        one = choice.splits[None], choice.rows[None], choice.group[None]
        return turns_of(self._cost.model, *one, choice.groups)[0]

    def _server_bytes(self, choice: Choice, ranks: Mapping[str, int]) -> int:
        cost = self._cost
        turns = self._turns(choice)
        counts = np.repeat(cost.model.clients_at(choice.splits)[None], len(turns), axis=0)
        vector = cost.model.rank_vector(ranks)
        return round(float((cost.server.constant(counts, turns) + cost.server.per_rank(counts, turns) @ vector).max()))


MAX_WEIGHT = 4.0
"""Most that a client's loss is weighted by beside its tokens, with ``pace.weights: data``."""
