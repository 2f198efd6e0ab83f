"""A run's course in a terminal: a table of the holders that is redrawn in place, progress, perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hsplit.observe.observer import Observer
from hsplit.observe.pace import Pace
from hsplit.observe.plan_text import lacking_text, memory_text, plan_lines, ranks_range, split_text
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow
from hsplit.observe.wording import NOTHING, number_text, printable
from hsplit.scheduling.plan import HolderPlan, Plan
from hsplit.waiting import Waiting

REFRESH_PER_S = 4
_ROUNDS_SHOWN = 8
_BAR_WIDTH = 60
_LINES_BESIDE_ROWS = 11
"""Lines that the live part needs besides its rows: the table's frame, server, progress, history, prompt."""


class LiveDisplay(Observer):
    """A table with one row a client and the server's, redrawn at most ``REFRESH_PER_S`` times a second.

    A terminal too low for all clients shows the first, and says how many are left out.

    Args:
        stream: a terminal.
        console: what to draw on instead, in tests.
        pace: how far the run is.
    """

    def __init__(self, stream: TextIO | None = None, console: Console | None = None, pace: Pace | None = None) -> None:
        self._console = console or Console(file=stream, highlight=False)
        self._pace = pace or Pace()
        # Drawn by rich's own thread: what it reads is replaced as a whole here, never changed in place.
        self._plan: Plan | None = None
        # What is under way, until there is a step to tell of: on a busy machine that may take minutes.
        self._waits_for = "preparing: layers, data, and a validation before any training"
        self._round = ""
        self._losses: Mapping[str, float] = {}
        self._states: Mapping[str, str] = {}
        self._perplexities: tuple[tuple[int, float], ...] = ()
        # Until there is something to redraw.
        self._waiting = Waiting("the actors are reading their data")
        self._live = Live(
            get_renderable=self._frame,
            console=self._console,
            refresh_per_second=REFRESH_PER_S,
            vertical_overflow="ellipsis",
        )

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        """Print the run's name and what it runs on."""
        self._console.print(Text(f"Run {printable(run_name)}", style="bold"))
        for line in lines:
            self._console.print(Text(printable(line)))

    def plan(self, plan: Plan) -> None:
        """Show the plan, and begin to redraw; one that replaces another is shown in its place."""
        for line in plan_lines(plan):
            self._console.print(Text(printable(line)))
        if self._plan is not None:
            self._reset_returned(self._plan, plan)
        self._plan = plan
        if not self._live.is_started:  # not earlier: until there is a plan there is nothing to redraw
            self._waiting.end()
            self._live.start()

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        """Show the step's losses and states."""
        self._pace.step(step, steps)
        self._round = f"round {round}/{rounds}, step {step}/{steps}"
        self._losses = {**self._losses, **losses}
        self._states = {**self._states, **states}

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """Add the round to the perplexities."""
        # A round that is repeated from a checkpoint takes the place of those that it undoes.
        kept = tuple(done for done in self._perplexities if done[0] < row.round)
        self._perplexities = (*kept, (row.round, row.val_ppl))[-_ROUNDS_SHOWN:]
        self._waits_for = "training begins"

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Print ``text`` above the table."""
        if event == "resumed":
            self._waits_for = "training goes on"
        self._console.print(Text(printable(text), style="yellow"))

    def finished(self, lines: Sequence[str]) -> None:
        """Stop redrawing and print where the results are."""
        self._live.stop()
        for line in lines:
            self._console.print(Text(printable(line)))

    def __enter__(self) -> Self:
        self._waiting.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.__exit__(kind, error, trace)
        self._live.stop()

    def _reset_returned(self, before: Plan, after: Plan) -> None:
        """Drop the stale loss and state of clients that take part again."""
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
        table.add_column("memory", no_wrap=True)
        table.add_column("loss", justify="right", no_wrap=True)
        table.add_column("state", overflow="fold")
        room = max(1, self._console.height - _LINES_BESIDE_ROWS)
        shown = plan.clients[:room]
        for client in shown:
            self._add_row(table, client, plan.layers)
        if len(shown) < len(plan.clients):
            table.add_row(Text(f"… {len(plan.clients) - len(shown)} more"), style="dim")
        table.add_section()
        self._add_row(table, plan.server, plan.layers)
        return table

    def _add_row(self, table: Table, holder: HolderPlan, layers: int) -> None:
        state = self._states.get(holder.name, "") if holder.available else lacking_text(holder)
        loss = self._losses.get(holder.name) if holder.available else None
        cells = (
            holder.name,
            split_text(holder, layers),
            ranks_range(holder.ranks),
            memory_text(holder),
            NOTHING if loss is None else number_text(loss),
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
        return Text(f"validation perplexity {rounds}")
