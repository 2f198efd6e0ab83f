"""The virtual seconds of a local step and of its parts (METHOD 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Job
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import CountedModel, Floats, Ints, prefix
from hsplit.planning.plan import HolderPlan


@dataclass(frozen=True)
class StepTime:
    """Seconds of one client's part of a local step (virtual).

    Attributes:
        up_s: front forward and hidden states up.
        turn_s: U-shape only: deep output down, tail, its gradient up.
        down_s: gradient down and front backward.
    """

    up_s: float
    turn_s: float
    down_s: float

    @property
    def total_s(self) -> float:
        """All of it, seconds (virtual)."""
        return self.up_s + self.turn_s + self.down_s


@dataclass(frozen=True)
class Loads:
    """Work of clients in a batch, where it is not the same for all.

    Attributes:
        rows: examples, ``(C,)``.
        wires: formats of their messages, ``C`` of them.
        codes: the base is stored as codes, which are dequantized in every pass, ``(C,)``.
    """

    rows: Ints
    wires: Sequence[str]
    codes: NDArray[np.bool_]

    @staticmethod
    def of_plan(parts: Sequence[HolderPlan], job: Job) -> Loads:
        """The loads that a plan gives its clients."""
        return Loads(
            np.array([part.rows or job.batch_size for part in parts], dtype=np.int64),
            [part.wire or job.wire for part in parts],
            np.array([part.stored == "codes" for part in parts], dtype=bool),
        )


class StepTimes:
    """Virtual seconds at the declared compute, bandwidth and latency.

    The residual counts at its cap and every adapter at the largest rank, so that times depend on the splits alone, as
    METHOD 5's ``makespan(K)`` does.

    Args:
        model: the counts.
        waits: whether residual changes may wait (``pace.residual_wait``).
    """

    def __init__(self, model: CountedModel, *, waits: bool = False) -> None:
        self._model, self._waits = model, waits

    def client_times(self, client: ClientBudget, microbatches: int | None = None) -> Floats:
        """Seconds of a client's phases up, turn and down of one local step at each split: ``(L + 1, 3)``.

        Args:
            client: its budget.
            microbatches: messages for each batch, ``pipeline.microbatches`` by default.
        """
        return self.all_client_times([client], microbatches)[0]

    def all_client_times(
        self, clients: Sequence[ClientBudget], microbatches: int | None = None, loads: Loads | None = None
    ) -> Floats:
        """:meth:`client_times` of many clients at once: ``(C, L + 1, 3)``."""
        layers = np.arange(self._model.layers + 1)
        return self._times(clients, layers[None], microbatches, loads)

    def times_at(
        self,
        clients: Sequence[ClientBudget],
        splits: Ints,
        microbatches: int | None = None,
        loads: Loads | None = None,
    ) -> Floats:
        """:meth:`client_times` of many clients, each at its own split alone: ``(C, 3)`` for ``splits`` ``(C,)``.

        Args:
            clients: budgets of the clients.
            splits: their splits.
            microbatches: as for :meth:`client_times`; no more than a batch has examples.
            loads: of the clients; by default ``job.batch_size`` examples each, as ``job.wire``, stored dense.
        """
        return self._times(clients, splits[:, None], microbatches, loads)[:, 0]

    def _times(
        self, clients: Sequence[ClientBudget], splits: Ints, microbatches: int | None, loads: Loads | None = None
    ) -> Floats:
        """Seconds of the phases at ``splits``, ``(C, K)`` or ``(1, K)``: ``(C, K, 3)``."""
        job, most = self._model.job, microbatches or self._model.job.pipeline.microbatches
        if loads is None:
            count = len(clients)
            loads = Loads(np.full(count, job.batch_size), [job.wire] * count, np.zeros(count, dtype=bool))
        messages = np.minimum(most, loads.rows)[:, None]
        share = (loads.rows / job.batch_size)[:, None]
        budgets = np.array([(c.flops, c.bandwidth_bps, c.latency_s) for c in clients], dtype=np.float64)
        flops, bandwidth, latency = budgets.reshape(-1, 3).T[:, :, None]
        # Clients of a few loads have the same messages.
        keys = list(zip(loads.wires, loads.rows.tolist(), strict=True))
        wires = {key: self._model.wire_bytes(1, *key) for key in set(keys)}

        def sent(message: str) -> Floats:
            # A client sends and computes alternately, so that every message's latency counts.
            nbytes = np.array([getattr(wires[key], message) for key in keys], dtype=np.float64)[:, None]
            seconds: Floats = 8 * nbytes / bandwidth + messages * latency
            return seconds

        times = np.zeros((len(clients), splits.shape[1], 3))
        if self._model.whole:
            # Local steps of the client alone: no phase waits for another holder.
            work = prefix(self._model.forward_flops + self._model.backward_flops + self._weight_gradient_flops)
            times[:, :, 0] = (work + self.tail_flops)[splits] / flops
            return times * self._model.job.grad_accumulation
        widened = messages * loads.codes[:, None] * prefix(self._model.dequantization_flops)[splits]
        times[:, :, 0] = (share * prefix(self._model.forward_flops)[splits] + widened) / flops + sent("up")
        if self._model.tail_at_client:
            times[:, :, 1] = sent("deep") + share * self.tail_flops / flops + sent("slope")
        back = (share * prefix(self._model.backward_flops)[splits] + widened) / flops + sent("down")
        times[:, :, 2] = np.where(splits > 0, back, 0.0)
        return times * self._model.job.grad_accumulation

    def link_s(self, client: ClientBudget, loads: Loads) -> float:
        """Virtual seconds of a client's messages in a local step; ``loads`` are of this client alone."""
        wire = self._model.wire_bytes(1, loads.wires[0], int(loads.rows[0]))
        messages = min(self._model.job.pipeline.microbatches, int(loads.rows[0])) * (
            4 if self._model.tail_at_client else 2
        )
        nbytes = wire.up + wire.deep + wire.slope + wire.down
        once = 8 * nbytes / client.bandwidth_bps + messages * client.latency_s
        return once * self._model.job.grad_accumulation

    def exchange_times(
        self, clients: Sequence[ClientBudget], *, forward_only: bool = False, learned_from: int = 0
    ) -> Floats:
        """Seconds of a round's end for the links of ``clients``, spread over its local steps: ``(C, L + 1)``.

        Adapters up, the residual's change and the restart down; for a client that only computes forward, the residual's
        change alone, which includes the restart. Changes that may wait are taken to wait: they are sent once in many
        rounds. Unlike a step's messages it grows with the split: over a slow link a deep split may take longer to
        aggregate than it saves the server.

        Args:
            clients: budgets of the clients.
            forward_only: they train nothing.
            learned_from: the first layer that any client trains; layers before it have no residual.
        """
        model = self._model
        budgets = np.array([(c.bandwidth_bps, c.latency_s) for c in clients], dtype=np.float64)
        bandwidth, latency = budgets.reshape(-1, 2).T[:, :, None]
        residual = model.by_layer(model.residual_itemsize * model.residual_entries)
        if self._waits:
            residual = model.sent_bytes.astype(np.float64) if forward_only else np.zeros_like(residual)
        residual[:learned_from] = 0
        nbytes = prefix(residual if forward_only else 2 * model.sent_bytes + residual)
        messages = 1 if forward_only else 2
        seconds: Floats = (8 * nbytes / bandwidth + messages * latency) / model.job.local_steps
        return seconds

    def server_times(self, server: ServerBudget, counts: Ints) -> Floats:
        """Virtual seconds of the servers' phase of one local step: ``(M,)`` for ``counts`` ``(M, L + 1)``.

        With several servers it is that of the first, which no other exceeds.
        """
        return self.serving_times(server, self._model.served(counts))

    def serving_times(self, server: ServerBudget, served: Ints) -> Floats:
        """Virtual seconds of one server's phase with exactly the clients ``served``: ``(M,)``."""
        joined = self._model.joined_clients(served)
        flops = joined @ (self._model.forward_flops + self._model.backward_flops)
        # Codes are dequantized once in each pass of a microbatch, whatever its rows.
        parts = min(self._model.job.pipeline.microbatches, self._model.job.batch_size)
        flops = flops + 2 * parts * ((joined > 0) @ self._model.dequantization_flops)
        if not self._model.tail_at_client:
            flops = flops + served.sum(axis=1) * self.tail_flops
        times: Floats = flops / server.flops * self._model.job.grad_accumulation
        return times

    def makespan(self, slowest: Floats, server_s: Floats) -> Floats:
        """METHOD 5's ``makespan(K)``, pipelined where the job has microbatches.

        Then it is an upper bound of :class:`~hsplit.planning.cost.clock.VirtualClock`: the slowest up, turn and down
        phases are taken as one client's, although they may be of several.

        Args:
            slowest: longest up, turn and down phase of the clients that wait for one another, and longest up phase of
                those that are a step ahead, ``(..., 4)``.
            server_s: the server's phase, ``(...)``.
        """
        job, together, ahead = self._model.job, slowest[..., :3], slowest[..., 3]
        if job.pipeline.microbatches == 1:
            total: Floats = np.maximum(together.sum(axis=-1) + server_s, ahead)
            return total
        # Accumulated batches follow one another.
        cut = pipelined_s(
            together[..., None, :],
            self._forward_part * server_s,
            (1 - self._forward_part) * server_s,
            job.pipeline.microbatches,
            turns=self._model.tail_at_client,
        )
        return np.maximum(cut, ahead)

    @cached_property
    def _forward_part(self) -> float:
        """Forward's part of the deep layers' arithmetic."""
        forward = float(self._model.forward_flops.sum())
        return forward / (forward + float(self._model.backward_flops.sum()))

    def forward_times_at(self, clients: Sequence[ClientBudget], splits: Ints, loads: Loads) -> Floats:
        """Seconds of each client's forward of one batch, ``(C, 2)``: front and message up, and the tail if held."""
        budgets = np.array([(c.flops, c.bandwidth_bps, c.latency_s) for c in clients], dtype=np.float64)
        flops, bandwidth, latency = budgets.reshape(-1, 3).T
        share = loads.rows / self._model.job.batch_size
        front, tail = share * prefix(self._model.forward_flops)[splits], share * self._tail_forward_flops
        times = np.zeros((len(clients), 2))
        if self._model.whole:
            times[:, 0] = (front + tail) / flops
            return times
        front = front + loads.codes * prefix(self._model.dequantization_flops)[splits]
        keys = list(zip(loads.wires, loads.rows.tolist(), strict=True))
        wires = [self._model.wire_bytes(1, *key) for key in keys]
        times[:, 0] = front / flops + 8 * np.array([wire.up for wire in wires]) / bandwidth + latency
        if self._model.tail_at_client:
            times[:, 1] = 8 * np.array([wire.deep for wire in wires]) / bandwidth + latency + tail / flops
        return times

    def turn_times(self, server: ServerBudget, splits: Ints, rows: Ints) -> tuple[Floats, Floats]:
        """Virtual seconds of a server's forward and backward over one batch of each client, ``(C,)`` each."""
        model, share = self._model, rows / self._model.job.batch_size
        at_server = 0.0 if model.tail_at_client else self._tail_forward_flops
        forward, backward = prefix(model.forward_flops), prefix(model.backward_flops)
        return (
            share * (forward[-1] - forward[splits] + at_server) / server.flops,
            share * (backward[-1] - backward[splits] + at_server) / server.flops,
        )

    def widening_s(self, server: ServerBudget, split: int) -> float:
        """Virtual seconds in which a server dequantizes its layers once, from ``split`` on."""
        return float(self._model.dequantization_flops[split:].sum()) / server.flops

    def server_forward_s(self, server: ServerBudget, counts: Ints) -> float:
        """Virtual seconds of the server's forward of one joined batch; ``counts`` is ``(L + 1,)``."""
        served = self._model.served(counts[None])
        joined = self._model.joined_clients(served)
        flops = float((joined @ self._model.forward_flops + (joined > 0) @ self._model.dequantization_flops)[0])
        if not self._model.tail_at_client:
            flops += int(served.sum()) * self._tail_forward_flops
        return flops / server.flops

    @staticmethod
    def sent_s(nbytes: int, client: ClientBudget) -> float:
        """Virtual seconds for ``nbytes`` over a client's link, in either direction."""
        return 8 * nbytes / client.bandwidth_bps + client.latency_s

    @cached_property
    def tail_flops(self) -> float:
        """Operations of the head's forward and of the gradient at its input (and of the head, where it is trained),
        with all positions supervised.
        """
        return (3.0 if self._model.trains_weights else 2.0) * self._tail_forward_flops

    @property
    def _weight_gradient_flops(self) -> Floats:
        """Operations of ``delta^T x`` of every weight over one batch where weights are trained, by layer, ``(L,)``."""
        model = self._model
        return model.weight_gradient_flops if model.trains_weights else np.zeros(model.layers)

    @property
    def _tail_forward_flops(self) -> float:
        return 2.0 * self._model.rows * self._model.width * self._model.words


