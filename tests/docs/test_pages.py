"""What the documents say of the code is there: links, commands, keys, tests and diagrams."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import hsplit
from docs import diagrams
from docs.configuration_keys import SECTIONS, keys_of
from hsplit.cli import main
from hsplit.config import load_run_config
from hsplit.config.cluster import ClientGroup, ServerConfig
from hsplit.config.job import Job
from hsplit.config.policy import Policy
from tests.documents import DOCS, PAGES, ROOT, commands_in

_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TEST = re.compile(r"tests/[\w/]+(?:\.py)?")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_relative_links_lead_to_files_of_the_repository(page: Path) -> None:
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"https?:", target):
            continue
        path = page.parent / target.partition("#")[0] if target.partition("#")[0] else page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_every_command_is_one_that_hsplit_has_with_options_that_it_knows(page: Path) -> None:
    for words in commands_in(page):
        # `[runs/OTHER ...]` says that there may be more.
        words = [word for word in words if not re.fullmatch(r"\[\S*|\.\.\.\]", word)]
        command: click.Command = main
        while isinstance(command, click.Group) and words:
            name, *words = words
            assert name in command.commands, f"hsplit {name}"
            command = command.commands[name]
        context = command.make_context(command.name, list(words))
        given = context.params
        if given.get("cluster") not in ("hetero", "cluster/hetero.yaml"):
            continue
        policy = given.get("policy")
        load_run_config("hetero", policy if policy and not policy.endswith(".yaml") else None, given["overrides"])


def test_the_documents_tell_commands() -> None:
    assert len(commands_in(ROOT / "README.md")) == 11
    assert {words[0] for page in PAGES for words in commands_in(page)} == set(main.commands)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_tests_that_are_named_exist(page: Path) -> None:
    for path in _TEST.findall(page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_section_of_a_configuration_is_on_a_page_of_the_reference_once() -> None:
    reachable = {
        name
        for model in (ServerConfig, ClientGroup, Job, Policy)
        for name in (model.__name__, *model.model_json_schema().get("$defs", {}))
    }
    assert set(SECTIONS) == reachable
    pages = [(DOCS / "reference" / name).read_text() for name in ("cluster.md", "policy.md")]
    named = [name for page in pages for name in re.findall(r"<!-- keys: (\w+) -->", page)]
    assert sorted(named) == sorted(SECTIONS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_table_has_every_key_with_its_default_and_meaning(name: str) -> None:
    rows = {row.split("|")[1].strip(" `"): row for row in keys_of(name).splitlines()[2:]}
    fields = SECTIONS[name].model_fields
    assert list(rows) == list(fields)
    for key, field in fields.items():
        assert field.description and field.description in rows[key]
        assert ("required" in rows[key]) == field.is_required()


def test_tables_tell_bounds_and_alternatives() -> None:
    job, client, policy = (keys_of(name) for name in ("Job", "ClientGroup", "Policy"))
    assert "| `dropout` | number ≥ 0, < 1 | `0.0` |" in job
    assert "| `clip` | number > 0; `null` | `1.0` |" in job
    assert "| `memory_gb` | number; [distribution](#distribution); each > 0 | required |" in client
    assert "| `ranks` | `importance`, `budget`, `uniform`; whole number ≥ 1; `package.module:name` |" in policy


def test_the_python_page_has_what_hsplit_exports() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    exported = [name for name in hsplit.__all__ if name != "__version__"]
    assert {f"::: hsplit.{name}" for name in exported} <= set(page.splitlines())


def test_every_diagram_is_drawn_by_the_script_and_shown() -> None:
    assert {path.stem for path in (DOCS / "diagrams").iterdir()} == set(diagrams.ALL)
    shown = "".join((DOCS / name).read_text() for name in ("index.md", "how-it-works.md"))
    for name, draw in diagrams.ALL.items():
        assert f"](diagrams/{name}.svg)" in shown
        assert draw().figure.axes
        assert "<svg" in (DOCS / "diagrams" / f"{name}.svg").read_text()[:1000]
