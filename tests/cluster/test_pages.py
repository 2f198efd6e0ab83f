"""What users open in a browser: Ray's dashboard while a run goes on, and the run's report from the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from docs.pictures import (
    RUN,
    browser,
    chromium,
    dashboard_url,
    launched,
    once_trained,
    picture_of_actors,
    picture_of_report,
    picture_of_terminal,
    sign_in,
)

pytestmark = pytest.mark.real

TOKEN = os.environ["RAY_AUTH_TOKEN"]
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Looked:
    """What was seen of a run while it went on.

    Attributes:
        actors: the dashboard's list of actors, as text.
        stranger: what somebody with another token sees of the dashboard.
        watched: what ``hsplit watch`` printed, and its exit code.
        path: the run's directory, once it has been stopped.
        picture: of the dashboard.
    """

    actors: str
    stranger: str
    watched: tuple[str, int]
    path: Path
    picture: bytes


@pytest.fixture(scope="module")
def looked(cluster_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Looked]:
    if chromium() is None:
        pytest.skip("Chromium is not installed")
    pytest.importorskip("playwright", reason="playwright is not installed")
    # Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="p") as temporary:
        runs = Path(temporary) / "runs"
        # More rounds than there is time for: it is stopped once it has been looked at.
        arguments = ("--cluster", str(cluster_file), "--set", "rounds=100000")
        with launched(runs, TOKEN, *arguments) as run, browser() as chrome:
            record = once_trained(runs, run, 2)
            watching = subprocess.Popen(
                [sys.executable, "-c", "from hsplit.cli import run; run()", "watch", str(runs / RUN)],
                stdout=subprocess.PIPE,
                text=True,
            )
            page = chrome.new_page()
            picture = picture_of_actors(page, dashboard_url(record), TOKEN)
            actors = page.locator("table").first.inner_text()
            other = chrome.new_context().new_page()
            sign_in(other, dashboard_url(record), "x" * len(TOKEN), "/actors")
            other.get_by_role("alert").wait_for()
            stranger = other.inner_text("body")
            run.send_signal(signal.SIGINT)
            printed, _ = watching.communicate(timeout=300)
            assert run.wait(300) == 130, (runs / "launch.log").read_text()
        yield Looked(actors, stranger, (printed, watching.returncode), runs / RUN, picture)


def test_the_dashboard_of_a_live_run_names_its_actors(looked: Looked) -> None:
    names = set(re.findall(rf"hsplit:{RUN}:\S+", looked.actors))
    clients = {f"hsplit:{RUN}:client:{name}" for name in ("small", "large-0", "large-1")}
    assert names == {f"hsplit:{RUN}:server", f"hsplit:{RUN}:scheduler", *clients}
    assert looked.actors.count("ALIVE") == len(names)
    assert looked.picture.startswith(_PNG)


def test_the_dashboard_shows_nothing_to_who_has_not_the_token(looked: Looked) -> None:
    assert "Invalid authentication token" in looked.stranger
    assert "hsplit:" not in looked.stranger


def test_watch_follows_the_run_until_it_is_stopped(looked: Looked) -> None:
    printed, code = looked.watched
    lines = printed.splitlines()
    assert code == 1
    assert lines[0] == f"run {RUN}" and any(line.startswith("  ray      http://127.0.0.1:") for line in lines)
    assert any(line.startswith("round 1 done: train loss ") for line in lines)
    assert lines[-1] == f"go on from the last checkpoint with: hsplit resume {looked.path}"


def test_the_report_draws_its_plots_and_asks_nobody_for_anything(looked: Looked) -> None:
    asked: list[str] = []
    with browser() as chrome:
        page = chrome.new_page()
        page.on("request", lambda request: asked.append(request.url))
        picture = picture_of_report(page, looked.path / "report.html")
        assert picture.startswith(_PNG)
        page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
        plots = page.locator("svg").all()
        assert len(plots) > 5
        for plot in plots:
            box = plot.bounding_box()
            assert box is not None and box["width"] > 200 and box["height"] > 50, plot.get_attribute("aria-label")
            drawn = plot.locator("path").evaluate_all(
                "paths => paths.filter(path => path.getBoundingClientRect().width > 0 ||"
                " path.getBoundingClientRect().height > 0).length"
            )
            assert drawn > 5, plot.get_attribute("aria-label")
    assert asked == [(looked.path / "report.html").resolve().as_uri()]
    assert all(urlsplit(url).scheme == "file" for url in asked)


def test_the_terminal_picture_is_the_live_table(looked: Looked) -> None:
    with browser() as chrome:
        page = chrome.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        assert picture_of_terminal(page, looked.path).startswith(_PNG)
        text = (page.locator("svg").first.text_content() or "").replace("\xa0", " ")
    assert not asked
    for shown in ("small", "large-1", "server", "validation perplexity", "go on from the last checkpoint with:"):
        assert shown in text
