"""The tutorials of docs/tutorials: their files are written, and their commands run, as the pages have them.

What is replaced is said at each test. Commands run in this process on the tests' Ray, where nothing speaks against it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.experiments import load_experiment
from hsplit.observe.events import read_events
from hsplit.observe.run_list import list_runs
from hsplit.observe.tables import read_metrics
from tests.cluster.namespaces import RayNode, environment, hosts, ray_on, unavailable
from tests.documents import ROOT, TUTORIALS, Block, blocks, commands

THREE_MACHINES = TUTORIALS / "three-machines.md"
OWN_POLICY = TUTORIALS / "own-policy.md"
COMPARISON = TUTORIALS / "comparison.md"
CONFIGURED = ("launch", "plan", "probe")
PROBED_BRIEFLY = ("--repeats", "1", "--seconds", "0.2")


def overrides(**values: object) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def tiny(models: Mapping[str, Path]) -> list[str]:
    """A tiny random model in place of SmolLM2-135M, and little of everything."""
    return overrides(
        job__model=models["llama"], rank_set="[1, 2, 4]", rounds=1, local_steps=2, validation__max_examples=2
    )


def with_words(words: Sequence[str], more: Sequence[str]) -> list[str]:
    """A command of a page, with what a test adds to it."""
    name = words[0]
    return [*words, *(more if name in CONFIGURED else ()), *(PROBED_BRIEFLY if name == "probe" else ())]


def run_here(block: Block, more: Sequence[str] = ()) -> str:
    """Run the hsplit commands of a block, of which there must be nothing else; what they print."""
    found = commands(block.text)
    assert len(found) == len(block.text.strip().splitlines())
    output = ""
    for words in found:
        result = CliRunner().invoke(main, with_words(words, more), catch_exceptions=False)
        assert result.exit_code == 0, f"hsplit {shlex.join(words)}: {result.output}"
        output += result.output
    return output


def shell(folder: Path, more: Sequence[str]) -> dict[str, str]:
    """An environment in which ``hsplit`` is this tree's, with ``more`` added to what reads a cluster file."""
    (folder / "bin").mkdir()
    command = folder / "bin" / "hsplit"
    command.write_text(
        f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.cluster.test_tutorials import with_words
sys.argv[1:] = with_words(sys.argv[1:], {list(more)!r})
from hsplit.cli import run
run()
"""
    )
    command.chmod(0o755)
    return os.environ | {"PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}


def written(page: Path, to: Path) -> None:
    """Write the files that a page gives into a folder."""
    for block in blocks(page):
        if block.language in ("yaml", "python") and block.title:
            (to / block.title).write_text(block.text)


def notes(first: int, count: int = 30) -> str:
    """The page's rows over and over, each with a number of its own."""
    (block,) = blocks(THREE_MACHINES, "csv")
    header, *rows = block.text.splitlines()
    lines = [rows[i % len(rows)].replace('"', f'"{i} ', 1) for i in range(first, first + count)]
    return "\n".join([header, *lines]) + "\n"


def test_your_own_data_and_model(
    ray_cluster: None, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tests' Ray, on one machine: so no ``ray start``, no ``--address``, and nobody is pinned to a node."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("ward", "lab")):
        (tmp_path / f"{name}.csv").write_text(notes(100 * seed))
    written(THREE_MACHINES, tmp_path)
    cluster = tmp_path / "hospitals.yaml"
    cluster.write_text(cluster.read_text().replace("/srv/model", str(models["llama"])))
    own = {f"clients__{name}__data": tmp_path / f"{name}.csv" for name in ("ward", "lab")}
    unpinned = overrides(server__node="null", clients__ward__node="null", clients__lab__labels="{}", **own)
    pages = {block.title: block for block in blocks(THREE_MACHINES, "bash")}
    here = {title: Block("bash", title, block.text.replace(" --address auto", "")) for title, block in pages.items()}
    assert "ward" in run_here(here[""], unpinned)
    run_here(here["measure"], unpinned)
    run_here(here["run"], unpinned)
    assert "letters" in run_here(here["look"])
    run_here(here["hand out"])
    (run,) = list_runs(tmp_path / "runs")
    assert (run.state, run.round, run.clients) == ("complete", 2, 2)
    assert {f"on {name}" for name in ("head", "ward", "lab")} == pages.keys() - here.keys() | {
        title for title in pages if title.startswith("on ")
    }
    # It loads as the page says, and no label has left a client.
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "letters").config.num_hidden_layers == 4
    assert "labels: client" in (tmp_path / "runs" / "letters" / "config.yaml").read_text()


@pytest.mark.drill
def test_your_own_data_and_model_on_three_hosts(models: dict[str, Path], tmp_path: Path) -> None:
    """Network namespaces in place of machines, other addresses and places of files; Ray's options are the page's."""
    if reason := unavailable():
        pytest.skip(f"hosts of their own cannot be made: {reason}")
    (srv := tmp_path / "srv").mkdir()
    (working := tmp_path / "working").mkdir()
    written(THREE_MACHINES, working)
    cluster = working / "hospitals.yaml"
    cluster.write_text(cluster.read_text().replace("/srv/model", str(models["llama"])).replace("/srv", str(srv)))
    pages = {block.title: block.text for block in blocks(THREE_MACHINES, "bash")}
    nodes = {}
    for seed, name in enumerate(("head", "ward", "lab")):
        options = dict.fromkeys(word for word in shlex.split(pages[f"on {name}"]) if word.startswith("--"))
        given = {word.partition("=")[0]: word.partition("=")[2] for word in options}
        assert given["--node-name"] == name
        # What `ray_on` gives every node itself.
        usual = ("--head", "--port", "--address", "--node-ip-address", "--node-name", "--num-cpus")
        (own := tmp_path / name).mkdir()
        if name != "head":
            (own / "notes.csv").write_text(notes(100 * seed))
        nodes[name] = RayNode(
            cpus=int(given["--num-cpus"]),
            options=[word for word in options if word.partition("=")[0] not in usual],
            files={srv: own},
        )
    variables = environment() | shell(tmp_path, [])
    with hosts(dict.fromkeys(nodes)) as made, ray_on(made, nodes) as address:
        for title in ("", "measure", "run", "look", "hand out"):
            text = pages[title].replace("--address auto", f"--address {address}")
            command = made["head"].command("bash", "-euc", text)
            done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=working, timeout=900)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (run,) = list_runs(working / "runs")
    assert (run.state, run.clients) == ("complete", 2)
    # The driver's host has none of the notes.
    assert not list(srv.iterdir())


