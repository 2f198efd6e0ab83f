"""Metrics of a run in Prometheus: the list that exporter, dashboard and documentation share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportedMetric:
    """A metric of a run: a gauge with the tag ``run``.

    Sums and counts are gauges too: Ray drops a gauge soon after its run, but a counter only with the node.

    Attributes:
        name: its name in Ray.
        unit: of its value, as Grafana calls it.
        meaning: description for users.
        tags: labels that distinguish its series of one run.
    """

    name: str
    unit: str
    meaning: str
    tags: tuple[str, ...] = ()

    @property
    def in_prometheus(self) -> str:
        """Name of the metric in Prometheus."""
        return f"ray_{self.name}"


ROUND = ExportedMetric("hsplit_round", "short", "Rounds done.")
STEP = ExportedMetric("hsplit_step", "short", "Local steps done.")
TOKENS = ExportedMetric("hsplit_tokens", "short", "Supervised tokens trained on since the run's start.")
TRAIN_LOSS = ExportedMetric("hsplit_train_loss", "short", "Mean training loss over the last round's supervised tokens.")
CLIENT_TRAIN_LOSS = ExportedMetric(
    "hsplit_client_train_loss", "short", "Mean training loss of a client in its last local step.", ("holder",)
)
VALIDATION_LOSS = ExportedMetric(
    "hsplit_validation_loss", "short", "Mean loss over the held-out supervised tokens in the last validation."
)
PERPLEXITY = ExportedMetric(
    "hsplit_validation_perplexity", "short", "Perplexity of the held-out supervised tokens in the last validation."
)
WORST_PERPLEXITY = ExportedMetric(
    "hsplit_worst_client_perplexity", "short", "Largest perplexity of a client's own held-out tokens."
)
STEP_SECONDS = ExportedMetric(
    "hsplit_step_seconds",
    "s",
    "Wall seconds of a local step that a holder spends in a phase of timing.csv, mean over the last round.",
    ("holder", "phase"),
)
VIRTUAL_STEP_SECONDS = ExportedMetric(
    "hsplit_virtual_step_seconds",
    "s",
    "Virtual seconds of a holder's part of a local step: predicted by the plan at the declared budgets.",
    ("holder",),
)
WALL_SECONDS = ExportedMetric("hsplit_wall_seconds", "s", "Wall seconds that the run has taken by its last round.")
VIRTUAL_SECONDS = ExportedMetric(
    "hsplit_virtual_seconds",
    "s",
    "Virtual seconds that the run would have taken by its last round at the declared budgets.",
)
TRAIN_WALL_SECONDS = ExportedMetric(
    "hsplit_train_wall_seconds", "s", "Wall seconds that the run has taken by its last round, without validations."
)
TRAIN_VIRTUAL_SECONDS = ExportedMetric(
    "hsplit_train_virtual_seconds",
    "s",
    "Virtual seconds that the run would have taken by its last round at the declared budgets, without validations.",
)
WIRE_BYTES = ExportedMetric(
    "hsplit_wire_bytes", "bytes", "Bytes that clients sent (up) and received (down) in the last round.", ("direction",)
)
MEMORY_DECLARED = ExportedMetric("hsplit_memory_declared_bytes", "bytes", "Memory that a holder declares.", ("holder",))
MEMORY_PREDICTED = ExportedMetric(
    "hsplit_memory_predicted_bytes", "bytes", "Memory that the plan in force needs of a holder at most.", ("holder",)
)
MEMORY_MEASURED = ExportedMetric(
    "hsplit_memory_measured_bytes",
    "bytes",
    "Most memory that a holder took in the last round in which it was measured.",
    ("holder",),
)
RANK_TOTAL = ExportedMetric("hsplit_rank_total", "short", "Sum of the ranks of a holder's adapters.", ("holder",))
SPLIT = ExportedMetric(
    "hsplit_split", "short", "A client's split point: how many layers it holds; a server's first layer.", ("holder",)
)
CLIENTS = ExportedMetric("hsplit_clients", "short", "Clients that take part.")
CAPTURED_IMPORTANCE = ExportedMetric(
    "hsplit_captured_importance", "short", "Importance that the plan in force captures."
)
FAILURES = ExportedMetric(
    "hsplit_failures",
    "short",
    "How often an actor has failed since the driver began, by the kind of failure; none: no series.",
    ("holder", "kind"),
)

METRICS = (
    ROUND,
    STEP,
    TOKENS,
    TRAIN_LOSS,
    CLIENT_TRAIN_LOSS,
    VALIDATION_LOSS,
    PERPLEXITY,
    WORST_PERPLEXITY,
    STEP_SECONDS,
    VIRTUAL_STEP_SECONDS,
    WALL_SECONDS,
    VIRTUAL_SECONDS,
    TRAIN_WALL_SECONDS,
    TRAIN_VIRTUAL_SECONDS,
    WIRE_BYTES,
    MEMORY_DECLARED,
    MEMORY_PREDICTED,
    MEMORY_MEASURED,
    RANK_TOTAL,
    SPLIT,
    CLIENTS,
    CAPTURED_IMPORTANCE,
    FAILURES,
)
"""All metrics."""
