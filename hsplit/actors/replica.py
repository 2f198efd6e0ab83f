"""A server without an aggregator: runs the deep layers for the clients that it serves. Ray-free."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hsplit.actors.executor import refusal
from hsplit.actors.holder_actor import HolderActor
from hsplit.actors.joined_batch import JoinedBatch
from hsplit.actors.messages import Activations, LossReport, ProbeReport, ServerReport, WireTensor, not_finite
from hsplit.actors.profiling import (
    Stopwatch,
    measured,
    measured_in_first_steps,
    measured_once_a_round,
    measured_with_part,
)
from hsplit.config import Job, Policy
from hsplit.errors import NO_NUMBERS
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.holder import Holder, RoundUpdate
from hsplit.lora.importance_probe import ImportanceProbe, ProbedRows
from hsplit.models.loading import load_segment
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.models.tail import TailLosses
from hsplit.models.weights import is_quantized
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import Plan
from hsplit.seeds import hash_seed


class Replica(HolderActor[Holder]):
    """Hosts layers ``[min_i k_i, L)``, and stores a quantized base as bitsandbytes codes.

    Every server is one; the first also aggregates (:class:`~hsplit.actors.server.Server`). Its adapters are aggregated
    like any holder's, weighted by the tokens that it trained them on.

    Args:
        name: ``server``, or ``server-1`` and so on.
        job, policy: the run's settings.
        base: the base model as the server reads it.
        device: where it computes.
        measure: follow the peak of allocated memory, see :meth:`peak_bytes`.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        super().__init__(name, job, policy, base, device, measure)
        self._layers = 0
        self._plan: Plan | None = None
        self._kept: dict[tuple[int, int], list[JoinedBatch]] = {}
        self._probed: tuple[ImportanceProbe, JoinedBatch] | None = None
        self._step_tokens: dict[int, float] = defaultdict(float)

    # -- set-up ---------------------------------------------------------------------------------------------------

    @measured_with_part
    def configure(self, plan: Plan) -> None:
        """Read the deep layers and the tail that ``plan`` gives a server; :meth:`restart` begins the round.

        Every step and probe begun before is dropped.
        """
        self._holder = self._probed = None
        self._kept.clear()
        self._scores.clear()
        self._step_tokens.clear()
        self._hold(plan, None)

    @measured_with_part
    def follow(self, plan: Plan, update: RoundUpdate) -> None:
        """Follow a change of plan between two rounds: read new layers, drop others, change ranks (law E4).

        Args:
            plan: the new plan.
            update: what the adapters restart with, and changes of residuals; whole ones for layers that are new here.
        """
        before = self._plan
        assert before is not None
        if (before.server.split, before.server.ranks) == (plan.server.split, plan.server.ranks):
            # The same adapters and optimizer: nothing to carry over.
            self._plan = plan
            self._keep_working_copies(self.holder.segment, plan)
            self.restart(update)
            return
        held, carried = self.holder.segment, self.holder.carried_moments(plan.server.ranks)
        # Dropped first, so that two sets of adapters are never in memory together.
        self._holder = None
        held.remove_adapters()
        self._hold(plan, held)
        self.restart(update)
        if carried is not None:
            self.holder.resume_moments(carried, update)

    def _hold(self, plan: Plan, kept: Segment | None) -> None:
        """Hold what ``plan`` gives the server; layers of ``kept`` are not read again."""
        assert plan.server.split is not None
        self.gpu_memory.give_back()
        self.gpu_memory.allow(plan.server.declared_bytes)
        tail = self._policy.placement == "split" and self._job.privacy.labels == "server"
        spec = SegmentSpec(plan.server.split, plan.layers, tail=tail)
        segment = load_segment(self._base, spec, quantized=True, device=self._device, kept=kept)
        self._keep_working_copies(segment, plan)
        shapes = self._base.spec.targeted(self._job.targets)
        self._plan, self._layers, self._shapes = plan, plan.layers, shapes
        self._holder = Holder(
            self.name, segment, shapes, plan.server.ranks, self._job, self._policy, self._base.dtype, self._device
        )

    def _keep_working_copies(self, segment: Segment, plan: Plan) -> None:
        if is_quantized(self._base.base):
            for linear in segment.linears.values():
                linear.keep_working_copy(plan.server.working_copy)

    # -- one local step -------------------------------------------------------------------------------------------

    @measured_in_first_steps
    def train_step(
        self, step: int, turn: int, *messages: Activations
    ) -> tuple[ServerReport, *tuple[WireTensor | None, ...]]:
        """Labels on the server: add one depth-joined batch to local step ``step`` (METHOD 2).

        Args:
            step: counted over the run; :meth:`end_step` ends it.
            turn: counted over the step.
            messages: of the clients whose turn it is.

        Returns:
            The report with a loss a message, then for each message the gradient of that client's own mean loss at
            its split point (``None`` for a client without layers), in the order of ``messages``. An invalid message is
            left out and named in the report; its gradient is ``None``.
        """
        watch = Stopwatch(self._device)
        losses: list[LossReport] = []
        gradients: dict[str, WireTensor | None] = {}
        refused: dict[str, str] = {}
        trained: list[Activations] = []
        for group in self._groups(messages):
            joined = self._join(step, turn, group, watch, refused, training=True)
            if joined is None:
                continue
            with watch.phase("tail"):
                sums, counts = self._losses(joined)
                total = (sums * joined.weights.to(sums)).sum()
            with watch.phase("backward"), self._scoring(joined):
                if total.requires_grad:
                    total.backward()
            with watch.phase("pack"):
                gradients |= joined.gradients(self._job.transport)
            losses += _loss_reports(joined.messages, sums.detach(), counts)
            trained += joined.messages
        self._count(trained)
        watch.pace(self._turn_s("step", messages))
        returned = [gradients.get(message.client) for message in messages]
        return _report(watch, returned, losses, refused), *returned

    @measured_in_first_steps
    def forward(
        self, step: int, turn: int, *messages: Activations
    ) -> tuple[ServerReport, *tuple[WireTensor | None, ...]]:
        """U-shape: run the deep layers and keep the graph; arguments as :meth:`train_step`.

        Returns:
            The report, then the output for each client's tokens ``(n, d)``. An invalid message is left out and named
            in the report; its output is ``None``.
        """
        watch = Stopwatch(self._device)
        kept = self._kept[step, turn] = []
        outputs: dict[str, WireTensor] = {}
        refused: dict[str, str] = {}
        for group in self._groups(messages):
            joined = self._join(step, turn, group, watch, refused, training=True)
            if joined is None:
                continue
            kept.append(joined)
            with watch.phase("pack"):
                outputs |= joined.outputs(self._job.transport)
        watch.pace(self._turn_s("forward", messages))
        returned = [outputs.get(message.client) for message in messages]
        return _report(watch, returned, refused=refused), *returned

    @measured_in_first_steps
    def backward(
        self, step: int, turn: int, clients: Sequence[str], *sent: WireTensor
    ) -> tuple[ServerReport, *tuple[WireTensor | None, ...]]:
        """U-shape: backpropagate the gradients of the clients' token sums from the last layer's output.

        Args:
            step, turn: of the forward.
            clients: the senders, in order; a client of the forward that is not among them has trained nothing.
            sent: their gradients.

        Returns:
            As :meth:`train_step`, without losses.
        """
        watch = Stopwatch(self._device)
        arrived = dict(zip(clients, sent, strict=True))
        gradients: dict[str, WireTensor | None] = {}
        refused: dict[str, str] = {}
        trained: list[Activations] = []
        for joined in self._kept.pop((step, turn)):
            with watch.phase("unpack"):
                upstream, own = self._upstream(joined, arrived, refused)
            with watch.phase("backward"), self._scoring(joined):
                if joined.output.requires_grad:
                    joined.output.backward(upstream)
            with watch.phase("pack"):
                gradients |= joined.gradients(self._job.transport)
            trained += own
        self._count(trained)
        watch.pace(self._turn_s("backward", clients))
        returned = [None if client in refused else gradients.get(client) for client in clients]
        return _report(watch, returned, refused=refused), *returned

    @measured_in_first_steps
    def end_step(self, step: int) -> Mapping[str, float]:
        """Divide layer ``l``'s gradient by its ``n_l`` over all turns since the last step, and step the adapters.

        Returns:
            Seconds of the wall by phase.
        """
        watch = Stopwatch(self._device)
        layers = range(self.holder.segment.spec.first, self._layers)
        with watch.phase("optimizer"):
            self.adapters.scale_grad_by_layer({layer: 1.0 / max(self._step_tokens[layer], 1) for layer in layers})
            self.holder.step(step, self._lr_scales)
        self._step_tokens.clear()
        watch.pace(0.0 if self._pace else None)
        return watch.seconds

    # -- importance probe (METHOD 3) ------------------------------------------------------------------------------

    @measured
    def probe(self, *messages: Activations) -> tuple[ProbeReport, *tuple[WireTensor | None, ...]]:
        """Labels on the server: score every weight held here for each client, from its own tokens and mean loss alone.

        Nothing is trained or counted, and the adapters get no gradient.

        Returns:
            The report, then for each message the gradient of that client's mean loss at its split point (``None`` for
            a client without layers), in the order of ``messages``.

        Raises:
            RuntimeError: no gradient reached one of the weights.
        """
        probe, joined = self._watched(messages)
        sums, _ = self._losses(joined)
        return self._scored(probe, joined, sums.sum(), None)

    @measured
    def probe_forward(self, *messages: Activations) -> tuple[ServerReport, *tuple[WireTensor, ...]]:
        """U-shape: run as :meth:`forward` does, watching the weights."""
        probe, joined = self._watched(messages)
        self._probed = probe, joined
        outputs = list(joined.outputs(self._job.transport).values())
        return _report(None, outputs), *outputs

    @measured
    def probe_backward(self, *sent: WireTensor) -> tuple[ProbeReport, *tuple[WireTensor | None, ...]]:
        """U-shape: score as :meth:`probe`, from the gradient of each client's token sum, in the messages' order."""
        assert self._probed is not None
        probe, joined = self._probed
        self._probed = None
        arrived = {m.client: slope for m, slope in zip(joined.messages, sent, strict=True)}
        refused: dict[str, str] = {}
        upstream, _ = self._upstream(joined, arrived, refused)
        _raise_refused(refused, "probe_tail")
        return self._scored(probe, joined, joined.output, upstream)

    # -- validation -----------------------------------------------------------------------------------------------

    @measured_once_a_round
    @torch.no_grad()
    def evaluate(self, *messages: Activations) -> ServerReport:
        """Labels on the server: compute the validation loss of each client's rows.

        Raises:
            ActorFailure: a client's message is invalid; names the client.
        """
        losses: list[LossReport] = []
        for joined in self._evaluated(messages):
            losses += _loss_reports(joined.messages, *self._losses(joined))
        return _report(None, (), losses)

    @measured_once_a_round
    @torch.no_grad()
    def evaluate_deep(self, *messages: Activations) -> tuple[ServerReport, *tuple[WireTensor, ...]]:
        """U-shape: run the deep layers on each client's validation rows; errors as :meth:`evaluate`."""
        outputs: list[WireTensor] = []
        for joined in self._evaluated(messages):
            outputs += joined.outputs(self._job.transport).values()
        return _report(None, outputs), *outputs

    def _evaluated(self, messages: Sequence[Activations]) -> Iterator[JoinedBatch]:
        for group in self._groups(messages):
            refused: dict[str, str] = {}
            joined = self._join(0, 0, group, Stopwatch(self._device), refused, training=False)
            _raise_refused(refused, "validation_forward")
            assert joined is not None
            yield joined

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _tail(self) -> TailLosses:
        tail = self.holder.segment.tail
        assert tail is not None, "labels are at the clients"
        return tail

    @property
    def adapters(self) -> AdapterSet:
        """This server's adapters."""
        return self.holder.adapters

    def _groups(self, messages: Sequence[Activations]) -> list[Sequence[Activations]]:
        """Group what is computed at once: all clients, or with ``fast.depth_joined`` off one after another."""
        return [messages] if self._job.fast.depth_joined else [[message] for message in messages]

    def _join(
        self,
        step: int,
        turn: int,
        messages: Sequence[Activations],
        watch: Stopwatch,
        refused: dict[str, str],
        training: bool,
    ) -> JoinedBatch | None:
        """Run the step's joined batch, without gradients for clients that have nothing to train.

        Invalid messages are added to ``refused``; ``None`` where none is left.
        """
        self.holder.begin_phase(hash_seed(step, turn), training)
        with watch.phase("unpack"):
            inputs = self._unpacked(
                messages, lambda m: training and (m.scored[1] > 0 or (m.trains and m.split > 0)), refused
            )
        if not inputs:
            return None
        with watch.phase("forward"):
            sound = [message for message in messages if message.client in inputs]
            if not (training and any(message.scored[1] for message in sound)):
                return JoinedBatch.run(self.holder.segment, self._layers, sound, inputs)
            probe = self._new_probe(training=True, draw=step)
            with probe.watching():
                joined = JoinedBatch.run(self.holder.segment, self._layers, sound, inputs)
            joined.probe = probe
            return joined

    @contextmanager
    def _scoring(self, joined: JoinedBatch) -> Iterator[None]:
        """Score in the backward inside, of the token sum, what clients asked for in their messages."""
        if joined.probe is None:
            yield
            return
        asked = [message for message in joined.messages if message.scored[1]]
        begun = {message.client: joined.tokens[message.client].start for message in asked}
        rows = [
            ProbedRows(m.client, slice(begun[m.client], begun[m.client] + m.scored[0]), m.split, m.scored[1] * m.weight)
            for m in asked
        ]
        with joined.probe.scoring(rows):
            yield
        found = joined.probe.found()
        self._scores |= {m.client: ImportanceReport(m.client, m.scored[1], found[m.client]) for m in asked}

    def _losses(self, joined: JoinedBatch) -> tuple[Tensor, Tensor]:
        return joined.losses(self._tail, self._job.fast.loss_rows)

    def _unpacked(
        self, messages: Sequence[Activations], differentiable: Callable[[Activations], bool], refused: dict[str, str]
    ) -> dict[str, Tensor]:
        """Unpack each client's hidden states at its split point, in the compute dtype, as leaves of a graph.

        Invalid messages are left out and added to ``refused``.
        """
        segment = self.holder.segment
        inputs: dict[str, Tensor] = {}
        for message in messages:
            flaw = message.flaw(segment.width, segment.vocab_size)
            hidden = None if flaw else self._sound(message.client, message.hidden, message.hidden.shape, refused)
            if flaw:
                refused[message.client] = flaw
            elif hidden is not None:
                inputs[message.client] = hidden.requires_grad_(differentiable(message))
        return inputs

    def _upstream(
        self, joined: JoinedBatch, arrived: Mapping[str, WireTensor], refused: dict[str, str]
    ) -> tuple[Tensor, list[Activations]]:
        """U-shape: put the clients' gradients at their tokens of the joined output's gradient ``(n, d)``.

        Rows of clients without a gradient, or with an invalid one, are zero; also returns the other clients' messages.
        """
        upstream = torch.zeros_like(joined.output)
        own = []
        for message in joined.messages:
            rows = upstream[joined.tokens[message.client]]
            wire = arrived.get(message.client)
            slope = None if wire is None else self._sound(message.client, wire, tuple(rows.shape), refused)
            if slope is not None:
                rows.copy_(slope).mul_(message.weight)
                own.append(message)
        return upstream, own

    def _sound(self, client: str, wire: WireTensor, shape: tuple[int, ...], refused: dict[str, str]) -> Tensor | None:
        """Unpack what ``client`` sent, in the compute dtype; a wrong shape or NaN is added to ``refused`` instead."""
        if wire.shape != shape:
            refused[client] = f"a gradient of shape {wire.shape} where {shape} is right"
            return None
        tensor = wire.unpack(self._base.dtype, self._device)
        if not_finite(tensor):
            refused[client] = f"values {NO_NUMBERS} (NaN or infinite)"
            return None
        return tensor

    def _watched(self, messages: Sequence[Activations]) -> tuple[ImportanceProbe, JoinedBatch]:
        """Run a probe's joined batch without dropout, watched by the probe."""
        probe = self._new_probe()
        refused: dict[str, str] = {}
        with probe.watching():
            self.holder.begin_phase(0, training=False)
            # A probe needs a gradient at layer 0 too, for the first linears there.
            inputs = self._unpacked(messages, lambda message: True, refused)
            _raise_refused(refused, "probe_forward")
            return probe, JoinedBatch.run(self.holder.segment, self._layers, messages, inputs)

    def _scored(
        self, probe: ImportanceProbe, joined: JoinedBatch, output: Tensor, upstream: Tensor | None
    ) -> tuple[ProbeReport, *tuple[WireTensor | None, ...]]:
        """Score from a backward of the token sum: a client's part divided by its ``n_i`` is that of its mean loss."""
        messages = joined.messages
        rows = [ProbedRows(m.client, joined.tokens[m.client], m.split, max(m.step_supervised, 1)) for m in messages]
        scores = probe.scores(output, upstream, rows)
        gradients = list(joined.gradients(self._job.transport).values())
        importance = tuple(ImportanceReport(m.client, m.supervised, scores[m.client]) for m in messages)
        nbytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        return ProbeReport(importance, nbytes), *gradients

    def _turn_s(self, call: str, clients: Sequence[Activations | str]) -> float | None:
        """Seconds that a turn over the rows of ``clients`` is to take; ``None``: as long as it does."""
        if not self._pace:
            return None
        names = [client if isinstance(client, str) else client.client for client in clients]
        return self._pace[call] + sum(self._pace[f"{call} {name}"] for name in names)

    def _count(self, messages: Sequence[Activations]) -> None:
        """Count the tokens of ``messages`` that passed through each layer here, for step and aggregation."""
        first = self.holder.segment.spec.first
        for message in messages:
            for layer in range(max(first, message.split), self._layers):
                self._step_tokens[layer] += message.supervised * message.weight
                self.holder.tokens.add([layer], message.supervised * message.weight)


def _report(
    watch: Stopwatch | None,
    sent: Sequence[WireTensor | None],
    losses: Sequence[LossReport] = (),
    refused: Mapping[str, str] | None = None,
) -> ServerReport:
    nbytes = sum(tensor.nbytes for tensor in sent if tensor is not None)
    return ServerReport(tuple(losses), nbytes, {} if watch is None else watch.seconds, refused or {})


def _raise_refused(refused: Mapping[str, str], method: str) -> None:
    """Refuse the first invalid message, where no client can be left out."""
    for client, reason in refused.items():
        raise refusal(client, method, f"it sent {reason}")


def _loss_reports(messages: Sequence[Activations], sums: Tensor, counts: Tensor) -> list[LossReport]:
    return [LossReport(m.client, float(s), int(c)) for m, s, c in zip(messages, sums, counts, strict=True)]
