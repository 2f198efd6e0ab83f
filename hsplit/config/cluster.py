"""The ``server`` and ``clients`` sections of a cluster file: the server, client groups, and the clients of a group.

A budget is a number, or a distribution that each client's budget is drawn from.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from hsplit.config.section import (
    LARGEST,
    LIST,
    MAX_NAME,
    NOT_EMPTY,
    Name,
    NonNegative,
    OneKey,
    PathText,
    Positive,
    Section,
    Text,
    meaning,
    refuse,
    shape,
    shown,
)

SMALLEST_DRAW = 1e-9
"""Lognormal draws are clipped to [SMALLEST_DRAW, LARGEST], which keeps every budget usable."""

_Bounds = Annotated[tuple[float, float], LIST]


class Distribution(OneKey):
    """Distribution of a client's budget, in the unit of its field."""

    uniform: _Bounds | None = Field(default=None, description="[lowest, highest] value, equally likely between")
    lognormal: _Bounds | None = Field(
        default=None,
        description="[mean, coefficient of variation] of the value itself (not of its logarithm)",
    )
    choice: Annotated[tuple[float, ...], LIST, NOT_EMPTY] | None = Field(
        default=None, description="list of equally likely values"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise refuse(f"must be [lowest, highest] (got {shown(list(self.uniform))})", "uniform")
        if self.lognormal is not None and not (self.lognormal[0] > 0 and 0 <= self.lognormal[1] <= 100):
            raise refuse(
                "must be [mean, coefficient of variation] with a mean above 0 and a coefficient from 0 to 100"
                f" (got {shown(list(self.lognormal))})",
                "lognormal",
            )
        return self

    def bounds(self) -> tuple[float, ...]:
        """Values that are in range only if every draw is (a lognormal's draws are clipped)."""
        if self.lognormal is not None:
            return self.lognormal[:1]
        return self.uniform or self.choice or ()

    def draw(self, source: random.Random) -> float:
        """Draw one value with ``source``."""
        if self.uniform is not None:
            return source.uniform(*self.uniform)
        if self.choice is not None:
            return source.choice(self.choice)
        assert self.lognormal is not None  # _exactly_one
        mean, variation = self.lognormal
        # for X = exp(N(mu, s^2)): E[X] = exp(mu + s^2/2) and (sd[X] / E[X])^2 = exp(s^2) - 1
        variance = math.log1p(variation**2)
        drawn = math.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * source.gauss(0.0, 1.0))
        return min(max(drawn, SMALLEST_DRAW), LARGEST)


def _in_range(budget: float | Distribution, *, zero_allowed: bool) -> float | Distribution:
    many = isinstance(budget, Distribution)
    for value in budget.bounds() if isinstance(budget, Distribution) else (budget,):
        if 0 < value <= LARGEST or (zero_allowed and value == 0):
            continue
        rule = f"at most {LARGEST:g}" if value > 0 else "at least 0" if zero_allowed else "greater than 0"
        raise refuse(f"{'every value drawn ' if many else ''}must be {rule} (got {value:g})")
    return budget


def _positive(budget: float | Distribution) -> float | Distribution:
    return _in_range(budget, zero_allowed=False)


def _non_negative(budget: float | Distribution) -> float | Distribution:
    return _in_range(budget, zero_allowed=True)


_Either = Annotated[
    Annotated[float, meaning("a finite number, or a distribution such as {uniform: [5, 20]}"), Tag("<plain>")]
    | Annotated[Distribution, Tag("<mapping>")],
    Discriminator(shape),
]
Budget = Annotated[_Either, AfterValidator(_positive)]
"""A positive number or a distribution of positive numbers."""
BudgetOrZero = Annotated[_Either, AfterValidator(_non_negative)]
"""A non-negative number or a distribution of non-negative numbers, such as a latency."""


def drawn(budget: float | Distribution, seed: int, client: str, field: str) -> float:
    """The number drawn from ``budget`` for one field of one client.

    A draw depends on ``seed``, ``client`` and ``field`` only: adding a client changes no other's budget.
    """
    if not isinstance(budget, Distribution):
        return budget
    digest = hashlib.sha256(f"{seed}:{client}:{field}".encode()).digest()
    return budget.draw(random.Random(int.from_bytes(digest)))


