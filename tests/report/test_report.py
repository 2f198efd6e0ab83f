from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hsplit.errors import InputError
from hsplit.observe.events import EventLog
from hsplit.observe.tables import MetricsRow, MetricsTable
from hsplit.planning.plan import Plan
from hsplit.report.report import write_report
from hsplit.report.run_record import Holding, load_run, load_runs
from hsplit.run_directory import RunDirectory
from tests.observe.conftest import metrics_row

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br", "hr", "img", "input"}
ATTACK = "<script>alert(1)</script><img src=\"http://evil.invalid/x\" onerror='x'>"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order.

    Attributes:
        labels, unfolded: descriptions of the figures, all and those outside of folded parts, in order.
        lead: the sentence on top.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.labels: list[str] = []
        self.unfolded: list[str] = []
        self.lead = ""
        self._open: list[str] = []
        self._leading = False
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "svg":
            self.labels.append(dict(attrs)["aria-label"] or "")
            if "details" not in self._open:
                self.unfolded.append(self.labels[-1])
        if ("class", "lead") in attrs:
            self._leading = True

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._leading = self._leading and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data + "\n"
            self.lead += data if self._leading else ""


def report_of(to: Path, *runs: Path) -> tuple[str, Page]:
    assert write_report(runs, to) == to
    html = to.read_text(encoding="utf-8")
    return html, Page(html)


def assert_self_contained(html: str, page: Page) -> None:
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    assert all(value.startswith("#") for name, value in page.attributes if name in loading)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "image"}
    assert not re.search(r"@import|url\((?!#)", html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referenced = {value[1:] for name, value in page.attributes if name in loading}
    assert referenced | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_report_of_one_run(fake_run: MakeRun, tmp_path: Path) -> None:
    html, page = report_of(tmp_path / "new" / "report.html", fake_run("first"))
    assert_self_contained(html, page)
    assert [label.split(" by ")[0] for label in page.labels] == [
        "validation perplexity against virtual time",
        "validation perplexity against wall time",
        "validation perplexity against tokens",
        "validation perplexity against round",
        "train loss against virtual time",
        "train loss against wall time",
        "train loss against tokens",
        "train loss against round",
        "total LoRA rank",
        "declared, predicted and measured memory",
        "bytes up and down",
    ]
    for shown in (
        "hsplit run first",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "nf4",
        "hsplitlora",
        "dirichlet 0.5",
    ):
        assert shown in page.text
    for figure in ("21.75", "10.88", "7.250", "5.438", "3,702", "0.16 GB", "0.15 GB", "42.50", "42 s"):
        assert figure in page.text
    for holder in ("phone-0", "laptop", "watch", "server", "unavailable"):
        assert holder in page.text
    for axis in ("wall time (s), without validation", "virtual time (s), without validation"):
        assert page.text.count(f"\n{axis}\n") == 2
    assert "\n24\n" in page.text  # the server's rank in a layer, written into the heat map
    assert "measured" in page.text
    assert "120 examples to train on" in page.text
    assert "routine 1" not in page.text
    assert "prefers-color-scheme: dark" in html
    assert "#010203" not in html  # the page's own colours stand where these were drawn


def test_a_report_opens_with_outcome_curve_and_holders(fake_run: MakeRun, tmp_path: Path) -> None:
    _, page = report_of(tmp_path / "report.html", fake_run("first"))
    assert page.lead.startswith(
        "Validation perplexity fell from 21.75 to 5.438 in 3 of 5 rounds (interrupted), taking 42 s"
    )
    assert "with 2 of 5 clients (phone-0, laptop)" in page.lead
    assert page.unfolded == ["validation perplexity against virtual time", "total LoRA rank by holder and layer"]
    places = [
        page.text.index(f"\n{title}\n") for title in ("Perplexity over time", "Who held what", "Rounds", "Memory")
    ]
    assert places == sorted(places)
    table = page.text[page.text.index("\nΣ ranks\n") : page.text.index("\nRounds\n")].split("\n")
    cells = [cell for cell in table if cell]
    laptop = cells.index("laptop")
    assert cells[laptop : laptop + 4] == ["laptop", "3", "36", "–"]  # what each trained on is not in such a log


def test_what_each_client_trained_on_is_of_the_last_round(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run("counted")
    with EventLog(run / "events.jsonl") as events:
        for tokens in (1000, 4321):
            events.write("round", "round", client_tokens={"laptop": tokens, "phone-0": "?"})
    assert load_run(run).client_tokens == {"laptop": 4321}
    _, page = report_of(tmp_path / "report.html", run)
    assert "\n4,321\n" in page.text
    assert "\n1,000\n" not in page.text


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (None, "in 3 of 5 rounds (interrupted), "),
        ("stopped", "in 3 of 5 rounds (stopped), "),
        ("failed", "in 3 of 5 rounds (failed: server failed in round 4 <b>), "),
    ],
)
def test_the_outcome_says_how_a_run_ended(fake_run: MakeRun, tmp_path: Path, ending: str | None, words: str) -> None:
    run = fake_run("ended")
    if ending:
        with EventLog(run / "events.jsonl") as events:
            events.write(ending, "server failed in round 4 <b>.")
    _, page = report_of(tmp_path / "report.html", run)
    assert words in page.lead


