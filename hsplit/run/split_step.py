"""The local step of a split model, its validation and its importance probe (METHOD 2 and 10).

A local step is one cycle: the server serves the clients in groups, one turn after another, and steps its adapters once
all have had theirs, or after each. Where turns overlap, a client begins its next batch as soon as its own backward
allows, whoever else the step still waits for: what it sends was computed with the adapters that the gradient returns
to, so that only waiting differs. With ``pace.ahead`` it begins one batch earlier, and the gradient returns to the
adapters of one step before.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

from hsplit.actors.client import Client
from hsplit.actors.executor import Executor, Ref
from hsplit.actors.messages import Activations, ForwardReport, LossReport, ServerReport, WireTensor
from hsplit.actors.replica import Replica
from hsplit.config import Job, Pace
from hsplit.errors import HsplitError
from hsplit.planning.cost.serving import cohorts, served_by
from hsplit.planning.plan import Plan
from hsplit.run.probe import ProbeOutcome, probe_importance
from hsplit.run.step import StepOutcome, Training, failure_in_step

_Front = tuple[Ref[ForwardReport], Ref[Activations]]
_Tails = dict[str, tuple[Ref[LossReport], Ref[WireTensor]]]
_Backward = Ref[Mapping[str, float]]
# Of one turn of the servers with labels at home: the microbatch, and by server its clients' outputs.
_Turn = tuple[int, int, dict[str, tuple[Ref[ServerReport], dict[str, Ref[WireTensor | None]]]]]


class SplitTraining(Training):
    """Training where clients hold the front layers and the servers all deeper ones (METHOD 2).

    Args:
        job: the run's settings.
        pace: what keeps holders from waiting.
        executor: reaches clients and servers.
    """

    def __init__(self, job: Job, pace: Pace, executor: Executor) -> None:
        super().__init__(job, executor)
        self._labels_at_home = job.privacy.labels == "client"
        self._overlaps, self._steps_each_group = pace.periods != "none", pace.server_step == "group"
        self._ahead = pace.ahead
        self._frozen_run_ahead = job.runs_ahead or (self._overlaps and not self._labels_at_home)
        # By client, step and microbatch: fronts begun, and the backwards begun in advance of clients that need no
        # gradient; by client and step the backwards begun before its first front.
        self._fronts: dict[tuple[str, int, int], _Front] = {}
        self._early: dict[tuple[str, int, int], _Backward] = {}
        self._before: dict[tuple[str, int, int], list[_Backward]] = {}
        # Backwards whose times have not been read, by client in order.
        self._unread: dict[str, list[_Backward]] = defaultdict(list)
        # Microbatches of each client's batches by the plan in force.
        self._parts: dict[str, int] = {}
        # The step in whose backward each client's weights are scored.
        self._watched: dict[str, int] = {}
        # When the batch under way began, by time.monotonic.
        self._batch_begun = 0.0
        # Of the step under way: each client's next two in the round, its server, and the servers that have had a turn
        # since they stepped, with the ends of their steps.
        self._following: dict[str, list[int]] = {}
        self._server_of: dict[str, str] = {}
        self._stepping: set[str] = set()
        self._ends: list[tuple[str, Ref[Mapping[str, float]]]] = []

    def forget(self, client: str | None = None) -> None:
        super().forget(client)
        for calls in (self._fronts, self._early, self._before):
            for key in [key for key in calls if client in (None, key[0])]:
                del calls[key]
        for name in [name for name in self._unread if client in (None, name)]:
            del self._unread[name]

    def watch(self, client: str, step: int, tokens: int) -> None:
        """Have a client's weights scored in the backward of a step to come, over ``tokens`` supervised tokens."""
        self._watched[client] = step
        # Not waited for: a failure is found by the next call that is.
        self._executor.call(client, Client.watch, step, tokens)

    # -- one local step -------------------------------------------------------------------------------------------

    def step(self, plan: Plan, step: int, clients: Sequence[str]) -> StepOutcome:
        job, parts = self._job, {part.name: part for part in plan.available}
        self._parts = {name: part.parts(job) for name, part in parts.items()}
        turn = [name for name in clients if parts[name].takes_part_in(step)]
        outcome = self._begin(turn, clients)
        begun = [name for name in turn if outcome.takes_part(name)]
        served = _served_by(plan, begun)
        self._server_of = {client: server for server, own in served.items() for client in own}
        self._stepping.clear()
        self._ends.clear()
        by_group: dict[int, list[str]] = defaultdict(list)
        for client in begun:
            by_group[parts[client].group].append(client)
        groups = [by_group[group] for group in sorted(by_group)]
        end = (step // job.local_steps + 1) * job.local_steps
        self._following = {
            name: list(islice((later for later in range(step + 1, end) if parts[name].takes_part_in(later)), 2))
            for name in begun
        }
        for client in begun:
            watched = self._watched.get(client) == step
            if self._frozen_run_ahead and client in plan.forward_only and not watched:
                self._run_ahead(client, step, self._following[client])
        for batch in range(job.grad_accumulation):
            for client in begun:
                if outcome.takes_part(client):
                    self._begin_fronts(client, step, batch)
                    if self._ahead and batch == job.grad_accumulation - 1:
                        for later in self._following[client][:1]:
                            self._begin_fronts(client, later, 0)
            self._batch_begun = time.monotonic()
            turns = self._turns_at_home if self._labels_at_home else self._turns
            reports = turns(outcome, step, batch, groups)
            for server, report in reports:
                outcome.add_server_report(server, self._executor.value(report))
            if not self._overlaps:
                # The servers have finished by now, so that only the clients' own time counts.
                self._read_backwards(outcome, begun, last=batch == job.grad_accumulation - 1)
        self._step_servers(step)
        for server, seconds in self._ends:
            outcome.add_seconds(server, self._executor.value(seconds))
        self._ends.clear()
        if self._overlaps and step == end - 1:
            self._read_backwards(outcome, list(self._unread), last=True)
        self._clear(outcome, step, begun)
        self._raise_if_all_failed(outcome, clients)
        return outcome

    def settle(self) -> StepOutcome:
        """Wait for all backwards under way, and discard the fronts of steps to come.

        Clients are then as after the last step, so that a checkpoint may be made in the middle of a round.
        """
        outcome = StepOutcome()
        for (client, _, _), calls in reversed(self._before.items()):
            self._unread[client] = [*calls, *self._unread[client]]
        self._before.clear()
        self._read_backwards(outcome, list(self._unread), last=True)
        for client, step in dict.fromkeys((client, step) for client, step, _ in self._fronts):
            if client not in outcome.failed:
                self._executor.call(client, Client.skip, step)
        self._fronts.clear()
        self._early.clear()
        return outcome

    def _begin_fronts(self, client: str, step: int, batch: int) -> None:
        """Begin the fronts of one batch, unless that is done."""
        micros = self._micros(client, batch)
        if (client, step, micros[0]) in self._fronts:
            return
        self._before[client, step, micros[0]] = self._unread.pop(client, [])
        for micro in micros:
            self._fronts[client, step, micro] = self._executor.call_pair(client, Client.forward, step, micro)

    def _run_ahead(self, client: str, step: int, following: Sequence[int]) -> None:
        """Begin all calls of ``step`` of a forward-only client, and the fronts of its next one in the round.

        It waits for no gradient, and trains nothing that would change the next fronts. Its calls have the same order
        as those of other clients.
        """
        for batch in range(self._job.grad_accumulation):
            self._begin_fronts(client, step, batch)
            for micro in self._micros(client, batch):
                self._early[client, step, micro] = self._executor.call(client, Client.backward, step, micro, None)
                self._unread[client].append(self._early[client, step, micro])
        for later in following[:1]:
            for batch in range(self._job.grad_accumulation):
                self._begin_fronts(client, later, batch)

    def _begin_backwards(self, step: int, micro: int, gradients: Mapping[str, Ref[WireTensor | None]]) -> None:
        """Begin the backward of ``micro`` of the clients in ``gradients``; after a batch's last, what follows it."""
        for client, gradient in gradients.items():
            if (client, step, micro) in self._early:
                continue
            self._unread[client].append(self._executor.call(client, Client.backward, step, micro, gradient))
            batch = micro // self._job.pipeline.microbatches
            if not self._overlaps or micro != self._micros(client, batch)[-1]:
                continue
            if batch + 1 < self._job.grad_accumulation:
                self._begin_fronts(client, step, batch + 1)
                continue
            # With one batch ahead, the next fronts are under way, and those after them are what follows.
            for later in self._following[client][self._ahead :][:1]:
                self._begin_fronts(client, later, 0)

    def _sent(self, outcome: StepOutcome, step: int, micro: int, group: Sequence[str]) -> dict[str, Ref[Activations]]:
        """Wait for one microbatch's fronts of a group and count them; returns the activations by client."""
        present = [c for c in group if outcome.takes_part(c) and (c, step, micro) in self._fronts]
        # The small reports come first: a client that failed is found before its tensors are passed on.
        reports = {client: self._fronts[client, step, micro][0] for client in present}
        counts = {
            client: {
                "forward": 1 + micro % self._job.pipeline.microbatches,
                "backward": len(self._before.get((client, step, micro), ())),
            }
            for client in present
        }

        # All turns' fronts could begin when the servers had done all before them: several late clients, each in a turn
        # of its own, are waited for together.
        others = partial(self._under_way, present)
        arrived = self._in_time(outcome, reports, counts, others, self._batch_begun)
        for client, report in arrived.items():
            outcome.bytes_up += report.nbytes
            # An actor does its calls in order: the backwards before this front are done.
            self._add_backwards(outcome, client, self._before.pop((client, step, micro), []))
            self._add_time(outcome, client, "forward", report.seconds)
        sent = {}
        for client in present:
            _, message = self._fronts.pop((client, step, micro))
            if outcome.takes_part(client):
                sent[client] = message
        return sent

    def _by_server(self, clients: Iterable[str]) -> dict[str, list[str]]:
        """``clients`` by the server that serves them in the step under way."""
        served: dict[str, list[str]] = defaultdict(list)
        for client in clients:
            served[self._server_of[client]].append(client)
        return served

    def _turns(
        self,
        outcome: StepOutcome,
        step: int,
        batch: int,
        groups: Sequence[Sequence[str]],
    ) -> list[tuple[str, Ref[ServerReport]]]:
        """One batch with labels on the server: one call a turn does forward, loss and backward of its joined batch."""
        reports = []
        for index, group in enumerate(groups):
            for micro in self._micros_of(group, batch):
                sent = self._sent(outcome, step, micro, group)
                back: dict[str, Ref[WireTensor | None]] = {}
                for server, served in self._by_server(sent).items():
                    rows = [sent[client] for client in served]
                    turn = micro * len(groups) + index
                    report, own = self._executor.call_each(server, Replica.train_step, step, turn, rows)
                    self._stepping.add(server)
                    reports.append((server, report))
                    back |= zip(served, own, strict=True)
                self._begin_backwards(step, micro, back)
            if self._steps_each_group:
                self._step_servers(step)
        return reports

    def _turns_at_home(
        self,
        outcome: StepOutcome,
        step: int,
        batch: int,
        groups: Sequence[Sequence[str]],
    ) -> list[tuple[str, Ref[ServerReport]]]:
        """One batch with labels at home: the last layer's output goes to the clients, their tails' gradients come back.

        Tails begin in a turn of their own after every turn's forward, so that the servers compute one while the
        clients' tails do another.
        """
        executor = self._executor
        forwards: list[_Turn] = []
        for index, group in enumerate(groups):
            for micro in self._micros_of(group, batch):
                sent = self._sent(outcome, step, micro, group)
                turn = micro * len(groups) + index
                deep: dict[str, Any] = {}
                for server, served in self._by_server(sent).items():
                    rows = [sent[client] for client in served]
                    report, out = executor.call_each(server, Replica.forward, step, turn, rows)
                    deep[server] = report, dict(zip(served, out, strict=True))
                forwards.append((micro, turn, deep))
        tails: list[_Tails] = []
        for micro, _, deep in forwards:
            own_tails: _Tails = {}
            for server, (report, outputs) in deep.items():
                outcome.add_server_report(server, executor.value(report))
                for client, output in outputs.items():
                    if outcome.takes_part(client):
                        # Only a refused client has none, and it has failed above.
                        deep_output = cast("Ref[WireTensor]", output)
                        own_tails[client] = executor.call_pair(client, Client.tail, step, micro, deep_output)
            tails.append(own_tails)
        reports = []
        for (micro, turn, deep), own_tails in zip(forwards, tails, strict=True):
            losses = {client: report for client, (report, _) in own_tails.items() if outcome.takes_part(client)}
            count = 1 + micro % self._job.pipeline.microbatches
            counts = {client: {"tail": count} for client in losses}
            others = partial(self._under_way, losses, tails)
            for client, loss in self._in_time(outcome, losses, counts, others).items():
                outcome.bytes_up += loss.nbytes
                outcome.add_loss(loss)
                self._add_time(outcome, client, "tail", loss.seconds)
            arrived = {client: gradient for client, (_, gradient) in own_tails.items() if outcome.takes_part(client)}
            back: dict[str, Ref[WireTensor | None]] = {}
            for server, (_, outputs) in deep.items():
                # Also without any client left: the server has a graph to free.
                own = [client for client in outputs if client in arrived]
                upstream = [arrived[client] for client in own]
                report, down = executor.call_each(server, Replica.backward, step, turn, own, upstream)
                self._stepping.add(server)
                reports.append((server, report))
                back |= zip(own, down, strict=True)
            self._begin_backwards(step, micro, back)
        return reports

    def _micros(self, client: str, batch: int) -> range:
        """The microbatches of a client's batch, counted over the step as if each batch had the most there may be."""
        first = batch * self._job.pipeline.microbatches
        return range(first, first + self._parts[client])

    def _micros_of(self, group: Sequence[str], batch: int) -> range:
        first = batch * self._job.pipeline.microbatches
        return range(first, first + max(self._parts[client] for client in group))

    def _step_servers(self, step: int) -> None:
        """Have the servers that have had a turn step their adapters."""
        self._ends += [
            (server, self._executor.call(server, Replica.end_step, step)) for server in sorted(self._stepping)
        ]
        self._stepping.clear()

    # -- the ends of backwards --------------------------------------------------------------------------------------

    def _read_backwards(self, outcome: StepOutcome, clients: Iterable[str], *, last: bool) -> None:
        """Wait for the backwards of ``clients`` that have not been read.

        Args:
            outcome: of the step.
            clients: their names.
            last: a client whose backward is late has had its part in the step all the same, and is busy with it.
        """
        calls = {client: self._unread[client] for client in clients if self._unread.get(client)}
        calls = {client: own for client, own in calls.items() if outcome.takes_part(client)}
        ends = {client: own[-1] for client, own in calls.items()}
        counts = {client: {"backward": len(own)} for client, own in calls.items()}
        finished = self._in_time(outcome, ends, counts, partial(self._under_way, ends))
        for client in calls:
            if client in finished:
                self._add_backwards(outcome, client, self._unread.pop(client))
            elif client in outcome.left_out and last:
                self._busy.setdefault(client, []).extend(self._unread.pop(client))

    def _under_way(self, besides: Collection[str], tails: Iterable[_Tails] = ()) -> list[Ref[Any]]:
        """The last call of each client that is not in ``besides``: an answer shows that the client is there."""
        calls: dict[str, Ref[Any]] = {client: own[-1] for (client, _, _), own in self._before.items() if own}
        calls |= {client: own[-1] for client, own in self._unread.items() if own}
        calls |= {client: front for (client, _, _), (front, _) in self._fronts.items()}
        calls |= {client: report for own in tails for client, (report, _) in own.items()}
        return [call for client, call in calls.items() if client not in besides and client not in self._busy]

    def _add_backwards(self, outcome: StepOutcome, client: str, calls: Sequence[_Backward]) -> None:
        """Count finished backwards of a client; one that failed fails the client."""
        for seconds in self._executor.wait(calls):
            if isinstance(seconds, HsplitError):
                outcome.failed.setdefault(client, failure_in_step(client, seconds))
            else:
                self._add_time(outcome, client, "backward", seconds)

    def _clear(self, outcome: StepOutcome, step: int, begun: Sequence[str]) -> None:
        """Have clients that were left out of the step discard what they have begun of it."""
        for client in begun:
            # Clients whose last backward alone was late are in _busy already: they took part in the step.
            if client in outcome.left_out and client not in self._busy:
                self._discard(client, step)
        passed = [key for key in self._fronts if key[1] <= step]
        for client, ahead in dict.fromkeys((client, ahead) for client, ahead, _ in passed):
            if client not in begun and client not in outcome.failed:
                # It computed ahead for a step that it was left out of.
                self._discard(client, ahead)
        for calls in (self._fronts, self._early, self._before):
            for key in [key for key in calls if key[1] <= step]:
                del calls[key]

    def _discard(self, client: str, step: int) -> None:
        """Have a client discard ``step``; it is busy until that, and all backwards that nobody has read, are done."""
        before = [call for (name, of, _), own in self._before.items() if (name, of) == (client, step) for call in own]
        skipped = self._executor.call(client, Client.skip, step)
        self._busy.setdefault(client, []).extend([*before, *self._unread.pop(client, ()), skipped])

    # -- between steps ----------------------------------------------------------------------------------------------

    def validation(self, plan: Plan, batches: Mapping[str, int]) -> StepOutcome:
        outcome = StepOutcome()
        # All calls begin at once, so that clients compute one batch while the server does another.
        fronts = [
            {c: self._executor.call_pair(c, Client.validation_forward, index) for c, n in batches.items() if index < n}
            for index in range(max(batches.values()))
        ]
        reports, tails = [], []
        for index, front in enumerate(fronts):
            outcome.bytes_up += sum(sent.nbytes for sent in self._get([sent for sent, _ in front.values()]))
            for part in cohorts(list(front), self._job.clients_per_round):
                for server, served in _served_by(plan, part).items():
                    activations = [front[client][1] for client in served]
                    if not self._labels_at_home:
                        reports.append(self._executor.call_all(server, Replica.evaluate, activations))
                        continue
                    report, deep = self._executor.call_each(server, Replica.evaluate_deep, activations)
                    reports.append(report)
                    tails += [
                        self._executor.call(client, Client.validation_tail, index, output)
                        for client, output in zip(served, deep, strict=True)
                    ]
        for served_report in self._executor.get(reports):
            outcome.bytes_down += served_report.nbytes
            outcome.losses += served_report.losses
        outcome.losses += self._get(tails)
        return outcome

    def probe(self, plan: Plan, clients: Sequence[str], round_: int, tokens: int) -> ProbeOutcome:
        job, served = self._job, _served_by(plan, clients)
        return probe_importance(self._executor, served, round_, tokens, job.privacy.labels, job.faults.patience_s)


def _served_by(plan: Plan, clients: Iterable[str]) -> dict[str, list[str]]:
    """``clients`` by the server that serves them."""
    return served_by(clients, {client.name: client.split or 0 for client in plan.available}, plan.server_names)
