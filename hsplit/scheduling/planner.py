"""Split points and ranks for everybody: captured importance per second of makespan (METHOD 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Policy
from hsplit.errors import InputError
from hsplit.scheduling.cost import ClientBudget, CostModel, Floats, Ints, ServerBudget
from hsplit.scheduling.plan import HolderPlan, Plan
from hsplit.scheduling.ranks import captured_by, greedy_levels

EQUAL = "equal importance per parameter (no score yet)"
# The most deadlines that are scanned; beyond it, evenly spread ones among the distinct client times.
MAX_DEADLINES = 256
# How many of the starts are searched from.
SEARCHED_STARTS = 4
# An improvement smaller than this, relative, is rounding.
TOLERANCE = 1e-9


def plan(
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, float],
    policy: Policy,
    current: Plan | None = None,
    source: str = EQUAL,
) -> Plan:
    """Who holds which layers at which ranks.

    Args:
        clients: every declared client; those that fit nothing are in the plan as unavailable.
        server: the server's budget.
        cost: what splits and ranks cost.
        importance: ``H_w`` by weight name, for every adapted weight.
        policy: its ``split`` and ``ranks``.
        current: the plan in force, a start of the search.
        source: where the importance comes from, in words.

    Raises:
        InputError: the policy's split is no layer of the model, no client fits, or the server does not.
    """
    if isinstance(policy.split, int) and policy.split > cost.layers:
        raise InputError(
            f"policy: split: must be at most {cost.layers}, the model's number of layers (got {policy.split})"
        )
    smallest = policy.split if isinstance(policy.split, int) else 1
    ranks = _rank_choices(cost, policy)
    needed = _minimal_bytes(cost, int(ranks[0]))
    available = [c for c in clients if c.memory_bytes >= needed[smallest]]
    if not available:
        raise _no_client(clients, float(needed[smallest]), smallest, int(ranks[0]))
    problem = Problem(available, server, cost, importance, ranks, coupled=policy.ranks != "importance")
    if policy.split == "planned":
        splits = _search(problem, current)
    elif policy.split == "uniform":
        splits = _best(
            [np.full(len(available), k) for k in range(1, int(problem.deepest.min()) + 1)], problem
        )
    else:
        splits = np.full(len(available), smallest)
    return _as_plan(problem, splits, clients, int(needed[smallest]), source)


def _rank_choices(cost: CostModel, policy: Policy) -> Ints:
    if isinstance(policy.ranks, int):
        return np.array([policy.ranks], dtype=np.int64)
    return np.array(cost.rank_set, dtype=np.int64)


def _minimal_bytes(cost: CostModel, rank: int) -> Floats:
    """What each split needs of a client with every weight at ``rank``: ``(L + 1,)``."""
    held = np.arange(cost.layers + 1)[:, None] > cost.weight_layer
    needed: Floats = cost.client_constant + rank * (held @ cost.client_per_rank)
    return needed


def _no_client(clients: Sequence[ClientBudget], needed: float, split: int, rank: int) -> InputError:
    closest = max(clients, key=lambda c: c.memory_bytes)
    return InputError(
        f"clients: none has the memory for {split} layer{'' if split == 1 else 's'} at rank {rank}: that takes"
        f" {needed / 1e9:.3f} GB, and {closest.name} has the most with {closest.memory_bytes / 1e9:.3f};"
        " raise memory_gb, or lower job.batch_size, job.max_length or job.residual.max_rank"
    )


@dataclass(frozen=True)
class State:
    """What the objective of some splits depends on, one row a variant.

    Attributes:
        counts: clients at each split, ``(M, L + 1)``.
        gain: importance that the clients capture, summed over them, ``(M,)``.
        slowest: largest up, turn and down time of a client, ``(M, 3)``.
        level: with one rank for all, the largest that every client fits, as index into the rank set, ``(M,)``.
    """

    counts: Ints
    gain: Floats
    slowest: Floats
    level: Ints


class Problem:
    """One planning problem over the available clients, with all that can be computed before searching.

    Args:
        clients: the available clients, ``N`` of them.
        server, cost, importance: as for :func:`plan`.
        rank_set: ranks to choose from, ``(Q,)``.
        coupled: one rank for all weights and holders instead of greedy ones.
    """

    def __init__(
        self,
        clients: Sequence[ClientBudget],
        server: ServerBudget,
        cost: CostModel,
        importance: Mapping[str, float],
        rank_set: Ints,
        coupled: bool,
    ) -> None:
        self.clients, self.server, self.cost = clients, server, cost
        self.rank_set, self.coupled = rank_set, coupled
        self.worth: Floats = np.array([importance[w.name] for w in cost.weights], dtype=np.float64)
        kinds: dict[tuple[float, ...], int] = {}
        self.kind: Ints = np.array(
            [
                kinds.setdefault((c.memory_bytes, c.flops, c.bandwidth_bps, c.latency_s), len(kinds))
                for c in clients
            ]
        )
        first = [int(np.flatnonzero(self.kind == k)[0]) for k in range(len(kinds))]
        self.memory: Floats = np.array([clients[i].memory_bytes for i in first], dtype=np.float64)
        self.times: Floats = np.stack([cost.client_times(clients[i]) for i in first])
        self.needed = _minimal_bytes(cost, int(rank_set[0]))
        # Bytes grow with the split, so the splits that fit are those up to the deepest.
        self.deepest_of_kind: Ints = (self.needed <= self.memory[:, None]).sum(axis=1) - 1

    @property
    def deepest(self) -> Ints:
        """Deepest split that each client fits, ``(N,)``."""
        return self.deepest_of_kind[self.kind]

    @cached_property
    def held(self) -> NDArray[np.bool_]:
        """Which weights a client holds at each split, ``(L + 1, W)``."""
        held: NDArray[np.bool_] = np.arange(self.cost.layers + 1)[:, None] > self.cost.weight_layer
        return held

    @cached_property
    def client_levels(self) -> Ints:
        """With one rank for all: index of the largest that a kind of client fits at each split, ``(K, L + 1)``."""
        unit = self.held @ self.cost.client_per_rank
        needed = self.cost.client_constant[:, None] + unit[:, None] * self.rank_set
        levels: Ints = (needed[None] <= self.memory[:, None, None]).sum(axis=2) - 1
        return levels

    @cached_property
    def client_gains(self) -> Floats:
        """Importance that a client of each kind captures at each split if all tokens were its own, ``(K, L + 1)``."""
        kinds, splits = len(self.memory), self.cost.layers + 1
        if self.coupled:
            return np.zeros((kinds, splits))
        table = np.zeros((kinds, splits))
        for split in range(1, splits):
            fitting = np.flatnonzero(self.deepest_of_kind >= split)
            if len(fitting):
                levels = self.client_ranks_at(fitting, split)
                table[fitting, split] = (captured_by(self.rank_set)[levels] * self.held[split]) @ self.worth
        return table

    def client_ranks_at(self, kinds: Ints, split: int) -> NDArray[np.int8]:
        """Greedy levels of clients of ``kinds`` at ``split``, ``(len(kinds), W)``."""
        held = np.broadcast_to(self.held[split], (len(kinds), len(self.worth)))
        slack = self.memory[kinds] - self.needed[split]
        return greedy_levels(slack, held, self.cost.client_per_rank, self.worth, self.rank_set)

    def state(self, splits: Ints) -> State:
        """The state of one assignment ``(N,)``, as a single row."""
        times = self.times[self.kind, splits]
        return State(
            self.cost.clients_at(splits)[None],
            np.array([self.client_gains[self.kind, splits].sum()]),
            times.max(axis=0)[None],
            np.array([self.client_levels[self.kind, splits].min()]),
        )

    def moves(self, splits: Ints, members: Ints, targets: Ints) -> State:
        """The states after moving ``members``, alike and at one split now, to each of ``targets`` ``(M,)``."""
        kind, now = int(self.kind[members[0]]), int(splits[members[0]])
        others = np.ones(len(splits), dtype=bool)
        others[members] = False
        counts = np.repeat(self.cost.clients_at(splits)[None], len(targets), axis=0)
        counts[:, now] -= len(members)
        counts[np.arange(len(targets)), targets] += len(members)
        gains = self.client_gains
        rest = gains[self.kind[others], splits[others]].sum()
        slowest = self.times[self.kind[others], splits[others]].max(axis=0, initial=0.0)
        level = self.client_levels[self.kind[others], splits[others]].min(initial=len(self.rank_set))
        return State(
            counts,
            rest + len(members) * gains[kind, targets],
            np.maximum(slowest, self.times[kind, targets]),
            np.minimum(level, self.client_levels[kind, targets]),
        )

    def objective(self, state: State) -> Floats:
        """Captured importance per second, ``(M,)``; where the server does not fit, minus the bytes that it lacks."""
        lacking = self.server_minimal(state.counts) - self.server.memory_bytes
        return np.where(lacking > 0, -lacking, self.captured(state) / self.makespan(state))

    def makespan(self, state: State) -> Floats:
        """METHOD 5's ``makespan(K)``, seconds (virtual)."""
        total: Floats = state.slowest.sum(axis=1) + self.cost.server_times(self.server, state.counts)
        return total

    def captured(self, state: State) -> Floats:
        """METHOD 5's ``captured(K, r)``."""
        if self.coupled:
            level = np.maximum(np.minimum(state.level, self.server_level(state.counts)), 0)
            captured: Floats = captured_by(self.rank_set)[level] * self.worth.sum()
            return captured
        clients = len(self.clients)
        share = self.cost.joined_clients(state.counts)[:, self.cost.weight_layer] / clients
        own = (captured_by(self.rank_set)[self.server_levels(state.counts)] * share) @ self.worth
        total: Floats = state.gain / clients + own
        return total

    def server_minimal(self, counts: Ints) -> Floats:
        """Bytes of the server with every weight at the smallest rank, ``(M,)``."""
        unit = self.cost.server_per_rank(counts).sum(axis=1)
        total: Floats = self.cost.server_constant(counts) + self.rank_set[0] * unit
        return total

    def server_levels(self, counts: Ints) -> NDArray[np.int8]:
        """Greedy levels of the server, ``(M, W)``."""
        unit = self.cost.server_per_rank(counts)
        joined = self.cost.joined_clients(counts)[:, self.cost.weight_layer]
        slack = self.server.memory_bytes - self.server_minimal(counts)
        return greedy_levels(slack, joined > 0, unit, self.worth * joined, self.rank_set)

    def server_level(self, counts: Ints) -> Ints:
        """With one rank for all: index of the largest that the server fits, ``(M,)``."""
        unit = self.cost.server_per_rank(counts).sum(axis=1)
        needed = self.cost.server_constant(counts)[:, None] + unit[:, None] * self.rank_set
        levels: Ints = (needed <= self.server.memory_bytes).sum(axis=1) - 1
        return levels