def test_the_outcome_of_a_run_that_goes_on_and_of_a_complete_one(fake_run: MakeRun, tmp_path: Path) -> None:
    run = RunDirectory.open(fake_run("going"))
    with run.driven():
        _, page = report_of(tmp_path / "report.html", run.path)
    assert "in 3 of 5 rounds (still running), " in page.lead
    _, page = report_of(tmp_path / "report.html", fake_run("whole", rounds=5))
    assert page.lead.startswith(
        "Validation perplexity fell from 21.75 to 3.625 in 5 rounds, taking 1 min 06 s on the wall"
    )
    # its log has no event of a round, and so nothing to tell of cuts
    assert page.lead.endswith("adapters aggregated by concat.")
    with EventLog(tmp_path / "runs" / "whole" / "events.jsonl") as events:
        for number, cut in enumerate((0.25, 0.5, 0.0), start=1):
            events.write("round", "closed", round=number, residual_cut=cut)
    _, page = report_of(tmp_path / "report.html", tmp_path / "runs" / "whole")
    assert "; residual.max_rank cut in 2 of 3 rounds: at most 50 % of a weight's residual" in page.lead
    assert "aggregated by" not in page.lead


def test_a_run_that_failed_before_any_round(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run("unborn", rounds=0, checkpoint=False)
    for name in ("metrics.csv", "plan.csv"):
        (run / name).unlink()
    with EventLog(run / "events.jsonl") as events:
        events.write("failed", "no memory.")
    html, page = report_of(tmp_path / "report.html", run)
    assert_self_contained(html, page)
    assert page.lead == "No round has been validated yet. The run failed: no memory."
    assert page.tags["svg"] == 0
    assert "No plan has been made yet." in page.text


def test_a_run_that_held_nothing_out_opens_with_its_train_loss(fake_run: MakeRun, tmp_path: Path) -> None:
    run = RunDirectory.open(fake_run("unvalidated", rounds=5))
    rows = [metrics_row(round, val_loss=0.0, val_ppl=1.0) for round in range(6)]
    MetricsTable(run.metrics, MetricsRow).append(*rows)
    html, page = report_of(tmp_path / "report.html", run.path)
    assert_self_contained(html, page)
    assert page.lead.startswith("Nothing was held out to validate on; train loss fell from 3.000 to 0.600 in 5 rounds")
    assert page.unfolded[0] == "train loss against virtual time"
    assert page.text.count("\nnothing was held out\n") == 4
    assert "\n0.000\n" not in page.text  # no validation loss in the table of rounds


def test_report_of_two_runs_overlays_them(fake_run: MakeRun, tmp_path: Path) -> None:
    first, second = fake_run("first"), fake_run("second", rounds=5, checkpoint=False, measured=False)
    html, page = report_of(tmp_path / "report.html", first, second)
    assert_self_contained(html, page)
    assert page.tags["svg"] == 8 + 2 * 3
    assert "2 hsplit runs" in page.text
    assert "Side by side" in page.text
    for name in ("first", "second"):
        assert page.text.count(f"\n{name}\n") >= 8 + 2  # in each legend, the comparison, its own section
    assert "from its split; no event and no checkpoint tells the ranks" in page.text


def test_runs_of_one_name_are_told_apart(fake_run: MakeRun, tmp_path: Path) -> None:
    first = fake_run("same")
    other = tmp_path / "elsewhere" / "same"
    other.parent.mkdir()
    first.rename(other)
    names = [run.name for run in load_runs([fake_run("same"), other])]
    assert names[0].endswith("runs/same")
    assert names[1].endswith("elsewhere/same")


def test_run_with_round_0_only(fake_run: MakeRun, tmp_path: Path) -> None:
    html, page = report_of(tmp_path / "report.html", fake_run("young", rounds=0))
    assert_self_contained(html, page)
    assert page.tags["svg"] == 11
    assert page.text.count("no round of training yet") == 4
    assert "21.75" in page.text


def test_run_without_any_round(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run("unborn", rounds=0, checkpoint=False)
    for name in ("metrics.csv", "plan.csv", "events.jsonl"):
        (run / name).unlink()
    _, page = report_of(tmp_path / "report.html", run)
    assert page.lead == "No round has been validated yet. The run is interrupted."
    assert "Nothing out of the ordinary." in page.text


def test_diverged_run(fake_run: MakeRun, tmp_path: Path) -> None:
    run = RunDirectory.open(fake_run("diverged"))
    bad = {"val_loss": float("nan"), "val_ppl": float("inf"), "train_loss": float("nan")}
    MetricsTable(run.metrics, MetricsRow).append(metrics_row(0), metrics_row(1, **bad))
    _, page = report_of(tmp_path / "report.html", run.path)
    assert "inf" in page.text
    assert "nan" in page.text


def test_everything_is_escaped(fake_run: MakeRun, tmp_path: Path) -> None:
    plain = fake_run("plain")
    odd = plain.rename(plain.parent / "_$<b>odd & \\x$")
    config = odd / "config.yaml"
    config.write_text(config.read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", "<i>model</i>"))
    with EventLog(odd / "events.jsonl") as events:
        events.write(ATTACK, f"{ATTACK} failed \udc80", client=ATTACK)
    html, page = report_of(tmp_path / "report.html", odd, fake_run("other"))
    assert_self_contained(html, page)
    assert page.tags["b"] == page.tags["i"] == 0
    assert f"{ATTACK} failed ?" in page.text
    assert "<i>model</i>" in page.text
    assert "<b>odd & \\x$" in page.text


def test_damaged_checkpoint_is_passed_over(fake_run: MakeRun, plan: Plan) -> None:
    run = fake_run("damaged")
    later = run / "checkpoints" / "round-0009"
    later.mkdir()
    (later / "state.json").write_text('{"plan": {"layers"')
    assert load_run(run).plan == plan


def test_layers_held_come_from_the_plan_or_else_from_the_splits(fake_run: MakeRun) -> None:
    assert load_run(fake_run("planned")).holdings() == [
        Holding("phone-0", {0: 11, 1: 11}),
        Holding("laptop", {0: 12, 1: 12, 2: 12}),
        Holding("server", {2: 24, 3: 24, 4: 24, 5: 24}),
    ]
    assert load_run(fake_run("unplanned", checkpoint=False)).holdings() == [
        Holding("phone-0", {0: None, 1: None}),
        Holding("laptop", {0: None, 1: None, 2: None}),
        Holding("server", {2: None}),
    ]


def test_what_is_not_a_run_is_refused(fake_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such directory"):
        write_report([tmp_path / "none"], tmp_path / "report.html")
    with pytest.raises(InputError, match=r"has no config\.yaml"):
        write_report([fake_run("good"), tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_place_that_cannot_be_written_is_refused(fake_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--to .*cannot be written"):
        write_report([fake_run("good")], tmp_path / "file" / "report.html")


def test_each_clients_part_of_the_data_is_drawn(fake_run: MakeRun, tmp_path: Path) -> None:
    run = fake_run("shared")
    share = {"examples": 30, "characters": [5, 20, 40, 60, 300], "labels": {"east": 20, "west": 7}}
    many = {"examples": 9, "characters": [1, 1, 1, 1, 1], "labels": {f"l{n}": 1 for n in range(9)}}
    with EventLog(RunDirectory.open(run).events) as events:
        events.write(
            "shares", "read as E2E: 39 examples", clients={"a": share, "b": many, "broken": {"examples": "many"}}
        )
    html, page = report_of(tmp_path / "report.html", run)
    assert "Read as E2E: 39 examples." in page.text and "2 clients with a part of the shared data" in page.text
    assert "examples of each client by label, and their lengths" in page.labels
    for label in ("east", "west", "others", "characters of an example"):
        assert label in html
    assert "part of the shared data" not in report_of(tmp_path / "report.html", fake_run("none"))[0]
