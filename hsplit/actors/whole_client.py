"""A participant that holds the whole model: a client of a federated policy, or the one node of a centralized one.

Ray-free. Nothing of a step leaves it: data, activations and labels stay; adapters alone are sent, at a round's end.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from hsplit.actors.messages import LossReport
from hsplit.actors.participant import Participant
from hsplit.actors.profiling import Stopwatch, measured, measured_in_first_steps, measured_once_a_round
from hsplit.data.batches import probe_batch
from hsplit.lora.importance_probe import ProbedRows
from hsplit.lora.weight_holder import WeightHolder
from hsplit.models.segment import Segment, SegmentSpec, load_segment
from hsplit.planning.importance import ImportanceReport
from hsplit.seeds import hash_seed


class WholeClient(Participant):
    """Trains the whole model on its data; a quantized base stays as codes, as a machine short of memory would do."""

    def _hold(self, split: int, ranks: dict[str, int], kept: Segment | None) -> None:
        spec = SegmentSpec(0, split, embedding=True, tail=True)
        if self._policy.train == "adapters":
            self._hold_segment(spec, ranks, kept, quantized=True)
            return
        master = torch.promote_types(self._base.dtype, torch.float32)
        segment = load_segment(replace(self._base, dtype=master), spec, device=self._device, kept=kept)
        self._split = split
        self._holder = WeightHolder(self.name, segment, self._job)

    @measured_in_first_steps
    def train_step(self, step: int) -> LossReport:
        """The whole local step ``step`` (counted over the run), all its accumulated batches."""
        watch = Stopwatch(self._device)
        with watch.phase("data"):
            batches = self._step_batches(step)
        tokens = sum(batch.supervised for batch in batches)
        loss_sum = 0.0
        for index, batch in enumerate(batches):
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
            self.holder.step(step, self._lr_scale)
        self._batches.pop(step, None)
        watch.pace(self._pace.get("up"))
        return LossReport(self.name, loss_sum, tokens, seconds=watch.seconds)

    @measured
    def probe(self, round_: int, tokens: int) -> list[ImportanceReport]:
        """Score every adapted weight on a probe batch of each client whose data is here (METHOD 3).

        Args:
            round_: round of the probe.
            tokens: supervised tokens wanted, see :func:`hsplit.data.batches.probe_batch`.
        """
        reports = []
        for data in self._data:
            seed = hash_seed(self._job.seed, data.client, "probe", round_)
            batch = probe_batch(data.train, tokens, self._job.batch_size, seed)
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
        """Loss of validation batch ``index``."""
        batch = self._validation[index]
        self.holder.begin_phase(0, training=False)
        with self._autocast():
            loss = self._loss_sum(self._front(batch), batch)
        return LossReport(self.name, float(loss), batch.supervised)

    def _autocast(self) -> AbstractContextManager[object]:
        """Weights that are trained are kept in fp32; they compute in the run's dtype."""
        narrow = self._policy.train == "weights" and self._base.dtype == torch.bfloat16
        return torch.autocast(self._device.type, torch.bfloat16, enabled=narrow)
