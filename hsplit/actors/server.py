"""The first server: deep layers for the clients that it serves, and the aggregation of all adapters. Ray-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hsplit.actors.profiling import measured, measured_always, measured_with_part
from hsplit.actors.replica import Replica
from hsplit.config import Job, Policy
from hsplit.lora.aggregation import Aggregator
from hsplit.lora.holder import HeldAdapters, RoundUpdate
from hsplit.models.segment import BaseModel
from hsplit.models.spec import LinearShape
from hsplit.models.weights import is_quantized
from hsplit.planning.plan import Plan


@dataclass(frozen=True)
class AggregationReport:
    """Traffic and losses of an aggregation.

    Attributes:
        nbytes_up, nbytes_down: bytes of the adapters that each client sent, and of its update, by client name.
        residual_cut: largest part of a residual that the cap cut in this round, relative Frobenius norm.
        refused: by client name the reason for which its adapters were left out.
        residual_lag: largest part of a weight's aggregated adapters that its holders lack of the residual, for changes
            that wait (``pace.residual_wait``), relative Frobenius norm.
    """

    nbytes_up: dict[str, int]
    nbytes_down: dict[str, int]
    residual_cut: float
    refused: dict[str, str] = field(default_factory=dict)
    residual_lag: float = 0.0


@dataclass(frozen=True)
class ReconfigurationReport:
    """Traffic and losses of a change of plan.

    Attributes:
        nbytes_down: bytes of residuals and restarts that each client gets, by client name; none for absent ones.
        residual_cut: as in :class:`AggregationReport`.
    """

    nbytes_down: dict[str, int]
    residual_cut: float


class Server(Replica):
    """The first server, or the only one: aggregates, and keeps what earlier rounds have learned.

    Where clients hold the whole model (placement ``full`` or ``single``) it hosts no layer and only aggregates.
    """

    def __init__(
        self, name: str, job: Job, policy: Policy, base: BaseModel, device: str = "cpu", measure: bool = True
    ) -> None:
        super().__init__(name, job, policy, base, device, measure)
        self._all_shapes: dict[str, LinearShape] = {}
        self._aggregator: Aggregator | None = None

    # -- set-up ---------------------------------------------------------------------------------------------------

    @measured_with_part
    def configure(self, plan: Plan) -> None:
        """Configure as every server, and start again with empty residuals."""
        job = self._job
        shapes = self._base.spec.targeted(job.targets)
        self._all_shapes = {shape.name: shape for shape in shapes}
        master = torch.promote_types(self._base.dtype, torch.float32)
        self._aggregator = Aggregator(shapes, job, self._policy, master, merges=not is_quantized(job.base))
        super().configure(plan)

    @measured_with_part
    def reconfigure(
        self, round_: int, plan: Plan, following: Collection[str], *holders: str
    ) -> tuple[ReconfigurationReport, *tuple[RoundUpdate, ...]]:
        """Put ``plan`` in force between two rounds: read new layers, drop others, change ranks (law E4).

        Call it when every adapter has just been restarted and nothing has been trained since.

        Args:
            round_: the round that begins.
            plan: the new plan.
            following: the clients that hold their part of the old plan and have followed the residual.
            holders: the clients that take part in the new plan, and the other servers.

        Returns:
            The report, then the update of each of ``holders`` (a server takes it in :meth:`follow`). It is empty for
            a client for which nothing changes, which the report leaves out.
        """
        before = self._plan
        assert before is not None and before.server.split is not None
        cut, changed = self.aggregator.fit_restarts(_ranks_of(plan))
        had = {c.name: c for c in before.available if c.name in following}
        new = plan.server.ranks.keys() - before.server.ranks.keys()
        own = self.aggregator.update_for(round_, plan.server.ranks, whole=new)
        updates, sent = dict.fromkeys(plan.server_names, own), {}
        for name in holders:
            if name in plan.server_names:
                continue
            part, old = plan.client(name), had.get(name)
            if old is not None and old.given == part.given and changed.isdisjoint(part.ranks):
                updates[name] = RoundUpdate(round_, {}, {})
                continue
            new = part.ranks.keys() - (old.ranks.keys() if old is not None else set())
            updates[name] = self.aggregator.update_for(round_, part.ranks, whole=new)
            sent[name] = updates[name].nbytes
        self.aggregator.mark_sent()
        self.follow(plan, own)
        return ReconfigurationReport(sent, cut), *(updates[name] for name in holders)

    # -- rounds ---------------------------------------------------------------------------------------------------

    @measured_always
    def aggregate(self, round_: int, *held: HeldAdapters) -> tuple[AggregationReport, *tuple[RoundUpdate, ...]]:
        """Aggregate every weight over its holders, the server among them, and make each one's update (METHOD 6).

        Args:
            round_: the round that begins afterwards.
            held: the adapters of the clients and of the other servers; empty for a client that has not trained in the
                round that ends.

        Raises:
            FloatingPointError: an adapter of this server has entries that are no numbers.

        Returns:
            The report, then the update with which each holder of ``held`` begins the round. Invalid adapters are left
            out and named in the report; their holder's update is empty.
        """
        plan = self._plan
        assert plan is not None
        own = self.holder.held()
        if flaw := own.flaw(plan.server.ranks, self._all_shapes):
            raise FloatingPointError(f"{self.name} has {flaw}")
        flaws = {h.holder: h.flaw(plan.part(h.holder).ranks, self._all_shapes) for h in held}
        refused = {name: flaw for name, flaw in flaws.items() if flaw is not None}
        sound = [*(h for h in held if h.holder not in refused), own]
        # A missing holder returns with the rank that the plan gives it, and restarts with what that has room for.
        there = {h.holder: h.terms for h in sound}
        absent = {
            name: {weight: rank for weight, rank in ranks.items() if weight not in there.get(name, {})}
            for name, ranks in _ranks_of(plan).items()
        }
        cut = self.aggregator.aggregate(sound, absent, last=round_ > self._job.rounds or not plan.waits)
        # A weight that a holder does not train has rank 0; pruned ranks are its own.
        updates = {h.holder: self.aggregator.update_for(round_, absent[h.holder] | h.ranks) for h in sound}
        self.aggregator.mark_sent()
        updates |= {name: RoundUpdate(round_, {}, {}) for name in refused}
        self.restart(updates.pop(self.name))
        # Between servers nothing counts as sent: their links are not declared.
        servers = plan.server_names
        report = AggregationReport(
            nbytes_up={h.holder: h.nbytes for h in held if h.holder not in servers},
            nbytes_down={n: update.nbytes for n, update in updates.items() if n not in servers and n not in refused},
            residual_cut=cut,
            refused=refused,
            residual_lag=self.aggregator.lag,
        )
        return report, *(updates[h.holder] for h in held)

    @measured
    def full_updates(self, round_: int, *clients: str) -> tuple[int, *tuple[RoundUpdate, ...]]:
        """Make updates for clients that begin ``round_`` from nothing, after a failure.

        Returns:
            The bytes of all updates, then for each of ``clients`` every residual whole and its adapters' restart.
        """
        assert self._plan is not None
        ranks = [self._plan.client(name).ranks for name in clients]
        updates = [self.aggregator.update_for(round_, own, whole=own) for own in ranks]
        self.aggregator.mark_sent()
        return sum(update.nbytes for update in updates), *updates

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @measured
    def state(self) -> dict[str, Tensor]:
        """Return this server's adapters and moments, every residual and every common restart, for a checkpoint."""
        return self.holder.state() | self.aggregator.state()

    @measured_with_part
    def load_state(self, tensors: dict[str, Tensor], *holders: str) -> tuple[int, *tuple[RoundUpdate, ...]]:
        """Resume from a checkpoint.

        Returns:
            The bytes of all updates, then for each of ``holders`` (clients and other servers) its update with every
            residual whole.
        """
        plan = self._plan
        assert plan is not None
        self.aggregator.load_state(tensors)
        own = self.holder.adapters.ranks
        self.resume_state(tensors, self.aggregator.update_for(0, own, whole=own))
        ranks = [plan.part(name).ranks for name in holders]
        updates = [self.aggregator.update_for(0, held, whole=held) for held in ranks]
        # Frees the copies that were made for the updates.
        self.aggregator.mark_sent()
        return sum(u.nbytes for u in updates), *updates

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def aggregator(self) -> Aggregator:
        """The aggregator; a RuntimeError before :meth:`configure`."""
        if self._aggregator is None:
            raise RuntimeError("the server has not been configured")
        return self._aggregator


def _ranks_of(plan: Plan) -> dict[str, dict[str, int]]:
    return {c.name: c.ranks for c in plan.available} | dict.fromkeys(plan.server_names, plan.server.ranks)