def test_a_policy_of_ones_own(
    ray_cluster: None, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model, one round. What needs PYTHONPATH runs in a shell, as the page has it, with a Ray of its own."""
    monkeypatch.chdir(tmp_path)
    written(OWN_POLICY, tmp_path)
    variables = shell(tmp_path, tiny(models))
    for block in blocks(OWN_POLICY, "bash"):
        for line in block.text.splitlines():
            if not line.startswith("PYTHONPATH"):
                run_here(Block("bash", "", line), tiny(models))
                continue
            done = subprocess.run(["bash", "-euc", line], capture_output=True, text=True, env=variables, timeout=600)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {run.name: (run.state, run.policy) for run in list_runs(tmp_path / "runs")} == {
        "mine": ("complete", "mine"),
        "default": ("complete", "hsplitlora"),
    }
    told = "".join(event["text"] for event in read_events(tmp_path / "runs" / "mine" / "events.jsonl"))
    for rule in ("late_layers_first", "no_loud_voice", "per_parameter"):
        assert f"my_policy:{rule} is code from {tmp_path / 'my_policy.py'}" in told
    plans = [pandas.read_csv(tmp_path / "runs" / name / "plan.csv") for name in ("mine", "default")]
    assert all(plan.query("round == 1 and kind == 'client'")["available"].all() for plan in plans)
    assert "mine" in (tmp_path / "compare.html").read_text()


def test_the_papers_comparison(
    ray_cluster: None, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model, one round; of the benchmarks, which take hours, that their flags are known."""
    monkeypatch.chdir(tmp_path)
    hours = [block for block in blocks(COMPARISON, "bash") if block.title == "hours"]
    for block in blocks(COMPARISON, "bash"):
        if block not in hours:
            run_here(block, tiny(models))
    for name in ("ours", "splitlora"):
        assert len(read_metrics(tmp_path / "runs" / name / "metrics.csv")) == 2
    report = (tmp_path / "compare.html").read_text()
    assert "ours" in report and "splitlora" in report
    assert len(hours) == 2
    for words in (words for block in hours for words in commands(block.text)):
        bench, name, *flags = words
        assert bench == "bench"
        known = (Path(load_experiment(name).__file__ or "")).read_text()
        assert all(f'"{flag}"' in known for flag in flags if flag.startswith("--"))