def _search(problem: Problem, current: Plan | None) -> Ints:
    """Local search from the best starts."""
    shallowest = np.ones(len(problem.clients), dtype=np.int64)
    starts = [shallowest, *_deadline_starts(problem)]
    scores = [float(problem.objective(problem.state(s))[0]) for s in starts]
    chosen = [starts[i] for i in np.argsort(-np.array(scores), kind="stable")[:SEARCHED_STARTS]]
    if current is not None:
        # First, so that among equals the plan in force stays.
        chosen = [_in_force(problem, current), *chosen]
    return _best([_improved(problem, start) for start in _distinct(chosen)], problem)


def _deadline_starts(problem: Problem) -> list[Ints]:
    """For every deadline: the deepest split of each client that fits and ends by then, at least 1."""
    totals = problem.times.sum(axis=2)[:, 1:]
    fits = np.arange(1, problem.cost.layers + 1) <= problem.deepest_of_kind[:, None]
    deadlines = np.unique(totals[fits])
    if len(deadlines) > MAX_DEADLINES:
        deadlines = deadlines[np.linspace(0, len(deadlines) - 1, MAX_DEADLINES).round().astype(np.int64)]
    # Times grow with the split, so those that end in time are the first ones.
    starts = [
        np.maximum((fits & (totals <= deadline)).sum(axis=1), 1)[problem.kind] for deadline in deadlines
    ]
    return _distinct(starts)


