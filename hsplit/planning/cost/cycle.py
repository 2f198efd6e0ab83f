"""Simulation of the turns of a round's local steps on the virtual clock (METHOD 8 and 10).

Clients compute and send one after another; the server serves its turns in order, each when its last client has sent.
Deterministic: durations are declared ones, and the order of turns is the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit.planning.cost.counted_model import Floats, Ints

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Turns:
    """Durations of the microbatches of the clients that train, ``C`` of them, in seconds (virtual).

    Attributes:
        up: front and message of one microbatch, ``(C,)``.
        turn: with labels at home, output to the client, tail and its gradient back, ``(C,)``; else 0.
        down: gradient to the client and backward, ``(C,)``.
        forward, backward: of the server over one microbatch, ``(C,)``.
        parts: microbatches of a batch, ``(C,)``.
        group, every, offset: which turn, and the local steps taken part in, ``(C,)`` each.
        server: the server of each, ``(C,)``.
        frozen: needs no gradient, ``(C,)``.
        turn_forward, turn_backward: of the server, once a turn whatever its rows (dequantization).
        batches: accumulated in a step.
        at_home: labels are at the clients.
        overlaps: a client begins its next batch when its own backward is done; else all wait for all.
        ahead: clients that need no gradient are a step ahead.
    """

    up: Floats
    turn: Floats
    down: Floats
    forward: Floats
    backward: Floats
    parts: Ints
    group: Ints
    every: Ints
    offset: Ints
    server: Ints
    frozen: Flags
    turn_forward: float
    turn_backward: float
    batches: int
    at_home: bool
    overlaps: bool
    ahead: bool


@dataclass(frozen=True)
class Cycle:
    """Result of a simulation.

    Attributes:
        ends: seconds from the start to the end of each local step: the servers' last turn of it, and of the last step
            also the clients' backwards, ``(steps,)``.
        finished: seconds at which each client has done its last backward, ``(C,)``.
        busy: seconds that each client computes or sends, ``(C,)``.
        server_busy: seconds that the busiest server computes.
        server_finished: seconds at which the last server has done its last turn.
    """

    ends: Floats
    finished: Floats
    busy: Floats
    server_busy: float
    server_finished: float


def simulated_cycle(turns: Turns, first_step: int, steps: int) -> Cycle:
    """Simulate ``steps`` local steps from ``first_step`` on, with nothing under way before and after."""
    return _Simulation(turns).run(first_step, steps)


class _Simulation:
    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        count, servers = len(turns.up), int(turns.server.max(initial=0)) + 1
        # Time at which each client, and each server, is done with all it has begun.
        self._free, self._busy = np.zeros(count), np.zeros(count)
        self._server_free, self._server_busy = np.zeros(servers), np.zeros(servers)
        self._runs_ahead: Flags = turns.frozen & turns.ahead & (not turns.at_home)

    def run(self, first_step: int, steps: int) -> Cycle:
        turns, ends = self._turns, [0.0, 0.0]
        for step in range(first_step, first_step + steps):
            members = np.flatnonzero(step % turns.every == turns.offset)
            groups = [members[turns.group[members] == group] for group in np.unique(turns.group[members])]
            # A client that needs no gradient is one step ahead, and no further.
            ahead = members[self._runs_ahead[members]]
            self._free[ahead] = np.maximum(self._free[ahead], ends[-2])
            for _ in range(turns.batches):
                if not turns.overlaps:
                    self._wait_for_all(members)
                self._batch(members, groups)
            if not turns.overlaps:
                self._wait_for_all(members)
            ends.append(max(ends[-1], float(self._server_free.max())))
        ends[-1] = max(ends[-1], float(self._free.max(initial=0.0)))
        busy, done = float(self._server_busy.max()), float(self._server_free.max())
        return Cycle(np.array(ends[2:]), self._free, self._busy, busy, done)

    def _wait_for_all(self, members: Ints) -> None:
        waiting = members[~self._runs_ahead[members]]
        now = max(float(self._free[waiting].max(initial=0.0)), float(self._server_free.max()))
        self._free[waiting] = now
        self._server_free[:] = now

    def _work(self, clients: Ints, begin: Floats, seconds: Floats) -> None:
        """Have ``clients`` work for ``seconds`` from ``begin`` on, or from when they are free."""
        self._free[clients] = np.maximum(self._free[clients], begin) + seconds
        self._busy[clients] += seconds

    def _serve(self, clients: Ints, ready: Floats, seconds: Floats, once_s: float) -> Floats:
        """One turn over ``clients``, at their servers; returns the times at which each client's result is there."""
        done = np.zeros(len(clients))
        for server in np.unique(self._turns.server[clients]).tolist():
            own = self._turns.server[clients] == server
            taken = float(seconds[own].sum()) + once_s
            self._server_free[server] = max(float(self._server_free[server]), float(ready[own].max())) + taken
            self._server_busy[server] += taken
            done[own] = self._server_free[server]
        return done

    def _batch(self, members: Ints, groups: Sequence[Ints]) -> None:
        turns, begun = self._turns, self._free.copy()
        self._work(members, self._free[members], (turns.parts * turns.up)[members])
        # Each turn's clients, and the times at which their messages are there.
        each = [
            (clients, begun[clients] + (part + 1) * turns.up[clients])
            for group in groups
            for part in range(int(turns.parts[group].max()))
            if len(clients := group[turns.parts[group] > part])
        ]
        once_s = turns.turn_forward + turns.turn_backward
        if turns.at_home:
            outputs = [self._serve(c, ready, turns.forward[c], turns.turn_forward) for c, ready in each]
            for index, ((clients, _), output) in enumerate(zip(each, outputs, strict=True)):
                self._work(clients, output, turns.turn[clients])
                each[index] = clients, self._free[clients].copy()
            once_s = turns.turn_backward
        served = turns.backward if turns.at_home else turns.forward + turns.backward
        for clients, ready in each:
            done = self._serve(clients, ready, served[clients], once_s)
            trains = ~turns.frozen[clients]
            self._work(clients[trains], done[trains], turns.down[clients[trains]])