SERVER = "server"
"""Name of the server; its replicas are ``server-1`` and so on."""
SCHEDULER = "scheduler"
"""Name of the scheduler."""
CENTRAL = "central"
"""Name of the one node of a policy with ``placement: single``."""
RESERVED_NAMES = frozenset({SERVER, SCHEDULER, "driver", CENTRAL})
"""Names of hsplit's own actors and processes, which no client may have."""
MAX_COUNT = 200_000
"""Most clients of one group, and of a simulation."""
MAX_TAKING_PART = 10_000
"""Most clients of a run."""
BUDGET_FIELDS = ("memory_gb", "tflops", "bandwidth_mbps", "latency_ms")
"""Fields of a client that may be drawn, and that may change during a run."""
_REPLICA_NAME = re.compile(r"server-\d+")
SERVER_BUDGET_FIELDS = ("memory_gb", "tflops")
"""The same of the server."""


def _not_reserved(name: str) -> str:
    # Upper and lower case alike: on some file systems `Server.safetensors` is the server's file.
    if name.lower() in RESERVED_NAMES or _REPLICA_NAME.fullmatch(name.lower()):
        reserved = ", ".join([*sorted(RESERVED_NAMES), "server-1 and so on"])
        raise refuse(f"{shown(name)} is reserved (so are {reserved}); choose another name")
    return name


def server_names(replicas: int) -> tuple[str, ...]:
    """Names of ``replicas`` servers, the first of which aggregates: ``server``, ``server-1`` and so on."""
    return (SERVER, *(f"server-{number}" for number in range(1, replicas)))


def is_server(name: str) -> bool:
    """True if ``name`` is one of :func:`server_names`."""
    return name == SERVER or _REPLICA_NAME.fullmatch(name) is not None


def _absolute(path: str) -> str:
    """Absolute ``path``; not resolved further, since the file is on the client's node."""
    return path if path.startswith("~") or os.path.isabs(path) else os.path.abspath(path)


def _absolute_if_dotted(model: str) -> str:
    # Without a leading dot, `org/name` is a hub id.
    return _absolute(model) if model.startswith(".") else model


_KEYS_OF_THEIR_OWN = {"CPU": "num_cpus", "GPU": "num_gpus"}
# Resources that Ray counts by itself on every node.
_RAYS_OWN = frozenset({"memory", "object_store_memory"})
_LABEL_PART = "[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([A-Za-z0-9]([A-Za-z0-9.-]{{0,251}}[A-Za-z0-9])?/)?{_LABEL_PART}")
_LABEL_VALUE = re.compile(_LABEL_PART)


def _custom(resources: dict[str, float]) -> dict[str, float]:
    for name in resources:
        if name in _KEYS_OF_THEIR_OWN:
            raise refuse(f"has a key of its own: {_KEYS_OF_THEIR_OWN[name]}", name)
        if name in _RAYS_OWN or not name:
            raise refuse("must be the name of a custom resource, as given to `ray start --resources`", name)
    return resources


