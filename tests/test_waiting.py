"""Long waits print their cause; short ones print nothing."""

from __future__ import annotations

import io
import threading

from hsplit.waiting import Waiting, status


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
