"""The simulated fleet: clients present in each round, their links, by a seed or from a trace, and the model."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsplit.errors import InputError, os_reason
from hsplit.models.lookup import find_model
from hsplit.models.spec import ModelSpec
from hsplit.planning.budgets import Budget, ClientBudget
from hsplit.planning.cost.counted_model import Floats

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "meta-llama/Llama-2-70b-hf": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}
"""Published shapes of models whose configuration cannot be fetched freely."""


def shape_of(model: str) -> ModelSpec:
    """Read the configuration of ``model``; no weights are needed.

    Args:
        model: the value of ``job.model``; a name in :data:`SHAPES` is not searched for.

    Raises:
        InputError: the model is not found.
    """
    if model in SHAPES:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "config.json").write_text(json.dumps(SHAPES[model]))
            return ModelSpec.read(Path(name))
    return find_model(model, weights=False).spec


LINK_MEMORY = 0.8
"""Correlation of the logarithm of a drawn link from one round to the next."""
_COLUMNS = ["round", "client", "bandwidth_mbps"]


@dataclass(frozen=True)
class Traffic:
    """Changes of the fleet in a simulation.

    Attributes:
        leave: probability that a present client is lost in the next round.
        back: probability that a lost client is back in the next round.
        variation: coefficient of variation of a link's bandwidth about its declared value, over the rounds.
        trace: bandwidth in bit/s by round and client, each until the client's next; 0: the client is lost.
    """

    leave: float = 0.0
    back: float = 0.5
    variation: float = 0.0
    trace: Mapping[int, Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        for option, value in (("--leave", self.leave), ("--return", self.back)):
            if not 0 <= value <= 1:
                raise InputError(f"{option}: must be a probability from 0 to 1 (got {value:g})")
        if not 0 <= self.variation <= 100:
            raise InputError(f"--link-variation: must be from 0 to 100 (got {self.variation:g})")


@dataclass(frozen=True)
class Links:
    """Presence and links of the fleet in one round.

    Attributes:
        present: true for the clients that are present, ``(N,)``.
        factor: each link's bandwidth as a multiple of the declared one, ``(N,)``.
        traced_bps: each link's bandwidth by the trace, which replaces the drawn one; NaN: not in the trace, ``(N,)``.
    """

    present: NDArray[np.bool_]
    factor: Floats
    traced_bps: Floats

    def budgets(self, clients: Sequence[ClientBudget]) -> list[Budget]:
        """Budgets of ``clients`` with this round's links."""
        drawn = np.isnan(self.traced_bps) | (self.traced_bps == 0)
        now = np.where(drawn, np.array([c.bandwidth_bps for c in clients]) * self.factor, self.traced_bps)
        return [
            Budget(c.name, c.memory_bytes, c.flops, bps, c.latency_s)
            for c, bps in zip(clients, now.tolist(), strict=True)
        ]


def links(clients: Sequence[ClientBudget], traffic: Traffic, seed: int) -> Iterator[Links]:
    """Yield the fleet of round 1, 2 and so on; the same for the same seed.

    All clients are present in the first round, except for those that the trace excludes.
    """
    draw = np.random.default_rng(seed)
    index_of = {client.name: index for index, client in enumerate(clients)}
    count, spread = len(clients), math.sqrt(math.log1p(traffic.variation**2))
    present = np.ones(count, dtype=bool)
    swing = draw.standard_normal(count)
    traced = np.full(count, np.nan)
    round_ = 1
    while True:
        for name, bps in (traffic.trace or {}).get(round_, {}).items():
            traced[index_of[name]] = bps
        # Mean 1: a link has its declared bandwidth on average.
        factor = np.exp(spread * swing - spread**2 / 2)
        yield Links(present & (traced != 0), factor, traced.copy())
        chance = draw.random(count)
        present = np.where(present, chance >= traffic.leave, chance < traffic.back)
        swing = LINK_MEMORY * swing + math.sqrt(1 - LINK_MEMORY**2) * draw.standard_normal(count)
        round_ += 1


def read_trace(path: Path, clients: Sequence[ClientBudget]) -> dict[int, dict[str, float]]:
    """Read a CSV file with the columns ``round,client,bandwidth_mbps``.

    Returns:
        Bit/s by round and client.

    Raises:
        InputError: the file cannot be read, or a line is wrong; the text names it.
    """
    known = {client.name for client in clients}
    found: dict[int, dict[str, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise InputError(f"{path}: its first line must be {','.join(_COLUMNS)}")
            for row in reader:
                round_, name, bps = _entry(row, f"{path}: line {reader.line_num}", known)
                found.setdefault(round_, {})[name] = bps
    except OSError as error:
        raise InputError(f"{path}: {os_reason(error)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is no CSV file in UTF-8") from error
    return found


def _entry(row: Mapping[str, str | None], where: str, known: set[str]) -> tuple[int, str, float]:
    name = row["client"]
    if name not in known:
        raise InputError(f"{where}: client: there is none of the name {name!r} in the cluster")
    try:
        round_, mbps = int(row["round"] or ""), float(row["bandwidth_mbps"] or "")
    except ValueError:
        raise InputError(f"{where}: round and bandwidth_mbps must be numbers") from None
    if round_ < 1 or not 0 <= mbps <= 1e9:
        raise InputError(f"{where}: round must be from 1, and bandwidth_mbps from 0 (not there) to 1e9")
    assert name is not None
    return round_, name, mbps * 1e6
