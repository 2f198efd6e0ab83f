"""The protocol of ``hsplit bench convergence``: a file, fixed before the results that it governs."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hsplit.config.reading import parse_yaml
from hsplit.errors import InputError
from hsplit.files import sha256_of

DEFAULT = Path(__file__).with_name("convergence.yaml")

Changes = tuple[str, ...]
"""``KEY=VALUE`` of a cluster file, with ``job.`` and ``policy.`` as on the command line."""


class _Fixed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Clients(_Fixed):
    """Clients whose memory, compute and bandwidth are drawn around a mean."""

    count: int
    memory_gb: float
    tflops: float
    bandwidth_mbps: float
    latency_ms: float


class ServerBudget(_Fixed):
    """The server, which is the same in every run."""

    memory_gb: float
    tflops: float


class DataSet(_Fixed):
    """One data set.

    Attributes:
        changes: with ``{folder}`` for the folder of its files.
        files: their SHA-256 by name.
    """

    changes: Changes = ()
    files: dict[str, str] = {}


class Rates(_Fixed):
    """Learning rates that are tried.

    Attributes:
        usual, weights: centres for adapters and for all weights.
        factors: around these, in order.
        beyond: most factors of two that are tried beyond these while the best is at an edge.
        rounds: of such a run.
        seed: of such a run.
    """

    usual: float
    weights: float
    factors: tuple[float, ...]
    beyond: int
    rounds: int
    seed: int


class Target(_Fixed):
    """The perplexity to reach, of each seed: what ``policy`` has after a ``part`` of its rounds."""

    policy: str
    part: Annotated[float, Field(gt=0, le=1)]


class Part(_Fixed):
    """Some runs.

    Attributes:
        variants: changes by name.
        policy: of all variants; by default each one's name.
        rate_of: variant whose rates they take; by default their own.
        data: name of the data set; by default the first.
        levels: by default the protocol's.
        seeds: of budgets, data and adapters.
    """

    variants: dict[str, Changes]
    seeds: tuple[int, ...]
    policy: str | None = None
    rate_of: str | None = None
    data: str | None = None
    levels: tuple[float, ...] | None = None


class Protocol(_Fixed):
    """All of it.

    Attributes:
        why: what is different from the one before.
        model: as ``job.model``.
        clients, server: budgets.
        data: data sets, the main one first.
        job: changes of every run.
        rounds, local_steps: of a run.
        rates, target: see there.
        levels: coefficients of variation of the clients' budgets.
        parts: runs, in their order.
        sha256: of the file.
    """

    why: str
    model: str
    clients: Clients
    server: ServerBudget
    data: dict[str, DataSet]
    job: Changes
    rounds: int
    local_steps: int
    rates: Rates
    target: Target
    levels: tuple[float, ...]
    parts: dict[str, Part]
    sha256: str = ""

    @staticmethod
    def read(path: Path) -> Protocol:
        """Read a file.

        Raises:
            InputError: it is no protocol.
        """
        try:
            content = path.read_bytes()
            made = parse_yaml(content.decode(), str(path))
            return Protocol.model_validate({**made, "sha256": hashlib.sha256(content).hexdigest()})
        except (OSError, UnicodeError, TypeError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
            raise InputError(f"{path}: {reason}") from error

    @property
    def main_data(self) -> str:
        """Name of the data set on which rates are tuned."""
        return next(iter(self.data))

    def variant(self, name: str, part: str) -> Variant:
        """Find a variant of a part."""
        own = self.parts[part]
        return Variant(name, own.policy or name, own.variants[name], own.rate_of or name, own.data or self.main_data)

    def data_changes(self, name: str, folder: Path) -> list[str]:
        """Return the changes that name a data set's files in ``folder``.

        Raises:
            InputError: a file is not there, or is another one.
        """
        for file, sha256 in self.data[name].files.items():
            if not (folder / file).is_file():
                raise InputError(f"--data {folder}: {file} is not there, which {name} needs")
            if sha256_of(folder / file) != sha256:
                raise InputError(f"--data {folder}: {file} is not the protocol's: its SHA-256 must be {sha256}")
        return [change.replace("{folder}", str(folder)) for change in self.data[name].changes]


@dataclass(frozen=True)
class Variant:
    """A policy with changes.

    Attributes:
        name: of the variant.
        policy: name of the policy.
        changes: of policy, job and cluster.
        rate_of: variant whose learning rate it takes; its own name if it is tuned itself.
        data: name of the data set.
    """

    name: str
    policy: str
    changes: Changes
    rate_of: str
    data: str


# -- budgets --------------------------------------------------------------------------------------------------------


def draws(count: int, h: float, seed: int, field: str) -> list[float]:
    """Draw lognormal values with mean 1 and coefficient of variation ``h``, both exact in the sample.

    The same standard normal numbers serve every ``h``, so that a client keeps its place.
    """
    source = random.Random(f"{seed}:{field}")
    normal = [source.gauss(0.0, 1.0) for _ in range(count)]
    if h == 0:
        return [1.0] * count

    def scaled(sigma: float) -> list[float]:
        values = [math.exp(sigma * z) for z in normal]
        return [value / fmean(values) for value in values]

    low, high = 0.0, 16.0
    for _ in range(100):
        sigma = (low + high) / 2
        variation = math.sqrt(fmean((value - 1) ** 2 for value in scaled(sigma)))
        low, high = (sigma, high) if variation < h else (low, sigma)
    return scaled(high)


def budgets(protocol: Protocol, h: float, seed: int) -> list[dict[str, float]]:
    """Budgets of the clients, in the fields of a cluster file."""
    mean = protocol.clients
    fields = {name: getattr(mean, name) for name in ("memory_gb", "tflops", "bandwidth_mbps")}
    columns = {field: [value * d for d in draws(mean.count, h, seed, field)] for field, value in fields.items()}
    return [{field: values[i] for field, values in columns.items()} for i in range(mean.count)]


def cluster_text(protocol: Protocol, drawn: list[dict[str, float]]) -> str:
    """Content of the cluster file of some budgets."""

    def shown(budget: Mapping[str, Any]) -> str:
        return ", ".join(f"{field}: {value:.9f}" for field, value in budget.items())

    lines = [f"server: {{{shown(protocol.server.model_dump())}}}", "clients:"]
    latency = f"latency_ms: {protocol.clients.latency_ms:g}"
    lines += [f"  - {{name: client-{i}, {latency}, {shown(own)}}}" for i, own in enumerate(drawn)]
    return "\n".join([*lines, ""])