def _label_form(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        form = "1 to 63 letters, digits, '.', '_' or '-', the first and the last a letter or digit"
        if not _LABEL_KEY.fullmatch(key):
            raise refuse(f"a label's key must be {form}, such as site or ray.io/region (got {shown(key)})")
        if not _LABEL_VALUE.fullmatch(value):
            raise refuse(f"must be {form} (got {shown(value)})", key)
    return labels


_ClientName = Annotated[Name, AfterValidator(_not_reserved)]
_Cpus = Annotated[NonNegative, Field(description="CPU cores that Ray reserves for the actor")]
_Gpus = Annotated[NonNegative, Field(description="share of a GPU that Ray reserves for the actor (0.25 = a quarter)")]
_ClientGpus = Annotated[
    float, Field(ge=0, le=1, description="share of a GPU that Ray reserves for the client (0.25 = a quarter)")
]
_Node = Annotated[
    Text | None, Field(description="host name, node name or IP address of the node to run on; null = any")
]
# Ray counts in steps of a ten-thousandth.
_Resources = Annotated[
    Annotated[dict[str, Annotated[float, Field(ge=0.0001, le=LARGEST)]], AfterValidator(_custom)],
    Field(description="Ray's custom resources that the node must have, and how much of each is reserved"),
]
_Labels = Annotated[
    Annotated[dict[str, str], AfterValidator(_label_form)],
    Field(description="Ray's labels that the node must have, such as {site: ward}"),
]
_Late = Annotated[
    bool,
    Field(description="true = may be away when the run starts, and takes part as soon as a node that it fits is there"),
]
_DataPath = Annotated[
    Annotated[PathText, AfterValidator(_absolute)] | None,
    Field(description="file of the client's own data, read only on its node; null = a share of `job.data`"),
]
_ModelPath = Annotated[
    Annotated[PathText, AfterValidator(_absolute_if_dotted)] | None,
    Field(description="where the client's node has the model, path or hub id; null = `job.model`"),
]


class BudgetChange(Section):
    """New values of a holder's budget, in the units of the cluster file; ``None``: unchanged."""

    memory_gb: Positive | None = Field(default=None, description="memory for the model's work, in GB (1e9 bytes)")
    tflops: Positive | None = Field(default=None, description="compute, in TFLOP/s (1e12 operations a second)")
    bandwidth_mbps: Positive | None = Field(default=None, description="link to the server, in Mbit/s")
    latency_ms: NonNegative | None = Field(default=None, description="one-way delay to the server, in milliseconds")

    def values(self) -> dict[str, float]:
        """The fields that change, by name."""
        return {field: value for field in BUDGET_FIELDS if (value := getattr(self, field)) is not None}

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.values():
            raise refuse(f"must change at least one of: {', '.join(BUDGET_FIELDS)}")
        return self


class ScheduledChange(BudgetChange):
    """A change of budget that the cluster file schedules."""

    round: int = Field(ge=2, le=10**9, description="the first round, counted from 1, that the new budget holds for")


def _in_order(changes: tuple[ScheduledChange, ...]) -> tuple[ScheduledChange, ...]:
    for earlier, later in pairwise(changes):
        if earlier.round >= later.round:
            raise refuse(f"must be in the order of its rounds, each once (got {earlier.round}, then {later.round})")
    return changes


_Schedule = Annotated[
    Annotated[tuple[ScheduledChange, ...], LIST, AfterValidator(_in_order)],
    Field(description="changes of the budget during the run, such as {round: 3, memory_gb: 0.1}"),
]


class HolderConfig(Section):
    """A machine with a budget of memory and compute (METHOD.md section 1)."""

    memory_gb: Positive = Field(description="memory for the model's work, in GB (1e9 bytes)")
    tflops: Positive = Field(description="compute, in TFLOP/s (1e12 operations a second)")
    num_cpus: _Cpus = 1.0
    num_gpus: _Gpus = 0.0
    node: _Node = None
    resources: _Resources = Field(default_factory=dict)
    labels: _Labels = Field(default_factory=dict)
    schedule: _Schedule = ()

    def changed(self, values: Mapping[str, float]) -> Self:
        """A copy with new budget ``values`` by field name.

        Raises:
            ValueError: the holder has no such field.
        """
        unknown = values.keys() - type(self).model_fields.keys()
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such field")
        return self.model_copy(update=dict(values))

    @property
    def memory_bytes(self) -> int:
        """Declared memory in bytes."""
        return round(self.memory_gb * 1e9)

    @property
    def flops(self) -> float:
        """Declared compute in FLOP/s."""
        return self.tflops * 1e12


class ServerConfig(HolderConfig):
    """The server, which runs the layers that the clients do not hold."""

    memory_gb: Positive = Field(default=8.0, description="memory for the model's work, in GB (1e9 bytes)")
    tflops: Positive = Field(default=20.0, description="compute, in TFLOP/s (1e12 operations a second)")
    num_gpus: NonNegative = Field(
        default=0.0, description="share of a GPU that Ray reserves, or how many GPUs to spread the server's layers over"
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="how many servers there are, each with this budget and these resources, each serving a part of the"
        " clients",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all replicas; the first aggregates."""
        return server_names(self.replicas)

    @model_validator(mode="after")
    def _gpus_are_whole(self) -> Self:
        if self.num_gpus > 1 and not self.num_gpus.is_integer():
            raise refuse(f"must be a share of one GPU, or a whole number of them (got {self.num_gpus:g})", "num_gpus")
        return self

    @model_validator(mode="after")
    def _has_no_link(self) -> Self:
        for index, change in enumerate(self.schedule):
            for field in change.values():
                if field not in SERVER_BUDGET_FIELDS:
                    allowed = ", ".join(SERVER_BUDGET_FIELDS)
                    raise refuse(f"the server's budget has no such part (it has {allowed})", "schedule", index, field)
        return self


class ClientConfig(HolderConfig):
    """One client with concrete budgets, in the units of the cluster file; properties have SI units."""

    name: _ClientName = Field(description="the client's name, unique in the run")
    kind: _ClientName = Field(description="name of the group it came from")
    bandwidth_mbps: Positive = Field(default=100.0, description="link to the server, in Mbit/s (1e6 bits a second)")
    latency_ms: NonNegative = Field(default=10.0, description="one-way delay to the server, in milliseconds")
    num_gpus: _ClientGpus = 0.0
    late: _Late = False
    data: _DataPath = None
    model: _ModelPath = None

    @property
    def bandwidth_bps(self) -> float:
        """Declared bandwidth in bit/s."""
        return self.bandwidth_mbps * 1e6

    @property
    def latency_s(self) -> float:
        """Declared one-way latency in seconds."""
        return self.latency_ms / 1e3


class ClientGroup(Section):
    """A group of ``count`` clients with equal budgets, or budgets drawn from the same distributions."""

    name: _ClientName = Field(description="the client's name; with `count` above 1, NAME-0, NAME-1, ...")
    count: int = Field(default=1, ge=1, le=MAX_COUNT, description="number of clients of this kind")
    memory_gb: Budget = Field(description="memory for the model's work, in GB (1e9 bytes), or a distribution")
    tflops: Budget = Field(default=1.0, description="compute, in TFLOP/s (1e12 operations a second), or a distribution")
    bandwidth_mbps: Budget = Field(
        default=100.0, description="link to the server, in Mbit/s (1e6 bits a second), or a distribution"
    )
    latency_ms: BudgetOrZero = Field(
        default=10.0, description="one-way delay to the server, in milliseconds, or a distribution"
    )
    num_cpus: _Cpus = 1.0
    num_gpus: _ClientGpus = 0.0
    node: _Node = None
    resources: _Resources = Field(default_factory=dict)
    labels: _Labels = Field(default_factory=dict)
    late: _Late = False
    data: _DataPath = None
    model: _ModelPath = None
    schedule: _Schedule = ()

    @model_validator(mode="after")
    def _numbered_names_fit(self) -> Self:
        last = self.name if self.count == 1 else f"{self.name}-{self.count - 1}"
        if len(last) > MAX_NAME:
            longest = shown(last, 100)
            raise refuse(f"is too long for its count: {longest} has more than {MAX_NAME} characters", "name")
        return self

    def names(self) -> tuple[str, ...]:
        """The names of the group's clients: the bare name for one, numbered from 0 for more."""
        if self.count == 1:
            return (self.name,)
        return tuple(f"{self.name}-{number}" for number in range(self.count))

    def _drawn(self, seed: int, name: str) -> dict[str, Any]:
        return {field: drawn(getattr(self, field), seed, name, field) for field in BUDGET_FIELDS}

    def expanded(self, seed: int) -> tuple[ClientConfig, ...]:
        """The group's clients, with their budgets drawn for ``seed``."""
        fixed: dict[str, Any] = self.model_dump(exclude={"name", "count", *BUDGET_FIELDS})
        return tuple(
            ClientConfig(
                name=name,
                kind=self.name,
                **fixed,
                **self._drawn(seed, name),
            )
            for name in self.names()
        )


def unique_names(groups: tuple[ClientGroup, ...]) -> tuple[ClientGroup, ...]:
    """Validate that no two ``groups`` make the same client name; returns them unchanged."""
    if (total := sum(group.count for group in groups)) > MAX_COUNT:
        raise refuse(f"must be at most {MAX_COUNT} clients in all (got {total})")
    owners: dict[str, int] = {}
    for index, group in enumerate(groups):
        # On some file systems, names that differ in case alone are one file.
        for name, as_given in {name.lower(): name for name in (group.name, *group.names())}.items():
            if name in owners:
                other = groups[owners[name]]
                raise refuse(
                    f"{shown(as_given)} is also a name of clients[{owners[name]}] ({shown(other.name)}, count"
                    f" {other.count}); give every client a name of its own",
                    index,
                    "name",
                )
            owners[name] = index
    return groups
