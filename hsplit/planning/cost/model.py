"""The cost of an assignment for a holder in bytes and seconds, before anything runs (METHOD 4).

Everything is counted once when the model is made; after that every cost is a few array look-ups, so that a planner can
try thousands of splits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from hsplit.config import Job, Pace, RunConfig
from hsplit.lora.aggregation import find_aggregation
from hsplit.models.spec import ModelSpec
from hsplit.planning.budgets import ClientBudget, ServerBudget
from hsplit.planning.cost.counted_model import CountedModel, WireBytes
from hsplit.planning.cost.memory import ClientMemory, ServerMemory, training_bytes
from hsplit.planning.cost.step_time import StepTime, StepTimes
from hsplit.planning.plan import HolderPlan


class CostModel:
    """Bytes and seconds of every split and rank for one model and one job.

    Bytes are reserved so that a plan holds for the whole run: the residual at its cap; every batch at ``batch_size``
    rows of ``max_length`` tokens, all of them supervised; copies of a round's end at the largest rank. All times are
    virtual.

    Args:
        model: the model; no weights are read.
        job: the run's settings.
        pace: the policy's, see METHOD 10.
        setting: consequences of the policy, see :class:`~hsplit.planning.cost.counted_model.CountedModel`.

    Attributes:
        model: the counts.
        rank_set: ranks for a plan to choose from, increasing.
        server: bytes of the server.
        times: virtual seconds.
        waits: residual changes may wait (``pace.residual_wait``).
    """

    def __init__(self, model: ModelSpec, job: Job, pace: Pace | None = None, **setting: Any) -> None:
        self.pace = pace or Pace()
        self.rank_set: tuple[int, ...] = tuple(job.rank_set)
        self.model = CountedModel(model, job, exchange=self.pace.exchange, **setting)
        self._client_memory: dict[tuple[int, bool], ClientMemory] = {}
        self._set_waits(self.pace.residual_wait > 0)

    def _set_waits(self, waits: bool) -> None:
        self.waits = waits
        self.server, self.times = ServerMemory(self.model, waits=waits), StepTimes(self.model, waits=waits)

    def for_server(self, server: ServerBudget, clients: int) -> CostModel:
        """The costs with a server of that budget: residual changes wait only where memory is ample.

        While changes wait the server keeps each residual twice. Memory is better spent on ranks, so that there must be
        enough for both, at the largest ranks and with a batch of all clients, wherever these split.
        """
        if not self.waits:
            return self
        counts = clients * np.eye(self.model.layers + 1, dtype=np.int64)
        most = self.server.constant(counts) + self.model.top_rank * self.server.per_common_rank(counts)
        if most.max() <= server.memory_bytes:
            return self
        made = copy.copy(self)
        made._set_waits(False)
        return made

    @property
    def client(self) -> ClientMemory:
        """Bytes of a client that brings ``job.batch_size`` examples and stores its layers dense."""
        return self.client_memory(self.model.job.batch_size)

    def client_memory(
        self, rows: int, stored: Literal["dense", "codes"] = "dense", embedding_rows: int | None = None
    ) -> ClientMemory:
        """Bytes of a client.

        Args:
            rows: examples in each of its batches.
            stored: how it keeps a quantized base; a client with the whole model always keeps codes.
            embedding_rows: rows of the token embedding that it holds; ``None``: all, as with the tail.

        Raises:
            ValueError: codes of a base that is not quantized.
        """
        codes = self.model.client_codes is not None or stored == "codes"
        if codes and not self.model.quantized:
            raise ValueError(f"a base in {self.model.job.base} has no codes")
        if (rows, codes) not in self._client_memory:
            ahead = self.pace.ahead
            # A second batch's graph is alive, and the adapters as they were before the last step.
            memory = ClientMemory.of(self.model.at_rows(2 * rows if ahead else rows), codes)
            self._client_memory[rows, codes] = memory.with_adapters_kept() if ahead else memory
        memory = self._client_memory[rows, codes]
        if embedding_rows is None or self.model.tail_at_client:
            return memory
        return memory.with_embedding(embedding_rows)

    def client_bytes(
        self,
        split: int,
        ranks: Mapping[str, int],
        rows: int | None = None,
        stored: Literal["dense", "codes"] = "dense",
        embedding_rows: int | None = None,
    ) -> int:
        """Peak bytes of a client that holds layers ``[0, split)``.

        Args:
            split: its split point.
            ranks: by weight name.
            rows, stored, embedding_rows: as for :meth:`client_memory`; ``job.batch_size`` rows by default.
        """
        memory = self.client_memory(rows or self.model.job.batch_size, stored, embedding_rows)
        return memory.peak_bytes(split, ranks)

    @property
    def training_bytes(self) -> int:
        """Peak bytes of a node that trains every weight of the model."""
        return training_bytes(self.model)

    def server_bytes(self, splits: Sequence[int], ranks: Mapping[str, int]) -> int:
        """Peak bytes of the server beside clients that split at ``splits``, with ``ranks`` of its own."""
        return self.server.peak_bytes(splits, ranks)

    def working_copy_bytes(self, first: int) -> int:
        """Bytes of a server's working copies of layers ``[first, L)``, beside their codes."""
        return round(float(self.model.working_copy_bytes[first:].sum()))

    def with_working_copy(self, server: HolderPlan) -> HolderPlan:
        """Let ``server`` keep working copies, if there is something to copy and its declared memory has room.

        In 16 bits a copy would lose most of a small residual, which a quantized base applies beside itself for that
        reason (METHOD 6).
        """
        assert server.split is not None
        if self.model.dtype.itemsize < 4:
            return server
        copies = self.working_copy_bytes(server.split)
        needed = server.predicted_bytes + copies
        if not copies or needed > server.declared_bytes:
            return server
        return replace(server, working_copy=True, predicted_bytes=needed)

    @staticmethod
    def of_run(model: ModelSpec, run: RunConfig) -> CostModel:
        """Make the cost model of a run, for its declared server; a single node's batch joins those of all clients."""
        policy, job = run.policy, run.job
        if policy.placement == "single":
            together = sum(client.data is None for client in run.clients)
            job = job.model_copy(update={"batch_size": job.batch_size * together})
        aggregation = find_aggregation(policy.aggregation)
        made = CostModel(
            model,
            job,
            policy.pace,
            # Plans reserve memory for a residual only if the aggregation has one.
            residual=aggregation.keeps_residual,
            decomposes=aggregation.decomposes,
            truncates=aggregation.truncates,
            top_rank=policy.ranks if isinstance(policy.ranks, int) else None,
            whole=policy.placement != "split",
            trains_weights=policy.train == "weights",
            servers=run.server.replicas,
            spectral=policy.importance.spectral,
        )
        return made.for_server(run.server, len(run.clients))

    def step_time_s(self, client: ClientBudget, split: int) -> StepTime:
        """Virtual seconds of a client's part of one local step."""
        up, turn, down = self.times.client_times(client)[split]
        return StepTime(float(up), float(turn), float(down))

    def wire_bytes(self, split: int, wire: str = "") -> WireBytes:
        """Bytes of one full batch of a client that splits at ``split``; ``wire`` as in a plan."""
        return self.model.wire_bytes(split, wire)
