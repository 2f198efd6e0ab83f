"""The experiments of ``benchmarks/`` by name, from a checkout and from a wheel."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hsplit.errors import InputError

_PACKAGE = Path(__file__).resolve().parent
_NAME = "benchmarks"


def experiment_directory() -> Path:
    """The folder of the experiments: inside the package (a wheel) or beside it (a checkout)."""
    inside = _PACKAGE / _NAME
    return inside if inside.is_dir() else _PACKAGE.parent / _NAME


def results_directory(name: str) -> Path:
    """The default folder for the results of ``name``: beside it in a checkout, else under the working directory."""
    directory = experiment_directory()
    return (Path(_NAME) if directory.parent == _PACKAGE else directory) / "results" / name


def run_experiment(name: str, arguments: Sequence[str]) -> None:
    """Call ``main(arguments)`` of the experiment ``name``.

    Raises:
        InputError: there is no experiment of that name.
    """
    load_experiment(name).main(arguments)


def call_of(name: str, function: str, *arguments: Any) -> Any:
    """Call ``function`` of the experiment ``name``: for spawned processes, which cannot import it by themselves."""
    return getattr(load_experiment(name), function)(*arguments)


def load_experiment(name: str) -> ModuleType:
    """Import the module ``benchmarks.NAME``, an experiment or a part of one.

    Raises:
        InputError: there is no experiment of that name.
    """
    directory = experiment_directory()
    if not (directory / f"{name}.py").is_file():
        raise InputError(f"bench: there is no experiment {name} in {directory}")
    _import_package(directory)
    return importlib.import_module(f"{_NAME}.{name}")


def _import_package(directory: Path) -> None:
    """Import ``benchmarks`` from ``directory``, even if ``sys.path`` leads to another package of that name."""
    known = sys.modules.get(_NAME)
    if known is not None and [Path(path).resolve() for path in known.__path__] == [directory]:
        return
    for other in [module for module in sys.modules if module.partition(".")[0] == _NAME]:
        del sys.modules[other]
    spec = importlib.util.spec_from_file_location(
        _NAME, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
