"""Displays of a run: a live table in a terminal, plain lines everywhere else, with pace and time left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hsplit.config.cluster import is_server
from hsplit.observe.observer import Observer, SilentDisplay
from hsplit.observe.plan_text import (
    holder_line,
    lacking_text,
    memory_text,
    plan_changes,
    plan_lines,
    ranks_by_kind,
    ranks_by_layer,
    ranks_range,
    split_text,
)
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.observe.wording import bytes_text, duration_text, figure_text, number_text, printable
from hsplit.planning.plan import HolderPlan, Plan
from hsplit.streams import encodable, is_terminal
from hsplit.waiting import Waiting


class Pace:
    """Progress in local steps, with the time per step averaged over all steps of this process.

    The mean since the start, unlike that of the last seconds, includes aggregation and validation.

    Args:
        clock: seconds, increasing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: int | None = None
        self.done = 0
        self.total = 0
        self.begin()

    def begin(self) -> None:
        """Start counting now."""
        self._begun = self._first_time = self._last_time = self._clock()

    def step(self, step: int, steps: int) -> None:
        """Step ``step`` of ``steps`` is done, counted from 1 over the whole run."""
        self.done, self.total = step, steps
        self._last_time = self._clock()
        if self._first is None:
            # the first step includes warm-up, and earlier steps of a resumed run took none of this time
            self._first, self._first_time = step, self._last_time

    @property
    def share(self) -> float:
        """Share of all steps done, from 0 to 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since this process began."""
        return self._clock() - self._begun

    @property
    def left_s(self) -> float | None:
        """Predicted seconds left; None until two steps are done."""
        if self._first is None or self.done <= self._first:
            return None
        per_step = (self._last_time - self._first_time) / (self.done - self._first)
        # The end of a round may take longer than a step, while all later steps are still to be done.
        since_last = min(self._clock() - self._last_time, per_step)
        return max(0.0, (self.total - self.done) * per_step - since_last)

    def __str__(self) -> str:
        left = self.left_s
        remaining = "" if not left else f", about {duration_text(left)} left"
        return f"{self.share:.0%}, {duration_text(round(self.elapsed_s))} elapsed{remaining}"


REFRESH_PER_S = 4
_ROUNDS_SHOWN = 8
_BAR_WIDTH = 60
_LINES_BESIDE_ROWS = 11
"""Lines of the live part besides the clients' rows: the table's frame, server, progress, history, prompt."""
# Columns of a terminal from which the ranks are shown by layer (beside one for each layer) and by weight kind.
_WIDTH_OF_LAYERS, _WIDTH_OF_KINDS = 95, 150


class _Display(Observer):
    """Display that says what the run waits for while nothing else is shown."""

    _waiting: Waiting

    def __enter__(self) -> Self:
        self._waiting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.__exit__(kind, error, trace)


