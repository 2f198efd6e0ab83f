"""A cluster file with measured budgets: each figure, with its spread beside it, instead of the declared one."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hsplit.config import RunConfig, load_run_config, to_yaml
from hsplit.config.cluster import BUDGET_FIELDS
from hsplit.config.overrides import Overrides, parse_overrides
from hsplit.config.section import LARGEST
from hsplit.errors import InputError


@dataclass(frozen=True)
class Figure:
    """A measured figure in the unit of its key in a cluster file.

    Attributes:
        value: as the file has it, with four digits.
        low, high: the least and the greatest sample.
        samples: number of samples.
        kind: ``value`` is their median, or the least where a budget must always hold.
    """

    value: float
    low: float
    high: float
    samples: int
    kind: Literal["median", "least"]

    @staticmethod
    def median_of(samples: Sequence[float]) -> Figure:
        """Return the median of at least one sample; values are limited to what a file may have."""
        return Figure._of(statistics.median(samples), samples, "median")

    @staticmethod
    def least_of(samples: Sequence[float]) -> Figure:
        """Return the least of at least one sample, limited likewise."""
        return Figure._of(min(samples), samples, "least")

    @staticmethod
    def _of(value: float, samples: Sequence[float], kind: Literal["median", "least"]) -> Figure:
        return Figure(_rounded(value), _rounded(min(samples)), _rounded(max(samples)), len(samples), kind)

    @property
    def spread(self) -> str:
        """Description for a comment of the file."""
        return f"{self.kind} of {self.samples}, {self.low:g}-{self.high:g}"


Figures = Mapping[str, Mapping[str, Figure]]
"""By holder, then by key of its budget."""


def _rounded(value: float) -> float:
    return float(f"{min(value, float(LARGEST)):.4g}")


# Any value will do: the measured one replaces it.
_UNMEASURED = {"memory_gb": 1.0}


def load_unmeasured(cluster: str | Path, overrides: Overrides = (), *, cpu: bool = False) -> RunConfig:
    """Load the run of a cluster file whose clients need no budgets.

    Args:
        cluster: path or name of a cluster file.
        overrides: ``key=value`` strings, or a mapping of dotted keys.
        cpu: reserve no GPUs, whatever the file says.

    Raises:
        InputError: the file or the overrides are wrong.
    """
    for override in parse_overrides(overrides):
        if override.key.partition(".")[0] == "policy":
            raise InputError(f"{override.where}: a cluster file has no policy: budgets are measured for any")
    return load_run_config(cluster, None, overrides, cpu=cpu, client_defaults=_UNMEASURED)


def measured_file(run: RunConfig, figures: Figures, header: Sequence[str]) -> str:
    """Write the YAML text of a cluster file.

    Args:
        run: the holders and the job, of which only the given keys are written.
        figures: by holder and key, of every client and server; the servers share one entry with the least of each.
        header: lines of the comment at the top.
    """
    server = run.server.model_dump(exclude_unset=True, exclude=set(BUDGET_FIELDS))
    lines = [*(f"# {line}".rstrip() for line in header), "", "server:"]
    servers = [figures[name] for name in run.server.names]
    least = {key: min((each[key] for each in servers), key=lambda figure: figure.value) for key in servers[0]}
    lines += textwrap.indent(_entry({}, least, server), "  ").splitlines()
    lines += ["", "clients:"]
    for client in run.clients:
        rest = client.model_dump(exclude_defaults=True, exclude={"name", "kind", *BUDGET_FIELDS})
        entry = textwrap.indent(_entry({"name": client.name}, figures[client.name], rest), "    ")
        lines += ("  - " + entry.lstrip()).splitlines()
    job = run.job.model_dump(exclude_unset=True)
    return "\n".join([*lines, ""]) + (f"\n{to_yaml({'job': job})}" if job else "")


def _entry(names: Mapping[str, Any], figures: Mapping[str, Figure], rest: Mapping[str, Any]) -> str:
    """Write a holder's keys, one on a line, measured figures with their spread."""
    measured = [f"{to_yaml({key: figure.value}).rstrip()}  # {figure.spread}\n" for key, figure in figures.items()]
    return "".join([to_yaml(names) if names else "", *measured, to_yaml(rest) if rest else ""])
