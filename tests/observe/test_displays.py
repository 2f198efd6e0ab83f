from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
from rich.console import Console

from hsplit.observe.displays import LiveDisplay, Pace, PlainDisplay, display_for
from hsplit.observe.observer import Observer
from hsplit.observe.plan_text import plan_changes, plan_lines, plan_table
from hsplit.planning.insight import Bottleneck, Insight, OneMoreGB
from hsplit.planning.plan import HolderPlan, Plan
from tests.observe.conftest import metrics_row


class Ticking:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def recorded(width: int = 110, height: int = 30, colours: Literal["truecolor"] | None = None) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=colours)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def play(display: Observer, plan: Plan, clock: Ticking) -> None:
    display.started("first", ["model  tiny", "dashboard http"])
    display.plan(plan)
    display.round_done(metrics_row(0), [], [])
    for step in range(1, 11):
        clock.now += 6
        losses = {"phone-0": 3.0 - step / 10, "laptop": 2.5}
        display.step(1, 2, step, 20, losses, {"phone-0": "training", "laptop": "training"})
    display.round_done(metrics_row(1), [], [])
    display.note("laptop was late")


@pytest.fixture
def clock() -> Iterator[Ticking]:
    return Ticking()


def test_a_long_end_of_a_round_leaves_the_time_of_the_steps_after_it(clock: Ticking) -> None:
    pace = Pace(clock)
    for step in (1, 2):
        clock.now += 60
        pace.step(step, 4)
    clock.now += 600
    assert str(pace) == "50%, 12 min 00 s elapsed, about 1 min 00 s left"
    pace.step(4, 4)
    assert str(pace) == "100%, 12 min 00 s elapsed"


@pytest.mark.parametrize("resumed", [False, True])
def test_before_the_first_step_it_is_told_what_is_waited_for(plan: Plan, resumed: bool) -> None:
    console = recorded()
    display = LiveDisplay(console=console)
    with display:
        display.started("first", [])
        display.plan(plan)
        if resumed:
            display.note("resumed from round-0001", "resumed")
        else:
            console.print(display._frame())
            assert "preparing: layers, data, and a validation before any training" in written(console)
            display.round_done(metrics_row(0), [], [])
        console.print(display._frame())
        assert ("training goes on" if resumed else "training begins") in written(console)


def test_live_table_shows_what_a_user_must_see(plan: Plan, clock: Ticking) -> None:
    console = recorded()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.finished(["report runs/first/report.html"])
    lines = written(console)
    before, _, last = lines.rpartition("┏")  # the last frame
    phone, laptop, watch, server = (
        next(line for line in last.splitlines() if name in line) for name in ("phone-0", "laptop", "watch", "server")
    )
    for cell in ("2 of 6", "1–8 (Σ 22)", "0.15 / 0.16 GB", "2.000", "training"):
        assert cell in phone
    assert "4 (Σ 36)" in laptop
    assert "unavailable, lacks 71.0 MB" in watch
    assert "from 2" in server
    assert "8 (Σ 96)" in server
    assert "round 1/2, step 10/20: 50%, 1 min 00 s elapsed, about 1 min 00 s left" in last
    assert "validation perplexity 21.75 (round 0) → 10.88 (round 1)" in last
    assert "report runs/first/report.html" in last
    assert "Run first" in before
    assert "equal importance per parameter (no scores yet)" in before
    assert "laptop was late" in before


@pytest.mark.parametrize(("width", "layers", "kinds"), [(80, False, False), (110, True, False), (170, True, True)])
def test_a_wide_live_table_has_ranks_by_layer_and_by_kind(plan: Plan, width: int, layers: bool, kinds: bool) -> None:
    console = recorded(width=width)
    with LiveDisplay(console=console) as display:
        display.plan(plan)
        console.print(display._frame())
    lines = written(console).splitlines()
    server = [line for line in lines if "server" in line and "from 2" in line][-1]
    assert ("  ████" in server) == layers and ("all 8" in server) == kinds
    assert any("by layer, 0–5" in line for line in lines) == layers


def test_live_table_fits_80_columns(plan: Plan, clock: Ticking) -> None:
    console = recorded(width=80)
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
    phone = [line for line in written(console).splitlines() if "phone-0" in line][-1]
    assert "1–8 (Σ 22)" in phone
    assert "0.15 / 0.16 GB" in phone
    assert "training" in phone