class LiveDisplay(_Display):
    """A table with one row a client and the server's, redrawn at most ``REFRESH_PER_S`` times a second.

    A terminal too low for all clients shows the first ones and the number of the others.

    Args:
        stream: a terminal.
        console: console to draw on instead, in tests.
        pace: progress of the run.
    """

    def __init__(self, stream: TextIO | None = None, console: Console | None = None, pace: Pace | None = None) -> None:
        self._console = console or Console(file=stream, highlight=False)
        self._pace = pace or Pace()
        # rich's own thread draws these: they are replaced as a whole, never changed in place.
        self._plan: Plan | None = None
        # Shown until the first step, which may take minutes on a busy machine.
        self._waits_for = "preparing: layers, data, and a validation before any training"
        self._round = ""
        self._losses: Mapping[str, float] = {}
        self._states: Mapping[str, str] = {}
        self._worst = ""
        self._perplexities: tuple[tuple[int, float], ...] = ()
        self._waiting = Waiting("the actors are reading their data")
        self._live = Live(
            get_renderable=self._frame,
            console=self._console,
            refresh_per_second=REFRESH_PER_S,
            vertical_overflow="ellipsis",
        )

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._console.print(Text(f"Run {printable(run_name)}", style="bold"))
        for line in lines:
            self._console.print(Text(printable(line)))

    def plan(self, plan: Plan) -> None:
        for line in plan_lines(plan):
            self._console.print(Text(printable(line)))
        if self._plan is not None:
            self._reset_returned(self._plan, plan)
        self._plan = plan
        if not self._live.is_started:  # before the first plan there is nothing to redraw
            self._waiting.end()
            self._live.start()

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        self._pace.step(step, steps)
        self._round = f"round {round}/{rounds}, step {step}/{steps}"
        self._losses = {**self._losses, **losses}
        self._states = {**self._states, **states}

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        # A round repeated from a checkpoint replaces those that it undoes.
        kept = tuple(done for done in self._perplexities if done[0] < row.round)
        known = () if row.val_ppl is None else ((row.round, row.val_ppl),)
        self._perplexities = (*kept, *known)[-_ROUNDS_SHOWN:]
        if known:
            self._worst = _worst(row)
        self._waits_for = "training begins"

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        if event == "resumed":
            self._waits_for = "training goes on"
        self._console.print(Text(printable(text), style="yellow"))

    def finished(self, lines: Sequence[str]) -> None:
        self._live.stop()
        for line in lines:
            self._console.print(Text(printable(line)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._live.stop()

    def _reset_returned(self, before: Plan, after: Plan) -> None:
        """Remove the stale loss and state of clients that take part again."""
        back = {client.name for client in after.available} - {client.name for client in before.available}
        self._losses = {name: loss for name, loss in self._losses.items() if name not in back}
        self._states = {**self._states, **dict.fromkeys(back, "training")}

    def _frame(self) -> RenderableType:
        if self._plan is None:
            return Text()
        return Group(self._table(self._plan), self._progress(), self._history())

    def _table(self, plan: Plan) -> Table:
        table = Table()
        table.add_column("name", overflow="ellipsis", no_wrap=True)
        table.add_column("split", no_wrap=True)
        table.add_column("ranks", no_wrap=True)
        kinds, by_layer = (self._console.width >= width for width in (_WIDTH_OF_KINDS, _WIDTH_OF_LAYERS + plan.layers))
        # Bars are no letters of every terminal.
        by_layer = by_layer and self._console.encoding.lower().startswith("utf")
        if by_layer:
            table.add_column(f"by layer, 0–{plan.layers - 1}", no_wrap=True)
        if kinds:
            table.add_column("by kind", overflow="fold")
        table.add_column("memory", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column("state", overflow="fold")
        shown = plan.clients[: max(1, self._console.height - _LINES_BESIDE_ROWS)]
        largest = max((rank for part in (*plan.clients, plan.server) for rank in part.ranks.values()), default=1)

        def ranks(holder: HolderPlan) -> list[str]:
            own = [ranks_by_layer(holder.ranks, plan.layers, largest)] if by_layer else []
            return [ranks_range(holder.ranks), *own, *([ranks_by_kind(holder.ranks)] if kinds else [])]

        for client in shown:
            self._add_row(table, client, plan.layers, ranks(client))
        if len(shown) < len(plan.clients):
            table.add_row(Text(f"… {len(plan.clients) - len(shown)} more"), style="dim")
        table.add_section()
        self._add_row(table, plan.server, plan.layers, ranks(plan.server))
        return table

    def _add_row(self, table: Table, holder: HolderPlan, layers: int, ranks: Sequence[str]) -> None:
        state = self._states.get(holder.name, "") if holder.available else lacking_text(holder)
        loss = self._losses.get(holder.name) if holder.available else None
        cells = (
            holder.name,
            split_text(holder, layers),
            *ranks,
            memory_text(holder),
            figure_text(loss),
            state,
        )
        table.add_row(*(Text(printable(cell)) for cell in cells), style=None if holder.available else "dim")

    def _progress(self) -> RenderableType:
        bar = ProgressBar(total=max(1, self._pace.total), completed=self._pace.done, width=_BAR_WIDTH)
        # rich's bar does not end its line
        return Group(bar, Text("\n" + (f"{self._round}: {self._pace}" if self._round else self._waits_for)))

    def _history(self) -> Text:
        if not self._perplexities:
            return Text()
        rounds = " → ".join(f"{number_text(ppl)} (round {round})" for round, ppl in self._perplexities)
        return Text(f"validation perplexity {rounds}{self._worst}")


def _worst(row: MetricsRow) -> str:
    """Name the worst client's validation perplexity, where it is another than the mean."""
    if row.worst_ppl is None or row.worst_ppl == row.val_ppl:
        return ""
    return f" (worst client {number_text(row.worst_ppl)})"


class PlainDisplay(_Display):
    """Prints lines: at the start, for each holder that a plan changes, every few steps, and for each round.

    Args:
        stream: output; each line is flushed.
        every_steps: steps between two lines.
        names_shown: largest number of clients whose losses are given by name.
        pace: progress of the run.
    """

    def __init__(self, stream: TextIO, every_steps: int = 5, names_shown: int = 8, pace: Pace | None = None) -> None:
        self._stream = stream
        self._every_steps = every_steps
        self._names_shown = names_shown
        self._pace = pace or Pace()
        self._printed_step = 0
        self._plan: Plan | None = None
        self._waiting = Waiting("the actors are reading their data and layers", growing=True)

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        self._print(f"run {run_name}")
        for line in lines:
            self._print(f"  {line}")

    def plan(self, plan: Plan) -> None:
        """Print every holder's part; for a plan that replaces another, only its changes."""
        if self._plan is None:
            self._print("plan:")
            lines = [holder_line(holder, plan.layers) for holder in (*plan.clients, plan.server)]
        else:
            self._print("new plan:")
            lines = plan_changes(self._plan, plan) or ["every holder keeps its part"]
        self._plan = plan
        for line in (*lines, *plan_lines(plan)):
            self._print(f"  {line}")
        self._waiting.update("loading and validating the layers of the plan")

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        self._pace.step(step, steps)
        self._waiting.update(f"round {round}/{rounds}, after step {step}/{steps}")
        # the first step at once, to show that training has begun; `hsplit watch` may skip steps
        passed = step // self._every_steps - self._printed_step // self._every_steps
        if self._printed_step and passed == 0:
            return
        self._printed_step = step
        absent = [f"{name}: {states[name]}" for name in states if name not in losses and not is_server(name)]
        parts = [f"round {round}/{rounds} step {step}/{steps}", self._losses(losses), *absent]
        self._print(f"{', '.join(parts)} ({self._pace})")

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        trained = "" if row.train_loss is None else f"train loss {number_text(row.train_loss)}, "
        parts = [
            f"round {row.round} done: {trained}validation loss {figure_text(row.val_loss)}",
            f"validation perplexity {figure_text(row.val_ppl)}{_worst(row)}",
            f"{row.tokens:,} tokens",
            f"{duration_text(row.wall_time_s)} (virtual {duration_text(row.virtual_time_s)})",
            f"{bytes_text(row.bytes_up)} up, {bytes_text(row.bytes_down)} down",
            f"{row.available_clients} clients",
        ]
        self._print(", ".join(parts))
        self._waiting.update(f"after round {row.round}: checkpoint, plan, next round")

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        self._print(f"note: {text}")

    def finished(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._print(line)

    def _losses(self, losses: Mapping[str, float]) -> str:
        if not losses:
            return "no losses"
        if len(losses) <= self._names_shown:
            return "loss " + ", ".join(f"{name} {number_text(loss)}" for name, loss in losses.items())
        low, high = min(losses.values()), max(losses.values())
        return f"losses of {len(losses)} clients from {number_text(low)} to {number_text(high)}"

    def _print(self, line: str) -> None:
        print(encodable(printable(line), self._stream.encoding), file=self._stream, flush=True)
        self._waiting.heard()


def display_for(stream: TextIO | None, pace: Pace | None = None) -> Observer:
    """Return the live table if ``stream`` is a terminal that can show it, plain lines otherwise; nothing without one.

    Args:
        stream: output.
        pace: progress of the run; by default counted from now on.
    """
    if stream is None or stream.closed:
        return SilentDisplay()
    if is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown") and _shows(stream, "–Σ→━"):
        return LiveDisplay(stream, pace=pace)
    return PlainDisplay(stream, pace=pace)


def _shows(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
