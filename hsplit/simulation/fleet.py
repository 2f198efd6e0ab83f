"""Who is there in each round and how fast its link is: drawn by a seed, or read from a trace."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hsplit.errors import InputError, os_reason
from hsplit.scheduling.budgets import ClientBudget
from hsplit.scheduling.counted_model import Floats

LINK_MEMORY = 0.8
"""Correlation of a drawn link's logarithm from one round to the next."""
_COLUMNS = ["round", "client", "bandwidth_mbps"]


@dataclass(frozen=True)
class Traffic:
    """What happens to the fleet in a simulation.

    Attributes:
        leave: probability that a client that is there is gone in the next round.
        back: probability that one that is gone is back in the next.
        variation: coefficient of variation of a link's bandwidth about its declared value, over the rounds.
        trace: bandwidth in bit/s by round and client, each until the client's next; 0 means that it is not there.
    """

    leave: float = 0.0
    back: float = 0.5
    variation: float = 0.0
    trace: Mapping[int, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        for option, value in (("--leave", self.leave), ("--return", self.back)):
            if not 0 <= value <= 1:
                raise InputError(f"{option}: must be a probability from 0 to 1 (got {value:g})")
        if not 0 <= self.variation <= 100:
            raise InputError(f"--link-variation: must be from 0 to 100 (got {self.variation:g})")


@dataclass(frozen=True)
class Budget:
    """A client's budget in a round: bytes, FLOP/s, bit/s, seconds."""

    name: str
    memory_bytes: int
    flops: float
    bandwidth_bps: float
    latency_s: float


@dataclass(frozen=True)
class Links:
    """The fleet in one round.

    Attributes:
        present: who is there, ``(N,)``.
        factor: each link's bandwidth now, in parts of the declared one, ``(N,)``.
        traced_bps: its bandwidth by the trace instead, where that has one; otherwise NaN, ``(N,)``.
    """

    present: NDArray[np.bool_]
    factor: Floats
    traced_bps: Floats

    def budgets(self, clients: Sequence[ClientBudget]) -> list[Budget]:
        """``clients`` with their links as they are in this round."""
        drawn = np.isnan(self.traced_bps) | (self.traced_bps == 0)
        now = np.where(drawn, np.array([c.bandwidth_bps for c in clients]) * self.factor, self.traced_bps)
        return [
            Budget(c.name, c.memory_bytes, c.flops, bps, c.latency_s)
            for c, bps in zip(clients, now.tolist(), strict=True)
        ]


def links(clients: Sequence[ClientBudget], traffic: Traffic, seed: int) -> Iterator[Links]:
    """The fleet in round 1, 2 and so on; the same for the same seed.

    Everybody is there in the first round, as far as a trace does not say otherwise.
    """
    draw = np.random.default_rng(seed)
    place = {client.name: index for index, client in enumerate(clients)}
    count, spread = len(clients), math.sqrt(math.log1p(traffic.variation**2))
    here = np.ones(count, dtype=bool)
    swing = draw.standard_normal(count)
    traced = np.full(count, np.nan)
    round_ = 1
    while True:
        for name, bps in (traffic.trace or {}).get(round_, {}).items():
            traced[place[name]] = bps
        # Of mean 1, so that a link has its declared bandwidth on average.
        factor = np.exp(spread * swing - spread**2 / 2)
        yield Links(here & (traced != 0), factor, traced.copy())
        chance = draw.random(count)
        here = np.where(here, chance >= traffic.leave, chance < traffic.back)
        swing = LINK_MEMORY * swing + math.sqrt(1 - LINK_MEMORY**2) * draw.standard_normal(count)
        round_ += 1


def read_trace(path: Path, clients: Sequence[ClientBudget]) -> dict[int, dict[str, float]]:
    """A CSV file with the columns ``round,client,bandwidth_mbps``.

    Returns:
        Bit/s by round and client.

    Raises:
        InputError: it cannot be read, or a line is wrong; the text names it.
    """
    known = {client.name for client in clients}
    found: dict[int, dict[str, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise InputError(f"{path}: its first line must be {','.join(_COLUMNS)}")
            for row in reader:
                round_, name, bps = _entry(row, f"{path}: line {reader.line_num}", known)
                found.setdefault(round_, {})[name] = bps
    except OSError as error:
        raise InputError(f"{path}: {os_reason(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV file in UTF-8") from error
    return found


def _entry(row: Mapping[str, str | None], place: str, known: set[str]) -> tuple[int, str, float]:
    name = row["client"]
    if name not in known:
        raise InputError(f"{place}: client: there is none of the name {name!r} in the cluster")
    try:
        round_, mbps = int(row["round"] or ""), float(row["bandwidth_mbps"] or "")
    except ValueError:
        raise InputError(f"{place}: round and bandwidth_mbps must be numbers") from None
    if round_ < 1 or not 0 <= mbps <= 1e9:
        raise InputError(f"{place}: round must be from 1, and bandwidth_mbps from 0 (not there) to 1e9")
    assert name is not None
    return round_, name, mbps * 1e6
