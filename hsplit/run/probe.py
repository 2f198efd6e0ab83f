"""The importance probe of a split model, between two local steps (METHOD 3)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hsplit.actors.client import Client
from hsplit.actors.executor import Executor, R, Ref
from hsplit.actors.replica import Replica
from hsplit.planning.importance import ImportanceReport


@dataclass(frozen=True)
class ProbeOutcome:
    """Result of a probe.

    Attributes:
        reports: two for each client: of its own layers, and of the server's layers over its tokens.
        bytes_up, bytes_down: activations (and the gradients of clients' tails) sent to the server; its replies.
    """

    reports: list[ImportanceReport]
    bytes_up: int
    bytes_down: int


def probe_importance(
    executor: Executor,
    served: Mapping[str, Sequence[str]],
    round_: int,
    tokens: int,
    labels: str,
    patience_s: float | None = None,
) -> ProbeOutcome:
    """Score every adapted weight on a probe batch of each client; nothing is trained and nothing else changes.

    Call it between two local steps. Tensors pass from actor to actor as handles; only scalars arrive here.

    Args:
        executor: reaches clients and servers, all of them configured.
        served: the clients that take part, by the server that serves them.
        round_: the examples are drawn by the run's seed, the client and this.
        tokens: supervised tokens to score on at each client, see :func:`hsplit.data.batches.probe_batch`.
        labels: ``privacy.labels``: ``server`` or ``client``.
        patience_s: seconds after which a client that has not answered has failed; ``None``: never.

    Raises:
        ActorFailure: an actor failed, or a weight did not report.
    """

    def get(calls: Sequence[Ref[R]]) -> list[R]:
        return executor.get(calls, None if patience_s is None else time.monotonic() + patience_s)

    fronts = {
        client: executor.call_pair(client, Client.probe_forward, round_, tokens)
        for clients in served.values()
        for client in clients
    }
    # The small reports come first: a client that failed is found before its tensors are passed on.
    bytes_up = sum(report.nbytes for report in get([report for report, _ in fronts.values()]))
    sent = {client: message for client, (_, message) in fronts.items()}
    bytes_down, scored = 0, []
    if labels == "client":
        # Calls to all servers begin before any client's tail is waited for.
        deep = {
            server: executor.call_each(server, Replica.probe_forward, [sent[client] for client in clients])
            for server, clients in served.items()
        }
        tails = {
            client: executor.call_pair(client, Client.probe_tail, output)
            for server, clients in served.items()
            for client, output in zip(clients, deep[server][1], strict=True)
        }
        bytes_up += sum(loss.nbytes for loss in get([report for report, _ in tails.values()]))
        bytes_down += sum(report.nbytes for report in executor.get([report for report, _ in deep.values()]))
        for server, clients in served.items():
            tail_gradients = [tails[client][1] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe_backward, tail_gradients)))
    else:
        for server, clients in served.items():
            messages = [sent[client] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe, messages)))
    own = [
        executor.call(client, Client.probe_backward, gradient)
        for clients, _, gradients in scored
        for client, gradient in zip(clients, gradients, strict=True)
    ]
    at_servers = executor.get([report for _, report, _ in scored])
    reports = get(own) + [report for server in at_servers for report in server.importance]
    return ProbeOutcome(reports, bytes_up, bytes_down + sum(server.nbytes for server in at_servers))
