"""The virtual clock: durations of a run at the declared budgets (METHOD 8)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hsplit.config import Policy
from hsplit.lora.importance_probe import WATCHED_ROWS
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import Floats, Ints, prefix
from hsplit.planning.cost.cycle import Cycle, Turns, simulated_cycle
from hsplit.planning.cost.model import CostModel
from hsplit.planning.cost.serving import cohorts, served_by
from hsplit.planning.cost.step_time import Loads
from hsplit.planning.plan import HolderPlan, Plan

# Cost of an operation of a decomposition in operations of a step, to which declared speeds refer: it is in fp64, and
# LAPACK is half as fast as products (measured on CPUs at 384 to 4096 wide: 3.9 to 4.5).
_DECOMPOSED = 4.0
# Cost of multiplying an entry of a gradient by its weight and summing the absolute values, in the same operations.
_REDUCED = 100.0


@dataclass(frozen=True)
class Ranks:
    """Ranks of each weight over its holders.

    Attributes:
        total: sum of their ranks, ``(W,)``.
        holders: number of holders, ``(W,)``.
    """

    total: Ints
    holders: Ints


class VirtualClock:
    """Virtual seconds of every part of a run; deterministic, and independent of wall-clock time.

    Every batch counts as a full one of ``max_length`` tokens, all of them supervised, as in plans. Clients compute
    and send in parallel; the server waits for the last of them.

    Args:
        cost: costs of steps.
        clients, server: the budgets in force.
    """

    def __init__(self, cost: CostModel, clients: Sequence[ClientBudget], server: ServerBudget) -> None:
        self._cost, self._server = cost, server
        self._clients = {client.name: client for client in clients}

    def steps_s(self, plan: Plan, clients: Collection[str] | None = None, start: int = 0) -> list[float]:
        """Seconds of each local step of a round, in order: in the first nothing is under way, after the last neither.

        Args:
            plan: the plan in force.
            clients: the training clients; all available ones by default.
            start: the round's first local step, counted over the run.
        """
        ends = self.cycle(plan, clients, start, self._cost.model.job.local_steps).ends
        steps: list[float] = np.diff(ends, prepend=0.0).tolist()
        return steps

    def finished_s(self, plan: Plan, clients: Collection[str] | None = None, start: int = 0) -> dict[str, float]:
        """Seconds from the end of a round's last step to each client's end of it: before that, negative.

        Nothing where all wait for all: then nobody sends adapters before the step has ended.
        """
        if self._cost.pace.periods == "none":
            return {}
        found = self.cycle(plan, clients, start, self._cost.model.job.local_steps)
        parts = self._training(plan, clients)
        own = dict(zip((part.name for part in parts), (found.finished - found.ends[-1]).tolist(), strict=True))
        return own | {plan.server.name: found.server_finished - float(found.ends[-1])}

    def step_s(self, plan: Plan, clients: Collection[str] | None = None) -> float:
        """Seconds of a local step of a round that goes on, on the average over the clients' periods.

        Args:
            plan: the plan in force.
            clients: the training clients; all available ones by default.
        """
        steps = math.lcm(*(part.every for part in self._training(plan, clients)))
        ends = self.cycle(plan, clients, 0, 3 * steps + 1).ends
        # The last step also waits for the clients' backwards.
        return float(ends[-2] - ends[-2 - steps]) / steps if len(ends) > steps + 1 else float(ends[0])

    def cycle(self, plan: Plan, clients: Collection[str] | None, start: int, steps: int) -> Cycle:
        """Simulate ``steps`` local steps from ``start`` on; arguments as :meth:`steps_s`."""
        return simulated_cycle(self._turns(plan, self._training(plan, clients)), start, steps)

    def _turns(self, plan: Plan, parts: Sequence[HolderPlan]) -> Turns:
        model, times, job = self._cost.model, self._cost.times, self._cost.model.job
        loads, splits = Loads.of_plan(parts, job), np.array([part.split or 0 for part in parts], dtype=np.int64)
        batches = 1 if model.whole else job.grad_accumulation
        phases = times.times_at([self._clients[part.name] for part in parts], splits, loads=loads) / batches
        cut = np.ones(len(parts), dtype=np.int64)
        forward, backward = np.zeros(len(parts)), np.zeros(len(parts))
        server = np.zeros(len(parts), dtype=np.int64)
        widening_s = 0.0
        if not model.whole:
            cut = np.minimum(loads.rows, job.pipeline.microbatches)
            forward, backward = times.turn_times(self._server, splits, loads.rows)
            widening_s = times.widening_s(self._server, plan.server.split or 0)
            own = {part.name: part.split or 0 for part in parts}
            dealt = served_by(own, own, plan.server_names)
            place = {name: index for index, names in enumerate(dealt.values()) for name in names}
            server = np.array([place[part.name] for part in parts], dtype=np.int64)
        frozen = np.array([part.forward_only for part in parts], dtype=bool)
        return Turns(
            up=phases[:, 0] / cut,
            turn=phases[:, 1] / cut,
            down=np.where(frozen, 0.0, phases[:, 2] / cut),
            forward=forward / cut,
            backward=backward / cut,
            parts=cut,
            group=np.array([part.group for part in parts], dtype=np.int64),
            every=np.array([part.every for part in parts], dtype=np.int64),
            offset=np.array([part.offset for part in parts], dtype=np.int64),
            server=server,
            frozen=frozen,
            turn_forward=widening_s,
            turn_backward=widening_s,
            batches=batches,
            at_home=model.tail_at_client and not model.whole,
            overlaps=self._cost.pace.periods != "none",
            ahead=job.runs_ahead or self._cost.pace.periods != "none",
        )

    def _busiest(self, plan: Plan, clients: Collection[str] | None) -> dict[str, tuple[str, float]]:
        """The server's seconds of a step, and compute and links of the busiest client, where turns overlap."""
        parts = self._training(plan, clients)
        steps = math.lcm(*(part.every for part in parts))
        found = self.cycle(plan, clients, 0, steps)
        index = int(found.busy.argmax())
        part, busy = parts[index], float(found.busy[index]) / steps
        link = (
            self._cost.times.link_s(self._clients[part.name], Loads.of_plan([part], self._cost.model.job)) / part.every
        )
        link = min(link, busy)
        server = (plan.server.name, found.server_busy / steps)
        return {"compute": (part.name, busy - link), "link": (part.name, link), "server": server}

    def busy_s(self, plan: Plan) -> dict[str, float]:
        """Seconds that each holder computes or sends in a local step, on the average over its period, by name."""
        steps = math.lcm(*(part.every for part in plan.available))
        found = self.cycle(plan, None, 0, steps)
        busy = dict(zip((part.name for part in plan.available), (found.busy / steps).tolist(), strict=True))
        return busy | {plan.server.name: found.server_busy / steps}

    def binding(self, plan: Plan) -> str:
        """Name the holder that a plan's speed follows from, with what it spends most of its time on."""
        busy = self.busy_s(plan)
        server_s = busy.pop(plan.server.name)
        name = max(busy, key=busy.__getitem__)
        if server_s >= busy[name]:
            return f"{plan.server.name} compute"
        part = plan.client(name)
        loads, at = Loads.of_plan([part], self._cost.model.job), np.array([part.split or 0])
        links = self._cost.times.link_s(self._clients[name], loads)
        spent = float(self._cost.times.times_at([self._clients[name]], at, loads=loads).sum())
        return f"{name} {'link' if links > spent / 2 else 'compute'}"

    def _training(self, plan: Plan, clients: Collection[str] | None) -> list[HolderPlan]:
        members = None if clients is None else set(clients)
        return [part for part in plan.available if members is None or part.name in members]

    def waits_s(self, plan: Plan, clients: Collection[str] | None = None) -> dict[str, tuple[str, float]]:
        """Split one local step, without overlap, into the server's phase (``server``), and compute (``compute``) and
        links (``link``) of the clients that it waits for.

        Args:
            plan: the plan in force.
            clients: the training clients; all available ones by default.

        Returns:
            For each part the holder's name (of several clients the one with most), and seconds (virtual).
        """
        if self._cost.pace.periods != "none":
            return self._busiest(plan, clients)
        splits = _splits(plan, clients)
        phases, names = self._phases(plan, splits), list(splits)
        model, times = self._cost.model, self._cost.times
        server_s = 0.0 if model.whole else sum(self._server_batch_s(splits)) * model.job.grad_accumulation
        early = _among(splits, self._ahead(plan))
        # Clients that are ahead are waited for only as far as they take longer than all the rest.
        others = phases[~early].max(axis=0, initial=0.0)
        beyond = phases[early, 0] - (others.sum() + server_s)
        phases[early, 0] = np.where(beyond > 0, beyond + others[0], 0.0)
        spent: dict[str, dict[str, float]] = {"compute": {}, "link": {}}
        wire = model.wire_bytes(1)
        sent = ((wire.up,), (wire.deep, wire.slope) if model.tail_at_client else (), (wire.down,))
        for phase, (slowest, messages) in enumerate(zip(phases.argmax(axis=0).tolist(), sent, strict=True)):
            name, seconds = names[slowest], float(phases[slowest, phase])
            client = self._clients[name]
            parts = model.job.pipeline.microbatches
            link = sum(times.sent_s(size, client) + (parts - 1) * client.latency_s for size in messages)
            link = min(0.0 if model.whole else link * model.job.grad_accumulation, seconds)
            for part, share in (("compute", seconds - link), ("link", link)):
                spent[part][name] = spent[part].get(name, 0.0) + share
        found = {part: (max(own, key=own.__getitem__), sum(own.values())) for part, own in spent.items()}
        return {**found, "server": (plan.server.name, server_s)}

    def call_s(self, plan: Plan) -> dict[str, dict[str, float]]:
        """Seconds of each call of a local step, by holder and call.

        Up, turn and down of a client. Of a server (of each, where there are several) ``step``, or ``forward`` and
        ``backward`` where the labels are at home: what a turn takes whatever its rows, and with a client's name after
        it what that client's rows add.
        """
        turns = self._turns(plan, plan.available)
        calls: dict[str, dict[str, float]] = {}
        for index, part in enumerate(plan.available):
            up, turn, down = float(turns.up[index]), float(turns.turn[index]), float(turns.down[index])
            calls[part.name] = {"up": up, "turn": turn, "down": down}
        if self._cost.model.whole:
            return {name: {"up": own["up"]} for name, own in calls.items()}
        at_server = {"forward": turns.turn_forward, "backward": turns.turn_backward}
        at_server["step"] = at_server["forward"] + at_server["backward"]
        for part, forward, backward in zip(
            plan.available, turns.forward.tolist(), turns.backward.tolist(), strict=True
        ):
            at_server |= {f"forward {part.name}": forward, f"backward {part.name}": backward}
            at_server[f"step {part.name}"] = forward + backward
        calls[plan.server.name] = at_server
        return calls

    def _phases(self, plan: Plan, splits: Mapping[str, int]) -> Floats:
        """Seconds of the up, turn and down phases of a local step of every client at its split, ``(C, 3)``."""
        loads = Loads.of_plan([part for part in plan.available if part.name in splits], self._cost.model.job)
        phases = self._cost.times.times_at([self._clients[name] for name in splits], _array(splits), loads=loads)
        phases[_among(splits, plan.forward_only), 2] = 0.0
        return phases

    def _ahead(self, plan: Plan) -> frozenset[str]:
        """Clients that are a step ahead of the others after the first step of a round."""
        return plan.forward_only if self._cost.model.job.runs_ahead else frozenset()

    def _server_batch_s(self, splits: Mapping[str, int]) -> tuple[float, float]:
        """The server's forward and backward of one joined batch."""
        counts = self._counts(splits)
        total = float(self._cost.times.server_times(self._server, counts)[0])
        forward_s = self._cost.times.server_forward_s(self._server, counts[0])
        return forward_s, total / self._cost.model.job.grad_accumulation - forward_s

    def probe_s(self, plan: Plan, tokens: int, clients: Collection[str] | None = None) -> float:
        """Seconds of an importance probe: part of a batch forward and backward, and the gradient of every adapted
        weight, which is reduced to one number for each client.

        Args:
            plan: the plan in force.
            tokens: supervised tokens wanted of each client: examples are whole, and at most a batch.
            clients: the probed clients; all available ones by default.
        """
        model, splits = self._cost.model, _splits(plan, clients)
        job = model.job
        parts = self._training(plan, clients)
        loads, at = Loads.of_plan(parts, job), _array(splits)
        part = np.minimum(math.ceil(tokens / job.max_length) / loads.rows, 1.0)
        examples = part * loads.rows / job.batch_size
        scored_flops = model.weight_gradient_flops
        fixed_flops = scored_flops * _REDUCED / (2 * model.rows)
        messages = np.array([0, 0, 0] if model.whole else [1, 2 * model.tail_at_client, 1])
        probed = [self._clients[name] for name in splits]
        waits = messages * np.array([client.latency_s for client in probed])[:, None]
        batch = self._cost.times.times_at(probed, at, 1, loads) / job.grad_accumulation
        phases = waits + part[:, None] * (batch - waits)
        scored = examples * prefix(scored_flops)[at] + prefix(fixed_flops)[at]
        phases[:, 2] += scored / np.array([client.flops for client in probed])
        if model.whole:
            return float(phases.max(axis=0).sum())
        deep = np.sum(self._cost.times.turn_times(self._server, at, loads.rows), axis=0) * part
        total = scored_flops.sum() * examples + fixed_flops.sum()
        deep += (total - scored) / self._server.flops
        return float(phases.max(axis=0).sum()) + self._of_busiest_server(plan, parts, deep)

    def watched_s(self, plan: Plan, tokens: int, clients: Collection[str] | None = None) -> float:
        """Seconds that a local step takes longer where weights are scored in its backward: part of each one's gradient,
        and the backward of clients that would only compute forward.

        Args:
            plan, tokens, clients: as for :meth:`probe_s`.
        """
        model, splits = self._cost.model, _splits(plan, clients)
        parts = self._training(plan, clients)
        loads, at = Loads.of_plan(parts, model.job), _array(splits)
        examples = np.minimum(math.ceil(tokens / model.job.max_length), loads.rows) / model.job.batch_size
        gradients, fixed = model.weight_gradient_flops, model.weight_gradient_flops * _REDUCED / (2 * model.rows)
        own = examples * prefix(gradients)[at] + prefix(fixed)[at]
        deep = examples * gradients.sum() + fixed.sum() - own
        members = [self._clients[name] for name in splits]
        batch = self._cost.times.times_at(members, at, 1, loads) / model.job.grad_accumulation
        backward = np.where(_among(splits, plan.forward_only), batch[:, 2], 0.0)
        seconds = own / WATCHED_ROWS / np.array([client.flops for client in members]) + backward
        deep_s = np.zeros(len(at)) if model.whole else deep / WATCHED_ROWS / self._server.flops
        return float(seconds.max()) + self._of_busiest_server(plan, parts, deep_s)

    def _forward_s(self, plan: Plan, parts: Sequence[HolderPlan]) -> float:
        """Seconds of the servers' forward over one joined batch of the clients ``parts``."""
        times, job = self._cost.times, self._cost.model.job
        if self._cost.model.whole:
            return 0.0
        splits = np.array([part.split or 0 for part in parts], dtype=np.int64)
        forward, _ = times.turn_times(self._server, splits, Loads.of_plan(parts, job).rows)
        return self._of_busiest_server(plan, parts, forward) + times.widening_s(self._server, plan.server.split or 0)

    @staticmethod
    def _of_busiest_server(plan: Plan, parts: Sequence[HolderPlan], seconds: Floats) -> float:
        """Sum of ``seconds`` ``(C,)`` over the clients of the server for which it is most."""
        own, place = {part.name: part.split or 0 for part in parts}, {part.name: i for i, part in enumerate(parts)}
        served = served_by(own, own, plan.server_names)
        return max(float(seconds[[place[name] for name in names]].sum()) for names in served.values())

    def aggregation_s(
        self,
        plan: Plan,
        policy: Policy,
        up_bytes: Mapping[str, int],
        down_bytes: Mapping[str, int],
        clients: Collection[str] | None = None,
        finished: Mapping[str, float] | None = None,
    ) -> float:
        """Seconds from the end of a round's last step until everybody may begin the next round.

        Args:
            plan, policy, up_bytes, down_bytes, clients, finished: as for :meth:`restarts_s`.
        """
        return max(self.restarts_s(plan, policy, up_bytes, down_bytes, clients, finished).values())

    def restarts_s(
        self,
        plan: Plan,
        policy: Policy,
        up_bytes: Mapping[str, int],
        down_bytes: Mapping[str, int],
        clients: Collection[str] | None = None,
        finished: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Seconds from the end of a round's last step until each holder may begin the next round, by name.

        Adapters go up, the server aggregates once it has them all, residual changes and restarts go down, and a dense
        base's working weights are formed again. Each client's messages travel while others compute and send.

        Args:
            plan: the plan with the adapters' ranks.
            policy: its aggregation.
            up_bytes, down_bytes: by client name.
            clients: clients that send adapters; all available ones by default.
            finished: when each client, and the server, has done its part of the last step, by name: 0 is that step's
                end, earlier is negative. Those that it lacks are done at the end, as all are by default.
        """
        done = finished or {}
        ranks, splits = self._ranks(plan, clients), _splits(plan)
        merged_flops = self._merged_flops(ranks, policy)
        first = self._cost.model.layers if self._cost.model.whole else min(splits.values(), default=0)
        server_flops = self._aggregation_flops(ranks, policy) + float(merged_flops[first:].sum())
        merged, sent = prefix(merged_flops).tolist(), self._cost.times.sent_s
        arrived = [done.get(name, 0.0) + sent(size, self._clients[name]) for name, size in up_bytes.items()]
        aggregated = max([done.get(plan.server.name, 0.0), *arrived]) + server_flops / self._server.flops
        restarts = {plan.server.name: aggregated}
        for name, size in down_bytes.items():
            client = self._clients[name]
            # Who is still computing takes the update afterwards.
            waited = max(sent(size, client), done.get(name, 0.0) - aggregated)
            restarts[name] = aggregated + (waited + merged[splits[name]] / client.flops)
        return restarts

    def transfer_s(self, nbytes: Mapping[str, int]) -> float:
        """Seconds for ``nbytes`` by client name, each over the client's own link, until the last is done."""
        sent = self._cost.times.sent_s
        return max((sent(size, self._clients[name]) for name, size in nbytes.items()), default=0.0)

    def reconfiguration_s(self, before: Plan, after: Plan, down_bytes: Mapping[str, int]) -> float:
        """Seconds of a change of plan: base weights of the layers that are new to a client, residuals and restarts.

        Base weights count at the size of the run's base, as if they came over the client's link, although a node may
        have the model on disk. Layers that the server takes over are on its own disk and do not count.

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
        """Seconds of the forward passes over each client's validation batches, joined one by one.

        Clients do not wait for one another; the server computes each joined batch when the last client has sent it.
        Tails follow when a client has sent all of its batches.

        Args:
            plan: the plan in force.
            batches: number of validation batches by client name.
        """
        splits = {name: k for name, k in _splits(plan).items() if batches.get(name, 0) > 0}
        model, at = self._cost.model, _array(splits)
        parts = [part for part in plan.available if part.name in splits]
        loads = Loads.of_plan(parts, model.job)
        up, tail = self._cost.times.forward_times_at([self._clients[name] for name in splits], at, loads).T
        count = np.array([batches[name] for name in splits], dtype=np.int64)
        free, own = 0.0, up * count
        joined: list[tuple[Sequence[int], float]] = []
        for index in range(int(count.max(initial=0))):
            if index in count or not joined:
                # Other clients take part than in the batch before.
                there = cohorts(np.flatnonzero(count > index).tolist(), model.job.clients_per_round)
                joined = [(own_rows, self._forward_s(plan, [parts[i] for i in own_rows])) for own_rows in there]
            for rows, deep_s in joined:
                free = max(free, (index + 1) * float(up[rows].max())) + deep_s
                own[rows] = np.maximum(own[rows], free) + tail[rows]
        return max(free, float(own.max(initial=0.0)))

    def _counts(self, splits: Mapping[str, int]) -> np.ndarray:
        return self._cost.model.clients_at(list(splits.values()))[None]

    def _ranks(self, plan: Plan, clients: Collection[str] | None) -> Ranks:
        """Ranks of every holder that sends adapters, the servers included."""
        members = None if clients is None else set(clients)
        own = [client.ranks for client in plan.available if members is None or client.name in members]
        own += [plan.server.ranks] * plan.servers
        # Thousands of clients share a few mappings: each is read once.
        shared = {id(ranks): ranks for ranks in own}
        count = Counter(id(ranks) for ranks in own)
        vectors = np.array([self._cost.model.rank_vector(ranks) for ranks in shared.values()])
        holders = np.array([count[key] for key in shared])
        return Ranks(holders @ vectors, holders @ (vectors > 0))

    def _joined(self, ranks: Ranks, policy: Policy) -> NDArray[np.bool_]:
        """Weights with an update that joins the residual; after an svd restart an only holder's adapter continues."""
        only = policy.reinit != "random" and self._cost.model.keeps_residual
        joined: NDArray[np.bool_] = ranks.holders > only
        return joined

    def _aggregation_flops(self, ranks: Ranks, policy: Policy) -> float:
        """LAPACK's leading terms for the decompositions of METHOD 6; averaging factors costs next to nothing."""
        model = self._cost.model
        if not model.decomposes:
            return 0.0
        rank = ranks.total
        decomposed = [rank] if policy.reinit == "svd" or not model.keeps_residual else []
        if model.job.residual.max_rank != "full" and model.keeps_residual:
            decomposed.append(rank + model.residual_entries // model.sides)
        smaller_side = np.array([min(weight.d_out, weight.d_in) for weight in model.weights])
        total = 0.0
        for directions in decomposed:
            width = np.minimum(directions, smaller_side)
            # Two QR, an SVD of the core, and at most all directions formed by products with the factors.
            total += float((4.0 * model.sides * width**2 + 22.0 * width**3)[self._joined(ranks, policy)].sum())
        return _DECOMPOSED * total

    def _merged_flops(self, ranks: Ranks, policy: Policy) -> Floats:
        """Operations to form the residual at its cap, to be added to a dense base, by layer, ``(L,)``."""
        model = self._cost.model
        if model.quantized or not model.keeps_residual:
            return np.zeros(model.layers)
        products = [2.0 * weight.parameters / (weight.d_out + weight.d_in) for weight in model.weights]
        return model.by_layer(products * model.residual_entries * self._joined(ranks, policy))

    @cached_property
    def _base_bytes(self) -> Floats:
        """Each layer's base weights as they are stored, without residuals, ``(L,)``."""
        model = self._cost.model
        beside = model.by_layer(model.dtype.itemsize * model.residual_entries) if model.quantized else 0.0
        base: Floats = model.stored_bytes - beside
        return base


def _splits(plan: Plan, clients: Collection[str] | None = None) -> dict[str, int]:
    members = None if clients is None else set(clients)
    return {c.name: c.split or 0 for c in plan.available if members is None or c.name in members}


def _among(splits: Mapping[str, int], clients: Collection[str]) -> NDArray[np.bool_]:
    return np.array([name in clients for name in splits], dtype=bool)


def _array(splits: Mapping[str, int]) -> Ints:
    return np.array(list(splits.values()), dtype=np.int64)
