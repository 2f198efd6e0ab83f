"""Running the experiments of ``benchmarks/`` by name, from a checkout and from a wheel."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

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
    path = benchmark_directory() / f"{name}.py"
    if not path.is_file():
        raise InputError(f"bench: there is no experiment {name} in {path.parent}")
    _loaded(path).main(arguments)


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hsplit_benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
