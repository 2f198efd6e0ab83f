"""`hsplit simulate`: fleets of many sizes, its files, and its refusals."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from hsplit.cli import main
from hsplit.config import load_run_config
from hsplit.config.cluster import MAX_COUNT, MAX_TAKING_PART
from hsplit.config.reading import find_preset
from hsplit.errors import InputError
from hsplit.simulation.fleet import SHAPES, shape_of
from hsplit.simulation.results import COLUMNS, cells, sweep_table
from hsplit.simulation.sweep import Setting, Sweep, scaled_counts, sweep


@pytest.fixture
def fleet(models: dict[str, Path], tmp_path: Path) -> Path:
    """A cluster file of drawn clients with a tiny model."""
    path = tmp_path / "fleet.yaml"
    path.write_text(
        f"""
server: {{memory_gb: 1, tflops: 0.01}}
clients:
  - {{name: slow, count: 30, memory_gb: {{uniform: [0.1, 0.2]}}, tflops: {{lognormal: [0.001, 0.5]}}}}
  - {{name: fast, count: 10, memory_gb: 0.5, tflops: 0.01, bandwidth_mbps: {{uniform: [50, 100]}}}}
job: {{model: {models["llama"]}, base: fp32, dtype: fp32, rounds: 2, max_length: 16}}
"""
    )
    return path


def test_a_simulation_needs_the_models_configuration_alone(
    fleet: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((models["llama"] / "config.json").read_bytes())
    options = ["simulate", "--cluster", str(fleet), "--clients", "8", "--json"]
    whole, found = (CliRunner().invoke(main, [*options, *more]) for more in ([], ["--set", f"model={bare}"]))
    assert whole.exit_code == found.exit_code == 0, found.output
    assert json.loads(found.stdout) == json.loads(whole.stdout) | {"model": str(bare)}


def test_the_page_and_the_files_say_that_it_is_a_simulation(fleet: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    options = ["simulate", "--cluster", str(fleet), "--clients", "8", "--clients", "40", "--servers", "1"]
    done = CliRunner().invoke(main, [*options, "--servers", "2", "--leave", "0.1", "--to", str(to), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["simulation"] is True
    assert [(s["clients"], s["servers"]) for s in found["settings"]] == [(8, 1), (8, 2), (40, 1), (40, 2)]
    assert all(line.startswith("simulation: ") for line in found["findings"])
    for name in ("settings.csv", "rounds.csv"):
        lines = (to / name).read_text().splitlines()
        assert lines[0].startswith("# simulation")
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        assert len(rows) == (4 if name == "settings.csv" else 4 * 3)
    html = (to / "report.html").read_text()
    assert "Simulation" in html and "virtual" in html and html.count("<svg") == 6 and "http-equiv" in html
    again = tmp_path / "again"
    CliRunner().invoke(main, [*options, "--servers", "2", "--leave", "0.1", "--to", str(again)])
    assert (again / "rounds.csv").read_text() == (to / "rounds.csv").read_text()


def test_a_server_without_room_is_a_line_of_the_table(fleet: Path) -> None:
    found = sweep(fleet, None, ["server.memory_gb=0.002"], sizes=[8, 40])
    assert found.settings[-1].refused.startswith("server: memory_gb")
    assert found.settings[-1].rounds == ()
    assert any("not enough" in line for line in found.findings())


def test_the_table_fits_80_columns_up_to_the_largest_fleets() -> None:
    small = Setting(10, 1, 0, 10, "", 0.123, 1.5, 3.0, 0.01, "link", 1.2, 12e6, 22e6, 0.01, ())
    large = Setting(100_000, 1000, 0, 99_876, "", 12_345, 23_456, 5e4, 1.0, "compute", 123.4, 8e13, 9e13, 1234, ())
    full = replace(small, clients=100_000, refused="server: memory_gb: no plan fits")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(sweep_table(Sweep({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}, (small, large, full))))
    shown = console.export_text()
    assert "…" not in shown
    lines = shown.splitlines()
    assert [line.split() for line in lines if line.lstrip().startswith(("10 ", "100,000"))] == list(
        map(cells, (small, large, full))
    )
    # Every heading, whole, whichever of its two lines has its words.
    heading = " ".join(lines[: next(n for n, line in enumerate(lines) if "───" in line)]).split()
    assert all(word in heading for column in COLUMNS for word in column.split())


@pytest.mark.parametrize(
    ("share", "round_s", "said"),
    [
        (0.7, 10.0, "not enough for 300 clients: it takes 70% of a local step"),
        (0.2, 40.0, "not enough for 300 clients: 4 do a round 4.0 times as fast"),
        (0.2, 10.9, "enough for 300 clients"),
    ],
)
def test_where_one_server_stops_being_enough(share: float, round_s: float, said: str) -> None:
    def setting(clients: int, servers: int, share: float, round_s: float) -> Setting:
        numbers = {"server_share": share, "round_s": round_s, "clients": clients, "servers": servers}
        rest = {field.name: 0 for field in fields(Setting)} | {"refused": "", "bottleneck": "link", "rounds": ()}
        return Setting(**rest | numbers)

    small = [setting(100, 1, 0.1, 10.0), setting(100, 4, 0.1, 10.0)]
    large = [setting(300, 1, share, round_s), setting(300, 4, 0.1, 10.0)]
    first, *others = Sweep({}, (*small, *large)).findings()
    assert first.startswith("simulation: one server is enough for ")
    assert said in first or said in others[0]
    assert ("enough for 100 clients" in first) == ("not" in said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clients", "0"], "--clients: must be from 1"),
        (["--clients", "1"], "--clients: must be at least 2"),
        (["--servers", "2000"], "--servers: must be from 1 to 1000"),
        (["--leave", "2"], "--leave: must be a probability"),
        (["--trace", "nothing.csv"], "nothing.csv"),
        (["--policy", "fedlora", "--servers", "2"], "--servers: must be 1"),
        (["--set", "nonsense=1"], "nonsense"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fleet: Path, options: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["simulate", "--cluster", str(fleet), *options])
    assert done.exit_code == 2
    assert said in done.stderr and done.stderr.strip().count("\n") == 0


def test_a_fleet_keeps_its_proportions() -> None:
    assert scaled_counts({"a": 5000, "b": 3500, "c": 1500}, 100) == {"a": 50, "b": 35, "c": 15}
    for size in (3, 7, 11, 99_999):
        counts = scaled_counts({"a": 5000, "b": 3500, "c": 1500}, size)
        assert sum(counts.values()) == size and min(counts.values()) >= 1


def test_a_run_takes_fewer_clients_than_a_simulation(tmp_path: Path) -> None:
    path = tmp_path / "crowd.yaml"
    path.write_text(f"clients: [{{name: c, count: {MAX_TAKING_PART + 1}, memory_gb: 1}}]")
    with pytest.raises(InputError, match=r"crowd\.yaml: clients: must be at most 10000 clients in all"):
        load_run_config(path)
    assert len(load_run_config(path, most_clients=MAX_COUNT).clients) == MAX_TAKING_PART + 1


@pytest.mark.parametrize(("model", "layers"), zip(SHAPES, (32, 80), strict=True))
def test_known_shapes_are_read_without_weights(model: str, layers: int) -> None:
    assert shape_of(model).layers == layers


def test_the_preset_is_of_ten_thousand_clients_and_a_known_shape() -> None:
    run = load_run_config(find_preset("cluster", "fleet-10k"))
    assert len(run.clients) == 10_000 and run.job.model in SHAPES
