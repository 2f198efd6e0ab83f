"""Makes the pictures under ``docs/pictures/`` from a real run: ``python -m docs.pictures`` (a few minutes).

It launches a run with a token for Ray's dashboard, scrapes it with Prometheus, follows it as ``hsplit watch`` does, and
looks at all of that with Chromium. Needs ``pip install -e '.[dev]'`` and the programs ``chromium`` and ``prometheus``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI

import hsplit
from hsplit.observe.displays import LiveDisplay, Pace
from hsplit.observe.monitoring import PANELS, Panel, write_monitoring
from hsplit.observe.progress_file import StepRecord, read_step_record
from hsplit.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from playwright.sync_api import Browser, Page

PICTURES = Path(__file__).parent / "pictures"
RUN = "demo"
_SCRAPED_S = 1.0
_PATIENCE_S = 600.0
_LOOKED_AT_STEP = 4
_HSPLIT = (sys.executable, "-c", "from hsplit.cli import run; run()")


# -- a run, and its observers --------------------------------------------------------------------------------------


@contextmanager
def process(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` beside the block, with its output in ``log``; it is asked to end at the end of the block."""
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
        try:
            yield started
        finally:
            if started.poll() is None:
                started.terminate()
            started.wait(_PATIENCE_S)


@contextmanager
def launched(runs: Path, token: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``hsplit launch`` as a user does, its run named ``RUN``; its output is in ``runs/launch.log``."""
    runs.mkdir(parents=True, exist_ok=True)
    command = [*_HSPLIT, "launch", "--name", RUN, "--runs-dir", str(runs), *arguments]
    # Often enough for the last round to be seen before the run ends.
    often = {"RAY_metrics_report_interval_ms": "1000"}
    with process(command, runs / "launch.log", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, **often) as run:
        yield run


def once_trained(runs: Path, run: subprocess.Popen[bytes], step: int) -> StepRecord:
    """Wait until ``run`` has done ``step`` local steps, and return its record.

    Raises:
        RuntimeError: it has ended before, or takes too long.
    """

    def record() -> StepRecord | None:
        if run.poll() is not None:
            raise RuntimeError(f"the run has ended: {(runs / 'launch.log').read_text()[-2000:]}")
        found = read_step_record(RunDirectory(runs / RUN).progress)
        return found if found is not None and found.step >= step else None

    return _awaited(record)


def dashboard_url(record: StepRecord) -> str:
    """Return the address of Ray's dashboard, as ``hsplit launch`` prints it."""
    return next(found[0] for line in record.lines if (found := re.search(r"http://\S+", line)) and line[:3] == "ray")


def _awaited(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + _PATIENCE_S
    while not (found := what()):
        if time.monotonic() > until:
            raise RuntimeError(f"waited for {_PATIENCE_S:g} s in vain")
        time.sleep(0.2)
    return found


# -- a browser ----------------------------------------------------------------------------------------------------


def chromium() -> str | None:
    """Return the path of the program, ``None`` without one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    # Its sandbox is not for root.
    sandbox = os.geteuid() != 0
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), chromium_sandbox=sandbox)
        try:
            yield started
        finally:
            started.close()


def sign_in(page: Page, url: str, token: str, path: str) -> None:
    """Open ``path`` of the Ray dashboard at ``url`` and answer its dialog, which asks for the token."""
    page.goto(f"{url}/#{path}")
    page.get_by_placeholder("Enter your authentication token").fill(token)
    page.get_by_role("button", name="Submit").click()


def _save(picture: bytes, name: str, to: Path) -> None:
    """As a PNG of at most 256 colours, which is a third of the size and looks the same."""
    path = to / f"{name}.png"
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} {path.stat().st_size / 1000:.0f} kB")


class _Recorded(LiveDisplay):
    """The live table on a console that is no terminal, where nothing ends the table's last line."""

    def started(self, run_name: str, lines: Sequence[str]) -> None:
        # The home directory is private.
        super().started(run_name, [line.replace(str(Path.home()), "~") for line in lines])

    def finished(self, lines: Sequence[str]) -> None:
        super().finished(["", *lines])


# -- the pictures -------------------------------------------------------------------------------------------------


def picture_of_actors(page: Page, url: str, token: str, run: str = RUN) -> bytes:
    """Picture of Ray's list of actors, with those of a running run."""
    page.set_viewport_size({"width": 1500, "height": 1060})
    sign_in(page, url, token, "/actors")
    page.get_by_text(f"hsplit:{run}:server", exact=True).first.wait_for()
    return page.screenshot()


def picture_of_report(page: Page, report: Path) -> bytes:
    """The top of a run's report."""
    page.set_viewport_size({"width": 1100, "height": 1500})
    page.goto(report.resolve().as_uri())
    return page.screenshot()


def picture_of_terminal(page: Page, run: Path) -> bytes:
    """Picture of ``hsplit watch`` at the end of a run."""
    record = read_step_record(RunDirectory(run).progress)
    assert record is not None
    # The time that the run took until its last step, as a terminal shows it then.
    moments = [record.begun]
    pace = Pace(lambda: moments[-1])
    moments.append(record.time)
    console = Console(record=True, width=100, file=io.StringIO(), color_system="truecolor")
    hsplit.watch(run, display=_Recorded(console=console, pace=pace))
    svg = console.export_svg(title=f"hsplit watch runs/{run.name}", theme=MONOKAI)
    # Its fonts would come from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    page.set_viewport_size({"width": 1230, "height": 800})
    page.set_content(f"<body style='margin:0'>{svg}</body>")
    return page.locator("svg").first.screenshot()


def picture_of_metrics(prometheus: str, run: str, begun: float, ended: float) -> bytes:
    """The panels of the Grafana dashboard, by its own queries to Prometheus, over a run's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.1 * math.ceil(len(PANELS) / 2)), layout="constrained", dpi=90)
    for panel, axes in zip(PANELS, figure.subplots(math.ceil(len(PANELS) / 2), 2).flat, strict=False):
        _draw(panel, axes, prometheus, run, begun, ended)
    picture = io.BytesIO()
    figure.savefig(picture)
    return picture.getvalue()


def _draw(panel: Panel, axes: Axes, prometheus: str, run: str, begun: float, ended: float) -> None:
    from matplotlib.ticker import MultipleLocator

    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.set_xlim(0, ended - begun)
    axes.xaxis.set_major_locator(MultipleLocator(30 if ended - begun < 300 else 60))
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{int(seconds) // 60}:{int(seconds) % 60:02d}")
    divisor, unit = {"bytes": (1e6, "MB"), "s": (1.0, "s")}.get(panel.unit, (1.0, ""))
    axes.set_ylabel(unit)
    found = [
        (query, number, labels, times, [value / divisor for value in values])
        for number, query in enumerate(panel.queries)
        for labels, times, values in _series(prometheus, query.expr.replace("$run", run), begun, ended)
    ]
    legends = [re.sub(r"\{\{(\w+)\}\}", lambda name, own=one[2]: own[name[1]], one[0].legend) for one in found]
    if not found:
        axes.text(0.5, 0.5, "No data", transform=axes.transAxes, ha="center", color="0.5")
        axes.set_yticks([])
        return
    other = axes.twinx() if any(query.right for query in panel.queries) else None
    if panel.stacked:
        moments = sorted({moment for _, _, _, times, _ in found for moment in times})
        known = [dict(zip(times, values, strict=True)) for _, _, _, times, values in found]
        axes.stackplot(moments, [[own.get(moment, 0.0) for moment in moments] for own in known], labels=legends)
    else:
        # One colour a holder, one style of line a figure of it.
        keys = [tuple(sorted(set(labels.items()) - {("run", run)})) or (number,) for _, number, labels, _, _ in found]
        colours = {key: f"C{index}" for index, key in enumerate(dict.fromkeys(keys))}
        for (query, number, labels, times, values), key, legend in zip(found, keys, legends, strict=True):
            style = "-" if len(labels) < 2 else ("-", "--", ":")[number]
            if query.right and other is not None:
                other.plot(times, values, color="0.6", linestyle="-.", label=legend)
            else:
                axes.plot(times, values, color=colours[key], linestyle=style, label=legend)
    handles = [handle for one in (axes, other) if one for handle in one.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=7, loc="upper left", bbox_to_anchor=(1.15, 1.0), frameon=False)


def _series(
    prometheus: str, expr: str, begun: float, ended: float
) -> list[tuple[Mapping[str, str], list[float], list[float]]]:
    """Labels, seconds since ``begun`` and values of each series that ``expr`` has."""
    query = urllib.parse.urlencode({"query": expr, "start": begun, "end": ended, "step": _SCRAPED_S})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{query}") as answer:
        found = json.load(answer)["data"]["result"]
    return [
        (one["metric"], [float(t) - begun for t, _ in one["values"]], [float(value) for _, value in one["values"]])
        for one in found
    ]


# -- all of it ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="hetero", help="cluster file of the run (hetero)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    parser.add_argument("--seconds", type=float, default=_PATIENCE_S, help="stop the run after so many (600)")
    parser.add_argument("--to", type=Path, default=PICTURES, help="folder of the pictures (docs/pictures)")
    arguments = parser.parse_args()
    for program in (chromium() or "chromium", "prometheus"):
        if shutil.which(program) is None:
            parser.error(f"{program} is not installed")
    to = arguments.to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    # A preset's name otherwise.
    cluster = Path(arguments.cluster).resolve() if Path(arguments.cluster).is_file() else arguments.cluster
    # End the started processes too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended by a signal"))
    token, overrides = secrets.token_hex(32), [word for given in arguments.set for word in ("--set", given)]
    # Short, since Ray's sockets have paths of at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="p") as temporary, ExitStack() as stack:
        stack.enter_context(chdir(temporary))
        runs = Path("runs")
        prometheus = _scraping(Path(temporary), stack)
        page = stack.enter_context(browser()).new_page()
        with launched(runs, token, "--cluster", str(cluster), *overrides) as run:
            record = once_trained(runs, run, _LOOKED_AT_STEP)
            _save(picture_of_actors(page, dashboard_url(record), token), "ray-actors", to)
            try:
                run.wait(arguments.seconds)
            except subprocess.TimeoutExpired:
                # As Ctrl-C does: the run is shown as far as it came.
                run.send_signal(signal.SIGINT)
                run.wait(_PATIENCE_S)
            ended = time.time()
        _save(picture_of_terminal(page, runs / RUN), "watch", to)
        _save(picture_of_report(page, RunDirectory(runs / RUN).report), "report", to)
        _save(picture_of_metrics(prometheus, RUN, record.begun, ended), "grafana-panels", to)


def _scraping(folder: Path, stack: ExitStack) -> str:
    """Start a Prometheus with the configuration that ``hsplit monitoring`` writes; returns its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    command, _ = write_monitoring(folder / "monitoring", every_s=_SCRAPED_S, prometheus_url=f"http://{address}")
    start = [*shlex.split(command), f"--web.listen-address={address}"]
    stack.enter_context(process(start, folder / "prometheus.log"))
    return f"http://{address}"


if __name__ == "__main__":
    main()
