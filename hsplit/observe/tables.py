"""The tables of a run, ``metrics.csv``, ``plan.csv`` and ``timing.csv``: their rows, files, and the residual's cuts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

from hsplit.config.reading import displayed
from hsplit.config.section import EXACT, Whole
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.planning.plan import HolderPlan, Plan

if TYPE_CHECKING:
    import pandas as pd


CUT, LAG = "residual_cut", "residual_lag"
"""Names of the cut, and of what waits, in the event that closes a round; events of older versions lack them."""
# Rounding errors of the fp32 factors come near this; a smaller loss is not due to the cap.
_ROUNDING = 1e-6


def residual_cuts(events: Iterable[Mapping[str, Any]], rounds: int | None = None, field: str = CUT) -> dict[int, float]:
    """Return the largest part of a weight's residual that was cut, by round; the last result counts.

    Args:
        events: of a run, oldest first.
        rounds: the last round that counts; by default all.
        field: ``LAG`` for what holders lacked instead.

    Returns:
        Relative Frobenius norms, 0.0 for a round without any; rounds of older versions, whose events lack the field,
        and the state before training are absent.
    """
    closed = {event.get("round"): event.get(field) for event in events if event["event"] == "round"}
    return {
        round_: float(cut)
        for round_, cut in closed.items()
        if isinstance(round_, int) and isinstance(cut, int | float)
        if round_ >= 1 and (rounds is None or round_ <= rounds)
    }


def cut_text(cuts: Mapping[int, float], aggregation: object) -> str:
    """Return one sentence on the cuts, or on their absence; empty if the events lack the field.

    A cut no larger than the rounding of fp32 counts as none.

    Args:
        cuts: as :func:`residual_cuts` returns them.
        aggregation: the policy's. The absence of cuts is reported for ``concat`` only: others may lose more than the
            residual's cuts.
    """
    cutting = [cut for cut in cuts.values() if cut > _ROUNDING]
    if cutting:
        often = f"in {len(cutting)} of {len(cuts)} {'round' if len(cuts) == 1 else 'rounds'}"
        return (
            f"residual.max_rank cut {often}: at most {share_cut(cuts)} of a weight's residual in one (relative"
            " Frobenius norm), so that the aggregation was not exact"
        )
    exact = cuts and aggregation == "concat"
    return "residual.max_rank cut nothing: the adapters were summed exactly in every round" if exact else ""


def lag_text(lags: Mapping[int, float]) -> str:
    """Return one sentence on what holders lacked between rounds (``pace.residual_wait``); empty if nothing waited.

    Args:
        lags: by round.
    """
    waited = [lag for lag in lags.values() if lag]
    often = f"in {len(waited)} of {len(lags)} {'round' if len(lags) == 1 else 'rounds'}"
    return (
        f"pace.residual_wait kept changes back {often}: holders trained on without at most {share_cut(lags)} of a"
        " weight's aggregated adapters (relative Frobenius norm), which reached them later"
        if waited
        else ""
    )


def share_cut(cuts: Mapping[int, float]) -> str:
    """Format the largest of ``cuts`` in percent, such as ``27 %``."""
    return f"{100 * max(cuts.values()):.2g} %"


# The largest integer of pandas.
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class MetricsRow:
    """One round in ``metrics.csv``; round 0 is the model before any training.

    Steps, tokens and times are totals since the run's start, so that rows are points of curves.

    Attributes:
        round: rounds done.
        step: local steps done.
        train_loss: mean over the round's supervised tokens; None in round 0.
        val_loss, val_ppl: mean over the held-out supervised tokens, and its exponential; None in a round without a
            validation (``job.validation.every``).
        tokens: supervised tokens trained on.
        wall_time_s: wall time of the run, without pauses between a kill and a resume.
        virtual_time_s: time that the run would have taken at the declared budgets (METHOD 8).
        bytes_up, bytes_down: sent and received by the clients in this round, validation included.
        captured_importance: of the round's plan (METHOD 5).
        available_clients: number of clients with a part in that plan.
        train_wall_time_s, train_virtual_time_s: ``wall_time_s`` and ``virtual_time_s`` without the validations so far;
            None in tables of older versions.
        worst_ppl: validation perplexity of the client where it is largest, each on its own held-out tokens; None
            where nothing was validated or held out, and on a single node, which has the data of all.
    """

    round: Whole
    step: Whole
    train_loss: float | None
    val_loss: float | None
    val_ppl: float | None
    tokens: Whole
    wall_time_s: float
    virtual_time_s: float
    bytes_up: Whole
    bytes_down: Whole
    captured_importance: float
    available_clients: Whole
    train_wall_time_s: float | None = None
    train_virtual_time_s: float | None = None
    worst_ppl: float | None = None
    __pydantic_config__ = EXACT


@dataclass(frozen=True)
class PlanRow:
    """One holder in one round in ``plan.csv``; memory in bytes, times in seconds for one local step.

    Attributes:
        kind: ``client`` or ``server``.
        split: a client's number of layers, the server's first layer; None for an unavailable client.
        rank_total: sum of the ranks of its adapters.
        predicted_time_s: virtual.
        measured_bytes, measured_time_s: None where nothing was measured.
        rows: examples of a client's batch, of which it brings one every ``every`` local steps; None for others.
        stored: how it keeps the base, ``dense`` or ``codes``.
        wire: format of its messages; empty stands for ``job.wire``.
        val_ppl: validation perplexity of a client's own held-out tokens; None where it has none, or in a round without
            a validation.
    """

    round: Whole
    name: str
    kind: str
    available: bool
    split: Whole | None
    rank_total: Whole
    declared_bytes: Whole
    predicted_bytes: Whole
    measured_bytes: Whole | None
    predicted_time_s: float
    measured_time_s: float | None
    rows: Whole | None = None
    every: Whole | None = None
    stored: str = ""
    wire: str = ""
    val_ppl: float | None = None
    __pydantic_config__ = EXACT


def perplexities(rows: Iterable[MetricsRow]) -> list[tuple[int, float]]:
    """Return round and validation perplexity of each round that was validated, in the order of ``rows``."""
    return [(row.round, row.val_ppl) for row in rows if row.val_ppl is not None]


PHASES = ("data", "unpack", "forward", "tail", "backward", "optimizer", "pack", "paced", "waiting")
"""Phases of a holder's time, in the order of a step; ``TimingRow`` describes each."""


