"""What one client at each split costs and brings the server, with the server's ranks as they are (METHOD 5).

With the server's ranks held, captured importance, server seconds and server bytes are sums over clients, so that
the best split of each client can be found without regard to the others. The search proposes by these sums and
decides by the exact objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hsplit.scheduling.counted_model import Floats, Ints
from hsplit.scheduling.problem import Problem
from hsplit.scheduling.ranks import captured_by, increments


@dataclass(frozen=True)
class Prices:
    """One client's effect on the server by its split, and what remains of the server without any.

    Attributes:
        captured: importance that the server captures of it if all tokens were its own, ``(L + 1,)``.
        seconds: of the server's phase; only differences between splits mean something, ``(L + 1,)``.
        bytes: of the server, likewise, ``(L + 1,)``.
        fixed_bytes: what the bytes of all clients add to, so that the sum is the server's bytes.
    """

    captured: Floats
    seconds: Floats
    bytes: Floats
    fixed_bytes: float


def server_prices(problem: Problem, counts: Ints, levels: Ints) -> Prices:
    """The prices at ``counts`` ``(L + 1,)``: a client is moved to each split and what that changes is taken.

    Args:
        problem: whose server.
        counts: clients at each split.
        levels: the server's ranks, as indices into the rank set, ``(W,)``.
    """
    cost = problem.cost
    layers, servers = cost.model.layers, cost.model.servers
    splits = np.arange(layers + 1)
    # Each server as full as the first one, and one client moved at each: a client alone need not change the first.
    own = cost.model.served(counts[None])
    base = servers * own
    moved = np.repeat(base, layers + 1, axis=0)
    moved[:, int(own.argmax())] -= servers
    moved[splits, splits] += servers
    # How much of that is one client's, if not all train, or each server serves a part of them.
    share = own.sum() / counts.sum()
    rows, ranks = np.concatenate([base, moved]), problem.rank_set[levels]
    seconds = cost.times.server_times(problem.server, rows)
    size = cost.server.constant(rows) + cost.server.per_rank(rows) @ ranks
    by_layer = np.bincount(
        cost.model.weight_layer, weights=captured_by(problem.rank_set)[levels] * problem.worth, minlength=layers
    )
    # A client at split k has its rows joined at the layers from k on.
    captured = np.append(np.cumsum(by_layer[::-1])[::-1], 0.0)
    relative = share * (size[1:] - size[0])
    return Prices(captured, share * (seconds[1:] - seconds[0]), relative, float(size[0] - counts @ relative))


def next_byte(problem: Problem, counts: Ints, levels: Ints) -> float:
    """What the server's next byte would capture, of all tokens, if ranks were not whole: 0 with all at the top."""
    steps, gains = increments(problem.rank_set)
    unit = problem.cost.server.per_rank(counts[None])[0]
    joined = problem.cost.model.joined_clients(counts[None])[0][problem.cost.model.weight_layer]
    open_ = np.flatnonzero((joined > 0) & (levels < len(steps)))
    if not len(open_):
        return 0.0
    next_ = levels[open_]
    gain = problem.worth[open_] * joined[open_] / len(problem.clients) * gains[next_]
    return float((gain / (unit[open_] * steps[next_])).max())
