"""Assignment of clients to servers and rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hsplit.seeds import hash_seed

Ints = NDArray[np.int64]
_Client = TypeVar("_Client")


def served_by(clients: Iterable[str], splits: Mapping[str, int], servers: Sequence[str]) -> dict[str, list[str]]:
    """Deal ``clients`` out over ``servers``, the shallowest split first, in turn.

    At every layer the first server then has the rows of ``ceil(n / S)`` of the ``n`` clients that pass it, and no other
    server has more: memory that is enough for the first is enough for each.

    Returns:
        Client names by server; servers without clients are left out.
    """
    # Sorting is stable: equal splits stay in the clients' order.
    order = sorted(clients, key=lambda name: splits[name])
    shares = {server: order[place :: len(servers)] for place, server in enumerate(servers)}
    return {server: share for server, share in shares.items() if share}


def drawn_cohort(present: Sequence[str], seed: int, round_: int, count: int | None) -> list[str]:
    """Draw ``count`` of the clients ``present`` for ``round_``, in their order, by seed, round and name alone."""
    if count is None or count >= len(present):
        return list(present)
    drawn = set(sorted(present, key=lambda name: hash_seed(seed, "cohort", round_, name))[:count])
    return [name for name in present if name in drawn]


def cohorts(clients: Sequence[_Client], most: int | None) -> list[Sequence[_Client]]:
    """Cut ``clients``, in their order, into parts of at most ``most``, for which the servers have reserved memory."""
    size = most or max(len(clients), 1)
    return [clients[start : start + size] for start in range(0, len(clients), size)]


def counts_at_first(counts: Ints, most: int | None, servers: int) -> Ints:
    """Most clients that the first of ``servers`` serves, at the shallowest possible splits, ``(M, L + 1)``.

    Args:
        counts: all clients at each split, ``(M, L + 1)``.
        most: number of clients that train in a round; ``None``: all.
        servers: number of servers.
    """
    joined = np.cumsum(counts, axis=1)
    if most is not None:
        joined = np.minimum(joined, most)
    served: Ints = np.diff(-(-joined // servers), axis=1, prepend=0)
    return served


def counts_of_deepest(counts: Ints, most: int | None) -> Ints:
    """Select the ``most`` clients of the deepest splits, ``(M, L + 1)`` as ``counts``."""
    if most is None:
        return counts
    return counts_at_first(counts[:, ::-1], most, 1)[:, ::-1]
