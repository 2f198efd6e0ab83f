"""The virtual clock: what everything would have taken at the declared budgets (METHOD 8)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np

from hsplit.config import Policy
from hsplit.scheduling.budgets import ClientBudget, ServerBudget
from hsplit.scheduling.cost import CostModel
from hsplit.scheduling.counted_model import Floats, Ints
from hsplit.scheduling.plan import Plan
from hsplit.scheduling.serving import cohorts
from hsplit.scheduling.step_time import pipelined_s


class VirtualClock:
    """Virtual seconds of everything that a run does; deterministic, and no statement about the wall.

    Every batch counts as a full one of ``max_length`` tokens, all of them supervised, as in plans. Clients compute
    and send side by side; the server waits for the last of them.

    Args:
        cost: what steps cost.
        clients, server: the budgets in force.
    """

    def __init__(self, cost: CostModel, clients: Sequence[ClientBudget], server: ServerBudget) -> None:
        self._cost, self._server = cost, server
        self._clients = {client.name: client for client in clients}

    def step_s(self, plan: Plan, clients: Collection[str] | None = None) -> float:
        """One local step: METHOD 5's makespan, pipelined where the job says so.

        Args:
            plan: the plan in force.
            clients: who trains; all available ones by default.
        """
        splits, job = _splits(plan, clients), self._cost.model.job
        phases = np.array([self._cost.times.client_times(self._clients[n])[k] for n, k in splits.items()])
        if self._cost.model.whole:
            return float(phases[:, 0].max())
        batches = job.grad_accumulation
        forward_s, backward_s = self._server_batch_s(splits)
        turns = self._cost.model.tail_at_client
        parts = job.pipeline.microbatches
        return batches * float(pipelined_s(phases / batches, forward_s, backward_s, parts, turns=turns))

    def call_s(self, plan: Plan, clients: Collection[str] | None = None) -> dict[str, dict[str, float]]:
        """Seconds of each call of a local step, by holder and by what is called for: up, turn and down of a client;
        step of the server (of each, where there are several), or forward and backward where the labels are at home.

        Args:
            plan: the plan in force.
            clients: who trains, which decides what the server has to do; all available ones by default.
        """
        splits, job = _splits(plan), self._cost.model.job
        times = {name: self._cost.times.client_times(self._clients[name])[k] for name, k in splits.items()}
        if self._cost.model.whole:
            return {name: {"up": float(up)} for name, (up, _, _) in times.items()}
        calls: dict[str, dict[str, float]] = {}
        for name, phases in times.items():
            up, turn, down = (float(seconds) / job.batches_per_step for seconds in phases)
            calls[name] = {"up": up, "turn": turn, "down": down}
        parts = job.pipeline.microbatches
        forward_s, backward_s = (seconds / parts for seconds in self._server_batch_s(_splits(plan, clients)))
        calls[plan.server.name] = {"step": forward_s + backward_s, "forward": forward_s, "backward": backward_s}
        return calls

    def _server_batch_s(self, splits: Mapping[str, int]) -> tuple[float, float]:
        """The server's forward and backward of one joined batch."""
        counts = self._counts(splits)
        total = float(self._cost.times.server_times(self._server, counts)[0])
        forward_s = self._cost.times.server_forward_s(self._server, counts[0])
        return forward_s, total / self._cost.model.job.grad_accumulation - forward_s

    def probe_s(self, plan: Plan, clients: Collection[str] | None = None) -> float:
        """One importance probe: a batch forward and backward, and the gradient of every adapted weight.

        Args:
            plan: the plan in force.
            clients: who is asked; all available ones by default.
        """
        splits, batches = _splits(plan, clients), self._cost.model.job.grad_accumulation
        phases = []
        for name, split in splits.items():
            client = self._clients[name]
            up, turn, down = self._cost.times.client_times(client, microbatches=1)[split] / batches
            phases.append((up, turn, down + self._cost.model.weight_gradient_flops[:split].sum() / client.flops))
        counts = self._counts(splits)
        deep = self._cost.times.server_times(self._server, counts)[0] / batches
        model = self._cost.model
        deep += (model.joined_clients(model.served(counts)) @ model.weight_gradient_flops)[0] / self._server.flops
        return float(np.array(phases).max(axis=0).sum() + deep)

    def aggregation_s(
        self,
        plan: Plan,
        policy: Policy,
        up_bytes: Mapping[str, int],
        down_bytes: Mapping[str, int],
        clients: Collection[str] | None = None,
    ) -> float:
        """A round's end: adapters up, the aggregation, residual changes and restarts down.

        Args:
            plan: whose adapters are aggregated.
            policy: its aggregation.
            up_bytes, down_bytes: by client name.
            clients: who hands in; all available ones by default.
        """
        arithmetic = self._aggregation_flops(plan, policy, clients) / self._server.flops
        return self.transfer_s(up_bytes) + arithmetic + self.transfer_s(down_bytes)

    def transfer_s(self, nbytes: Mapping[str, int]) -> float:
        """``nbytes`` by client name over every client's own link, until the last has it."""
        sent = self._cost.times.sent_s
        return max((sent(size, self._clients[name]) for name, size in nbytes.items()), default=0.0)

    def reconfiguration_s(self, before: Plan, after: Plan, down_bytes: Mapping[str, int]) -> float:
        """A change of plan: base weights of the layers that a client is new to, residuals and restarts.

        Base weights count at the size of the run's base, as if they came over the client's link, which they need not
        where its node has the model on disk. What the server takes over is on its own disk and does not count.

        Args:
            before, after: the two plans.
            down_bytes: residuals and restarts by client name.
        """
        had = _splits(before)
        moved = {
            name: down_bytes.get(name, 0) + round(float(self._base_bytes[had.get(name, 0) : split].sum()))
            for name, split in _splits(after).items()
            if name in down_bytes or split > had.get(name, 0)
        }
        return self.transfer_s(moved)

    def validation_s(self, plan: Plan, batches: Mapping[str, int]) -> float:
        """Forward passes over each client's validation batches, joined one by one.

        Args:
            plan: the plan in force.
            batches: number of validation batches by client name.
        """
        splits = {name: k for name, k in _splits(plan).items() if batches.get(name, 0) > 0}
        seconds, done = 0.0, 0
        # Between two distinct batch counts the same clients take part.
        for count in sorted({batches[name] for name in splits}):
            taking_part = [name for name in splits if batches[name] >= count]
            for part in cohorts(taking_part, self._cost.model.job.clients_per_round):
                seconds += (count - done) * self._forward_s({name: splits[name] for name in part})
            done = count
        return seconds

    def _forward_s(self, splits: Mapping[str, int]) -> float:
        clients = [self._cost.times.client_forward_s(self._clients[n], k) for n, k in splits.items()]
        up, tail = (max(phase) for phase in zip(*clients, strict=True))
        return up + self._cost.times.server_forward_s(self._server, self._counts(splits)[0]) + tail

    def _counts(self, splits: Mapping[str, int]) -> np.ndarray:
        return self._cost.model.clients_at(list(splits.values()))[None]

    def _aggregation_flops(self, plan: Plan, policy: Policy, clients: Collection[str] | None) -> float:
        """LAPACK's leading terms for the decompositions of METHOD 6; averaging factors is next to nothing."""
        model = self._cost.model
        if not model.decomposes:
            return 0.0
        own = [client.ranks for client in plan.available if clients is None or client.name in clients]
        own += [plan.server.ranks] * plan.servers
        rank: Ints = np.sum([model.rank_vector(ranks) for ranks in own], axis=0)
        cap, total = model.job.residual.max_rank, 0.0
        decomposed = [rank] if policy.reinit == "svd" or not model.keeps_residual else []
        if cap != "full" and model.keeps_residual:
            decomposed.append(rank + cap)
        for width in decomposed:
            # Two QR, an SVD of the core, and at most all directions formed by products with the factors.
            total += float((4.0 * model.sides * width**2 + 22.0 * width**3).sum())
        return total

    @cached_property
    def _base_bytes(self) -> Floats:
        """Each layer's base weights as they are stored, without residuals, ``(L,)``."""
        model = self._cost.model
        beside = model.by_layer(model.dtype.itemsize * model.residual_entries) if model.quantized else 0.0
        base: Floats = model.stored_bytes - beside
        return base


def _splits(plan: Plan, clients: Collection[str] | None = None) -> dict[str, int]:
    return {c.name: c.split or 0 for c in plan.available if clients is None or c.name in clients}
