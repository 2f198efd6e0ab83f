"""One importance probe, from the coordinator's side: who is asked for what, and in which order (METHOD 3)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsplit.actors.executor import SERVER, Executor, values_of
from hsplit.actors.messages import LossReport
from hsplit.scheduling.importance import ImportanceReport


@dataclass(frozen=True)
class ProbeOutcome:
    """What a probe found.

    Attributes:
        reports: for each client that of its own layers and that of the server's layers over its tokens.
        bytes_up, bytes_down: activations (and the gradients of clients' tails) sent to the server; what it sent back.
    """

    reports: list[ImportanceReport]
    bytes_up: int
    bytes_down: int


def probe_importance(
    executor: Executor,
    clients: Sequence[str],
    round_: int,
    tokens: int,
    labels: str,
    patience_s: float | None = None,
) -> ProbeOutcome:
    """Score every adapted weight on a probe batch of each client; nothing is trained and nothing else changes.

    Call it between two local steps. Tensors pass from actor to actor as handles; only scalars arrive here.

    Args:
        executor: reaches clients and server, all of them configured.
        clients: who takes part.
        round_: decides, with the run's seed and the client, which examples are drawn.
        tokens: supervised tokens wanted of each client, see :func:`hsplit.data.probe_batch.probe_batch`.
        labels: ``privacy.labels``: ``server`` or ``client``.
        patience_s: how long a client may take for a call before it has failed; ``None``: any time.

    Raises:
        ActorFailure: an actor failed, or a weight did not report.
    """

    def patiently(calls: Sequence[Any]) -> list[Any]:
        return values_of(executor.settle(calls, None if patience_s is None else time.monotonic() + patience_s))

    fronts = [executor.call_many(2, client, "probe_forward", round_, tokens) for client in clients]
    # The small reports come first: a client that failed is found before its tensors are passed on.
    bytes_up = sum(report.nbytes for report in patiently([report for report, _ in fronts]))
    activations = [message for _, message in fronts]
    bytes_down = 0
    if labels == "client":
        up, *deep = executor.call_many(1 + len(clients), SERVER, "probe_forward", *activations)
        tails = [
            executor.call_many(2, client, "probe_tail", output) for client, output in zip(clients, deep, strict=True)
        ]
        losses: list[LossReport] = patiently([report for report, _ in tails])
        bytes_up += sum(loss.nbytes for loss in losses)
        bytes_down += executor.get([up])[0].nbytes
        sent: list[Any] = [gradient for _, gradient in tails]
        down, *gradients = executor.call_many(1 + len(clients), SERVER, "probe_backward", *sent)
    else:
        down, *gradients = executor.call_many(1 + len(clients), SERVER, "probe", *activations)
    own = [
        executor.call(client, "probe_backward", gradient) for client, gradient in zip(clients, gradients, strict=True)
    ]
    (server,) = executor.get([down])
    fronts_scored = patiently(own)
    return ProbeOutcome([*fronts_scored, *server.importance], bytes_up, bytes_down + server.nbytes)
