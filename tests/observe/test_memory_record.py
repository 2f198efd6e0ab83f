from __future__ import annotations

from hsplit.observe.memory_record import memory_record
from hsplit.observe.metrics import PlanRow


def row(round: int, name: str, declared: int, predicted: int, measured: int | None, available: bool = True) -> PlanRow:
    kind = "server" if name == "server" else "client"
    split = 2 if available else None
    return PlanRow(round, name, kind, available, split, 8, declared, predicted, measured, 0.5, None)


def test_worst_round_is_the_largest_part_of_what_was_declared_then() -> None:
    rows = [
        *(row(0, "server", 900, 300, 290), row(0, "a", 100, 90, 80)),
        *(row(1, "server", 900, 300, 290), row(1, "a", 100, 90, 95)),
        # less memory taken than before, but also less declared
        *(row(2, "server", 900, 300, 310), row(2, "a", 50, 45, 52)),
        *(row(3, "server", 900, 300, 280), row(3, "a", 50, 45, 40)),
    ]
    a, server = memory_record(rows)
    assert (a.name, server.name) == ("a", "server")
    assert (a.last.round, a.worst.round, a.over_predicted, a.over_declared) == (3, 2, (1, 2), (2,))
    assert a.mark == "over declared"
    assert (server.worst.round, server.over_predicted, server.over_declared) == (2, (2,), ())
    assert server.mark == "over predicted"


def test_without_measurements_the_worst_is_what_was_predicted() -> None:
    (a,) = memory_record([row(0, "a", 100, 70, None), row(1, "a", 100, 90, None), row(2, "a", 200, 90, None)])
    assert (a.worst.round, a.mark) == (1, "")


def test_of_equal_rounds_the_last_is_the_worst() -> None:
    (a,) = memory_record([row(n, "a", 100, 70, 60) for n in range(4)])
    assert a.worst.round == 3


def test_a_client_that_takes_no_part_keeps_to_its_budget() -> None:
    rows = [row(0, "a", 100, 70, 60), row(1, "a", 1, 0, None, available=False)]
    (a,) = memory_record(rows)
    assert (a.last.available, a.worst.round, a.mark) == (False, 0, "")


def test_no_rows_are_no_record() -> None:
    assert memory_record([]) == []
