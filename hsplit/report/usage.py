"""Memory and time used by each holder: peaks against its budget, and the phases of a local step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from hsplit.config.cluster import is_server
from hsplit.observe.tables import PHASES, MetricsRow, PlanRow, TimingRow

ARITHMETIC = ("forward", "tail", "backward", "optimizer")
"""The phases that compute the model."""
_OVERHEAD = tuple(phase for phase in PHASES if phase not in (*ARITHMETIC, "waiting"))


@dataclass(frozen=True)
class HolderSteps:
    """A holder's mean local step over the rounds that it took part in.

    Attributes:
        name: the holder's name.
        seconds: wall seconds a step by phase, all ``PHASES``; together the wall time of a step.
    """

    name: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class StepShares:
    """Shares, from 0 to 1, of a local step's wall time, each the mean over rounds.

    Attributes:
        arithmetic: the model's arithmetic on the critical path.
        overhead: the phases that are neither arithmetic nor waiting, by holder (True: the server; False: the client
            that is busy longest) and phase; the largest first, without those of no time.
        idle: neither that client nor the server is busy: messages in transit, waiting for a core.
    """

    arithmetic: float
    overhead: Mapping[tuple[bool, str], float]
    idle: float


def holder_steps(timing: Iterable[TimingRow], metrics: Sequence[MetricsRow]) -> list[HolderSteps]:
    """Return every holder's mean step, clients first, in the order of their appearance.

    Args:
        timing: rows of ``timing.csv``.
        metrics: rows of ``metrics.csv``, oldest first; rounds without a known number of steps are left out.
    """
    steps = {row.round: row.step - before.step for before, row in pairwise(metrics) if row.round == before.round + 1}
    seconds: dict[str, dict[str, float]] = {}
    rounds: dict[str, set[int]] = defaultdict(set)
    for row in timing:
        if steps.get(row.round, 0) > 0:
            seconds.setdefault(row.name, dict.fromkeys(PHASES, 0.0))[row.phase] += row.seconds
            rounds[row.name].add(row.round)
    means = []
    for name, own in seconds.items():
        count = sum(steps[round] for round in rounds[name])
        means.append(HolderSteps(name, {phase: value / count for phase, value in own.items()}))
    return sorted(means, key=lambda holder: is_server(holder.name))


def step_shares(timing: Iterable[TimingRow]) -> StepShares | None:
    """Return shares of arithmetic, overhead and idle time in a local step's wall time; None without any time.

    The critical path of a round has the arithmetic of the client with the most arithmetic, plus the server's; its share
    of the round's wall time is averaged over rounds, with equal weights.

    Limits:

    - Times are summed over a round before the slowest client is found: if another client is the slowest in each step,
      the path is longer than counted.
    - Client and server count as working in turn. Simultaneous work (on different parts of a batch, or an optimizer
      during the other's backward pass) counts twice, so the shares, and even the arithmetic's alone, may exceed 1;
      ``idle`` is never below 0.
    - The client with the most arithmetic may differ from the one that is busy longest, which provides the overhead: a
      client that is paced, or packs slowly, may keep the others waiting with less arithmetic.
    - Seconds are wall time: arithmetic that waits for a core within its phase, on a shared machine, counts as
      arithmetic.
    - Validation, the importance probe, aggregation and moves are not part of a local step.
    """
    by_round: dict[int, dict[str, dict[str, float]]] = {}
    for row in timing:
        holder = by_round.setdefault(row.round, {}).setdefault(row.name, dict.fromkeys(PHASES, 0.0))
        holder[row.phase] += row.seconds
    rounds = [shares for holders in by_round.values() if (shares := _shares(holders)) is not None]
    if not rounds:
        return None
    overhead = {part: fmean(shares.overhead[part] for shares in rounds) for part in rounds[0].overhead}
    largest_first = sorted(overhead.items(), key=lambda item: item[1], reverse=True)
    return StepShares(
        arithmetic=fmean(shares.arithmetic for shares in rounds),
        overhead={part: share for part, share in largest_first if share > 0},
        idle=fmean(shares.idle for shares in rounds),
    )


def _shares(holders: Mapping[str, Mapping[str, float]]) -> StepShares | None:
    """Return the shares of one round, from its seconds by holder and phase."""
    # all holders' rows sum to the same wall time, except a holder's that was lost during the round
    wall_s = max(sum(own.values()) for own in holders.values())
    if wall_s <= 0:
        return None
    nothing = dict.fromkeys(PHASES, 0.0)
    # Several servers work side by side, like clients.
    server = max((own for name, own in holders.items() if is_server(name)), key=_busy_s, default=nothing)
    clients = [own for name, own in holders.items() if not is_server(name)] or [nothing]
    busiest = max(clients, key=_busy_s)
    arithmetic_s = max(map(_arithmetic_s, clients)) + _arithmetic_s(server)
    return StepShares(
        arithmetic=arithmetic_s / wall_s,
        overhead={(own is server, phase): own[phase] / wall_s for own in (busiest, server) for phase in _OVERHEAD},
        idle=max(0.0, 1 - (_busy_s(busiest) + _busy_s(server)) / wall_s),
    )


def _arithmetic_s(seconds: Mapping[str, float]) -> float:
    return sum(seconds[phase] for phase in ARITHMETIC)


def _busy_s(seconds: Mapping[str, float]) -> float:
    return sum(value for phase, value in seconds.items() if phase != "waiting")


# -- memory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HolderMemory:
    """A holder's memory over the rounds.

    Attributes:
        last: its row of the last round in the table.
        worst: its row of the round with the largest measured peak relative to the budget declared for that round; by
            the predictions, if nothing was measured.
        over_predicted, over_declared: rounds with a measured peak above the prediction, or above the declared budget.
    """

    last: PlanRow
    worst: PlanRow
    over_predicted: tuple[int, ...]
    over_declared: tuple[int, ...]

    @property
    def name(self) -> str:
        """The holder's name."""
        return self.last.name

    @property
    def mark(self) -> str:
        """Name of the limit that a measured peak exceeded; empty if none did."""
        if self.over_declared:
            return "over declared"
        return "over predicted" if self.over_predicted else ""


def memory_record(rows: Iterable[PlanRow]) -> list[HolderMemory]:
    """Return the record of every holder in the last round of ``rows`` (all of ``plan.csv``), clients first.

    A client that takes no part in a round has no prediction or measurement in it, and keeps to its budget.
    """
    by_name: dict[str, list[PlanRow]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    last_round = max((row.round for own in by_name.values() for row in own), default=0)
    records = [_record(own) for own in by_name.values() if own[-1].round == last_round]
    return sorted(records, key=lambda record: record.last.kind != "client")


def _record(rows: list[PlanRow]) -> HolderMemory:
    measured = [row for row in rows if row.measured_bytes is not None]

    def part(row: PlanRow) -> float:
        size = row.predicted_bytes if row.measured_bytes is None else row.measured_bytes
        return size / max(row.declared_bytes, 1)

    return HolderMemory(
        last=rows[-1],
        # the latest of equals, so that a run without change shows its last round
        worst=max(reversed(measured or rows), key=part),
        over_predicted=tuple(row.round for row in measured if (row.measured_bytes or 0) > row.predicted_bytes),
        over_declared=tuple(row.round for row in measured if (row.measured_bytes or 0) > row.declared_bytes),
    )