def _in_force(problem: Problem, current: Plan) -> Ints:
    known = {c.name: c.split for c in current.available}
    splits = np.array([known.get(c.name) or 1 for c in problem.clients], dtype=np.int64)
    return np.clip(splits, 1, problem.deepest)


def _distinct(starts: Sequence[Ints]) -> list[Ints]:
    return list({start.tobytes(): start for start in starts}.values())


def _improved(problem: Problem, start: Ints) -> Ints:
    """Move one kind of clients, or one client of it, at a time to its best split, while the objective improves."""
    splits = start.copy()
    best = float(problem.objective(problem.state(splits))[0])
    improving = True
    while improving:
        improving = False
        for kind in range(len(problem.memory)):
            members = np.flatnonzero(problem.kind == kind)
            targets = np.arange(1, problem.deepest_of_kind[kind] + 1)
            for now in np.unique(splits[members]):
                together = members[splits[members] == now]
                for group in (together, together[:1]) if len(together) > 1 else (together,):
                    scores = problem.objective(problem.moves(splits, group, targets))
                    top = int(scores.argmax())
                    if scores[top] > best + TOLERANCE * abs(best):
                        best, improving = float(scores[top]), True
                        splits[group] = targets[top]
                        break
    return splits


def _best(candidates: Sequence[Ints], problem: Problem) -> Ints:
    scores = [float(problem.objective(problem.state(c))[0]) for c in candidates]
    return candidates[int(np.argmax(scores))]


