"""``hsplit report``: one self-contained HTML page about one run, or several beside one another.

``report.html.j2`` is the page; this module provides the runs' records, their figures, and sentences about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hsplit.config.cluster import CENTRAL
from hsplit.config.reading import displayed
from hsplit.errors import InputError
from hsplit.files import write_text_atomically
from hsplit.observe.tables import MetricsRow, PlanRow, cut_text, lag_text, perplexities, plan_rows, share_cut
from hsplit.observe.wording import NOTHING, batch_text, bytes_text, duration_text, number_text, of_budget
from hsplit.report import figures
from hsplit.report.figures import MAX_HOLDERS, WARNING
from hsplit.report.page import render
from hsplit.report.rank_maps import HolderGroup, RankMaps, after_text
from hsplit.report.run_record import RunRecord, load_runs
from hsplit.report.usage import HolderMemory, StepShares, holder_steps, memory_record, step_shares

MAX_KINDS = 12
"""Largest number of client kinds with heat maps of their own; with more, only the mean of all clients is drawn."""
_MAX_EVENTS = 200
_MAX_PLANS = 40
# Most names in a sentence, and most parts of a step named beside the arithmetic.
_NAMED, _PARTS_NAMED = 6, 3
_JOB = ("model", "base", "rounds", "local_steps", "batch_size", "max_length", "lr", "seed")
_BUDGET = ("memory_gb", "tflops", "bandwidth_mbps", "latency_ms", "num_gpus")
_AGGREGATED = {
    "fedavg": "adapters averaged factor by factor, which is not noise-free",
    "hetlora": "adapters padded and averaged, which is not noise-free",
    "flexlora": "adapters averaged and truncated to each rank, which is not noise-free",
    "raflora": "adapters averaged and truncated to each rank, which is not noise-free",
    "florist": "of each round's sum the leading directions, which is not noise-free",
    "fedplora": "directions averaged factor by factor, which is not noise-free",
    "none": "nothing aggregated",
}


def write_report(runs: Sequence[Path], to: Path) -> Path:
    """Write the report on ``runs`` as one HTML file that loads nothing.

    Args:
        runs: directories of runs; each needs its ``config.yaml``, any other file may be missing.
        to: the file; its folder is created if missing.

    Returns:
        ``to``.

    Raises:
        InputError: one of ``runs`` is not a run, or ``to`` cannot be written.
    """
    html = report_page(load_runs([Path(run) for run in runs]))
    try:
        Path(to).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(to, html)
    except OSError as error:
        raise InputError(f"--to {displayed(to)}: cannot be written ({error.strerror}); give a file that can") from None
    return Path(to)


def report_page(records: Sequence[RunRecord]) -> str:
    """Return the HTML document about ``records``, at least one."""
    several = len(records) > 1
    opening = "perplexity" if any(record.validated for record in records) else "train loss"
    main = next(curve for curve in figures.CURVES if curve.title.endswith(f"{opening} against virtual time"))
    others = [curve for curve in figures.CURVES if curve is not main and any(record.metrics for record in records)]
    runs = [_run(record, f"run-{number}") for number, record in enumerate(records, start=1)]
    names = ", ".join(record.name for record in records)
    context = {
        "title": f"{len(records)} hsplit runs" if several else f"hsplit run {names}",
        "names": names,
        "several": several,
        "runs": runs,
        "main_curve": {"title": f"{opening} over time", "svg": figures.curve_svg(main, records, large=True)},
        "curves": [{"title": curve.title, "svg": figures.curve_svg(curve, records)} for curve in others],
        "max_events": _MAX_EVENTS,
        "job_settings": _JOB,
        "warning": WARNING,
    }
    return render(
        "report.html.j2",
        context,
        number=_known(number_text),
        whole=_known("{:,}".format),
        seconds=_known(lambda value: number_text(value, "s")),
        duration=_known(duration_text),
        size=_known(bytes_text),
        largest_cut=lambda cuts: share_cut(cuts) if cuts else NOTHING,
        sizes=figures.memory_sizes,
        of_budget=of_budget,
        rows=_rows_text,
        part=_part_text,
        setting=_setting_text,
        few=_first,
        capped=lambda items, what: (
            f" The first {MAX_HOLDERS - 1} and the last {what} are shown." if len(items) > MAX_HOLDERS else ""
        ),
        in_words=shares_text,
    )


def _run(record: RunRecord, key: str) -> dict[str, Any]:
    """Return the template's values for one run; ``key`` is unique in the page and starts the ids of its figures."""
    memory = memory_record(record.plan_rows)
    steps, shares = holder_steps(record.timing, record.metrics), step_shares(record.timing)
    holdings, history = record.holdings(), record.history
    rows = record.last_plan_rows or (plan_rows(0, record.plan) if record.plan else ())
    planned = list(dict.fromkeys(holder.name for plan in history.plans.values() for holder in plan.clients))
    rounds = max(record.rounds_done, 1 + max(history.plans, default=0))
    drawn = {
        "holdings": figures.holdings_svg(holdings, f"{key}-holdings") if holdings else "",
        "memory": figures.memory_svg(memory, f"{key}-memory") if memory else "",
        "timing": figures.timing_svg(steps, f"{key}-timing") if steps and shares else "",
        "data": figures.data_svg(record.shares, f"{key}-data") if record.shares else "",
        "traffic": figures.traffic_svg(record.metrics, f"{key}-traffic") if record.metrics else "",
        "splits": figures.splits_svg(history, figures.capped(planned), rounds, f"{key}-splits") if planned else "",
    }
    return {
        "key": key,
        "record": record,
        "figures": drawn,
        "shallow": bool(holdings) and figures.shallow(holdings),
        "outcome": outcome_text(record),
        "warnings": _memory_warnings(memory),
        "holders": sorted(rows, key=lambda row: row.kind != "client"),
        "memory": memory,
        "steps": steps,
        "shares": shares,
        "maps": _maps(record, planned, f"{key}-maps") if history.plans else None,
        "planned": planned,
        "plans": [
            {"plan": plan, "done": done, "since": after_text(done), "why": history.reasons.get(done)}
            for done, plan in sorted(history.plans.items())[-_MAX_PLANS:]
        ],
        "cluster": _cluster(record),
    }