def test_progress_has_a_line_of_its_own_below_its_bar(plan: Plan, clock: Ticking) -> None:
    console = recorded(width=80, colours="truecolor")  # without colours only the part that is done is drawn
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
    line = "round 1/2, step 10/20: 50%, 1 min 00 s elapsed, about 1 min 00 s left"
    assert line in (found.strip() for found in written(console).splitlines())


def test_low_terminal_says_how_many_clients_are_left_out(plan: Plan, clock: Ticking) -> None:
    many = tuple(replace(plan.clients[0], name=f"phone-{number}") for number in range(50))
    console = recorded(height=20)
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        display.plan(replace(plan, clients=many))
    assert "… 41 more" in written(console)
    assert "server" in written(console)


def test_live_table_shows_another_plan_in_mid_run(plan: Plan, other_plan: Plan, clock: Ticking) -> None:
    console = recorded()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.plan(other_plan)
        display.step(2, 2, 11, 20, {"laptop": 2.25}, {"laptop": "training"})
    last = written(console).rpartition("┏")[2]
    phone, laptop, watch, server = (
        next(line for line in last.splitlines() if name in line) for name in ("phone-0", "laptop", "watch", "server")
    )
    assert "unavailable, lacks 93.0 MB" in phone
    assert "2.000" not in phone  # the loss from when it took part
    assert "training" not in phone
    for cell in ("5 of 6", "2–8 (Σ 70)", "0.23 / 0.25 GB", "2.250", "training"):
        assert cell in laptop
    for cell in ("1 of 6", "1 (Σ 3)", "0.12 / 0.15 GB", "training"):
        assert cell in watch
    for cell in ("from 1", "4–16 (Σ 140)", "0.42 / 8.00 GB"):
        assert cell in server
    assert "One local step takes 2.250 s (virtual" in written(console)


def test_live_table_shows_a_client_that_comes_back_as_training(plan: Plan, other_plan: Plan, clock: Ticking) -> None:
    console = recorded()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.plan(other_plan)
        display.plan(plan)
    lines = written(console).rpartition("┏")[2].splitlines()
    phone, watch = (next(line for line in lines if name in line) for name in ("phone-0", "watch"))
    assert "training" in phone
    assert "2 of 6" in phone
    assert "2.000" not in phone  # its loss from before is stale
    assert "unavailable, lacks 71.0 MB" in watch


def test_live_display_ends_tidily_on_errors(plan: Plan) -> None:
    console = recorded()
    display = LiveDisplay(console=console)
    with pytest.raises(RuntimeError, match="boom"), display:
        display.plan(plan)
        assert "\x1b[?25l" in written(console)
        raise RuntimeError("boom")
    assert written(console).rindex("\x1b[?25h") > written(console).rindex("\x1b[?25l")  # the cursor is back
    display.note("after")
    assert written(console).rstrip().endswith("after")


def test_live_display_before_any_plan(clock: Ticking) -> None:
    console = recorded()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        display.started("first", ["model"])
        display.note("loading")
    assert written(console) == "Run first\nmodel\nloading\n"


def test_plain_lines(plan: Plan, clock: Ticking) -> None:
    stream = io.StringIO()
    with PlainDisplay(stream, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.finished(["adapter runs/first/adapter"])
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["run first", "  model  tiny", "  dashboard http"]
    assert (
        "  phone-0 (client): split 2 of 6, layers 0–1, ranks 1–8 (Σ 22), memory 0.15 / 0.16 GB,"
        " 0.500 s a step (virtual)"
    ) in lines
    assert "  watch (client): unavailable, lacks 71.0 MB (declared 50.0 MB)" in lines
    assert any(line.startswith("  server: split from 2, layers 2–5, ranks 8 (Σ 96)") for line in lines)
    steps = [line for line in lines if " step " in line and "round 1/2" in line]
    assert [line.split(",")[0] for line in steps] == [f"round 1/2 step {step}/20" for step in (1, 5, 10)]
    assert steps[-1].endswith("loss phone-0 2.000, laptop 2.500 (50%, 1 min 00 s elapsed, about 1 min 00 s left)")
    assert any(line.startswith("round 0 done: validation loss 3.100, validation perplexity 21.75") for line in lines)
    assert any(line.startswith("round 1 done: train loss 3.000, ") for line in lines)
    assert lines[-2:] == ["note: laptop was late", "adapter runs/first/adapter"]
    assert "\x1b" not in stream.getvalue()


def test_a_repeated_round_takes_the_place_of_its_first_try(plan: Plan, clock: Ticking) -> None:
    console = recorded()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.round_done(metrics_row(2), [], [])
        display.round_done(metrics_row(1, val_ppl=9.5), [], [])
    assert "validation perplexity 21.75 (round 0) → 9.500 (round 1)" in written(console).rpartition("┏")[2]


def test_a_round_without_a_validation_has_a_dash(plan: Plan, clock: Ticking) -> None:
    stream, console = io.StringIO(), recorded()
    row = metrics_row(2, val_loss=None, val_ppl=None)  # type: ignore[arg-type]
    PlainDisplay(stream, pace=Pace(clock)).round_done(row, [], [])
    assert "validation loss –, validation perplexity –" in stream.getvalue()
    with LiveDisplay(console=console, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.round_done(row, [], [])
    assert "(round 2)" not in written(console)


def test_plain_lines_come_every_few_steps_where_not_every_step_is_told(clock: Ticking) -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, pace=Pace(clock))
    for step in (3, 4, 7, 8, 9, 16, 17):
        display.step(1, 1, step, 20, {}, {})
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        f"round 1/1 step {step}/20" for step in (3, 7, 16)
    ]