def _as_plan(
    problem: Problem, splits: Ints, clients: Sequence[ClientBudget], smallest_bytes: int, source: str
) -> Plan:
    cost, state = problem.cost, problem.state(splits)
    lacking = float(problem.server_minimal(state.counts)[0]) - problem.server.memory_bytes
    if lacking > 0:
        raise InputError(
            f"server: memory_gb: {problem.server.memory_bytes / 1e9:.3f} is {lacking / 1e9:.3f} GB too little for"
            f" its layers and {len(problem.clients)} clients; raise it, or lower job.batch_size, job.max_length or"
            " job.residual.max_rank"
        )
    coupled_level = int(min(state.level[0], problem.server_level(state.counts)[0]))
    joined = cost.joined_clients(state.counts)[0][cost.weight_layer] > 0

    def named(levels: NDArray[np.int8], held: NDArray[np.bool_]) -> dict[str, int]:
        chosen = np.full(len(held), coupled_level) if problem.coupled else levels
        return {cost.weights[w].name: int(problem.rank_set[chosen[w]]) for w in np.flatnonzero(held)}

    assigned = {c.name: (i, int(splits[i])) for i, c in enumerate(problem.clients)}
    drawn: dict[tuple[int, int], dict[str, int]] = {}
    parts = []
    for client in clients:
        if client.name not in assigned:
            missing = smallest_bytes - client.memory_bytes
            parts.append(
                HolderPlan(
                    client.name,
                    "client",
                    False,
                    None,
                    declared_bytes=client.memory_bytes,
                    lacking_bytes=missing,
                )
            )
            continue
        index, split = assigned[client.name]
        kind = int(problem.kind[index])
        if (kind, split) not in drawn:
            levels = problem.client_ranks_at(np.array([kind]), split)[0]
            drawn[kind, split] = named(levels, problem.held[split])
        ranks = dict(drawn[kind, split])
        seconds = float(problem.times[kind, split].sum())
        predicted = cost.client_bytes(split, ranks)
        parts.append(
            HolderPlan(client.name, "client", True, split, ranks, client.memory_bytes, predicted, seconds)
        )
    own = named(problem.server_levels(state.counts)[0], joined)
    deep = HolderPlan(
        "server",
        "server",
        True,
        int(splits.min()),
        own,
        problem.server.memory_bytes,
        cost.server_bytes(splits.tolist(), own),
        float(cost.server_times(problem.server, state.counts)[0]),
    )
    return Plan(
        cost.layers,
        deep,
        tuple(parts),
        float(problem.makespan(state)[0]),
        float(problem.captured(state)[0]),
        source,
    )
