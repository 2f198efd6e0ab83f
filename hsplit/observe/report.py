"""``hsplit report``: one self-contained HTML page about one run, or several beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsplit.config.files import displayed
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.metrics import PlanRow
from hsplit.observe.report_data import RunRecord, load_runs
from hsplit.observe.report_figures import (
    CURVES,
    MAX_HOLDERS,
    curve_svg,
    holdings_svg,
    traffic_svg,
)
from hsplit.observe.report_memory import memory_section
from hsplit.observe.report_page import event_list, facts, page, plot, table, text
from hsplit.observe.report_schedule import schedule_section
from hsplit.observe.report_timing import timing_section
from hsplit.observe.residual_cuts import cut_text, share_cut
from hsplit.observe.wording import NOTHING, bytes_text, duration_text, number_text

_POLICY = ("policy", "name")
_MAX_EVENTS = 200


def write_report(runs: Sequence[Path], to: Path) -> Path:
    """Writes the report on ``runs`` as one HTML file that loads nothing from anywhere.

    Args:
        runs: directories of runs; each needs its ``config.yaml``, whatever else is missing is left out.
        to: the file; its folder is made if it is missing.

    Returns:
        ``to``.

    Raises:
        InputError: one of ``runs`` is not a run, or ``to`` cannot be written.
    """
    records = load_runs([Path(run) for run in runs])
    several = len(records) > 1
    title = f"{len(records)} hsplit runs" if several else f"hsplit run {records[0].name}"
    subtitle = ", ".join(record.name for record in records) if several else _what(records[0])
    sections = [_comparison(records)] if several else []
    sections.append(_curves(records))
    sections += [_run(record, f"run-{number}") for number, record in enumerate(records, start=1)]
    try:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(to, page(title, subtitle, sections))
    except OSError as error:
        raise InputError(f"--to {displayed(to)}: cannot be written ({error.strerror}); give a file that can") from None
    return Path(to)


def _what(record: RunRecord) -> str:
    model, base, policy = (record.setting(*keys) for keys in (("job", "model"), ("job", "base"), _POLICY))
    return f"{_shown(model)} on base {_shown(base)}, policy {_shown(policy)}, {len(record.clients())} clients"


def _comparison(records: Sequence[RunRecord]) -> str:
    columns = (
        "run",
        "policy",
        "model",
        "clients",
        *("rounds", "perplexity", "tokens", "wall time", "virtual time", "largest cut"),
    )
    rows = []
    for record in records:
        last = record.metrics[-1] if record.metrics else None
        taking_part = f"{last.available_clients if last else NOTHING} of {len(record.clients())}"
        figures = (
            (
                last.round,
                number_text(last.val_ppl),
                f"{last.tokens:,}",
                duration_text(last.wall_time_s),
                duration_text(last.virtual_time_s),
                share_cut(record.cuts) if record.cuts else NOTHING,
            )
            if last
            else (NOTHING,) * 6
        )
        names = (record.name, _shown(record.setting(*_POLICY)), _shown(record.setting("job", "model")))
        rows.append((*names, taking_part, *figures))
    note = (
        "After each run's last round. Virtual: what it would have taken at the declared budgets. Largest cut: what"
        " residual.max_rank cut of a weight's residual in a round (relative Frobenius norm)."
    )
    return f"<section><h2>Side by side</h2>{table(columns, rows, text_columns=3, caption=note)}</section>"


def _curves(records: Sequence[RunRecord]) -> str:
    plots = "\n".join(plot(curve_svg(curve, records), curve.title) for curve in CURVES)
    return (
        f'<section><h2>Training</h2><div class="plots">{plots}</div><p class="soft">Virtual time is counted, not'
        " measured: what each step would have taken at the declared compute, bandwidth and latency.</p></section>"
    )


def _run(record: RunRecord, key: str) -> str:
    parts = [f"<h2>{text(record.name)}</h2>", _settings(record), _clients(record), _rounds(record)]
    holdings = record.holdings()
    if holdings:
        caption = (
            "Total LoRA rank in each layer that a holder has, by the last plan."
            if record.plan
            else "Layers that each holder has, from its split; no event and no checkpoint tells the ranks. The server"
            " holds all the layers after these too."
        )
        more = f" The first {MAX_HOLDERS - 1} and the last are shown." if len(holdings) > MAX_HOLDERS else ""
        svg = holdings_svg(holdings, f"{key}-holdings")
        parts.append(f"<h3>Who holds what</h3>{plot(svg, caption + more, wide=True)}")
    if record.plan_rows:
        parts.append(_parts_table(record.last_plan_rows))
    parts.append(timing_section(record.timing, record.metrics, f"{key}-timing"))
    if record.history.plans:
        parts.append(schedule_section(record.history, record.clients(), record.rounds_done, key))
    if record.plan_rows:
        parts.append(memory_section(record.plan_rows, f"{key}-memory"))
    if record.metrics:
        svg = traffic_svg(record.metrics, f"{key}-traffic")
        sent, received = sum(r.bytes_up for r in record.metrics), sum(r.bytes_down for r in record.metrics)
        caption = f"In all {bytes_text(sent)} up and {bytes_text(received)} down."
        parts.append(f"<h3>Bytes sent</h3>{plot(svg, caption, wide=True)}")
    parts.append(f"<h3>What happened</h3>{_events(record.events)}")
    return f'<section id="{key}">{"".join(parts)}</section>'


def _settings(record: RunRecord) -> str:
    job = ("model", "base", "rounds", "local_steps", "batch_size", "max_length", "lr", "seed")
    values: dict[str, object] = {name.replace("_", " "): _shown(record.setting("job", name)) for name in job}
    values["data"] = _shown(record.setting("job", "data", "source"))
    values["partition"] = _shown(record.setting("job", "data", "partition"))
    policy = [record.setting(*_POLICY), record.setting("policy", "description")]
    values["policy"] = ": ".join(str(part) for part in policy if part)
    return facts(values)


def _clients(record: RunRecord) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for client in record.clients():
        kinds.setdefault(_shown(client.get("kind", client.get("name"))), []).append(client)
    budget = ("memory_gb", "tflops", "bandwidth_mbps", "latency_ms", "num_gpus")
    rows: list[list[object]] = [
        [kind, len(members), *(_span(members, key) for key in budget)] for kind, members in kinds.items()
    ]
    server = record.setting("server")
    if isinstance(server, Mapping):
        rows.append(["server", server.get("replicas", 1), *(_span([server], key) for key in budget)])
    columns = ("who", "count", "memory (GB)", "TFLOP/s", "Mbit/s", "latency (ms)", "GPUs")
    return f"<h3>Cluster</h3>{table(columns, rows)}"


def _rounds(record: RunRecord) -> str:
    columns = (
        *("round", "step", "train loss", "val. loss", "val. perplexity", "tokens", "wall time", "virtual time"),
        *("up", "down", "captured importance", "clients"),
    )
    rows = [
        (
            *(row.round, row.step, NOTHING if row.train_loss is None else number_text(row.train_loss)),
            *(number_text(row.val_loss), number_text(row.val_ppl), f"{row.tokens:,}"),
            *(duration_text(row.wall_time_s), duration_text(row.virtual_time_s)),
            *(bytes_text(row.bytes_up), bytes_text(row.bytes_down)),
            *(number_text(row.captured_importance), row.available_clients),
        )
        for row in record.metrics
    ]
    if not rows:
        return "<h3>Rounds</h3><p>No round has been validated yet.</p>"
    cut = cut_text(record.cuts, record.setting("policy", "aggregation"))
    caption = "Round 0 is the model before any training." + (f" {cut}." if cut else "")
    return f"<h3>Rounds</h3>{table(columns, rows, caption=caption)}"


def _parts_table(rows: Sequence[PlanRow]) -> str:
    """What each holder had to do in the last round, and how long a step of it took."""
    cells = [
        (
            *(row.name, "takes part" if row.available else "unavailable"),
            *(NOTHING if row.split is None else row.split, row.rank_total),
            number_text(row.predicted_time_s, "s") if row.available else NOTHING,
            NOTHING if row.measured_time_s is None else number_text(row.measured_time_s, "s"),
        )
        for row in rows
    ]
    columns = ("holder", "state", "split", "Σ ranks", "step time (virtual)", "step time (measured)")
    note = f"In round {rows[0].round}. The server's split is its first layer."
    return table(columns, cells, text_columns=2, caption=note)


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return "<p>Nothing out of the ordinary.</p>"
    left_out = len(events) - _MAX_EVENTS
    note = f'<p class="soft">The last {_MAX_EVENTS} of {len(events)}; all are in events.jsonl.</p>'
    return event_list(events[-_MAX_EVENTS:]) + (note if left_out > 0 else "")


def _span(members: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [m[key] for m in members if isinstance(m.get(key), int | float)]
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _shown(value: object) -> str:
    """A setting in words: a choice such as ``{dirichlet: 0.5}`` without its braces."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return NOTHING if value is None else str(value)
