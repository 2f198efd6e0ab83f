"""Imports go down the layers of CONTRIBUTING.md and never up, in no circle, and only Ray's own files import Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HSPLIT = Path(__file__).parents[1] / "hsplit"

# From the top: files and folders of hsplit/ by the layer that they stand in. The first is the Python interface.
LAYERS = (
    ("__init__", "cli"),
    ("budget_probe", "evaluation", "experiments", "simulation"),
    ("launcher", "local_run"),
    ("report",),
    ("coordinator", "exporting"),
    # The coordinator's own parts, in the order in which they build on one another.
    ("recovery",),
    ("save_point", "model_card", "preparation"),
    ("membership", "records"),
    ("run_context",),
    ("checkpoint", "client_data", "inbox", "janitor", "training"),
    ("deadlines", "failure_text", "probe", "run_state"),
    ("actors", "observe"),
    ("measuring",),
    # The method.
    ("data", "lora", "models", "scheduling"),
    ("driver", "extension", "run_directory"),
    ("config",),
    ("socket_directory", "tracebacks", "waiting"),
    ("dependency_messages", "errors", "files", "home", "seeds", "shadowing", "streams"),
)
# They start actors, place them, and pass on Ray's metrics.
KNOW_RAY = {
    "actors/placement.py",
    "actors/preflight.py",
    "actors/ray_connection.py",
    "actors/ray_executor.py",
    "actors/ray_failures.py",
    "launcher.py",
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
    """Every module that ``source`` imports, wherever in it, but for its types alone.

    For ``from a import b`` both ``a`` and ``a.b``.
    """
    yield from _imported_below(ast.parse(source))


def _imported_below(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module is not None, "imports say the whole name"
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imported_below(child)


def own_imports(source: str, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that ``source`` imports; its version and name, which it itself holds, are none."""
    names = {name.removeprefix("hsplit.") for name in imported(source) if name.startswith("hsplit.")}
    return names & modules.keys()


def layer_of(module: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_everything_stands_in_one_layer() -> None:
    named = [name for names in LAYERS for name in names]
    assert sorted(named) == sorted({module.split(".")[0] for module in files()})


def test_imports_go_down() -> None:
    modules = files()
    up = [
        f"{module} imports {other}"
        for module, file in modules.items()
        for other in own_imports(file.read_text(), modules)
        if layer_of(other) < layer_of(module)
    ]
    assert not up


def test_no_imports_go_in_a_circle() -> None:
    modules = files()
    graph = {module: own_imports(file.read_text(), modules) - {module} for module, file in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_only_these_files_know_ray() -> None:
    sources = {file.relative_to(HSPLIT).as_posix(): file.read_text() for file in files().values()}
    know = {path for path, source in sources.items() if "ray" in {name.split(".")[0] for name in imported(source)}}
    assert know == KNOW_RAY


def test_what_is_imported_inside_of_a_function_counts() -> None:
    modules = files()
    late = "def late():\n    from hsplit.actors import executor\n    from hsplit import __version__\n"
    types = "if TYPE_CHECKING:\n    from hsplit.launcher import Run\n"
    assert own_imports(f"import hsplit.cli\n{types}{late}", modules) == {"actors", "actors.executor", "cli"}
    assert layer_of("actors.executor") > layer_of("cli")