@dataclass(frozen=True)
class TimingRow:
    """One phase of one holder in one round in ``timing.csv``; round 0 has no rows.

    A holder's rows of a round sum to the wall time of that round's local steps.

    Attributes:
        name: a client's name, or ``server``.
        phase: one of ``PHASES``: ``data`` (drawing and collating batches), ``unpack`` (from the wire's bytes),
            ``forward``, ``tail`` (norm, head, loss and its gradient), ``backward``, ``optimizer``, ``pack`` (to the
            wire's dtype and bytes), ``paced`` (slept so that wall time follows the declared speed) and ``waiting``
            (the rest: for others, for messages, for a core).
        seconds: wall seconds, summed over the round's local steps.

    Raises:
        ValueError: ``phase`` is none of ``PHASES``.
    """

    round: Whole
    name: str
    phase: str
    seconds: float
    __pydantic_config__ = EXACT

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase {self.phase!r} is none of {', '.join(PHASES)}")


def plan_rows(
    round: int,
    plan: Plan,
    measured_bytes: Mapping[str, int] | None = None,
    measured_time_s: Mapping[str, float] | None = None,
    val_ppl: Mapping[str, float] | None = None,
) -> list[PlanRow]:
    """Return the rows of ``plan`` in ``round``, the servers first; measurements are by holder name."""
    sizes, times, perplexity = measured_bytes or {}, measured_time_s or {}, val_ppl or {}

    def row(holder: HolderPlan) -> PlanRow:
        return PlanRow(
            round=round,
            name=holder.name,
            kind=holder.kind,
            available=holder.available,
            split=holder.split,
            rank_total=holder.rank_total,
            declared_bytes=holder.declared_bytes,
            predicted_bytes=holder.predicted_bytes,
            measured_bytes=sizes.get(holder.name),
            predicted_time_s=holder.step_time_s,
            measured_time_s=times.get(holder.name),
            rows=holder.rows or None,
            every=holder.every if holder.rows else None,
            stored=holder.stored if holder.available else "",
            wire=holder.wire,
            val_ppl=perplexity.get(holder.name),
        )

    servers = [replace(plan.server, name=name) for name in plan.server_names]
    return [row(holder) for holder in (*servers, *plan.clients)]


def timing_rows(round: int, spent: Mapping[str, Mapping[str, float]], steps_s: float) -> list[TimingRow]:
    """Return the rows of a round.

    Args:
        round: number of the round.
        spent: wall seconds by holder and phase, without ``waiting``, summed over the round's local steps.
        steps_s: wall seconds of those steps.
    """
    rows = []
    for name, seconds in spent.items():
        whole = {**seconds, "waiting": steps_s - sum(seconds.values())}
        rows += [TimingRow(round, name, phase, whole[phase]) for phase in PHASES if phase in whole]
    return rows


Row = TypeVar("Row", bound=MetricsRow | PlanRow | TimingRow)


