"""Additions of the site to the pages of ``docs/``: MkDocs calls these functions as it builds (``hooks`` in mkdocs.yml).

Files of the repository that lie outside of ``docs/`` become pages or files under ``repository/``, so that links to
them, which are those that a code host follows, lead there in the site too. ``<!-- keys: NAME -->`` in a page becomes
the table of a configuration section's keys, made from its pydantic model.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository"
"""The site's folder for files outside of ``docs/``."""
SHOWN = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "benchmarks/README.md"),
    *("cluster/*.yaml", "cluster/ray/*.yaml", "policies/*.yaml", "benchmarks/*.py"),
    *("benchmarks/*.yaml", "benchmarks/results/*/*"),
)
"""The files outside of ``docs/`` that pages may link to."""

# A fenced or an inline piece of code, in which nothing is a link; or a link's target.
_LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]+`)|(?<=\]\()(?P<target>[^)\s#]+)", re.MULTILINE | re.DOTALL)
_KEYS = re.compile(r"^<!-- keys: (\w+) -->$", re.MULTILINE)
# Roles of other documentation tools that docstrings have before a name in code.
_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of ``docs/``."""
    for path in sorted({found for pattern in SHOWN for found in ROOT.glob(pattern) if found.is_file()}):
        uri = f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"
        # Some of the pages are in no menu, and need not be.
        files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into the site's, and fill in the tables of keys."""
    source = Path(page.file.abs_src_path or "").resolve()

    def link(found: re.Match[str]) -> str:
        if found["code"] or re.match(r"[a-z]+:", found["target"]):
            return found[0]
        return _site_link(source, found["target"], page.file.src_uri)

    return _KEYS.sub(lambda found: _keys(found[1]), _LINK.sub(link, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles of docstrings, which Markdown does not know."""
    return _ROLE.sub("", html)


def _site_link(source: Path, target: str, src_uri: str) -> str:
    """Return ``target``, a link in ``source``, relative to that page of the site."""
    path = (source.parent / target).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        # MkDocs reports it.
        return target
    place = path.relative_to(ROOT)
    uri = place.relative_to("docs") if place.parts[0] == "docs" else OUTSIDE / place
    return posixpath.relpath(uri.as_posix(), posixpath.dirname(src_uri) or ".")


def _keys(name: str) -> str:
    # Hooks are loaded by path, and the repository need not be installed where the site is built.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from docs.configuration_keys import SECTIONS, keys_of

    if name not in SECTIONS:
        raise PluginError(f"keys: there is no section {name}; there are {', '.join(SECTIONS)}")
    return keys_of(name)
