"""A cluster file with measured budgets: each figure, with its spread beside it, in place of the declared one."""

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
        value: what the file gets, four digits of it.
        low, high: of all samples.
        samples: how many there were.
        kind: what ``value`` is of them: the median, or where a budget must hold throughout the least.
    """

    value: float
    low: float
    high: float
    samples: int
    kind: Literal["median", "least"]

    @staticmethod
    def median_of(samples: Sequence[float]) -> Figure:
        """The median of ``samples``, of which there is at least one; none counts as more than a file may have."""
        return Figure._of(statistics.median(samples), samples, "median")

    @staticmethod
    def least_of(samples: Sequence[float]) -> Figure:
        """The least of ``samples``, likewise."""
        return Figure._of(min(samples), samples, "least")

    @staticmethod
    def _of(value: float, samples: Sequence[float], kind: Literal["median", "least"]) -> Figure:
        return Figure(_rounded(value), _rounded(min(samples)), _rounded(max(samples)), len(samples), kind)

    @property
    def spread(self) -> str:
        """In words, as a file's comment has it."""
        return f"{self.kind} of {self.samples}, {self.low:g}-{self.high:g}"


Figures = Mapping[str, Mapping[str, Figure]]
"""By holder, then by key of its budget."""


def _rounded(value: float) -> float:
    return float(f"{min(value, float(LARGEST)):.4g}")


# Any would do: it is replaced by what is measured.
_UNMEASURED = {"memory_gb": 1.0}


def load_unmeasured(cluster: str | Path, overrides: Overrides = (), *, cpu: bool = False) -> RunConfig:
    """The run of a cluster file whose clients need no budgets.

    Args:
        cluster: path or name of a cluster file.
        overrides: ``key=value`` strings, or a mapping of dotted keys.
        cpu: reserve no GPU for anybody, whatever the file says.

    Raises:
        InputError: something in the file or the overrides is wrong.
    """
    for override in parse_overrides(overrides):
        if override.key.partition(".")[0] == "policy":
            raise InputError(f"{override.place}: a cluster file has no policy: budgets are measured for any")
    return load_run_config(cluster, None, overrides, cpu=cpu, client_defaults=_UNMEASURED)


def measured_file(run: RunConfig, figures: Figures, header: Sequence[str]) -> str:
    """The YAML text of a cluster file.

    Args:
        run: who takes part, and the job; of the job, what was given is written, and defaults are left out.
        figures: by holder and key, of every client and every server; of the servers, which have one entry, the least.
        header: lines that stand above as a comment.
    """
    server = run.server.model_dump(exclude_unset=True, exclude=set(BUDGET_FIELDS))
    lines = [*(f"# {line}".rstrip() for line in header), "", "server:"]
    least = _least([figures[name] for name in run.server.names])
    lines += textwrap.indent(_entry({}, least, server), "  ").splitlines()
    lines += ["", "clients:"]
    for client in run.clients:
        rest = client.model_dump(exclude_defaults=True, exclude={"name", "kind", *BUDGET_FIELDS})
        entry = textwrap.indent(_entry({"name": client.name}, figures[client.name], rest), "    ")
        lines += ("  - " + entry.lstrip()).splitlines()
    job = run.job.model_dump(exclude_unset=True)
    return "\n".join([*lines, ""]) + (f"\n{to_yaml({'job': job})}" if job else "")


def _least(servers: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """What every one of ``servers`` has."""
    return {key: min((each[key] for each in servers), key=lambda figure: figure.value) for key in servers[0]}


def _entry(names: Mapping[str, Any], figures: Mapping[str, Figure], rest: Mapping[str, Any]) -> str:
    """A holder's keys, one a line, what was measured with its spread."""
    measured = [f"{to_yaml({key: figure.value}).rstrip()}  # {figure.spread}\n" for key, figure in figures.items()]
    return "".join([to_yaml(names) if names else "", *measured, to_yaml(rest) if rest else ""])