def test_plain_lines_of_another_plan_say_what_it_changes(plan: Plan, other_plan: Plan, clock: Ticking) -> None:
    stream = io.StringIO()
    with PlainDisplay(stream, pace=Pace(clock)) as display:
        play(display, plan, clock)
        display.plan(other_plan)
        display.plan(plan)
        display.plan(replace(plan, makespan_s=9.0))
    first, second, third = [part.splitlines()[1:] for part in stream.getvalue().split("new plan:")[1:]]
    assert first == [
        "  phone-0 (client): unavailable, lacks 93.0 MB (declared 1.00 MB), had split 2 of 6",
        "  laptop (client): split 3 → 5 of 6, ranks 4 (Σ 36) → 2–8 (Σ 70), memory 0.20 / 0.25 GB → 0.23 / 0.25 GB",
        "  watch (client): split 1 of 6, layers 0, ranks 1 (Σ 3), memory 0.12 / 0.15 GB,"
        " 0.750 s a step (virtual), back",
        "  server: split 2 → from 1, ranks 8 (Σ 96) → 4–16 (Σ 140), memory 0.31 / 8.00 GB → 0.42 / 8.00 GB",
        *(f"  {line}" for line in plan_lines(other_plan)),
    ]
    assert [line.split(":")[0] for line in second[:4]] == [
        *("  phone-0 (client)", "  laptop (client)", "  watch (client)", "  server"),
    ]
    assert second[0].endswith(", back")
    assert third[0] == "  every holder keeps its part"


def test_ranks_that_only_move_between_weights_are_said_to_move(plan: Plan) -> None:
    laptop = plan.clients[1]
    first, *rest = laptop.ranks
    uneven = replace(laptop, ranks={first: 2, **dict.fromkeys(rest, 4)})
    moved = replace(laptop, ranks={**dict.fromkeys(rest, 4), first: 4, rest[0]: 2})
    before = replace(plan, clients=(plan.clients[0], uneven))
    after = replace(plan, clients=(moved, replace(laptop, name="new")))
    assert plan_changes(before, after) == [
        "laptop (client): ranks 2–4 (Σ 34) moved between weights",
        "new (client): split 3 of 6, layers 0–2, ranks 4 (Σ 36), memory 0.20 / 0.25 GB, 0.125 s a step (virtual), new",
        "phone-0 (client): left",
    ]


def test_plain_lines_of_many_clients_and_absent_ones(clock: Ticking) -> None:
    stream = io.StringIO()
    display = PlainDisplay(stream, names_shown=3, pace=Pace(clock))
    display.step(1, 1, 1, 1, {f"c-{n}": float(n) for n in range(1, 6)}, {"c-9": "failed", "server": "busy"})
    assert "losses of 5 clients from 1.000 to 5.000, c-9: failed" in stream.getvalue()
    assert "busy" not in stream.getvalue()


def test_plain_lines_on_a_stream_without_unicode(plan: Plan) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PlainDisplay(stream).plan(plan)
    assert b"layers 0-1, ranks 1-8 (sum 22)" in raw.getvalue()