# -- sentences --------------------------------------------------------------------------------------------------------


def outcome_text(record: RunRecord) -> str:
    """Return one sentence: perplexity before and after, rounds, times, clients, and exactness of the aggregation."""
    rounds = record.setting("job", "rounds")
    endings = {"complete": "", "running": "still running", "failed": f"failed: {record.reason.rstrip('.')}"}
    ending = endings.get(record.state, record.state)
    if not record.metrics:
        ended = ending if record.state == "failed" else f"is {record.state}"
        return f"No round has been validated yet. The run {ended}."
    last = record.metrics[-1]
    if record.validated:
        found = perplexities(record.metrics)
        change = _change("Validation perplexity", found[0][1], found[-1][1])
    else:
        losses = [row.train_loss for row in record.metrics if row.train_loss is not None]
        change = "Nothing was held out to validate on; "
        change += _change("train loss", losses[0], losses[-1]) if losses else "nothing was trained"
    of = "" if last.round == rounds or not isinstance(rounds, int) else f" of {rounds}"
    parts = [
        f"{change} in {last.round}{of} round{'s' if of or last.round != 1 else ''}"
        + (f" ({ending})" if ending else ""),
        f"taking {duration_text(last.wall_time_s)} on the wall, {duration_text(last.virtual_time_s)} of virtual time"
        + _without_validation(last),
    ]
    if (names := record.participants) == [CENTRAL]:
        parts.append(f"on one node with the data of {len(record.clients())} clients")
    elif names:
        total = max(len(record.clients()), len(names))
        parts.append(f"with {len(names)} of {total} client{'s' if total > 1 else ''} ({_first(names)})")
    aggregation = record.setting("policy", "aggregation")
    cut, lag = cut_text(record.cuts, aggregation), lag_text(record.lags)
    if aggregation and not (aggregation == "concat" and cut):
        parts.append(_AGGREGATED.get(str(aggregation), f"adapters aggregated by {_setting_text(aggregation)}"))
    return "; ".join([", ".join(parts), *filter(None, (cut, lag))]) + "."


def _without_validation(row: MetricsRow) -> str:
    """Return the training times of ``row`` in brackets; nothing for tables of older versions, which lack them."""
    if row.train_wall_time_s is None or row.train_virtual_time_s is None:
        return ""
    wall, virtual = duration_text(row.train_wall_time_s), duration_text(row.train_virtual_time_s)
    return f" ({wall} and {virtual} without validation)"


def _change(what: str, before: float, after: float) -> str:
    if before == after:
        return f"{what} stayed at {number_text(after)}"
    verb = "fell" if after < before else "rose" if after > before and math.isfinite(after) else "went"
    return f"{what} {verb} from {number_text(before)} to {number_text(after)}"


