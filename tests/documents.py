"""The project's documents for tests: their code blocks and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = DOCS / "tutorials"
PAGES = (
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
)
"""All pages for readers of the project."""

_BLOCK = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.DOTALL | re.MULTILINE
)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n?)+", re.MULTILINE)
_COMMAND = re.compile(r"^ *(?:[A-Z_]+=\S* +)*hsplit +(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: as the fence says.
        title: the file that it is, or what it does; empty if the fence says nothing.
        text: what is in it.
    """

    language: str
    title: str
    text: str


def blocks(page: Path, language: str = "") -> list[Block]:
    """The fenced blocks of ``page``, of one language or of all, in their order."""
    found = [Block(m["language"], m["title"] or "", m["text"]) for m in _BLOCK.finditer(page.read_text())]
    return [block for block in found if language in ("", block.language)]


def commands(text: str) -> list[list[str]]:
    """Words of every ``hsplit`` command in a block of shell lines, without ``hsplit`` itself."""
    return [shlex.split(line, comments=True) for line in _COMMAND.findall(text.replace("\\\n", " "))]


def commands_in(page: Path) -> list[list[str]]:
    """Words of every ``hsplit`` command in ``page``, in fenced and in indented blocks."""
    text = page.read_text()
    shell = [block.text for block in blocks(page, "bash")]
    return [words for block in (*shell, *_INDENTED.findall(_BLOCK.sub("", text))) for words in commands(block)]
