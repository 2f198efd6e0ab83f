"""Long waits print their cause; short ones print nothing."""

from __future__ import annotations

import io
import threading

import pytest

from hsplit import waiting
from hsplit.waiting import Waiting, status, track


class Heard(io.StringIO):
    """Lets a test wait for lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self._lines, self.all = lines, threading.Event()

    def write(self, text: str, /) -> int:
        written = super().write(text)
        if self.getvalue().count("\n") >= self._lines:
            self.all.set()
        return written


def test_it_is_said_again_and_again() -> None:
    stream = Heard(lines=3)
    with Waiting("starting Ray", 0.01, stream=stream):
        assert stream.all.wait(60)
    for line in stream.getvalue().splitlines():
        assert line.startswith("waiting: starting Ray (") and line.endswith(" s)")
    ended = stream.getvalue()
    assert stream.getvalue() == ended


def test_only_the_innermost_speaks_and_of_what_it_waits_for_now() -> None:
    outer, inner = Heard(lines=1), Heard(lines=1)
    with Waiting("outer", 0.01, stream=outer), Waiting("inner", 60, stream=inner) as waiting:
        assert not outer.all.wait(0.2) and inner.getvalue() == ""
        waiting.update("something else")
    stream = Heard(lines=1)
    with Waiting("before", 0.01, stream=stream) as again:
        again.update("after")
        stream.truncate(0)
        assert stream.all.wait(60) and "after" in stream.getvalue()


def test_a_stream_that_is_closed_ends_nothing() -> None:
    stream = io.StringIO()
    stream.close()
    with Waiting("x", 0.01, stream=stream) as waiting:
        assert not threading.Event().wait(0.1)
        assert waiting._thread.is_alive()


def test_what_is_short_is_silent(capsys: object) -> None:
    with status("loading") as update:
        update("measuring")
    out, err = capsys.readouterr()  # type: ignore[attr-defined]
    assert out == err == ""


def test_progress_is_said_in_the_line_of_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SHOWN_FROM", 4)
    said = []
    with Waiting("reading the data", 60, stream=io.StringIO()) as outer:
        for _ in track(range(0, 6, 2), "tokenizing", each=2, total=6):
            said.append(outer.detail)
        assert outer.detail == ""
        assert list(track([1, 2], "a few")) == [1, 2]
    assert said == [f": tokenizing, {done} of 6" for done in (0, 2, 4)]
    assert list(track(range(5), "without one that waits")) == list(range(5))
