"""The site builds strictly, loads nothing from outside, and has what is made while it builds."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from docs.configuration_keys import SECTIONS
from docs.pictures import browser, chromium
from hsplit.cli import main
from tests.documents import ROOT

_MISSING = [
    name for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_click") if not importlib.util.find_spec(name)
]
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)} (pip install '.[docs]')")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return to


class _Loaded(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href") or "")
        self.found += [given[key] or "" for key in ("src", "srcset", "data", "poster") if key in given and tag != "a"]


def loaded_by(page: Path) -> list[str]:
    parser = _Loaded()
    parser.feed(page.read_text())
    return parser.found


def test_no_page_loads_anything_from_outside(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 25
    for page in pages:
        loaded = loaded_by(page)
        assert any(target.endswith(".js") for target in loaded)
        for target in loaded:
            assert not re.match(r"[a-z]+:|//", target) or target.startswith("data:"), (page, target)
            path = (page.parent / re.split("[?#]", target)[0]).resolve()
            assert target.startswith("data:") or path.is_file(), (page, target)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_references_are_made_from_the_code(site: Path) -> None:
    of_policies = ["Policy", "Pace", "Importance", "Replan", "Objective", "SelfPruning"]
    for name in ("cluster", "policy"):
        text = (site / "reference" / f"{name}.html").read_text()
        assert "<!-- keys" not in text
        for section in SECTIONS:
            if (section in of_policies) == (name == "policy"):
                assert all(f"<code>{key}</code>" in text for key in SECTIONS[section].model_fields), section
    commands = (site / "reference" / "cli.html").read_text()
    assert all(f">{name}<" in commands for name in main.commands)
    # As `--help` has them; mkdocs-click's tables show an inner value of click's where there is no default.
    assert "--dashboard-host" in commands and "UNSET" not in commands
    python = (site / "reference" / "python.html").read_text()
    assert 'id="hsplit.launch"' in python and "dashboard_host" in python
    # No role of another documentation tool is left.
    assert not re.search(r":(?:func|class|meth|attr):<code>", python)


def test_files_beside_the_documents_are_pages_and_files_of_the_site(site: Path) -> None:
    assert (site / "repository" / "benchmarks" / "index.html").is_file()
    assert (site / "repository" / "cluster" / "hetero.yaml").is_file()
    assert 'href="repository/benchmarks/index.html' in (site / "results.html").read_text()
    assert 'href="../../PRIVACY.html' in (site / "repository" / "benchmarks" / "index.html").read_text()
    assert not list(site.glob("*.py"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.real
@pytest.mark.skipif(chromium() is None, reason="not installed: chromium")
def test_a_browser_asks_no_other_host_and_finds_a_key(site: Path, served: str) -> None:
    asked: list[str] = []
    with browser() as started:
        page = started.new_page()
        page.set_default_timeout(300_000)
        page.on("request", lambda request: asked.append(request.url))
        for path in sorted(site.rglob("*.html")):
            page.goto(f"{served}/{path.relative_to(site).as_posix()}")
        page.goto(f"{served}/index.html?q=grad_accumulation")
        page.locator(".md-search-result__item").first.wait_for()
        # From a folder, without a server.
        page.goto((site / "how-it-works.html").as_uri())
        page.get_by_role("heading", name="Aggregation").first.wait_for()
        drawn = "image => image.complete && image.naturalWidth > 0"
        assert all(image.evaluate(drawn) for image in page.locator("article img").all())
    elsewhere = [url for url in asked if not url.startswith((served, "file:", "data:", "blob:"))]
    assert asked and elsewhere == []