def pipelined_s(
    clients: Floats, forward_s: Floats | float, backward_s: Floats | float, parts: int, *, turns: bool
) -> Floats:
    """Seconds of one batch cut into equal microbatches, which each holder computes in order (METHOD 8).

    A client computes all its fronts, then all its tails, if it has them, then the backward of all parts. The server
    starts a part when the last client has sent it; without turns it computes forward and backward at once.

    Args:
        clients: up, turn and down seconds of each client for the whole batch, ``(..., C, 3)``.
        forward_s, backward_s: the server's for the whole batch, ``(...)``.
        parts: microbatches.
        turns: the deep output goes to the clients' tails, and its gradient comes back (U-shape).

    Returns:
        ``(...)``.
    """
    up, turn, down = np.moveaxis(clients, -1, 0) / parts
    own = up * parts
    deep = (forward_s if turns else forward_s + backward_s) / parts
    free: Floats = np.zeros(own.shape[:-1])
    ready = []
    for part in range(parts):
        free = np.maximum(free, (up * (part + 1)).max(axis=-1)) + deep
        ready.append(free)
    if turns:
        returned = []
        for output in ready:
            own = np.maximum(own, output[..., None]) + turn
            free = np.maximum(free, own.max(axis=-1)) + backward_s / parts
            returned.append(free)
        ready = returned
    for gradient in ready:
        own = np.maximum(own, gradient[..., None]) + down
    last: Floats = own.max(axis=-1)
    return last
