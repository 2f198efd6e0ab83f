"""A run's metrics on Ray's metrics endpoint, where Prometheus finds them beside Ray's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from hsplit.observe.exported_metrics import (
    CAPTURED_IMPORTANCE,
    CLIENT_TRAIN_LOSS,
    CLIENTS,
    FAILURES,
    MEMORY_DECLARED,
    MEMORY_MEASURED,
    MEMORY_PREDICTED,
    METRICS,
    PERPLEXITY,
    RANK_TOTAL,
    ROUND,
    SPLIT,
    STEP,
    STEP_SECONDS,
    TOKENS,
    TRAIN_LOSS,
    VALIDATION_LOSS,
    VIRTUAL_SECONDS,
    VIRTUAL_STEP_SECONDS,
    WALL_SECONDS,
    WIRE_BYTES,
    ExportedMetric,
)
from hsplit.observe.observer import Observer
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, plan_rows
from hsplit.planning.plan import Plan

# How often Ray exports metrics, in milliseconds, and what it does where that is not set.
_INTERVAL, _DEFAULT_MS = "RAY_metrics_report_interval_ms", 10_000
# Ray exports no more often than this, in seconds; how much of the time between two exports passes between two settings.
_LEAST_S, _EVERY = 1.0, 0.4
# Values of a metric's series by the values of its tags.
_Series = Mapping[tuple[str, ...], float]


class RayMetrics(Observer):
    """Sets the gauges of :data:`~hsplit.observe.exported_metrics.METRICS` from this process, as an observer of a run.

    Ray exports what was set since it last did, and forgets what is not set again. So a thread sets every gauge anew,
    every few seconds. It ends with the run, and within two of Ray's intervals the run's series are gone.

    Args:
        every_s: seconds between two times, fewer than between two of Ray's exports; by default often enough for what
            ``RAY_metrics_report_interval_ms`` says.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self._every_s = every_s or _EVERY * max(_LEAST_S, float(os.environ.get(_INTERVAL, _DEFAULT_MS)) / 1000)
        self._run = ""
        self._gauges: dict[ExportedMetric, Any] = {}
        # Read by the thread: what it reads is replaced as a whole, never changed in place.
        self._series: Mapping[ExportedMetric, _Series] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._local_steps = 1

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        """Make the gauges, and begin to set them."""
        from ray.util.metrics import Gauge

        self._run = run_name
        self._gauges = {m: Gauge(m.name, m.meaning, tag_keys=("run", *m.tags)) for m in METRICS}
        # A daemon, since a driver that ends without leaving its run does not wait for it.
        self._thread = threading.Thread(target=self._set_repeatedly, name="hsplit metrics", daemon=True)
        self._thread.start()

    def plan(self, plan: Plan) -> None:
        """Show each holder's part of the plan: memory, ranks, split and predicted step time."""
        rows = [row for row in plan_rows(0, plan) if row.available]
        here = {row.name for row in rows}
        self._show(
            {
                MEMORY_DECLARED: {(row.name,): row.declared_bytes for row in rows},
                MEMORY_PREDICTED: {(row.name,): row.predicted_bytes for row in rows},
                RANK_TOTAL: {(row.name,): row.rank_total for row in rows},
                SPLIT: {(row.name,): row.split for row in rows if row.split is not None},
                VIRTUAL_STEP_SECONDS: {(row.name,): row.predicted_time_s for row in rows},
                CAPTURED_IMPORTANCE: {(): plan.captured_importance},
                CLIENTS: {(): len(plan.available)},
                # Of holders that have no part any more nothing is shown.
                **{
                    metric: {tags: value for tags, value in self._shown(metric).items() if tags[0] in here}
                    for metric in (MEMORY_MEASURED, CLIENT_TRAIN_LOSS, STEP_SECONDS)
                },
            }
        )

    def step(
        self,
        round: int,
        rounds: int,
        step: int,
        steps: int,
        losses: Mapping[str, float],
        states: Mapping[str, str],
    ) -> None:
        """Show the run's progress and the clients' losses."""
        self._local_steps = steps // rounds
        # Losses of clients that have left the run are passed too.
        own: _Series = {(name,): loss for name, loss in losses.items() if (name,) in self._shown(MEMORY_DECLARED)}
        self._show({ROUND: {(): round - 1}, STEP: {(): step}, CLIENT_TRAIN_LOSS: own})

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        """Show the round's results and measurements."""
        measured: _Series = {
            (holder.name,): holder.measured_bytes for holder in holders if holder.measured_bytes is not None
        }
        self._show(
            {
                ROUND: {(): row.round},
                STEP: {(): row.step},
                TOKENS: {(): row.tokens},
                TRAIN_LOSS: {} if row.train_loss is None else {(): row.train_loss},
                VALIDATION_LOSS: {(): row.val_loss},
                PERPLEXITY: {(): row.val_ppl},
                WALL_SECONDS: {(): row.wall_time_s},
                VIRTUAL_SECONDS: {(): row.virtual_time_s},
                WIRE_BYTES: {("up",): row.bytes_up, ("down",): row.bytes_down},
                CAPTURED_IMPORTANCE: {(): row.captured_importance},
                CLIENTS: {(): row.available_clients},
                MEMORY_MEASURED: {**self._shown(MEMORY_MEASURED), **measured},
                STEP_SECONDS: {(part.name, part.phase): part.seconds / self._local_steps for part in timing},
            }
        )

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Count failures; nothing else that is noted has a metric."""
        if event == "lost":
            failed = [(fields["client"], fields["kind"])]
        elif event == "repeated":
            failed = [(fields["actor"], fields["kind"]), *fields["gone"].items()]
        else:
            return
        counts = dict(self._shown(FAILURES))
        for series in failed:
            counts[series] = counts.get(series, 0) + 1
        self._show({FAILURES: counts})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _shown(self, metric: ExportedMetric) -> _Series:
        return self._series.get(metric, {})

    def _show(self, series: Mapping[ExportedMetric, _Series]) -> None:
        """Replace these metrics' series.

        Raises:
            Exception: of the thread, so that the fan-out removes this observer.
        """
        if self._error is not None:
            raise self._error
        self._series = {**self._series, **series}

    def _set_repeatedly(self) -> None:
        try:
            while not self._ended.wait(self._every_s):
                self._set()
            # The last round's, for the time until the run's series are gone.
            self._set()
        except Exception as error:
            self._error = error

    def _set(self) -> None:
        for metric, series in self._series.items():
            for values, value in series.items():
                tags = dict(zip(metric.tags, values, strict=True))
                self._gauges[metric].set(value, tags={"run": self._run, **tags})


def metrics_address() -> str:
    """Where Prometheus finds the metrics that this process, which is connected to Ray, has set: ``HOST:PORT``."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
