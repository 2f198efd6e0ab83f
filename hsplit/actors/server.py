"""The server: the deep layers for everybody at once, and the aggregation. Ray-free."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit.actors.client import tensors_held
from hsplit.actors.messages import Activations, LossReport, ServerReport, WireTensor
from hsplit.config import Job, Policy
from hsplit.lora.adapters import AdapterSet
from hsplit.lora.aggregation import AGGREGATIONS, Contribution
from hsplit.lora.holder import HeldAdapters, Holder, RoundUpdate
from hsplit.lora.low_rank import LowRank
from hsplit.lora.residual import Residual
from hsplit.models.packing import Packing
from hsplit.models.segment import BaseModel, SegmentSpec, linear_shapes, load_segment, targeted
from hsplit.models.weights import is_quantized
from hsplit.scheduling.plan import Plan


@dataclass
class _Joined:
    """A depth-joined batch after the last layer.

    Attributes:
        output: ``(n, d)``, all clients' tokens.
        messages: the clients' messages, in the order in which they came.
        inputs: each client's hidden states at its split point, leaves of the graph.
        tokens: each client's tokens of ``output``.
    """

    output: Tensor
    messages: list[Activations]
    inputs: dict[str, Tensor]
    tokens: dict[str, slice]


@dataclass(frozen=True)
class AggregationReport:
    """What an aggregation did.

    Attributes:
        nbytes_up, nbytes_down: adapters that each client sent, and what it gets back, by client name.
        residual_cut: largest part of a residual that the cap cut in this round, relative Frobenius norm.
        residual_bytes: bytes of all residuals together.
    """

    nbytes_up: dict[str, int]
    nbytes_down: dict[str, int]
    residual_cut: float
    residual_bytes: int


class Server:
    """Hosts layers ``[min_i k_i, L)``, stores a quantized base as bitsandbytes codes, and aggregates.

    Args:
        job, policy: the run's settings.
        base: the base model as the server reads it.
        device: where it computes.
    """

    name = "server"

    def __init__(self, job: Job, policy: Policy, base: BaseModel, device: str = "cpu") -> None:
        self._job, self._policy, self._base = job, policy, base
        self._device = torch.device(device)
        self._layers = 0
        self._plan: Plan | None = None
        self._holder: Holder | None = None
        self._kept: dict[tuple[int, int], _Joined] = {}
        self._step_tokens: dict[int, int] = defaultdict(int)
        self._residuals: dict[str, Residual] = {}
        self._common: dict[str, LowRank] = {}

    # -- set-up ---------------------------------------------------------------------------------------------------

    def configure(self, plan: Plan) -> None:
        """Read the deep layers and the tail that ``plan`` gives the server; the round is begun by :meth:`restart`."""
        assert plan.server.split is not None
        first = plan.server.split
        spec = SegmentSpec(first, plan.layers, tail=self._job.privacy.labels == "server")
        segment = load_segment(self._base, spec, quantized=True, device=self._device)
        shapes = targeted(linear_shapes(segment.config), self._job.targets)
        self._plan, self._layers = plan, plan.layers
        job = self._job
        self._holder = Holder(
            self.name, segment, shapes, plan.server.ranks, job, self._policy, self._base.dtype, self._device
        )
        master = torch.promote_types(self._base.dtype, torch.float32)
        cap = None if job.residual.max_rank == "full" else job.residual.max_rank
        for shape in shapes:
            self._residuals.setdefault(shape.name, Residual(shape.d_out, shape.d_in, cap, master))

    # -- one local step -------------------------------------------------------------------------------------------

    def train_step(
        self, step: int, micro: int, *messages: Activations
    ) -> tuple[ServerReport, *tuple[WireTensor | None, ...]]:
        """Labels on the server: the whole server phase of one depth-joined batch (METHOD 2).

        Returns:
            The report with a loss a message, then for each message the gradient of that client's own mean loss at
            its split point (``None`` for a client without layers), in the order of ``messages``.
        """
        begun = time.perf_counter()
        joined = self._join(step, micro, messages, training=True)
        sums, counts = self._losses(joined)
        total = sums.sum()
        if total.requires_grad:
            total.backward()
        gradients = self._returned(joined, messages)
        self._finish(step, micro, messages)
        losses = _loss_reports(messages, sums.detach(), counts)
        return _report(begun, gradients, losses), *gradients

    def forward(self, step: int, micro: int, *messages: Activations) -> tuple[ServerReport, *tuple[WireTensor, ...]]:
        """U-shape: the report, then the deep layers' output for each client's tokens ``(n, d)``; keeps the graph."""
        begun = time.perf_counter()
        joined = self._join(step, micro, messages, training=True)
        self._kept[step, micro] = joined
        outputs = self._outputs(joined, messages)
        return _report(begun, outputs), *outputs

    def backward(
        self, step: int, micro: int, messages: int, *sent: Activations | WireTensor
    ) -> tuple[ServerReport, *tuple[WireTensor | None, ...]]:
        """U-shape: from the gradients of every client's token sum at the last layer's output.

        Args:
            messages: how many of ``sent`` are the step's activations; the rest are the clients' gradients, in the
                same order.
        """
        begun = time.perf_counter()
        activations = [m for m in sent[:messages] if isinstance(m, Activations)]
        joined = self._kept.pop((step, micro))
        upstream = torch.zeros_like(joined.output)
        for message, gradient in zip(activations, sent[messages:], strict=True):
            assert isinstance(gradient, WireTensor)
            upstream[joined.tokens[message.client]] = gradient.unpack(upstream.dtype, upstream.device)
        if joined.output.requires_grad:
            joined.output.backward(upstream)
        gradients = self._returned(joined, activations)
        self._finish(step, micro, activations)
        return _report(begun, gradients), *gradients

    # -- validation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *messages: Activations) -> ServerReport:
        """Validation loss of each client's rows, labels on the server."""
        begun = time.perf_counter()
        sums, counts = self._losses(self._join(0, 0, messages, training=False))
        return _report(begun, (), _loss_reports(messages, sums, counts))

    @torch.no_grad()
    def evaluate_deep(self, *messages: Activations) -> tuple[ServerReport, *tuple[WireTensor, ...]]:
        """U-shape: the report, then the deep layers' output for each client's validation rows."""
        begun = time.perf_counter()
        outputs = self._outputs(self._join(0, 0, messages, training=False), messages)
        return _report(begun, outputs), *outputs

    # -- rounds ---------------------------------------------------------------------------------------------------

    def aggregate(self, round_: int, *held: HeldAdapters) -> tuple[AggregationReport, *tuple[RoundUpdate, ...]]:
        """Aggregate every weight over its holders (the server among them) and say how each goes on (METHOD 6).

        Args:
            round_: the round that begins afterwards.
            held: the clients' adapters.

        Returns:
            The report, then what each of ``held``'s clients needs to begin the round.
        """
        assert self._plan is not None
        own = self.holder.held()
        everyone = [*held, own]
        next_ranks = {h.name: h.ranks for h in (*self._plan.available, self._plan.server)}
        rule = AGGREGATIONS[self._policy.aggregation]
        cut = 0.0
        self._common = {}
        for name, residual in self._residuals.items():
            holders = [h for h in everyone if name in h.terms]
            tokens = [h.tokens.get(h.layers[name], 0) for h in holders]
            total = sum(tokens)
            if total == 0:
                continue
            contributions = [
                Contribution(_on_cpu(h.terms[name]), count / total)
                for h, count in zip(holders, tokens, strict=True)
                if count
            ]
            smallest = min(ranks[name] for ranks in next_ranks.values() if ranks.get(name, 0) > 0)
            outcome = rule(contributions, self._policy.reinit, smallest)
            if outcome.residual is not None:
                cut = max(cut, residual.add(outcome.residual))
            if outcome.common is not None:
                self._common[name] = outcome.common
        updates = {h.holder: self._update_for(round_, list(h.terms)) for h in everyone}
        for residual in self._residuals.values():
            residual.mark_sent()
        self.restart(updates.pop(self.name))
        report = AggregationReport(
            nbytes_up={h.holder: h.nbytes for h in held},
            nbytes_down={name: update.nbytes for name, update in updates.items()},
            residual_cut=cut,
            residual_bytes=sum(r.nbytes for r in self._residuals.values()),
        )
        return report, *(updates[h.holder] for h in held)

    def restart(self, update: RoundUpdate) -> None:
        self.holder.restart(update)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Own adapters and moments, every residual and every common restart."""
        tensors = self.holder.state()
        for name, residual in self._residuals.items():
            if residual.matrix is not None:
                tensors[f"residual.{name}.matrix"] = residual.matrix
            elif residual.rank:
                tensors[f"residual.{name}.B"] = residual.factors.B.contiguous()
                tensors[f"residual.{name}.A"] = residual.factors.A.contiguous()
        for name, common in self._common.items():
            tensors[f"common.{name}.B"] = common.B.contiguous()
            tensors[f"common.{name}.A"] = common.A.contiguous()
        return tensors

    def load_state(self, tensors: dict[str, Tensor], *clients: str) -> tuple[int, *tuple[RoundUpdate, ...]]:
        """Resume.

        Returns:
            Bytes of what follows: for each of ``clients`` what it needs to follow the residual again.
        """
        assert self._plan is not None
        for name, residual in self._residuals.items():
            matrix, B = tensors.get(f"residual.{name}.matrix"), tensors.get(f"residual.{name}.B")
            factors = None if B is None else LowRank(B, tensors[f"residual.{name}.A"])
            residual.restore(factors, matrix)
            if f"common.{name}.B" in tensors:
                self._common[name] = LowRank(tensors[f"common.{name}.B"], tensors[f"common.{name}.A"])
        own = self._update_for(0, self.holder.adapters.names, whole=True)
        self.holder.follow_residual(own.residuals)
        self.holder.load_state(tensors)
        ranks = {c.name: list(c.ranks) for c in self._plan.available}
        updates = [self._update_for(0, ranks[name], whole=True) for name in clients]
        return sum(u.nbytes for u in updates), *updates

    def parameters_held(self) -> dict[str, int]:
        """Numbers of frozen values held, by module path within the segment (for tests and reports)."""
        return tensors_held(self.holder.segment)

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def holder(self) -> Holder:
        if self._holder is None:
            raise RuntimeError("the server has not been configured")
        return self._holder

    @property
    def adapters(self) -> AdapterSet:
        return self.holder.adapters

    def _update_for(self, round_: int, names: Sequence[str], whole: bool = False) -> RoundUpdate:
        # A merged base forms its working weight from W_0 anew and so needs the residual whole.
        whole = whole or not is_quantized(self._base.base)
        return RoundUpdate(
            round_,
            {name: change for name in names if (change := self._residuals[name].update(whole)) is not None},
            {name: self._common[name] for name in names if name in self._common},
        )

    def _join(self, step: int, micro: int, messages: Sequence[Activations], training: bool) -> _Joined:
        """Run the deep layers: start with the shallowest split, let tokens join where their client's split lies."""
        self.holder.begin_phase(step * 1_000 + micro, training)
        segment = self.holder.segment
        by_depth = sorted(messages, key=lambda m: m.split)
        inputs: dict[str, Tensor] = {}
        tokens: dict[str, slice] = {}
        lengths: tuple[int, ...] = ()
        hidden: Tensor | None = None
        depth = by_depth[0].split
        for message in by_depth:
            if hidden is not None and message.split > depth:
                hidden = segment.run(hidden, Packing.of(lengths, self._device), depth, message.split)
                depth = message.split
            joining = message.hidden.unpack(self._base.dtype, self._device)
            # A client without layers has nothing to train, so no gradient goes back to it.
            inputs[message.client] = joining.requires_grad_(training and message.split > 0)
            start = 0 if hidden is None else hidden.shape[0]
            tokens[message.client] = slice(start, start + joining.shape[0])
            lengths += message.lengths
            hidden = joining if hidden is None else torch.cat([hidden, joining])
        assert hidden is not None
        output = segment.run(hidden, Packing.of(lengths, self._device), depth, self._layers)
        return _Joined(output, list(messages), inputs, tokens)

    def _losses(self, joined: _Joined) -> tuple[Tensor, Tensor]:
        """Loss sums and supervised tokens of each client, in the order in which the messages came."""
        tail = self.holder.segment.tail
        assert tail is not None
        hidden, targets, owners = [], [], []
        for index, message in enumerate(joined.messages):
            assert message.targets is not None
            own = torch.from_numpy(message.targets.copy()).to(self._device).long()
            at = own != -100
            hidden.append(joined.output[joined.tokens[message.client]][at])
            targets.append(own[at])
            owners.append(torch.full((int(at.sum()),), index, device=self._device))
        losses = tail.token_losses(torch.cat(hidden), torch.cat(targets))
        owner = torch.cat(owners)
        count = len(joined.messages)
        sums = torch.zeros(count, dtype=losses.dtype, device=self._device).index_add(0, owner, losses)
        return sums, torch.bincount(owner, minlength=count)

    def _outputs(self, joined: _Joined, messages: Sequence[Activations]) -> tuple[WireTensor, ...]:
        return tuple(WireTensor.pack(joined.output[joined.tokens[m.client]], self._job.wire) for m in messages)

    def _returned(self, joined: _Joined, messages: Sequence[Activations]) -> tuple[WireTensor | None, ...]:
        """To client ``i`` goes the gradient of its own mean loss: that of the token sum, divided by its ``n_i``."""
        gradients: list[WireTensor | None] = []
        for message in messages:
            gradient = joined.inputs[message.client].grad
            if gradient is None:
                gradients.append(None)
            else:
                gradients.append(WireTensor.pack(gradient / max(message.step_supervised, 1), self._job.wire))
        return tuple(gradients)

    def _finish(self, step: int, micro: int, messages: Sequence[Activations]) -> None:
        """Count tokens; after the step's last batch divide layer ``l``'s gradient by its ``n_l`` and step."""
        first = self.holder.segment.spec.first
        for message in messages:
            for layer in range(max(first, message.split), self._layers):
                self._step_tokens[layer] += message.supervised
                self.holder.count_tokens([layer], message.supervised)
        if micro == self._job.grad_accumulation - 1:
            layers = range(first, self._layers)
            self.adapters.scale_grad_by_layer({layer: 1.0 / max(self._step_tokens[layer], 1) for layer in layers})
            self.holder.step(step)
            self._step_tokens.clear()


def _report(begun: float, sent: Sequence[WireTensor | None], losses: Sequence[LossReport] = ()) -> ServerReport:
    nbytes = sum(tensor.nbytes for tensor in sent if tensor is not None)
    return ServerReport(tuple(losses), nbytes, time.perf_counter() - begun)


def _loss_reports(messages: Sequence[Activations], sums: Tensor, counts: Tensor) -> list[LossReport]:
    return [LossReport(m.client, float(s), int(c)) for m, s, c in zip(messages, sums, counts, strict=True)]


def _on_cpu(term: LowRank) -> LowRank:
    return LowRank(term.B.cpu(), term.A.cpu())