class MetricsTable(Generic[Row]):
    """A CSV file with its rows in memory, rewritten completely at each change.

    Tables are short (a row a round, or a few for each round and holder), so rewriting is cheap, and a kill at any
    moment leaves the last complete file. A resumed run cuts it to the rounds of its checkpoint.

    Args:
        path: the file; written at the first change.
        row_type: ``MetricsRow``, ``PlanRow`` or ``TimingRow``; its fields are the columns.
    """

    def __init__(self, path: str | Path, row_type: type[Row]) -> None:
        self.path = Path(path)
        self._row_type = row_type
        self._rows: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows, oldest first."""
        return self._rows

    def append(self, *rows: Row) -> None:
        """Add ``rows`` and write the file once.

        Raises:
            OSError: the file cannot be written; file and rows stay as they were.
        """
        self._write((*self._rows, *rows))

    def cut(self, last: int) -> None:
        """Keep the rows up to round ``last``: those in memory or, at the first call, those in the file.

        Raises:
            InputError: the file is not a table of these rows.
            OSError: the file cannot be written; file and rows stay as they were.
        """
        rows = self._rows if self._rows or not self.path.exists() else tuple(self._read())
        self._write(tuple(row for row in rows if row.round <= last))

    def clear(self) -> None:
        """Remove every row.

        Raises:
            OSError: the file cannot be written; file and rows stay as they were.
        """
        self._write(())

    def _read(self) -> list[Row]:
        try:
            return read_rows(self.path, self._row_type)
        except InputError as error:
            raise InputError(f"{error}; the run continues this table: put it right, or move it away") from None

    def _write(self, rows: tuple[Row, ...]) -> None:
        write_text_atomically(self.path, _csv(rows, self._row_type))
        self._rows = rows


def read_rows(path: str | Path, row_type: type[Row]) -> list[Row]:
    """Read the rows in ``path``, equal to the written ones, every float to its last digit.

    The last columns may be missing where their fields have a default: older versions had fewer.

    Raises:
        InputError: there is no such file, or it is not such a table; the message names the line.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            table = list(csv.reader(file))
    except FileNotFoundError:
        raise InputError(f"{displayed(path)}: there is no such file") from None
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{displayed(path)}: cannot be read ({error})") from None
    columns = [field.name for field in fields(row_type)]
    required = sum(field.default is MISSING for field in fields(row_type))
    if not table or len(table[0]) < required or table[0] != columns[: len(table[0])]:
        raise InputError(f"{displayed(path)}:1: the columns must be {','.join(columns)}")
    types = get_type_hints(row_type)
    rows = []
    for number, cells in enumerate(table[1:], start=2):
        try:
            named = zip(table[0], cells, strict=True)
            rows.append(row_type(**{column: _value(cell, types[column]) for column, cell in named}))
        except ValueError as error:
            raise InputError(f"{displayed(path)}:{number}: is no row of the table ({error})") from None
    return rows


def read_metrics(path: str | Path) -> pd.DataFrame:
    """Read ``metrics.csv`` as a frame with the columns of ``MetricsRow``; what a round does not have is NaN.

    Raises:
        InputError: there is no such file, or it is not such a table.
    """
    return _frame(read_rows(path, MetricsRow), MetricsRow)


def read_plan(path: str | Path) -> pd.DataFrame:
    """Read ``plan.csv`` as a frame with the columns of ``PlanRow``; empty cells are missing (``NA``).

    Raises:
        InputError: there is no such file, or it is not such a table.
    """
    return _frame(read_rows(path, PlanRow), PlanRow)


def _frame(rows: Sequence[Row], row_type: type[Row]) -> pd.DataFrame:
    import pandas as pd

    dtypes: dict[Any, str] = {int: "int64", int | None: "Int64", float: "float64", float | None: "float64"}
    dtypes |= {bool: "bool", str: "object"}
    types = get_type_hints(row_type)
    values = {column: [getattr(row, column) for row in rows] for column in types}
    return pd.DataFrame({column: pd.Series(values[column], dtype=dtypes[type_]) for column, type_ in types.items()})


def _csv(rows: Sequence[Row], row_type: type[Row]) -> str:
    types = get_type_hints(row_type)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(types)
    writer.writerows([_cell(getattr(row, column), type_) for column, type_ in types.items()] for row in rows)
    return text.getvalue()


def _cell(value: Any, type_: Any) -> str:
    if value is None:
        return ""
    # only the repr of Python's own float, not of numpy's or torch's, reads back equal
    return repr(float(value)) if type_ in (float, float | None) else str(value)


def _value(cell: str, type_: Any) -> Any:
    if type_ in (int | None, float | None):
        return None if cell == "" else _value(cell, int if type_ == int | None else float)
    if type_ is bool:
        if cell not in ("True", "False"):
            raise ValueError(f"{cell!r} is neither True nor False")
        return cell == "True"
    value = type_(cell)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("a number is too large")
    return value
