"""From splits to the plan: each holder's ranks, bytes, seconds and captured share, and which clients freeze (METHOD 5).

METHOD 1 lets a client hold layers without adapting them. Such a client sends its hidden states and gets no gradient
back, uploads no adapters at the round's end, and only follows what others have learned of its layers. Behind a slow
link a step takes half as long then, and training its few layers captures little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit.errors import InputError
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import Floats, Ints
from hsplit.planning.cost.model import CostModel
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.planning.problem import AHEAD, DOWN, EXCHANGE, PHASES, TURN, UP, Problem, State
from hsplit.planning.ranks import Flags, captured_by

FREEZABLE = 0.1
"""The most of what a plan captures that may be given up for time: what is never trained is missing at the end too."""


def worth_freezing(problem: Problem, splits: Ints) -> NDArray[np.bool_]:
    """The clients whose layers are better frozen, ``(N,)``: captured importance per second is largest then.

    Freezing helps with those who hold everybody up. So clients are taken in the order of what it saves them, and the
    best number of them is found by going through them once; equal ones are frozen together.

    Args:
        problem: with nobody frozen.
        splits: everybody's, ``(N,)``.
    """
    cost, kind, count = problem.cost, problem.kind, len(splits)
    none = np.zeros(count, dtype=bool)
    if cost.model.job.residual.max_rank == "full":
        # A residual without a cap has no room set aside for what a frozen client would keep of the restarts.
        return none
    state = problem.state(splits)
    phases, gains = problem.times[kind, splits], problem.client_captured(splits)
    idle = problem.frozen_exchange(everybody=False)[kind, splits]
    ahead = cost.model.job.runs_ahead
    left = (UP, DOWN, EXCHANGE) if ahead else (DOWN, EXCHANGE)
    saved = phases[:, left].sum(axis=1) - idle
    order = np.argsort(-saved, kind="stable")
    # After so many of them: what is left to wait for.
    slowest: Floats = np.zeros((count + 1, PHASES))
    slowest[:, [UP, TURN]] = phases[:, [UP, TURN]].max(axis=0)
    slowest[-1, left] = 0.0
    slowest[:-1, left] = np.maximum.accumulate(phases[order[::-1]][:, left], axis=0)[::-1]
    if ahead:
        slowest[1:, AHEAD] = np.maximum.accumulate(phases[order, UP])
    slowest[1:, EXCHANGE] = np.maximum(slowest[1:, EXCHANGE], np.maximum.accumulate(idle[order]))
    slowest[-1, EXCHANGE] = problem.frozen_exchange(everybody=True)[kind, splits].max()
    lost = np.concatenate([[0.0], np.cumsum(gains[order])]) / count
    captured = problem.captured(state)[0] - lost
    server_s = float(cost.times.server_times(problem.server, state.counts)[0])
    objective = captured / problem.pace(slowest, np.full(count + 1, server_s))
    objective[lost > FREEZABLE * captured[0]] = -np.inf
    # Equal clients are not told apart, and who saves nothing is left alone.
    ordered = saved[order]
    together = np.concatenate([[True], ordered[1:] < ordered[:-1], [True]]) & np.concatenate([[True], ordered > 0])
    best = int(np.where(together, objective, -np.inf).argmax())
    none[order[:best]] = True
    return none


@dataclass(frozen=True)
class _Held:
    """What a client holds: ranks by weight name, its predicted bytes, and what it captures of its own tokens."""

    ranks: dict[str, int]
    predicted_bytes: int
    gain: float


def planned(
    problem: Problem, splits: Ints, clients: Sequence[ClientBudget], smallest_bytes: int, importance: str
) -> Plan:
    """The plan that gives the available clients ``splits`` ``(N,)`` and everybody its ranks.

    Args:
        problem: of the available clients.
        splits: their split points; the server must have room for them.
        clients: every declared client, in the cluster's order.
        smallest_bytes: what the smallest assignment takes, which an unavailable client lacks in part.
        importance: where the scores came from, in words.
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
        )
        parts.append(part)
    deep = _server_part(problem, state, splits, 1.0 - sum(part.captured_share for part in parts))
    makespan = float(problem.makespan(state)[0])
    model = problem.cost.model
    exchange = float(state.slowest[0, -1])
    return Plan(model.layers, deep, tuple(parts), makespan, captured, importance, model.servers, exchange)


def whole_model(
    clients: Sequence[ClientBudget], server: ServerBudget, cost: CostModel, importance: Mapping[str, float]
) -> Plan:
    """The plan of a node that trains every weight: no adapters, so nothing to choose.

    What it captures counts each weight at its full rank, ``g(min(d_out, d_in))``.

    Raises:
        InputError: it does not fit.
    """
    (node,) = clients
    needed = cost.training_bytes
    if node.memory_bytes < needed:
        raise InputError(
            f"server: memory_gb: {node.memory_bytes / 1e9:.3f} is too little to train every weight: that takes"
            f" {needed / 1e9:.3f} GB; raise it, or lower job.batch_size or job.max_length"
        )
    layers, seconds = cost.model.layers, float(cost.times.client_times(node)[cost.model.layers].sum())
    total = sum(importance.values())
    full_rank = captured_by(np.array([min(w.d_out, w.d_in) for w in cost.model.weights]))
    captured = float(full_rank @ np.array([importance[w.name] / total for w in cost.model.weights]))
    part = HolderPlan(node.name, "client", True, layers, {}, node.memory_bytes, needed, seconds, captured_share=1.0)
    deep = HolderPlan("server", "server", True, layers, {}, server.memory_bytes, cost.server_bytes([layers], {}), 0.0)
    return Plan(layers, deep, (part,), seconds, captured, "every weight at its full rank")


def _held_by_clients(problem: Problem, state: State, splits: Ints) -> list[_Held]:
    """Each client's part, ``N`` of them; what is equal is made once."""
    names = np.array([w.name for w in problem.cost.model.weights], dtype=object)
    made: dict[tuple[int, bytes], _Held] = {}
    parts: list[_Held] = [_Held({}, 0, 0.0)] * len(splits)
    for split in np.unique(splits).tolist():
        at_split = np.flatnonzero(splits == split)
        kinds, of_client = np.unique(problem.kind[at_split], return_inverse=True)
        flags = problem.held[split]
        ranks = problem.rank_set[problem.client_levels(state, kinds, split)] * ~problem.frozen[kinds][:, None]
        gains = (captured_by(ranks) @ problem.worth[flags]).tolist()
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
    return HolderPlan(
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
