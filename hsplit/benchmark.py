"""Running the experiments of ``benchmarks/`` by name, from a checkout and from a wheel."""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hsplit.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def benchmark_directory() -> Path:
    """Where the experiments are: inside the package (a wheel) or beside it (a checkout)."""
    inside = _PACKAGE / "benchmarks"
    return inside if inside.is_dir() else _PACKAGE.parent / "benchmarks"


def results_directory(name: str) -> Path:
    """Where experiment ``name`` writes by default: beside it in a checkout, else under the working directory."""
    directory = benchmark_directory()
    return (Path("benchmarks") if directory.parent == _PACKAGE else directory) / "results" / name


def run_benchmark(name: str, arguments: Sequence[str]) -> None:
    """Call ``main(arguments)`` of the experiment ``name``.

    Raises:
        InputError: there is no experiment of that name.
    """
    load_benchmark(name).main(arguments)


def load_benchmark(name: str) -> ModuleType:
    """The module ``name`` of ``benchmarks/``, an experiment or a part of one.

    Raises:
        InputError: there is none of that name.
    """
    path = benchmark_directory() / f"{name}.py"
    if not path.is_file():
        raise InputError(f"bench: there is no experiment {name} in {path.parent}")
    return _loaded(path)


def keep_to_one_core() -> None:
    """Compute on one thread of one core, so that seconds can be compared."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine_description(*packages: str) -> dict[str, str]:
    """What figures were measured on: processor, system, and versions of Python and of ``packages``."""
    versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    return {"processor": _processor(), "system": platform.platform(), "versions": ", ".join(versions)}


def device_name(device: str) -> str:
    """The name of a GPU, or of this machine's processor."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], header: Mapping[str, Any]) -> None:
    """A CSV with ``# key: value`` lines before its header, which pandas reads with ``comment="#"``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a markdown file, the first column to the left and the others to the right."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show_table(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, left: int = 1
) -> None:
    """A table on the terminal, the first ``left`` columns to the left and the others to the right."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def keep_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], to: Path) -> None:
    """Show a table, and write it into a markdown file."""
    show_table(console, columns, rows)
    to.write_text(markdown_table(columns, rows))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hsplit_benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
