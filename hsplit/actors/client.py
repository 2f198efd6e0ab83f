"""The client of a split model: its data, the embedding, its shallow layers, and the tail where labels stay here.

Ray-free. Noise on the activations that a client sends (``privacy.noise``) is added here.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from hsplit.actors.messages import Activations, ForwardReport, LossReport, WireTensor
from hsplit.actors.participant import Participant
from hsplit.actors.profiling import Stopwatch, measured, measured_in_first_steps, measured_once_a_round
from hsplit.config import Job, Policy
from hsplit.data import Batch
from hsplit.data.batches import IGNORED
from hsplit.lora.holder import Holder
from hsplit.lora.importance_probe import ImportanceProbe, ProbedRows, Score
from hsplit.models.packing import pack_rows
from hsplit.models.segment import BaseModel, Segment, SegmentSpec
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import HolderPlan
from hsplit.seeds import hash_seed


class ActivationNoise:
    """Clips each position's activations and adds Gaussian noise to them.

    Noise that can be reproduced can be subtracted, and the server knows the run's seed and every client's name: the
    generator's key is 128 bits of the operating system's randomness that never leave this object. Each call draws
    again, since two messages with the same noise would reveal their difference.

    No differential privacy is claimed: what leaves over a run is not bounded, and the generator is not a cryptographic
    one.

    Args:
        noise: standard deviation of each entry's noise, in units of ``clip``; 0: no noise and no clipping.
        clip: L2 norm that each position is clipped to.
    """

    def __init__(self, noise: float, clip: float) -> None:
        self.noise, self.clip = noise, clip
        self._generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def added_to(self, hidden: Tensor) -> Tensor:
        """Clip and noise hidden states ``(n, d)``, differentiably."""
        if self.noise == 0:
            return hidden
        norm = hidden.norm(dim=-1, keepdim=True)
        clipped = hidden * (self.clip / norm.clamp_min(self.clip))
        # Allocated by torch, so that measurements see it.
        draw = torch.empty(hidden.shape, dtype=torch.float32)
        self._generator.standard_normal(dtype=np.float32, out=draw.numpy())
        return clipped + self.noise * self.clip * draw.to(hidden)


class Client(Participant):
    """Holds private data and the front segment; sends hidden states and adapters only."""

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        super().__init__(name, job, policy, base, device, measure)
        self._noise = ActivationNoise(job.privacy.noise, job.privacy.noise_clip)
        self._probed: tuple[ImportanceProbe, Batch, Tensor] | None = None
        self._sent: dict[tuple[int, int], Tensor] = {}
        # Those of them that were computed with the adapters before the last optimizer step.
        self._behind: set[tuple[int, int]] = set()
        # The step whose first batch weights are scored on, and the supervised tokens wanted; what is scored meanwhile.
        self._watched: tuple[int, int] | None = None
        self._scoring: dict[tuple[int, int], tuple[ImportanceProbe, ProbedRows, int]] = {}

    def _drop(self) -> None:
        super()._drop()
        self._probed = self._watched = None
        self._sent.clear()
        self._behind.clear()
        self._scoring.clear()
        self._scores.clear()

    def _hold(self, part: HolderPlan, kept: Segment | None) -> None:
        spec = SegmentSpec(0, part.held_layers, embedding=True, tail=self._job.privacy.labels == "client")
        self._hold_segment(spec, part, kept)

    # -- one local step -------------------------------------------------------------------------------------------

    def watch(self, step: int, tokens: int) -> None:
        """Score weights in the backward of local step ``step`` (counted over the run), if it comes to that.

        Args:
            step: the step; its first batch is used.
            tokens: supervised tokens wanted: those of the fewest whole examples that have as many, or of the batch.
        """
        self._watched = step, tokens

    @measured_in_first_steps
    def forward(self, step: int, micro: int) -> tuple[ForwardReport, Activations]:
        """Run the front over batch ``micro`` of local step ``step`` (counted over the run) and keep its graph."""
        watch = Stopwatch(self._device)
        with watch.phase("data"):
            batches = self.data.step_batches(step)
            batch = batches[micro]
        supervised = sum(b.supervised for b in batches.values())
        scored = self._to_score(step, batch) if micro == min(batches) else (0, 0)
        with watch.phase("forward"):
            self.holder.begin_phase(hash_seed(step, micro), training=True)
            with self._adapters_of(step, micro), self._scored_later(step, micro, scored, supervised):
                hidden = self._noise.added_to(self._front(batch, probing=scored[1] > 0))
        self._sent[step, micro] = hidden
        with watch.phase("pack"):
            message = self._message(batch, hidden, supervised, "step", step, micro, scored=scored)
        watch.pace(self._pace.get("up"))
        return ForwardReport(self.name, message.nbytes, watch.seconds), message

    @measured_in_first_steps
    def backward(self, step: int, micro: int, gradient: WireTensor | None) -> Mapping[str, float]:
        """Backpropagate the gradient of this client's mean loss from the split point; step after the last batch.

        Returns:
            Seconds of the wall by phase.
        """
        watch = Stopwatch(self._device)
        hidden = self._sent.pop((step, micro))
        if gradient is not None and hidden.requires_grad:
            with watch.phase("unpack"):
                upstream = gradient.unpack(hidden.dtype, hidden.device)
            behind = self._kept_adapters((step, micro) in self._behind)
            with watch.phase("backward"), behind, self._scored_now(step, micro):
                hidden.backward(upstream)
        self._behind.discard((step, micro))
        batches = self.data.step_batches(step)
        if micro == max(batches):
            # Counted at the end: a skipped step has trained nothing.
            tokens = sum(batch.supervised for batch in batches.values())
            self.data.drop(step)
            self.holder.tokens.add(range(self._split), tokens * self._weight)
            with watch.phase("optimizer"):
                if self._policy.pace.ahead and isinstance(self.holder, Holder):
                    self.holder.keep_earlier()
                    self._behind = set(self._sent)
                self.holder.step(step, self._lr_scales)
        watch.pace(self._pace.get("down"))
        return watch.seconds

    def _to_score(self, step: int, batch: Batch) -> tuple[int, int]:
        """Count the tokens of the first examples to score on, and the supervised ones among them; 0 if not watched."""
        if self._watched is None or self._watched[0] != step:
            return 0, 0
        carried = (batch.targets != IGNORED).sum(dim=1).cumsum(0)
        examples = min(int((carried < self._watched[1]).sum()) + 1, len(carried))
        return sum(batch.lengths[:examples]), int(carried[examples - 1])

    @contextmanager
    def _scored_later(self, step: int, micro: int, scored: tuple[int, int], supervised: int) -> Iterator[None]:
        """Watch the forward inside, if there is something to score, until :meth:`_scored_now`.

        Args:
            step, micro: of the batch.
            scored: tokens to score on, and the supervised ones among them.
            supervised: of the step: the divisor of the gradient that will come.
        """
        if not (scored[1] and self._split):
            yield
            return
        probe = self._new_probe(training=True, draw=step)
        rows = ProbedRows(self.name, slice(0, scored[0]), 0, scored[1] / supervised)
        self._scoring[step, micro] = probe, rows, scored[1]
        with probe.watching():
            yield

    @contextmanager
    def _scored_now(self, step: int, micro: int) -> Iterator[None]:
        """Score in the backward inside what :meth:`_scored_later` watched, if anything."""
        if (step, micro) not in self._scoring:
            yield
            return
        probe, rows, tokens = self._scoring.pop((step, micro))
        with probe.scoring([rows]):
            yield
        self._scores[self.name] = ImportanceReport(self.name, tokens, probe.found()[self.name])

    def skip(self, step: int) -> None:
        """Discard local step ``step``, begun here: the other clients have continued without this one."""
        self._scoring = {of: probe for of, probe in self._scoring.items() if of[0] != step}
        self._sent = {of: hidden for of, hidden in self._sent.items() if of[0] != step}
        self._behind &= self._sent.keys()
        self.data.drop(step)
        assert isinstance(self.holder, Holder)
        self.holder.drop_gradient()

    @measured_in_first_steps
    def tail(self, step: int, micro: int, deep: WireTensor) -> tuple[LossReport, WireTensor]:
        """U-shape: compute loss and gradient of the token sum at the last layer's output; labels stay here.

        Args:
            deep: last layer's output for this client's tokens, ``(n, d)``.
        """
        return self._tail(deep, self.data.step_batches(step)[micro], self._pace.get("turn"))

    # -- importance probe (METHOD 3) ------------------------------------------------------------------------------

    @measured
    def probe_forward(self, round_: int, tokens: int) -> tuple[ForwardReport, Activations]:
        """Run the front over a probe batch, watching its adapted weights, and keep its graph.

        Activations are noised as in a step.

        Args:
            round_: round of the probe.
            tokens: supervised tokens wanted, see :meth:`TrainingData.probe_batch`.
        """
        batch = self.data.probe_batch(self.data.clients[0], round_, tokens)
        self.holder.begin_phase(0, training=False)
        probe = self._new_probe()
        with probe.watching():
            hidden = self._noise.added_to(self._front(batch, probing=True))
        self._probed = probe, batch, hidden
        message = self._message(batch, hidden, batch.supervised, "probe", round_)
        return ForwardReport(self.name, message.nbytes), message

    @measured
    def probe_tail(self, deep: WireTensor) -> tuple[LossReport, WireTensor]:
        """U-shape: do as :meth:`tail` for the probe's batch."""
        assert self._probed is not None
        return self._tail(deep, self._probed[1], None)

    @measured
    def probe_backward(self, gradient: WireTensor | None) -> ImportanceReport:
        """Score this client's layers from the gradient of its mean loss at the split point, and forget the probe.

        Args:
            gradient: ``None`` for a client without layers, where there is nothing to score.

        Raises:
            RuntimeError: no gradient reached one of the weights.
        """
        assert self._probed is not None
        probe, batch, hidden = self._probed
        self._probed = None
        scores: dict[str, Score] = {}
        if self._split:
            upstream = None if gradient is None else gradient.unpack(hidden.dtype, hidden.device)
            rows = ProbedRows(self.name, slice(0, hidden.shape[0]), 0, 1)
            scores = probe.scores(hidden, upstream, [rows])[self.name]
        return ImportanceReport(self.name, batch.supervised, scores)

    # -- validation -----------------------------------------------------------------------------------------------

    @measured_once_a_round
    @torch.no_grad()
    def validation_forward(self, index: int) -> tuple[ForwardReport, Activations]:
        """Run the front over validation batch ``index``, without a graph and without dropout."""
        batch = self.data.validation[index]
        self.holder.begin_phase(0, training=False)
        hidden = self._noise.added_to(self._front(batch))
        # Rounded by the same random numbers in every round: what changes between them is the model alone.
        message = self._message(batch, hidden, batch.supervised, "validation", index)
        return ForwardReport(self.name, message.nbytes), message

    @measured_once_a_round
    @torch.no_grad()
    def validation_tail(self, index: int, deep: WireTensor) -> LossReport:
        """U-shape: compute the validation loss of batch ``index`` from the last layer's output."""
        batch = self.data.validation[index]
        hidden = deep.unpack(self._base.dtype, self._device)
        return LossReport(self.name, float(self._loss_sum(hidden, batch)), batch.supervised)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _adapters_of(self, step: int, micro: int) -> AbstractContextManager[None]:
        """Compute a front with the adapters that it has ahead of the batch before it (``pace.ahead``).

        Where that batch is done, since the run was stopped in between, these are the ones before its optimizer step.
        """
        behind = self._policy.pace.ahead and micro < self._job.pipeline.microbatches and self._has_earlier
        behind = behind and all(of == step for of, _ in self._sent)
        if behind:
            self._behind.add((step, micro))
        return self._kept_adapters(behind)

    def _kept_adapters(self, kept: bool) -> AbstractContextManager[None]:
        """Compute with the adapters before the last optimizer step, if ``kept``."""
        assert isinstance(self.holder, Holder)
        return self.holder.earlier() if kept else nullcontext()

    @property
    def _has_earlier(self) -> bool:
        return isinstance(self.holder, Holder) and self.holder.has_earlier

    def _tail(self, deep: WireTensor, batch: Batch, pace_s: float | None) -> tuple[LossReport, WireTensor]:
        watch = Stopwatch(self._device)
        with watch.phase("unpack"):
            hidden = deep.unpack(self._base.dtype, self._device).requires_grad_()
        with watch.phase("tail"):
            loss = self._loss_sum(hidden, batch)
            loss.backward()
        assert hidden.grad is not None
        with watch.phase("pack"):
            gradient = deep.answer(hidden.grad, "slope", self._job.transport)
        watch.pace(pace_s)
        report = LossReport(self.name, float(loss.detach()), batch.supervised, gradient.nbytes, watch.seconds)
        return report, gradient

    @property
    def _weight(self) -> float:
        """Weight of its loss beside the number of its tokens."""
        assert self._part is not None
        return self._part.weight

    def _message(
        self, batch: Batch, hidden: Tensor, step_supervised: int, *purpose: object, scored: tuple[int, int] = (0, 0)
    ) -> Activations:
        """Pack hidden states in this client's own format; ``purpose`` tells the message from all others of it."""
        at_home = self._job.privacy.labels == "client"
        assert isinstance(self.holder, Holder) and self._part is not None
        wire, seed = self._part.wire or self._job.wire, hash_seed(self._job.seed, "wire", self.name, *purpose)
        return Activations(
            client=self.name,
            split=self._split,
            hidden=WireTensor.pack(hidden, wire, self._job.transport, seed),
            lengths=batch.lengths,
            supervised=batch.supervised,
            step_supervised=step_supervised,
            targets=None if at_home else pack_rows(batch.targets, batch.lengths).to(torch.int32).numpy(),
            trains=bool(self.holder.adapters.names) or scored[1] > 0,
            scored=scored if scored[1] else (0, 0),
            weight=self._weight if purpose[0] == "step" else 1.0,
        )
