"""A client that holds the whole model: one of a federated policy, or the only node of a centralized one. Ray-free.

Data, activations and labels never leave it; adapters alone are sent, at a round's end.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from hsplit.actors.messages import LossReport
from hsplit.actors.participant import Participant
from hsplit.actors.profiling import Stopwatch, measured, measured_in_first_steps, measured_once_a_round
from hsplit.lora.importance_probe import ProbedRows
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.loading import load_segment
from hsplit.models.segment import Segment, SegmentSpec
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import HolderPlan
from hsplit.seeds import hash_seed


class WholeClient(Participant):
    """Trains the whole model on its data; a quantized base stays as codes, which saves memory."""

    def _hold(self, part: HolderPlan, kept: Segment | None) -> None:
        spec = SegmentSpec(0, part.held_layers, embedding=True, tail=True)
        if self._policy.train == "adapters":
            self._hold_segment(spec, part, kept)
            return
        master = torch.promote_types(self._base.dtype, torch.float32)
        segment = load_segment(replace(self._base, dtype=master), spec, device=self._device, kept=kept)
        self._split = spec.last
        self._holder = WeightHolder(self.name, segment, self._job)

    def _keeps_codes(self, part: HolderPlan) -> bool:
        return self._policy.train == "adapters"

    @measured_in_first_steps
    def train_step(self, step: int) -> LossReport:
        """Make local step ``step`` (counted over the run) over all its accumulated batches."""
        watch = Stopwatch(self._device)
        with watch.phase("data"):
            batches = self.data.step_batches(step)
        tokens = sum(batch.supervised for batch in batches.values())
        loss_sum = 0.0
        for index, batch in batches.items():
            self.holder.begin_phase(hash_seed(step, index), training=True)
            with self._autocast():
                with watch.phase("forward"):
                    hidden = self._front(batch)
                with watch.phase("tail"):
                    loss = self._loss_sum(hidden, batch)
            with watch.phase("backward"):
                (loss / max(tokens, 1)).backward()
            loss_sum += float(loss.detach())
        self.holder.tokens.add(range(self._split), tokens)
        with watch.phase("optimizer"):
            self.holder.step(step, self._lr_scales)
        self.data.drop(step)
        watch.pace(self._pace.get("up"))
        return LossReport(self.name, loss_sum, tokens, seconds=watch.seconds)

    @measured
    def probe(self, round_: int, tokens: int) -> list[ImportanceReport]:
        """Score every adapted weight on a probe batch of each client whose data is here (METHOD 3).

        Args:
            round_: round of the probe.
            tokens: supervised tokens wanted, see :meth:`TrainingData.probe_batch`.
        """
        reports = []
        for data in self.data.clients:
            batch = self.data.probe_batch(data, round_, tokens)
            self.holder.begin_phase(0, training=False)
            probe = self._new_probe()
            with probe.watching():
                loss = self._loss_sum(self._front(batch, probing=True), batch) / max(batch.supervised, 1)
            rows = [ProbedRows(data.client, slice(0, sum(batch.lengths)), 0, 1)]
            scores = probe.scores(loss, None, rows)[data.client]
            reports.append(ImportanceReport(data.client, batch.supervised, scores))
        return reports

    @measured_once_a_round
    @torch.no_grad()
    def validate(self, index: int) -> LossReport:
        """Compute the loss of validation batch ``index``."""
        batch = self.data.validation[index]
        self.holder.begin_phase(0, training=False)
        with self._autocast():
            loss = self._loss_sum(self._front(batch), batch)
        return LossReport(self.name, float(loss), batch.supervised)

    def _autocast(self) -> AbstractContextManager[object]:
        """Compute in the run's dtype where weights are trained, which are kept in fp32."""
        narrow = self._policy.train == "weights" and self._base.dtype == torch.bfloat16
        return torch.autocast(self._device.type, torch.bfloat16, enabled=narrow)
