"""Which clients only compute forward, their layers frozen.

METHOD 1 lets a client hold layers without adapting them. Such a client sends its hidden states and gets no gradient
back, hands in no adapters at the round's end, and only follows what others have learned of its layers. Behind a slow
link a step takes half as long then, and training its few layers captures little.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hsplit.scheduling.counted_model import Floats, Ints
from hsplit.scheduling.problem import AHEAD, DOWN, EXCHANGE, PHASES, TURN, UP, Problem
from hsplit.scheduling.ranks import captured_by

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
    phases, gains = problem.times[kind, splits], _gains(problem, splits)
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


def _gains(problem: Problem, splits: Ints) -> Floats:
    """What each client's own layers capture of its own tokens, ``(N,)``."""
    if not problem.coupled:
        gains: Floats = problem.client_gains[problem.kind, splits]
        return gains
    level = problem.uniform_levels(problem.state(splits))[0]
    held: Floats = (problem.held @ problem.worth)[splits]
    return held * captured_by(problem.rank_set)[level]
