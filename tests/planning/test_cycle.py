"""The simulation of turns on the virtual clock, against events one by one and against closed forms."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplit.planning.cost.cycle import Turns, simulated_cycle


@st.composite
def turns(draw: st.DrawFn) -> Turns:
    count = draw(st.integers(1, 5))
    seconds = st.floats(0.01, 2.0)

    def each(strategy: st.SearchStrategy[float]) -> np.ndarray:
        return np.array([draw(strategy) for _ in range(count)])

    every = np.array([draw(st.integers(1, 3)) for _ in range(count)])
    at_home = draw(st.booleans())
    return Turns(
        up=each(seconds),
        turn=each(seconds) if at_home else np.zeros(count),
        down=each(seconds),
        forward=each(seconds),
        backward=each(seconds),
        parts=np.array([draw(st.integers(1, 3)) for _ in range(count)]),
        group=np.array([draw(st.integers(0, 2)) for _ in range(count)]),
        every=every,
        offset=np.array([draw(st.integers(0, int(m) - 1)) for m in every]),
        server=np.zeros(count, dtype=np.int64),
        frozen=np.zeros(count, dtype=bool),
        turn_forward=draw(st.floats(0.0, 0.5)),
        turn_backward=draw(st.floats(0.0, 0.5)),
        batches=draw(st.integers(1, 2)),
        at_home=at_home,
        overlaps=True,
        ahead=True,
    )


def by_events(turns: Turns, steps: int) -> float:
    """End of the last backward, by queues of calls that wait for one another, as the actors have them.

    A call is (holder, seconds, calls that it waits for); each holder does its own in order.
    """
    queues: dict[object, list[tuple[float, list[int]]]] = {}
    calls: list[tuple[object, float, list[int]]] = []

    def call(holder: object, seconds: float, after: list[int]) -> int:
        calls.append((holder, seconds, after))
        return len(calls) - 1

    for step in range(steps):
        members = [c for c in range(len(turns.up)) if step % turns.every[c] == turns.offset[c]]
        groups = [[c for c in members if turns.group[c] == g] for g in sorted({int(turns.group[c]) for c in members})]
        for _ in range(turns.batches):
            fronts = {(c, p): call(c, turns.up[c], []) for c in members for p in range(turns.parts[c])}
            order = [(g, p) for g in groups for p in range(max(turns.parts[c] for c in g))]
            served = []
            for group, part in order:
                own = [c for c in group if turns.parts[c] > part]
                seconds = turns.turn_forward + sum(turns.forward[c] for c in own)
                if not turns.at_home:
                    seconds += turns.turn_backward + sum(turns.backward[c] for c in own)
                served.append(call("server", seconds, [fronts[c, part] for c in own]))
            if turns.at_home:
                tails = [
                    {c: call(c, turns.turn[c], [served[i]]) for c in group if turns.parts[c] > part}
                    for i, (group, part) in enumerate(order)
                ]
                served = [
                    call("server", turns.turn_backward + sum(turns.backward[c] for c in own), list(own.values()))
                    for own in tails
                ]
            for i, (group, part) in enumerate(order):
                for c in group:
                    if turns.parts[c] > part:
                        call(c, turns.down[c], [served[i]])
    for index, (holder, _, _) in enumerate(calls):
        queues.setdefault(holder, []).append((index, []))  # type: ignore[arg-type]
    done: dict[int, float] = {}
    free = dict.fromkeys(queues, 0.0)
    place = dict.fromkeys(queues, 0)
    waiting = [(0.0, str(holder), holder) for holder in queues]
    heapq.heapify(waiting)
    while len(done) < len(calls):
        for holder, queue in queues.items():
            while place[holder] < len(queue):
                index = int(queue[place[holder]][0])
                _, seconds, after = calls[index]
                if any(other not in done for other in after):
                    break
                begin = max([free[holder], *(done[other] for other in after)])
                free[holder] = done[index] = begin + seconds
                place[holder] += 1
    return max(done.values())


@settings(deadline=None, max_examples=80)
@given(turns=turns(), steps=st.integers(1, 5))
def test_the_round_ends_when_the_last_of_its_events_does(turns: Turns, steps: int) -> None:
    found = simulated_cycle(turns, 0, steps)
    assert len(found.ends) == steps and (np.diff(found.ends) >= -1e-12).all()
    if any((step % turns.every == turns.offset).any() for step in range(steps)):
        assert found.ends[-1] == pytest.approx(by_events(turns, steps))
    assert found.server_busy <= found.ends[-1] + 1e-9
    assert (found.busy <= found.ends[-1] + 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(turns=turns(), steps=st.integers(1, 5))
def test_nobody_is_slower_for_not_waiting(turns: Turns, steps: int) -> None:
    waiting = simulated_cycle(replace(turns, overlaps=False), 0, steps)
    assert simulated_cycle(turns, 0, steps).ends[-1] <= waiting.ends[-1] * (1 + 1e-9)


@pytest.mark.parametrize("own_s", [0.5, 3.0, 5.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_client_waits_for_its_own_group_alone(own_s: float, groups: int) -> None:
    """Equal clients in equal groups: a step takes the server's work, or a client's own with its group's turn."""
    count, deep_s = 4, 1.0
    ones = np.ones(count, dtype=np.int64)
    turns = Turns(
        up=np.full(count, own_s / 2),
        turn=np.zeros(count),
        down=np.full(count, own_s / 2),
        forward=np.full(count, deep_s / 2),
        backward=np.full(count, deep_s / 2),
        parts=ones,
        group=np.arange(count) % groups,
        every=ones,
        offset=0 * ones,
        server=0 * ones,
        frozen=np.zeros(count, dtype=bool),
        turn_forward=0.0,
        turn_backward=0.0,
        batches=1,
        at_home=False,
        overlaps=True,
        ahead=False,
    )
    ends = simulated_cycle(turns, 0, 8).ends
    step_s = max(count * deep_s, own_s + count / groups * deep_s)
    assert ends[-2] - ends[-3] == pytest.approx(step_s)
    assert math.isclose(simulated_cycle(turns, 3, 8).ends[-1], ends[-1])
