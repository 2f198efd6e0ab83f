"""Imports go down the layers of CONTRIBUTING.md and never up, in no circle, and only Ray's own files import Ray."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HSPLIT = Path(__file__).parents[1] / "hsplit"

# From the top: files and folders of hsplit/ by the layer that they stand in. The first is the Python interface.
LAYERS = (
    ("__init__", "cli"),
    ("api", "doctor", "evaluation", "experiments", "measuring", "simulation"),
    ("session",),
    ("exporting", "report", "run"),
    ("cluster",),
    ("actors", "observe"),
    # The method.
    ("planning",),
    ("data", "lora"),
    ("models",),
    ("extension", "run_directory"),
    ("config",),
    ("errors", "files", "home", "kept", "machine", "seeds", "shadowing", "streams", "tracebacks", "waiting"),
)
# They start actors, place them, and pass on Ray's metrics.
KNOW_RAY = {
    "cluster/connection.py",
    "cluster/placement.py",
    "cluster/preflight.py",
    "cluster/ray_executor.py",
    "cluster/ray_failures.py",
    "cluster/ray_session.py",
    "observe/ray_metrics.py",
}


def files() -> dict[str, Path]:
    """The package's files by the name of their module, without ``hsplit.``."""
    found = {}
    for file in HSPLIT.rglob("*.py"):
        parts = file.relative_to(HSPLIT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any level and for types too.

    For ``from a import b`` both ``a`` and ``a.b``.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports say the whole name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(source: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that ``source`` imports, without the package itself."""
    names = {name.removeprefix("hsplit.") for name in imported(source) if name.startswith("hsplit.")}
    return names & modules.keys()


def folder_of(module: str) -> str:
    return module.split(".")[0]


def layer_of(module: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if folder_of(module) in names)


def fail_on_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_everything_stands_in_one_layer() -> None:
    named = [name for names in LAYERS for name in names]
    assert sorted(named) == sorted({folder_of(module) for module in files()})


def test_imports_go_down() -> None:
    modules = files()
    up = [
        f"{module} imports {other}"
        for module, file in modules.items()
        for other in own_imports(file.read_text(), modules)
        if layer_of(other) < layer_of(module)
    ]
    assert not up


def test_no_files_import_in_a_circle() -> None:
    modules = files()
    fail_on_circle({module: own_imports(file.read_text(), modules) - {module} for module, file in modules.items()})


def test_no_folders_import_in_a_circle() -> None:
    modules = files()
    graph = defaultdict(set)
    for module, file in modules.items():
        others = {folder_of(other) for other in own_imports(file.read_text(), modules)}
        graph[folder_of(module)] |= others - {folder_of(module)}
    fail_on_circle(graph)


def test_no_two_files_have_one_name() -> None:
    names = [file.stem for file in files().values() if file.stem != "__init__"]
    assert not {name for name in names if names.count(name) > 1}


def test_only_these_files_know_ray() -> None:
    sources = {file.relative_to(HSPLIT).as_posix(): file.read_text() for file in files().values()}
    know = {path for path, source in sources.items() if "ray" in {name.split(".")[0] for name in imported(source)}}
    assert know == KNOW_RAY


def test_imports_count_inside_of_a_function_and_for_types_alone() -> None:
    modules = files()
    late = "def late():\n    from hsplit.actors import executor\n    from hsplit import __version__\n"
    types = "if TYPE_CHECKING:\n    from hsplit.api import Run\n"
    found = own_imports(f"import hsplit.cli\n{types}{late}", modules)
    assert found == {"actors", "actors.executor", "api", "cli"}
    assert layer_of("actors.executor") > layer_of("api")


def test_a_circle_is_found() -> None:
    with pytest.raises(pytest.fail.Exception, match="imports"):
        fail_on_circle({"a": {"b"}, "b": {"a"}})
