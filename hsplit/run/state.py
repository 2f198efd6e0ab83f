"""State of a run: plan, progress and membership, all that a checkpoint keeps beside tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from hsplit import __version__
from hsplit.config import SERVER, ClientConfig, Job
from hsplit.config.reading import from_json
from hsplit.config.section import EXACT, Whole
from hsplit.errors import InputError
from hsplit.planning.cost.serving import drawn_cohort
from hsplit.planning.importance import ImportanceReport
from hsplit.planning.plan import Plan
from hsplit.planning.planning_state import Fleet, PlanningState, Shortage

FORM = 3
"""Version of the form of ``state.json``; a file of another one is refused."""


class Status(StrEnum):
    """Membership of a client.

    * ``ACTIVE``: takes part wherever the plan has a part for it.
    * ``JOINING``: takes part from the next plan on.
    * ``LOST``: has failed, is started again and returns.
    * ``AWAY``: no node has room for it; it takes part when one has.
    * ``ASIDE``: has failed too often; takes part no more, unless it joins again.
    * ``LEFT``: was asked to leave; takes part no more, unless it joins again.

    Two words are no status: a client that the plan has no part for is *unavailable*, and an active client that is not
    in time for a local step is *left out* of that step.
    """

    ACTIVE = "active"
    JOINING = "joining"
    LOST = "lost"
    AWAY = "away"
    ASIDE = "aside"
    LEFT = "left"


@dataclass
class Member:
    """Record of one client, or of the servers, which all have the same part.

    Attributes:
        status: of the client; always ``ACTIVE`` for the servers.
        failures: number of failures.
        shortages: number of times that it ran out of memory.
        held_bytes: memory that it took by the plan in force when it ran out last.
        reason: cause of the last failure.
    """

    status: Status = Status.ACTIVE
    failures: Whole = 0
    shortages: Whole = 0
    held_bytes: Whole = 0
    reason: str = ""
    __pydantic_config__ = EXACT


@dataclass
class RunState:
    """Plan, progress and membership of a run; all of it survives a resume exactly.

    Attributes:
        round: completed rounds.
        step: completed local steps of the whole run, those of the round under way included.
        tokens: supervised tokens trained on.
        client_tokens: the same by client.
        examples: of each client, passed over in its data by the completed rounds, by name.
        train_examples, vocabulary: number of examples to train on in each client's data, and of distinct token ids in
            all of them, where it has read them, by name.
        round_loss_sum, round_tokens: of the round under way: cross-entropy sum in nats, supervised tokens.
        bytes_up, bytes_down: of the round under way: wire bytes, client to server and back.
        residual_cut: of the round under way: largest part of a weight's residual that its cap cut, relative norm.
        residual_lag: of the round under way: largest part of a weight's aggregated adapters that its holders lack of
            the residual (``pace.residual_wait``), relative norm.
        probe: importance found in the last step of a round, for the review after it; ``None``: it has to be probed.
        wall_time_s, virtual_time_s: since the run's start, over all its launches.
        validation_wall_s, validation_virtual_s: parts of them that went into validation.
        plan: the plan in force; ``None`` before the first.
        planning: input to later plans.
        members: records by client name; an active client that has never failed may have none.
        servers: record of the servers.
        joined: clients that joined while the run was under way, in that order.
        measured_bytes: peak memory of each holder in the last round, by name.
        model_fingerprint, data_sha256: of the model and the shared data that the run was started with.
    """

    round: Whole = 0
    step: Whole = 0
    tokens: Whole = 0
    client_tokens: dict[str, Whole] = field(default_factory=dict)
    examples: dict[str, Whole] = field(default_factory=dict)
    train_examples: dict[str, Whole] = field(default_factory=dict)
    vocabulary: dict[str, Whole] = field(default_factory=dict)
    round_loss_sum: float = 0.0
    round_tokens: Whole = 0
    bytes_up: Whole = 0
    bytes_down: Whole = 0
    residual_cut: float = 0.0
    residual_lag: float = 0.0
    probe: ImportanceReport | None = None
    wall_time_s: float = 0.0
    virtual_time_s: float = 0.0
    validation_wall_s: float = 0.0
    validation_virtual_s: float = 0.0
    plan: Plan | None = None
    planning: PlanningState = field(default_factory=PlanningState)
    members: dict[str, Member] = field(default_factory=dict)
    servers: Member = field(default_factory=Member)
    joined: list[ClientConfig] = field(default_factory=list)
    measured_bytes: dict[str, Whole] = field(default_factory=dict)
    model_fingerprint: str = ""
    data_sha256: str = ""
    __pydantic_config__ = EXACT

    # -- membership -----------------------------------------------------------------------------------------------

    def member(self, name: str) -> Member:
        """The record of a client or of a server; one is made where there was none."""
        return self.servers if name == SERVER else self.members.setdefault(name, Member())

    def status(self, name: str) -> Status:
        """The status of a client."""
        return self.members[name].status if name in self.members else Status.ACTIVE

    def with_status(self, *statuses: Status) -> list[str]:
        """Names of the clients that have one of ``statuses``."""
        return [name for name, member in self.members.items() if member.status in statuses]

    @property
    def present(self) -> list[str]:
        """The clients that take part now, in the plan's order."""
        parts = () if self.plan is None else self.plan.available
        return [part.name for part in parts if self.status(part.name) is Status.ACTIVE]

    @property
    def to_return(self) -> list[str]:
        """The clients that are lost or away, and will return."""
        return self.with_status(Status.LOST, Status.AWAY)

    def cohort(self, seed: int, round_: int, count: int | None) -> list[str]:
        """The clients that train in round ``round_``: ``count`` of those present, drawn again each round.

        Each client's position in a round's draw depends on seed, round and name alone. So a resumed run draws the
        same clients, and the next in the draw takes the position of a lost one.
        """
        return drawn_cohort(self.present, seed, round_, count)

    def held_bytes(self, name: str) -> int:
        """Predicted bytes of a client or ``server`` by the plan in force; 0 without a plan or a part in it."""
        parts = () if self.plan is None else (self.plan.server, *self.plan.clients)
        return next((part.predicted_bytes for part in parts if part.name == name), 0)

    def count_examples(self, job: Job) -> None:
        """Record how far the round that ends has gone in each client's data, whoever missed a step of it."""
        start = self.round * job.local_steps
        for part in () if self.plan is None else self.plan.available:
            turns = part.turns(start, start + job.local_steps)
            passed = turns * job.grad_accumulation * (part.rows or job.batch_size)
            self.examples[part.name] = self.examples.get(part.name, 0) + passed

    def count_shortage(self, name: str) -> None:
        """Record that a client or ``server`` ran out of memory; the next plan gives it less."""
        member = self.member(name)
        member.shortages += 1
        member.held_bytes = self.held_bytes(name)

    @property
    def has_shortages(self) -> bool:
        """True if any holder has run out of memory."""
        return any(member.shortages for member in (self.servers, *self.members.values()))

    def fleet(self, clients: Sequence[ClientConfig]) -> Fleet:
        """The fleet to plan for.

        Args:
            clients: every client of the run, those that joined included.
        """
        short = {SERVER: self.servers, **self.members}
        return Fleet(
            tuple(clients),
            joining=frozenset(self.with_status(Status.JOINING)),
            aside=frozenset(self.with_status(Status.ASIDE)),
            left=frozenset(self.with_status(Status.LEFT)),
            shortages={n: Shortage(m.shortages, m.held_bytes) for n, m in short.items() if m.shortages},
            examples=dict(self.train_examples),
            vocabulary=dict(self.vocabulary),
        )

    def remember(self, since: RunState) -> None:
        """Keep what going back to this state does not undo: failures, shortages, clients set aside, the wall's seconds.

        Args:
            since: the later state, which is given up.
        """
        self.validation_wall_s = max(self.validation_wall_s, since.validation_wall_s)
        for name, now in (*since.members.items(), (SERVER, since.servers)):
            then = self.member(name)
            then.failures = max(then.failures, now.failures)
            if now.shortages > then.shortages:
                then.shortages, then.held_bytes = now.shortages, now.held_bytes
            then.reason = now.reason or then.reason
            if now.status is Status.ASIDE:
                then.status = Status.ASIDE

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        # asdict would copy each of the plan's ranks on its own, which takes seconds for thousands of clients.
        plain: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        plain |= {
            "plan": None if self.plan is None else self.plan.to_json(),
            "planning": asdict(self.planning),
            "probe": None if self.probe is None else asdict(self.probe),
            "members": {name: asdict(member) for name, member in self.members.items()},
            "servers": asdict(self.servers),
            "joined": [client.model_dump() for client in self.joined],
        }
        return {"form": FORM, "written_by": __version__, **plain}

    @staticmethod
    def from_json(text: str | bytes, where: str) -> RunState:
        """The state that :meth:`to_json` gave.

        Args:
            text: JSON.
            where: the file, for messages.

        Raises:
            InputError: it is no state, or one of another form; the line names the key, or the version that wrote it.
        """
        origin = from_json(text, _Origin, where)
        if origin.form != FORM:
            raise InputError(
                f"{where}: was written by hsplit {origin.written_by}, whose checkpoints this version"
                f" ({__version__}) does not read; finish the run with that version"
            )
        written = from_json(text, _Written, where)
        state = RunState(**{one.name: getattr(written, one.name) for one in fields(RunState)})
        if state.plan is not None:
            try:
                state.plan.check()
            except ValueError as error:
                raise InputError(f"{where}: plan: {error}") from None
        return state


@dataclass
class _Origin:
    """Version keys of a state; the first form had neither."""

    form: int = 1
    written_by: str = "of an earlier version"


@dataclass(kw_only=True)
class _Written(RunState):
    """State with its version keys, as in the file."""

    form: int
    written_by: str
    __pydantic_config__ = EXACT
