"""Several observers of one run: told in turn, and none can end it."""

from __future__ import annotations

from typing import Any

import pytest

from hsplit.observe.observer import Observers
from hsplit.planning.plan import Plan
from tests.observe.conftest import metrics_row


class Told:
    """Writes into ``log`` what it is told; fails where ``fails`` says."""

    def __init__(self, name: str, log: list[Any], fails: str = "") -> None:
        self._name, self._log, self._fails = name, log, fails

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any, **fields: Any) -> None:
            self._log.append((self._name, method, arguments, fields))
            if method == self._fails:
                raise OSError("no connection")

        return call

    def __enter__(self) -> Told:
        self.entered()
        return self

    def __exit__(self, *error: Any) -> None:
        self.left()


def test_each_is_told_everything_in_turn(plan: Plan) -> None:
    log: list[Any] = []
    row = metrics_row(1)
    with Observers(Told("display", log), Told("other", log)) as observers:  # type: ignore[arg-type]
        observers.started("name", ["line"])
        observers.plan(plan)
        observers.step(1, 2, 3, 4, {"phone-0": 1.5}, {"phone-0": "training"})
        observers.round_done(row, [], [])
        observers.note("gone", "lost", client="phone-0", kind="died")
        observers.finished(["done"])
    both = [("display", "other")] * 7
    told = [
        ("entered", (), {}),
        ("started", ("name", ["line"]), {}),
        ("plan", (plan,), {}),
        ("step", (1, 2, 3, 4, {"phone-0": 1.5}, {"phone-0": "training"}), {}),
        ("round_done", (row, [], []), {}),
        ("note", ("gone", "lost"), {"client": "phone-0", "kind": "died"}),
        ("finished", (["done"],), {}),
    ]
    expected = [(name, *what) for names, what in zip(both, told, strict=True) for name in names]
    # The display is left last: it tells of the others.
    assert log == [*expected, ("other", "left", (), {}), ("display", "left", (), {})]


@pytest.mark.parametrize("fails", ["entered", "started", "note", "finished"])
def test_who_fails_is_left_out_and_the_others_are_told(fails: str) -> None:
    log: list[Any] = []
    watching = Told("display", log), Told("failing", log, fails), Told("other", log)
    with Observers(*watching) as observers:  # type: ignore[arg-type]
        observers.started("name", [])
        observers.note("one")
        observers.note("two")
        observers.finished([])
    methods = {name: [m for n, m, *_ in log if n == name] for name in ("display", "failing", "other")}
    assert methods["other"] == ["entered", "started", "note", "note", "finished", "left"]
    upto = methods["other"].index(fails) + 1
    assert methods["failing"] == [*methods["other"][:upto], "left"]
    notes = [arguments[0] for name, method, arguments, _ in log if (name, method) == ("display", "note")]
    assert notes.count("Told has failed and is left out from here on: no connection") == 1


@pytest.mark.parametrize("fails", ["entered", "started", "note", "finished", "left"])
def test_a_display_that_fails_does_not_end_what_it_shows(fails: str, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[Any] = []
    watching = Told("display", log, fails), Told("other", log)
    with Observers(*watching) as observers:  # type: ignore[arg-type]
        observers.started("name", [])
        observers.note("one")
        observers.finished([])
    methods = {name: [m for n, m, *_ in log if n == name] for name in ("display", "other")}
    assert methods["other"] == ["entered", "started", "note", "finished", "left"]
    assert methods["display"][-1] == "left" and methods["display"].count("left") == 1
    told = "note: what shows the run has failed, and the run goes on without: OSError: no connection\n"
    assert capsys.readouterr().err == ("" if fails == "left" else told)
