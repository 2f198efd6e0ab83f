"""One importance probe, from the coordinator's side: who is asked for what, and in which order (METHOD 3)."""

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
        served: who takes part, by the server that serves them.
        round_: decides, with the run's seed and the client, which examples are drawn.
        tokens: supervised tokens wanted of each client, see :func:`hsplit.data.batches.probe_batch`.
        labels: ``privacy.labels``: ``server`` or ``client``.
        patience_s: how long a client may take for a call before it has failed; ``None``: any time.

    Raises:
        ActorFailure: an actor failed, or a weight did not report.
    """

    def patiently(calls: Sequence[Ref[R]]) -> list[R]:
        return executor.get(calls, None if patience_s is None else time.monotonic() + patience_s)

    everybody = [client for clients in served.values() for client in clients]
    fronts = {client: executor.call_pair(client, Client.probe_forward, round_, tokens) for client in everybody}
    # The small reports come first: a client that failed is found before its tensors are passed on.
    bytes_up = sum(report.nbytes for report in patiently([report for report, _ in fronts.values()]))
    sent = {client: message for client, (_, message) in fronts.items()}
    bytes_down, scored = 0, []
    if labels == "client":
        # All servers are asked before anybody's tail is waited for.
        deep = {
            server: executor.call_each(server, Replica.probe_forward, [sent[client] for client in clients])
            for server, clients in served.items()
        }
        tails = {
            client: executor.call_pair(client, Client.probe_tail, output)
            for server, clients in served.items()
            for client, output in zip(clients, deep[server][1], strict=True)
        }
        bytes_up += sum(loss.nbytes for loss in patiently([report for report, _ in tails.values()]))
        bytes_down += sum(report.nbytes for report in executor.get([report for report, _ in deep.values()]))
        for server, clients in served.items():
            slopes = [tails[client][1] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe_backward, slopes)))
    else:
        for server, clients in served.items():
            messages = [sent[client] for client in clients]
            scored.append((clients, *executor.call_each(server, Replica.probe, messages)))
    own = [
        executor.call(client, Client.probe_backward, slope)
        for clients, _, gradients in scored
        for client, slope in zip(clients, gradients, strict=True)
    ]
    at_servers = executor.get([report for _, report, _ in scored])
    reports = patiently(own) + [report for server in at_servers for report in server.importance]
    return ProbeOutcome(reports, bytes_up, bytes_down + sum(server.nbytes for server in at_servers))