def test_no_text_steers_the_terminal(plan: Plan) -> None:
    console, stream = recorded(), io.StringIO()
    for display in (LiveDisplay(console=console), PlainDisplay(stream)):
        display.note("[bold]not markup[/bold] \x1b]0;title\x07")
        display.started("run", ["\x1b[2J"])
    for text in (written(console), stream.getvalue()):
        assert "[bold]not markup[/bold]" in text
        assert "\x1b" not in text
        assert "\x07" not in text


def test_display_for_chooses_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(display_for(Terminal()), LiveDisplay)
    assert isinstance(display_for(io.StringIO()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(display_for(Terminal()), PlainDisplay)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Terminal, "encoding", "latin-1")
    assert isinstance(display_for(Terminal()), PlainDisplay)


def test_plan_table_says_who_holds_what_and_why_it_fits(plan: Plan) -> None:
    console = recorded(width=140)
    console.print(plan_table(plan))
    lines = written(console).splitlines()
    phone, laptop, watch = (next(line for line in lines if name in line) for name in ("phone-0", "laptop", "watch"))
    for cell in ("2", "0–1", "q:1 k:2 down:8", "0.15 / 0.16 GB", "0.500 s", "12.5 %"):
        assert cell in phone
    assert "all 4" in laptop
    assert "unavailable," in watch
    text = written(console)
    assert "lacks 71.0 MB" in text
    assert "One local step takes 1.500 s (virtual" in text
    assert "Captured importance: 42.50, from equal importance per parameter (no scores yet)." in text
    assert "2 of 3 clients take part." in text


def test_plan_table_is_legible_at_80_columns(plan: Plan) -> None:
    console = recorded(width=80)
    long = replace(plan.clients[0], name="workstation-0")
    console.print(plan_table(replace(plan, clients=(*plan.clients, long))))
    lines = written(console).splitlines()
    phone = next(line for line in lines if "phone-0" in line)
    for cell in ("0–1", "q:1", "0.15 / 0.16 GB", "0.500 s", "12.5 %"):
        assert cell in phone
    assert any("watch" in line and "unavailable," in line for line in lines)
    assert any("lacks 71.0 MB" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_plan_table_says_who_is_waited_for_and_what_memory_would_buy(plan: Plan) -> None:
    told = Insight(
        Bottleneck("phone-0", "client", 2, 0.75),
        (
            OneMoreGB("watch", "client", 1, True, 2.834, 4.25, 0.0),
            OneMoreGB("phone-0", "client", 2, False, 1.417, 0.85, -0.15),
            OneMoreGB("server", "server", 1, False, 0.0, 0.0, 0.0),
        ),
        3,
    )
    console = recorded(width=80)
    console.print(plan_table(plan, told))
    lines = written(console).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "Bottleneck: phone-0 (2 alike); infinitely fast, it would make a step 0.750 s (50%) shorter." in text
    watch = "One more GB at watch: objective +10.0% (+10.0% captured, step +0.0%). It would take part."
    assert watch in text
    assert "One more GB at phone-0 (one of 2 alike): objective +5.0% (+2.0% captured, step -10.0%)." in text
    assert "One more GB at server" not in text
    assert "3 kinds of clients that promise less" in text
    console = recorded(width=80)
    console.print(plan_table(plan, replace(told, one_more_gb=(), kinds_left_out=0)))
    assert "One more GB of memory would buy nothing, at no holder." in written(console)


def test_plan_table_without_decoder_layers_on_a_client(plan: Plan) -> None:
    bare = HolderPlan("bare", "client", True, 0, {}, 99, 50, 0.1)
    console = recorded(width=140)
    console.print(plan_table(replace(plan, clients=(bare,))))
    row = next(line for line in written(console).splitlines() if "bare" in line)
    assert row.split()[:4] == ["bare", "0", "–", "–"]
    assert "50 / 99 B" in written(console)


def test_pace_of_a_resumed_run_counts_only_what_it_did(clock: Ticking) -> None:
    pace = Pace(clock)
    assert str(pace) == "0%, 0 s elapsed"
    clock.now += 30  # set-up
    pace.step(51, 100)
    assert pace.left_s is None
    clock.now += 2
    pace.step(52, 100)
    assert pace.left_s == pytest.approx(96)
    clock.now += 1
    assert pace.left_s == pytest.approx(95)
    assert pace.share == pytest.approx(0.52)