def shares_text(shares: StepShares) -> str:
    """Describe ``shares``: the arithmetic, and the largest parts of the rest."""
    parts = {
        f"{phase} at {'the server' if server else 'the busiest client'}": share
        for (server, phase), share in shares.overhead.items()
    }
    parts["neither of them at work"] = shares.idle
    largest = sorted(parts.items(), key=lambda part: part[1], reverse=True)[:_PARTS_NAMED]
    named = ", ".join(f"{part} {share:.1%}" for part, share in largest if share > 0)
    rest = f" Largest of the rest: {named}." if named else ""
    return (
        f"Of a local step's wall time {shares.arithmetic:.1%} is the model's arithmetic on the path that everybody"
        " waits for: forward, tail, backward and optimizer of the slowest client, and the server's. What both do at"
        f" the same time counts twice.{rest}"
    )


def _memory_warnings(record: Sequence[HolderMemory]) -> list[str]:
    """Return sentences on all holders that took more memory than declared or predicted, drawn or not."""
    lines = []
    for limit in ("declared", "predicted"):
        over = [(holder.name, rounds) for holder in record if (rounds := getattr(holder, f"over_{limit}"))]
        named = [f"{name} (round{'s' * (len(rounds) > 1)} {_first([*map(str, rounds)])})" for name, rounds in over]
        if named:
            lines.append(f"{WARNING} Measured more than {limit}: {_first(named)}.")
    return lines


def _first(words: Sequence[str]) -> str:
    """Return the first of ``words``, and the number of the others."""
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return ", ".join(words[:_NAMED]) + more


# -- importance and ranks ---------------------------------------------------------------------------------------------


def _maps(record: RunRecord, names: Sequence[str], key: str) -> dict[str, Any]:
    history = record.history
    server = HolderGroup("server", frozenset({history.plans[max(history.plans)].server.name}))
    clients = HolderGroup(f"mean of {len(names)} clients" if len(names) > 1 else "client", frozenset(names))
    kinds = _kinds(names, record.clients())
    drawn = kinds if 1 < len(kinds) <= MAX_KINDS else []
    maps = RankMaps(history, [server, clients, *drawn])
    changes = len(history.changed) - 1
    times = {1: "once", 2: "twice"}.get(changes, f"{changes} times")
    return {
        "changed": f"changed {times} after the start" if changes else "never changed",
        "shown": maps.shown,
        "layers": maps.layers,
        "svg": maps.svg([server, clients], key, importance=True),
        "kinds": [(kind.label, maps.svg([kind], f"{key}-kind-{number}")) for number, kind in enumerate(drawn)],
    }


def _kinds(names: Sequence[str], clients: Sequence[Mapping[str, Any]]) -> list[HolderGroup]:
    """Group ``names`` by their kind in the configuration; a name without one is a kind of its own."""
    known = {client.get("name"): client.get("kind") for client in clients}
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(str(known.get(name) or name), []).append(name)
    return [
        HolderGroup(f"{kind} (mean of {len(own)})" if len(own) > 1 else kind, frozenset(own))
        for kind, own in members.items()
    ]


# -- settings ---------------------------------------------------------------------------------------------------------


def _cluster(record: RunRecord) -> list[list[object]]:
    """Return a row for each kind of client, then the server: name, count, and budgets."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for client in record.clients():
        kinds.setdefault(_setting_text(client.get("kind", client.get("name"))), []).append(client)
    rows = [(kind, len(members), members) for kind, members in kinds.items()]
    if isinstance(server := record.setting("server"), Mapping):
        rows.append(("server", server.get("replicas", 1), [server]))
    return [[kind, count, *(_span(members, key) for key in _BUDGET)] for kind, count, members in rows]


def _span(members: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [m[key] for m in members if isinstance(m.get(key), int | float)]
    if not values:
        return NOTHING
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _rows_text(row: PlanRow) -> str:
    """Format the examples of a client's batch, and how often it brings one."""
    return batch_text(row.rows, row.every or 1) if row.rows and row.available else NOTHING


def _part_text(row: PlanRow) -> str:
    """Say that a holder takes part, how it keeps the base where that is as codes, and its wire format, if its own."""
    if not row.available:
        return "unavailable"
    return ", ".join(["takes part", *(["codes"] if row.stored == "codes" else []), *([row.wire] if row.wire else [])])


def _setting_text(value: object) -> str:
    """Format a setting: a choice such as ``{dirichlet: 0.5}`` without its braces."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_setting_text(item) for item in value)
    return NOTHING if value is None else str(value)


def _known(text: Callable[[Any], str]) -> Callable[[Any], str]:
    """Extend the format ``text`` by a dash for None."""
    return lambda value: NOTHING if value is None else text(value)
