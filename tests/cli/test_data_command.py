"""``hsplit data``: how a source is read, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import hsplit
from hsplit.cli import main
from hsplit.data.description import NAMED_LABELS, ClientShare, Lengths
from hsplit.data.examples import Example

CLUSTER = """
server: {memory_gb: 1, tflops: 1}
clients:
  - {name: a, memory_gb: 1, tflops: 1}
  - {name: b, memory_gb: 1, tflops: 1}
  - {name: own, memory_gb: 1, tflops: 1, data: own.csv}
job: {data: {partition: label, label: ward}, max_length: 16}
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"prompt": f"w{n}", "response": "w7 " * (n % 3 + 1), "ward": "east" if n % 3 else "west", "id": n}
        for n in range(2, 32)
    ]
    rows += [{"prompt": "w2", "response": ""}, {"prompt": "w2", "response": "w3 " * 40, "ward": "west"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.yaml").write_text(CLUSTER)
    return path


def test_the_view_says_what_was_found(source: Path, models: dict[str, Path]) -> None:
    cluster = source.parent / "c.yaml"
    shown = call(source, "--model", models["llama"], "--cluster", cluster)
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "Read as prompt and response: 31 examples, 1 row skipped." in text
    # A path may be broken at the end of a line.
    assert f"1skipped:blankresponse;at{source}:line31" in text.replace(" ", "")
    assert "Columns not used: id." in text
    assert "1 example is over max_length = 16 tokens." in text
    assert "\u25b8" in text and "west 11" in text and "east 20" in text
    # A client with data of its own has no part of it.
    assert " own " not in text


def test_as_json_it_has_the_keys_that_are_promised(source: Path, models: dict[str, Path]) -> None:
    shown = call(source, "--model", models["llama"], "--cluster", source.parent / "c.yaml", "--json")
    found = json.loads(shown.output)
    assert (found["form"], found["examples"], found["skipped"]) == ("prompt-response", 31, {"blank response": 1})
    assert found["too_long"] == 1 and found["unused"] == ["id"]
    assert sum(count for _, _, count in found["lengths"]["histogram"]) == 31
    assert {name: own["labels"] for name, own in found["clients"].items()} == {"a": {"east": 20}, "b": {"west": 11}}
    first = found["rendered"][0]
    assert [piece["learned"] for piece in first] == [False, True]
    described, _ = hsplit.api.describe_data(source, str(models["llama"]), source.parent / "c.yaml")
    assert json.loads(json.dumps(described.to_json())) == found


def test_without_a_cluster_nobody_shares_it(source: Path, models: dict[str, Path]) -> None:
    shown = call(source, "--model", models["llama"], "--json", "--set", "job.max_length=512")
    found = json.loads(shown.output)
    assert found["clients"] == {} and found["too_long"] == 0


def test_clients_that_cannot_share_it_do_not_hide_the_rest(source: Path, models: dict[str, Path]) -> None:
    shown = call(
        source, "--model", models["llama"], "--cluster", source.parent / "c.yaml", "--set", "job.data.label=null"
    )
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    assert "31 examples" in text and "The cluster's clients cannot share it: " in text


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "the file is empty"), ('{"a": 1}', "a.jsonl: has a; needs "), ("{", "line 1 is not JSON")],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, models: dict[str, Path], content: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    shown = call(tmp_path / "a.jsonl", "--model", models["llama"])
    assert shown.exit_code == 2
    assert said in shown.stderr and shown.stderr.count("\n") == 1


def test_a_histogram_has_every_example_once() -> None:
    for lengths in ([3], [1, 2, 3], list(range(100)), [5] * 9 + [1000]):
        found = Lengths.of(lengths)
        assert (found.least, found.most) == (min(lengths), max(lengths))
        assert sum(count for _, _, count in found.histogram) == len(lengths)
        assert len(found.histogram) <= 10
        for low, high, count in found.histogram:
            assert count == sum(low <= length <= high for length in lengths)


def test_without_a_source_the_clusters_data_are_shown(source: Path, models: dict[str, Path]) -> None:
    cluster = source.parent / "c.yaml"
    parts = json.dumps([{"source": str(source), "weight": 1, "label": "ward"}, {"source": "restaurants", "weight": 2}])
    options = ("--model", models["llama"], "--cluster", cluster, "--set", "job.data.label=null", "--json")
    shown = call(*options, "--set", f"job.data.mixture={parts}")
    found = json.loads(shown.output)
    assert (found["form"], found["examples"]) == ("mixture", 31 + 62)
    assert sum(own["examples"] for own in found["clients"].values()) == 93
    text = " ".join(call(*options[:-1], "--set", f"job.data.mixture={parts}").output.split())
    assert text.startswith("Read as a mixture (a.jsonl as prompt and response, restaurants as descriptions of")
    assert "): 93 examples, 1 row skipped." in text
    # A source on the command line is shown instead.
    assert json.loads(call(source, *options).output)["form"] == "prompt-response"


def test_a_column_with_another_label_in_each_row_is_counted_in_part() -> None:
    examples = [Example("p" * n, "r", f"label-{n}") for n in range(1, 101)]
    share = ClientShare.of([*examples, *[Example("p", "r", "common")] * 3])
    assert share.examples == 103 and len(share.labels) == NAMED_LABELS
    assert next(iter(share.labels.items())) == ("common", 3)
    assert share.characters == (2, 24, 50, 75, 101)
