"""Sharing examples out over clients: at random, in unequal sizes, by label, or by length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hsplit.data.examples import Example
from hsplit.errors import InputError

if TYPE_CHECKING:
    import numpy as np

SMALLEST_SHARE = 2  # one example to train on and one to hold out

PLAIN = ("iid", "label", "length")
"""Partitions without a number of their own."""

PartitionSpec = str | Mapping[str, Any]
_KNOWN = "iid, label, length, {dirichlet: ALPHA}, {unequal: SIGMA} or {shares: [one number for each client]}"


def partition(examples: Sequence[Example], clients: int, spec: PartitionSpec, seed: int) -> list[list[int]]:
    """Share out `examples`: the indices of each client, in ascending order; disjoint, together complete.

    Args:
        examples: to be shared out.
        clients: number of clients.
        spec: ``"iid"``: random, sizes equal to within one. ``"label"``: each label's examples go to one client, the
            larger labels first and always to the client with the fewest so far; with fewer labels than clients the
            largest are shared out evenly, at random, among several. ``"length"``: sizes equal to within one, by the
            length of the text: the first client has the shortest. ``{"dirichlet": alpha}``: for each label the
            clients' shares of it are one draw of ``Dirichlet(alpha)`` (arXiv 1909.06335), a small alpha
            meaning a strong skew. ``{"unequal": sigma}``: random, sizes in proportion to ``LogNormal(0,
            sigma)`` draws. ``{"shares": [...]}``: random, sizes in proportion to these, one for each client.
        seed: the same arguments give the same partition.

    A client that a draw leaves with fewer than two examples gets them from the client that holds the most at that
    moment.

    Raises:
        InputError: for a specification that is none of these, for fewer than two examples a client, and for a
            partition by label of examples without labels.
    """
    import numpy as np

    if clients < 1:
        raise InputError(f"clients: {clients} is too few, at least 1 is needed")
    if len(examples) < SMALLEST_SHARE * clients:
        raise InputError(
            f"data: more clients than examples to share out: {clients} clients need at least "
            f"{SMALLEST_SHARE * clients} examples, {SMALLEST_SHARE} each; there are {len(examples)}"
        )
    rng = np.random.default_rng(seed)
    kind, value = _parsed(spec, clients)
    if kind == "dirichlet":
        shares = _by_skew(examples, clients, value, rng)
    elif kind == "label":
        shares = _by_label(examples, clients, rng)
    elif kind == "length":
        drawn = rng.permutation(len(examples)).tolist()
        shares = _cut(sorted(drawn, key=lambda index: _length(examples[index])), [1.0] * clients)
    else:
        if kind == "iid":
            weights = [1.0] * clients
        else:
            weights = rng.lognormal(0.0, value, clients).tolist() if kind == "unequal" else value
        shares = _cut(rng.permutation(len(examples)).tolist(), weights)
    _fill_up(shares)
    return [sorted(share) for share in shares]


def _parsed(spec: PartitionSpec, clients: int) -> tuple[str, Any]:
    if isinstance(spec, str) and spec in PLAIN:
        return spec, None
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise InputError(f"data.partition: {spec!r} is unknown; give {_KNOWN}")
    ((kind, value),) = spec.items()
    if kind == "dirichlet":
        if not _is_number(value) or value <= 0:
            raise InputError(f"data.partition.dirichlet: {value!r} is not allowed; must be a number above 0")
    elif kind == "unequal":
        if not _is_number(value) or not 0 <= value <= 20:
            raise InputError(f"data.partition.unequal: {value!r} is not allowed; must be a number from 0 to 20")
    elif kind == "shares":
        listing = isinstance(value, Sequence) and not isinstance(value, str)
        if not listing or not all(_is_number(share) and share > 0 for share in value):
            raise InputError(f"data.partition.shares: {value!r} is not allowed; must be a list of numbers above 0")
        if len(value) != clients:
            raise InputError(f"data.partition.shares: has {len(value)} shares; must be {clients}, one for each client")
    else:
        raise InputError(f"data.partition: {kind!r} is unknown; give {_KNOWN}")
    return kind, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _length(example: Example) -> int:
    return len(example.prompt) + len(example.response)


def _labels(examples: Sequence[Example], kind: str) -> dict[str, list[int]]:
    """Return the indices of each label's examples."""
    of_label: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if example.label is None:
            raise InputError(
                f"data.label: a {kind} partition needs a label for each example, and example {index + 1} "
                f"of {len(examples)} has none; set data.label to a column, key or slot, "
                "or data.partition to iid"
            )
        of_label[example.label].append(index)
    return of_label


def _by_label(examples: Sequence[Example], clients: int, rng: np.random.Generator) -> list[list[int]]:
    of_label = _labels(examples, "label")
    labels = sorted(of_label, key=lambda label: (-len(of_label[label]), label))
    # Of fewer labels than clients, always the one with the most examples for a client gets another.
    holders = dict.fromkeys(labels, 1)
    for _ in range(clients - len(labels)):
        crowded = max(labels, key=lambda label: len(of_label[label]) / holders[label])
        holders[crowded] += 1
    parts = [
        part for label in labels for part in _cut(rng.permutation(of_label[label]).tolist(), [1.0] * holders[label])
    ]
    shares: list[list[int]] = [[] for _ in range(clients)]
    for part in sorted(parts, key=len, reverse=True):
        min(shares, key=len).extend(part)
    return shares


def _by_skew(examples: Sequence[Example], clients: int, alpha: float, rng: np.random.Generator) -> list[list[int]]:
    of_label = _labels(examples, "dirichlet")
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(of_label):
        proportions = rng.dirichlet([alpha] * clients).tolist()
        for share, part in zip(shares, _cut(rng.permutation(of_label[label]).tolist(), proportions), strict=True):
            share.extend(part)
    for share in shares:
        rng.shuffle(share)
    return shares


def _cut(indices: list[int], weights: Sequence[float]) -> list[list[int]]:
    """Cut the list into consecutive pieces with sizes in proportion to `weights`, by largest remainder."""
    total = math.fsum(weights)
    exact = [len(indices) * (weight / total) for weight in weights]
    sizes = [math.floor(size) for size in exact]
    order = sorted(range(len(weights)), key=lambda client: (sizes[client] - exact[client], client))
    for client in order[: len(indices) - sum(sizes)]:
        sizes[client] += 1
    ends = [sum(sizes[: client + 1]) for client in range(len(sizes))]
    return [indices[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _fill_up(shares: list[list[int]]) -> None:
    for share in shares:
        while len(share) < SMALLEST_SHARE:
            share.append(max(shares, key=len).pop())
