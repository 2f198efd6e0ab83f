"""From splits to the plan: each holder's ranks, bytes, seconds and captured share (METHOD 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsplit.config import Objective
from hsplit.errors import InputError
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.importance import Score, size_of
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.problem import Problem, State
from hsplit.planning.ranks import Flags, at_levels, captured_by


@dataclass(frozen=True)
class _Held:
    """A client's ranks by weight name, its predicted bytes, and the importance that it captures of its own tokens."""

    ranks: dict[str, int]
    predicted_bytes: int
    gain: float


def planned(
    problem: Problem, splits: Ints, clients: Sequence[ClientBudget], smallest_bytes: int, importance: str
) -> Plan:
    """Make the plan in which the available clients have ``splits`` ``(N,)``.

    Args:
        problem: of the available clients.
        splits: their split points; the server must have room for them.
        clients: every declared client, in the cluster's order.
        smallest_bytes: memory that the smallest assignment takes, more than an unavailable client has.
        importance: where the scores come from, in words.
    """
    state = problem.state(splits)
    captured = float(problem.captured(state)[0])
    held = _held_by_clients(problem, state, splits)
    seconds = problem.times[:, :, :-1].sum(axis=2)[problem.kind, splits].tolist()
    placed = {c.name: i for i, c in enumerate(problem.clients)}
    parts = []
    for client in clients:
        i = placed.get(client.name)
        if i is None:
            missing = smallest_bytes - client.memory_bytes
            parts.append(HolderPlan(client.name, "client", False, None, {}, client.memory_bytes, lacking_bytes=missing))
            continue
        part = HolderPlan(
            client.name,
            "client",
            available=True,
            split=int(splits[i]),
            ranks=held[i].ranks,
            declared_bytes=client.memory_bytes,
            predicted_bytes=held[i].predicted_bytes,
            step_time_s=seconds[i],
            captured_share=held[i].gain / len(problem.clients) / captured if captured > 0 else 0.0,
            # A single node brings as many of each client's data.
            rows=0 if problem.cost.model.whole else problem.cost.model.job.batch_size,
        )
        parts.append(part)
    deep = _server_part(problem, state, splits, 1.0 - sum(part.captured_share for part in parts))
    makespan = float(problem.makespan(state)[0])
    model = problem.cost.model
    rows = model.job.batch_size * model.job.grad_accumulation * len(problem.clients)
    exchange = float(state.slowest[0, -1])
    return Plan(
        model.layers,
        deep,
        tuple(parts),
        makespan,
        captured,
        importance,
        model.servers,
        exchange,
        gamma=problem.constants.gamma,
        rows=rows,
    )


def whole_model(
    clients: Sequence[ClientBudget],
    server: ServerBudget,
    cost: CostModel,
    importance: Mapping[str, Score],
    objective: Objective,
) -> Plan:
    """Make the plan of a node that trains every weight: no adapters, so nothing to choose.

    Its captured importance counts each weight at its full rank, ``g(min(d_out, d_in))``.

    Raises:
        InputError: the node has too little memory.
    """
    (node,) = clients
    needed = cost.training_bytes
    if node.memory_bytes < needed:
        raise InputError(
            f"server: memory_gb: {node.memory_bytes / 1e9:.3f} is too little to train every weight: that takes"
            f" {needed / 1e9:.3f} GB; raise it, or lower job.batch_size or job.max_length"
        )
    layers, seconds = cost.model.layers, float(cost.times.client_times(node)[cost.model.layers].sum())
    sizes = np.array([size_of(importance[w.name]) for w in cost.model.weights])
    full_rank = captured_by(np.array([min(w.d_out, w.d_in) for w in cost.model.weights]), objective.rho)
    captured = float(full_rank @ (sizes / sizes.sum()))
    part = HolderPlan(node.name, "client", True, layers, {}, node.memory_bytes, needed, seconds, captured_share=1.0)
    deep = HolderPlan("server", "server", True, layers, {}, server.memory_bytes, cost.server_bytes([layers], {}), 0.0)
    rows, source = cost.model.job.batch_size * cost.model.job.grad_accumulation, "every weight at its full rank"
    return Plan(layers, deep, (part,), seconds, captured, source, gamma=objective.gamma, rows=rows)


def _held_by_clients(problem: Problem, state: State, splits: Ints) -> list[_Held]:
    """Each client's part, ``N`` of them; equal parts are one object."""
    names = np.array([w.name for w in problem.cost.model.weights], dtype=object)
    discount = problem.discounts(state)[0][problem.cost.model.weight_layer]
    made: dict[tuple[int, bytes], _Held] = {}
    parts: list[_Held] = [_Held({}, 0, 0.0)] * len(splits)
    for split in np.unique(splits).tolist():
        at_split = np.flatnonzero(splits == split)
        kinds, of_client = np.unique(problem.kind[at_split], return_inverse=True)
        flags = problem.held[split]
        levels = problem.client_levels(state, kinds, split)[:, flags]
        ranks = problem.rank_set[levels] * ~problem.frozen[kinds][:, None]
        gains = (at_levels(problem.values[flags], levels) * (ranks > 0) @ discount[flags]).tolist()
        held = list(map(str, names[flags]))
        of_kind = []
        for row, gain in zip(ranks, gains, strict=True):
            key = (split, row.tobytes())
            if key not in made:
                by_name = dict(zip(held, row.tolist(), strict=True))
                made[key] = _Held(by_name, problem.cost.client_bytes(split, by_name), gain)
            of_kind.append(made[key])
        for client, kind in zip(at_split.tolist(), of_client.tolist(), strict=True):
            parts[client] = of_kind[kind]
    return parts


def _server_part(problem: Problem, state: State, splits: Ints, share: float) -> HolderPlan:
    cost, levels = problem.cost, problem.server_levels(state)[0]
    held: Flags = cost.model.joined_clients(state.counts)[0][cost.model.weight_layer] > 0
    ranks = {cost.model.weights[w].name: int(problem.rank_set[levels[w]]) for w in np.flatnonzero(held)}
    part = HolderPlan(
        "server",
        "server",
        available=True,
        split=int(splits.min()),
        ranks=ranks,
        declared_bytes=problem.server.memory_bytes,
        predicted_bytes=cost.server_bytes(splits.tolist(), ranks),
        step_time_s=float(cost.times.server_times(problem.server, state.counts)[0]),
        captured_share=max(share, 0.0),
    )
    return cost.with_working_copy(part)
