"""A run's metrics on Ray's metrics endpoint, beside Ray's own."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from hsplit.observe import exported_metrics as metrics
from hsplit.observe.exported_metrics import ExportedMetric
from hsplit.observe.observer import Observer
from hsplit.observe.tables import MetricsRow, PlanRow, TimingRow, plan_rows
from hsplit.planning.plan import Plan

# Ray's variable for its export interval in milliseconds, and the default.
_INTERVAL, _DEFAULT_MS = "RAY_metrics_report_interval_ms", 10_000
# Ray's shortest export interval, in seconds; time between two settings, as a share of the export interval.
_LEAST_S, _EVERY = 1.0, 0.4
# Values of a metric's series by the values of its tags.
_Series = Mapping[tuple[str, ...], float]


class RayMetrics(Observer):
    """Observer that sets the gauges of :data:`~hsplit.observe.exported_metrics.METRICS` from this process.

    Ray exports the gauges set since its last export, and drops the others. So a thread sets every gauge again every
    few seconds. It ends with the run, and the run's series are gone within two of Ray's intervals.

    Args:
        every_s: seconds between two settings, fewer than between two of Ray's exports; by default derived from
            ``RAY_metrics_report_interval_ms``.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self._every_s = every_s or _EVERY * max(_LEAST_S, float(os.environ.get(_INTERVAL, _DEFAULT_MS)) / 1000)
        self._run = ""
        self._gauges: dict[ExportedMetric, Any] = {}
        # Read by the thread: replaced as a whole, never changed in place.
        self._series: Mapping[ExportedMetric, _Series] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._local_steps = 1

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        from ray.util.metrics import Gauge

        self._run = run_name
        self._gauges = {m: Gauge(m.name, m.meaning, tag_keys=("run", *m.tags)) for m in metrics.METRICS}
        # A daemon, so that a driver that ends without __exit__ does not wait for it.
        self._thread = threading.Thread(target=self._set_repeatedly, name="hsplit metrics", daemon=True)
        self._thread.start()

    def plan(self, plan: Plan) -> None:
        rows = [row for row in plan_rows(0, plan) if row.available]
        here = {row.name for row in rows}
        self._update(
            {
                metrics.MEMORY_DECLARED: {(row.name,): row.declared_bytes for row in rows},
                metrics.MEMORY_PREDICTED: {(row.name,): row.predicted_bytes for row in rows},
                metrics.RANK_TOTAL: {(row.name,): row.rank_total for row in rows},
                metrics.SPLIT: {(row.name,): row.split for row in rows if row.split is not None},
                metrics.VIRTUAL_STEP_SECONDS: {(row.name,): row.predicted_time_s for row in rows},
                metrics.CAPTURED_IMPORTANCE: {(): plan.captured_importance},
                metrics.CLIENTS: {(): len(plan.available)},
                # Holders that no longer take part have no series.
                **{
                    metric: {tags: value for tags, value in self._series_of(metric).items() if tags[0] in here}
                    for metric in (metrics.MEMORY_MEASURED, metrics.CLIENT_TRAIN_LOSS, metrics.STEP_SECONDS)
                },
            }
        )

    def step(
        self, round: int, rounds: int, step: int, steps: int, losses: Mapping[str, float], states: Mapping[str, str]
    ) -> None:
        self._local_steps = steps // rounds
        # Losses of clients that have left the run are passed too.
        own: _Series = {
            (name,): loss for name, loss in losses.items() if (name,) in self._series_of(metrics.MEMORY_DECLARED)
        }
        self._update({metrics.ROUND: {(): round - 1}, metrics.STEP: {(): step}, metrics.CLIENT_TRAIN_LOSS: own})

    def round_done(self, row: MetricsRow, holders: Sequence[PlanRow], timing: Sequence[TimingRow]) -> None:
        measured: _Series = {
            (holder.name,): holder.measured_bytes for holder in holders if holder.measured_bytes is not None
        }
        self._update(
            {
                metrics.ROUND: {(): row.round},
                metrics.STEP: {(): row.step},
                metrics.TOKENS: {(): row.tokens},
                metrics.TRAIN_LOSS: {} if row.train_loss is None else {(): row.train_loss},
                **self._known(metrics.VALIDATION_LOSS, row.val_loss),
                **self._known(metrics.PERPLEXITY, row.val_ppl),
                **self._known(metrics.WORST_PERPLEXITY, row.worst_ppl),
                metrics.WALL_SECONDS: {(): row.wall_time_s},
                metrics.VIRTUAL_SECONDS: {(): row.virtual_time_s},
                **self._known(metrics.TRAIN_WALL_SECONDS, row.train_wall_time_s),
                **self._known(metrics.TRAIN_VIRTUAL_SECONDS, row.train_virtual_time_s),
                metrics.WIRE_BYTES: {("up",): row.bytes_up, ("down",): row.bytes_down},
                metrics.CAPTURED_IMPORTANCE: {(): row.captured_importance},
                metrics.CLIENTS: {(): row.available_clients},
                metrics.MEMORY_MEASURED: {**self._series_of(metrics.MEMORY_MEASURED), **measured},
                metrics.STEP_SECONDS: {(part.name, part.phase): part.seconds / self._local_steps for part in timing},
            }
        )

    def note(self, text: str, event: str = "", /, **fields: Any) -> None:
        """Count failures; no other note has a metric."""
        if event == "lost":
            failed = [(fields["client"], fields["kind"])]
        elif event == "repeated":
            failed = [(fields["actor"], fields["kind"]), *fields["gone"].items()]
        else:
            return
        counts = dict(self._series_of(metrics.FAILURES))
        for series in failed:
            counts[series] = counts.get(series, 0) + 1
        self._update({metrics.FAILURES: counts})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    @staticmethod
    def _known(metric: ExportedMetric, value: float | None) -> dict[ExportedMetric, _Series]:
        """The series of a metric of the run; none for ``None``, so that the last known value stays."""
        return {} if value is None else {metric: {(): value}}

    def _series_of(self, metric: ExportedMetric) -> _Series:
        return self._series.get(metric, {})

    def _update(self, series: Mapping[ExportedMetric, _Series]) -> None:
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
            # The last round's values, until the run's series are gone.
            self._set()
        except Exception as error:
            self._error = error

    def _set(self) -> None:
        for metric, series in self._series.items():
            for values, value in series.items():
                tags = dict(zip(metric.tags, values, strict=True))
                self._gauges[metric].set(value, tags={"run": self._run, **tags})


def metrics_address() -> str:
    """Return the address (``HOST:PORT``) of the metrics of this process, which is connected to Ray."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
