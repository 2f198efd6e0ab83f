"""The plan of a round: each holder's layers and ranks, with the bytes and seconds that they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from hsplit.config import Job
from hsplit.config.cluster import server_names
from hsplit.config.job import Wire
from hsplit.config.reading import from_plain
from hsplit.config.section import EXACT, MAX_LAYERS, STRICT, Whole
from hsplit.errors import InputError

MAX_SERVERS = 1000
"""Most servers of a plan that is read from a file."""
_Figure = Annotated[float, Field(gt=-(2.0**1000), lt=2.0**1000, allow_inf_nan=False)]


@dataclass(frozen=True)
class HolderPlan:
    """One holder's part of a plan.

    Attributes:
        name: client name or ``server``.
        kind: ``client`` or ``server``.
        available: some split fits; an unavailable client takes no part.
        split: clients: layers ``[0, split)`` are its own; server: its first layer. ``None`` when unavailable.
        ranks: LoRA rank by weight name; holders with equal ranks may share one mapping, so copy it to change it.
        declared_bytes, predicted_bytes: memory budget, and the peak that the plan will need of it.
        step_time_s: predicted time of its part of one local step, transfers included (virtual).
        lacking_bytes: memory that an unavailable client lacks for the smallest assignment.
        captured_share: its share of the plan's captured importance, 0 to 1; all shares add up to 1.
        rows: examples in each of a client's batches; 0 stands for ``job.batch_size``.
        group: the server's turn in a local step that a client comes to.
        every, offset: a client takes part in the local steps ``t``, counted over the run, with ``t % every == offset``.
        stored: how a client keeps a quantized base; a server always keeps codes.
        working_copy: a server computes with a dense copy of ``W_0 + R`` beside the codes.
        weight: of its loss, beside the number of its tokens.
        wire: format of its messages; empty stands for ``job.wire``.
    """

    name: str
    kind: Literal["client", "server"]
    available: bool
    split: Whole | None
    ranks: dict[str, Whole] = field(default_factory=dict)
    declared_bytes: Whole = 0
    predicted_bytes: Whole = 0
    step_time_s: _Figure = 0.0
    lacking_bytes: Whole = 0
    captured_share: _Figure = 0.0
    rows: Whole = 0
    group: Whole = 0
    every: Annotated[int, Field(ge=1)] = 1
    offset: Whole = 0
    stored: Literal["dense", "codes"] = "dense"
    working_copy: bool = False
    weight: _Figure = 1.0
    wire: Wire | Literal[""] = ""
    __pydantic_config__ = EXACT

    @property
    def held_layers(self) -> int:
        """Number of decoder layers of a client that takes part, from the embedding on: its split point."""
        assert self.split is not None, f"{self.name} takes no part"
        return self.split

    @property
    def given(self) -> tuple[Any, ...]:
        """All that the plan decides for it, without the figures that follow."""
        return (
            self.split,
            self.ranks,
            self.rows,
            self.group,
            self.every,
            self.offset,
            self.stored,
            self.working_copy,
            self.weight,
            self.wire,
        )

    def takes_part_in(self, step: int) -> bool:
        """True if it takes part in local step ``step``, counted over the run."""
        return step % self.every == self.offset

    def turns(self, start: int, stop: int) -> int:
        """Number of the local steps ``[start, stop)`` that it takes part in."""
        return max(0, -(-(stop - self.offset) // self.every)) - max(0, -(-(start - self.offset) // self.every))

    def parts(self, job: Job) -> int:
        """Number of microbatches that each of its batches is cut into: no more than it has examples."""
        return min(job.pipeline.microbatches, self.rows or job.batch_size)

    @property
    def rank_total(self) -> int:
        """Sum of its ranks."""
        return sum(self.ranks.values())

    @property
    def forward_only(self) -> bool:
        """True if it has layers and trains none of them, so that no gradient comes back to it."""
        return bool(self.ranks) and not any(self.ranks.values())


@dataclass(frozen=True)
class Speed:
    """Speed of a plan against what its budgets allow (METHOD 10, virtual).

    Attributes:
        rows_per_s: examples a second.
        bound_rows_per_s: most that the fleet could take with everything overlapped.
        binding: the holder, and what of it, that the plan's speed follows from.
    """

    rows_per_s: _Figure
    bound_rows_per_s: _Figure
    binding: str
    __pydantic_config__ = EXACT

    @property
    def share(self) -> float:
        """Part of the bound that is reached."""
        return self.rows_per_s / self.bound_rows_per_s if self.bound_rows_per_s > 0 else 0.0


@dataclass(frozen=True)
class Plan:
    """The layers and ranks of all holders, with the figures that they were chosen by.

    Attributes:
        layers: decoder layers of the model.
        server: the server's part.
        clients: every declared client's part, in the cluster's order.
        makespan_s: predicted time of one local step (METHOD 5, virtual).
        captured_importance: METHOD 5's ``learning``: captured importance, less what learning apart takes from it.
        importance: where the scores come from, in words.
        servers: number of servers; ``server`` is the part of each.
        exchange_s: predicted time of the exchange at a round's end on the clients' links, with the residual at its cap
            unless its changes wait, spread over the round's local steps (virtual).
        groups: turns of the server in one local step; a client's period, METHOD 10's ``m``, is ``groups * every``.
        speed: against the bound; ``None``: not found out, where nothing is split.
        gamma: the objective's exponent.
        rows: examples that all clients together bring to a local step, on the average.
        waits: the server has room for residual changes that wait, where ``pace.residual_wait`` lets them.
    """

    layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    server: HolderPlan
    clients: tuple[HolderPlan, ...]
    makespan_s: _Figure
    captured_importance: _Figure
    importance: str
    servers: Annotated[int, Field(ge=1, le=MAX_SERVERS)] = 1
    exchange_s: _Figure = 0.0
    groups: Annotated[int, Field(ge=1)] = 1
    speed: Speed | None = None
    gamma: _Figure = 1.0
    rows: _Figure = 1.0
    waits: bool = True
    __pydantic_config__ = STRICT

    @property
    def objective(self) -> float:
        """The objective of planning: captured importance, to the power of ``gamma``, times the examples a second of
        local steps and their part of the exchange.

        So plans with different clients, and rows, can be compared.
        """
        return float(self.captured_importance**self.gamma) * self.rows / (self.makespan_s + self.exchange_s)

    @property
    def price_of_a_second(self) -> float:
        """Captured importance that is worth as much as a second."""
        return self.captured_importance / (self.gamma * (self.makespan_s + self.exchange_s))

    @property
    def available(self) -> tuple[HolderPlan, ...]:
        """Clients that take part, in the cluster's order."""
        return tuple(c for c in self.clients if c.available)

    @property
    def forward_only(self) -> frozenset[str]:
        """Names of the clients that take part and train nothing."""
        return frozenset(client.name for client in self.available if client.forward_only)

    def holders_by_layer(self, clients: Collection[str], servers: int) -> list[int]:
        """Count the holders that train each layer where ``clients`` take part and ``servers`` serve them, ``(L,)``."""
        parts = [part for part in self.available if part.name in clients]
        # Servers share the clients in turn, so that each one has rows of a layer if as many clients pass it.
        return [
            sum(part.held_layers > layer and not part.forward_only for part in parts)
            + min(servers, sum(part.held_layers <= layer for part in parts))
            for layer in range(self.layers)
        ]

    @property
    def weights(self) -> list[str]:
        """Names of the weights that any holder has a rank for, 0 included."""
        return list(dict.fromkeys(name for part in (self.server, *self.available) for name in part.ranks))

    @property
    def paced(self) -> bool:
        """True if not all clients bring as many rows to every step, all together."""
        return self.groups > 1 or len({(part.rows, part.every) for part in self.available}) > 1

    @property
    def server_names(self) -> tuple[str, ...]:
        """Names of the servers; the first one aggregates."""
        return server_names(self.servers)

    def gives_the_same_as(self, other: Plan) -> bool:
        """True if all holders have the same layers at the same ranks, and the same part in steps."""
        own, others = ({part.name: part.given for part in (p.server, *p.available)} for p in (self, other))
        return own == others

    def client(self, name: str) -> HolderPlan:
        """A client's part, by its name."""
        return next(c for c in self.clients if c.name == name)

    def part(self, holder: str) -> HolderPlan:
        """The part of a client or a server."""
        return self.server if holder in self.server_names else self.client(holder)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint and for the event log."""
        # asdict would copy each of the ranks on its own, which takes seconds for thousands of clients.
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        speed = None if self.speed is None else asdict(self.speed)
        holders = {"server": _holder_json(self.server), "clients": tuple(map(_holder_json, self.clients))}
        return whole | {"speed": speed} | holders

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Read the plan that :meth:`to_json` made.

        Raises:
            ValueError: ``data`` is no plan.
        """
        try:
            plan = from_plain(data, Plan, "it is no plan")
        except InputError as error:
            raise ValueError(str(error)) from None
        plan.check()
        return plan

    def check(self) -> None:
        """Check that values read from a file can be a plan.

        Raises:
            ValueError: they cannot.
        """
        for part in (self.server, *self.clients):
            if (part.split is None and part.available) or (part.split or 0) > self.layers:
                raise ValueError(f"it is no plan: {part.name} takes part without layers, or has more than there are")
            if part.offset >= part.every or part.group >= self.groups:
                raise ValueError(f"it is no plan: {part.name} never has its turn")


def _holder_json(holder: HolderPlan) -> dict[str, Any]:
    return {f.name: getattr(holder, f.name) for f in fields(holder)} | {"ranks": dict(holder.ranks)}
