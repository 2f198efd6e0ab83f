"""The runs in a directory, each with its state, for ``hsplit runs``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hsplit.config import RunConfig
from hsplit.errors import HsplitError
from hsplit.observe.events import read_events
from hsplit.observe.tables import LAG, MetricsRow, cut_text, lag_text, perplexities, read_rows, residual_cuts
from hsplit.observe.wording import age_text, printable
from hsplit.run_directory import RunDirectory

State = Literal["running", "complete", "stopped", "failed", "interrupted", "unreadable"]

# The state of a run without a driver, by the kind of its last ending.
_ENDINGS: dict[str, State] = {"finished": "complete", "stopped": "stopped", "failed": "failed"}
_NEVER = datetime.min.replace(tzinfo=UTC)
BEGINNINGS = frozenset({"training", "resumed"})


@dataclass(frozen=True)
class RunSummary:
    """State and progress of a run.

    Attributes:
        name: its name.
        path: its directory.
        state: ``running``: it has a driver; ``complete``: all rounds are done; ``stopped`` on request, ``failed``
            with an error, ``interrupted`` without a message (killed, or the machine went down): these can be resumed.
        policy: the name of its policy, or ``None`` if the configuration cannot be read.
        round, rounds: rounds done, and rounds requested; ``rounds`` is ``None`` if the configuration cannot be read.
        val_ppl: the last validation perplexity, or ``None`` before any.
        clients: number of clients that took part in that round.
        changed: time of the last event, or ``None``.
        reason: cause of a failure; empty otherwise.
    """

    name: str
    path: Path
    state: State
    policy: str | None = None
    round: int = 0
    rounds: int | None = None
    val_ppl: float | None = None
    clients: int | None = None
    changed: datetime | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields for ``hsplit runs --json``."""
        changed = None if self.changed is None else self.changed.isoformat()
        return {**vars(self), "path": str(self.path), "changed": changed}


def list_runs(runs_dir: str | Path) -> list[RunSummary]:
    """Return the runs in ``runs_dir``, the last changed at the end; none if there is no such directory."""
    folder = Path(runs_dir)
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [run_state(RunDirectory(path)) for path in paths if os.path.isfile(path / "config.yaml")]
    return sorted(found, key=lambda run: (run.changed or _NEVER, run.name))


def run_state(directory: RunDirectory) -> RunSummary:
    """Return state and progress of the run in ``directory``."""
    try:
        config = RunConfig.load(RunDirectory.open(directory.path).config)
    except HsplitError as error:
        return RunSummary(directory.name, directory.path, "unreadable", reason=str(error))
    events = read_events(directory.events)
    state, reason = last_state(events)
    if state != "complete" and directory.is_driven:
        state, reason = "running", ""
    try:
        rows = read_rows(directory.metrics, MetricsRow)
    except HsplitError:
        rows = []  # none yet
    last = rows[-1] if rows else None
    return RunSummary(
        name=directory.name,
        path=directory.path,
        state=state,
        policy=config.policy.name,
        round=last.round if last else 0,
        rounds=config.job.rounds,
        val_ppl=found[-1][1] if (found := perplexities(rows)) else None,
        clients=last.available_clients if last else None,
        changed=datetime.fromisoformat(events[-1]["time"]) if events else None,
        reason=reason,
    )


def last_state(events: Iterable[Mapping[str, Any]]) -> tuple[State, str]:
    """Return the state of a run without a driver by its ``events``, and the reason if it is ``failed``."""
    state: State = "interrupted"
    reason = ""
    for event in events:
        if event["event"] in _ENDINGS:
            state, reason = _ENDINGS[event["event"]], event["text"] if event["event"] == "failed" else ""
        elif event["event"] in BEGINNINGS:
            state, reason = "interrupted", ""
    return state, reason


def results_lines(directory: RunDirectory) -> list[str]:
    """Return lines with the paths of a complete run's results, and with the loss if the residual's cap has cut."""
    exported = directory.model if directory.model.is_dir() else directory.adapter
    events = list(read_events(directory.events))
    cut, lag = cut_text(residual_cuts(events), None), lag_text(residual_cuts(events, field=LAG))
    found = [f"{name:<8} {text}" for name, text in (("cut", cut), ("lag", lag)) if text]
    return [f"{exported.name:<8} {exported}", f"report   {directory.report}", *found]


def way_on(directory: RunDirectory, address: str | None = None) -> str:
    """Return the advice on continuing a run that is not complete.

    Args:
        directory: of the run.
        address: of its Ray cluster; ``None`` for a local one.
    """
    command = directory.resume_command(address)
    if directory.has_checkpoints:
        return f"go on from the last checkpoint with: {command}"
    return f"there is no checkpoint yet; begin it again from round 0 with: {command}"


def runs_table(runs: Sequence[RunSummary], now: datetime | None = None) -> Table:
    """Return ``runs`` as a table for the terminal, with their age at ``now``."""
    now = now or datetime.now(UTC)
    # A default name and the other columns fit into 80 characters.
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("run", "policy", "state", "rounds", "ppl", "clients", "changed"):
        figures = heading in ("rounds", "ppl", "clients")
        text = heading in ("run", "policy")
        table.add_column(heading, justify="right" if figures else "left", overflow="fold", no_wrap=not text)
    for run in runs:
        table.add_row(
            # A directory may have any name, also one that looks like markup.
            Text(printable(run.name)),
            Text(printable(run.policy or "")),
            run.state,
            f"{run.round} of {run.rounds}" if run.rounds is not None else "",
            "" if run.val_ppl is None else f"{run.val_ppl:.3f}",
            "" if run.clients is None else str(run.clients),
            "" if run.changed is None else age_text((now - run.changed).total_seconds()),
        )
    return table
