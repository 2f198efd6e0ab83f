"""The file that is written: who there was, with what was measured and its spread, ready for ``launch``."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsplit.config import ClientConfig, RunConfig, load_run_config
from hsplit.config.cluster import BUDGET_FIELDS
from hsplit.errors import InputError
from hsplit.measuring.cluster_file import Figure, Figures, load_unmeasured, measured_file

GIVEN = """
server: {memory_gb: 8, num_cpus: 2}
clients:
  - {name: phone, count: 2, memory_gb: {uniform: [5, 20]}, tflops: {choice: [1, 2]}, latency_ms: 40, num_cpus: 3}
  - {name: clinic, data: /srv/notes.csv, model: "/srv/a #model", node: clinic-host,
     schedule: [{round: 3, memory_gb: 0.1}]}
job: {rounds: 4, data: {source: words.txt, partition: {dirichlet: 0.5}}, privacy: {labels: client}}
"""


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(GIVEN)
    return path


def _figures(run: RunConfig) -> Figures:
    found: dict[str, dict[str, Figure]] = {}
    for number, client in enumerate(run.clients, start=1):
        found[client.name] = {
            "memory_gb": Figure.least_of([2.5 * number, 2.25 * number]),
            "tflops": Figure.median_of([0.0215 * number, 0.0213 * number, 0.0209 * number]),
            "bandwidth_mbps": Figure.median_of([12345.6 * number]),
            "latency_ms": Figure.median_of([0.0]),
        }
    found["server"] = {"memory_gb": Figure.least_of([7.0]), "tflops": Figure.median_of([1e-5, 3e-5])}
    return found


def test_a_written_file_loads_and_has_the_figures(given: Path, tmp_path: Path) -> None:
    run = load_unmeasured(given)
    figures = _figures(run)
    path = tmp_path / "measured.yaml"
    path.write_text(measured_file(run, figures, ["what this is", ""]))
    loaded = load_run_config(path)
    assert [client.name for client in loaded.clients] == ["phone-0", "phone-1", "clinic"]
    for client in loaded.clients:
        assert {key: getattr(client, key) for key in BUDGET_FIELDS} == {
            key: figure.value for key, figure in figures[client.name].items()
        }
    assert (loaded.server.memory_gb, loaded.server.tflops) == (7.0, 2e-5)
    measured = dict.fromkeys(BUDGET_FIELDS)

    def unmeasured(client: ClientConfig) -> dict[str, object]:
        # A group's name is its clients' kind, and every client is an entry of its own now.
        return client.model_dump() | measured | {"kind": None}

    assert [*map(unmeasured, loaded.clients)] == [*map(unmeasured, run.clients)]
    assert loaded.server.num_cpus == 2
    assert loaded.job == run.job


def test_every_figure_has_its_spread_beside_it(given: Path) -> None:
    run = load_unmeasured(given)
    text = measured_file(run, _figures(run), ["what this is"])
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "# what this is"
    assert "tflops: 0.0213  # median of 3, 0.0209-0.0215" in lines
    assert "memory_gb: 2.25  # least of 2, 2.25-2.5" in lines
    # Four digits, and none in powers of ten.
    assert "bandwidth_mbps: 24690.0  # median of 1, 24690-24690" in lines
    assert sum("  # " in line for line in lines) == 4 * 3 + 2
    # Neither replaced keys nor defaults.
    assert not any(word in text for word in ("uniform", "choice", "count", "num_gpus", "batch_size"))


def test_several_servers_have_one_entry_with_the_least_of_each_figure(given: Path, tmp_path: Path) -> None:
    run = load_unmeasured(given, ["server.replicas=3"])
    figures = dict(_figures(run))
    figures["server-1"] = {"memory_gb": Figure.least_of([6.0, 8.0]), "tflops": Figure.median_of([4e-5])}
    figures["server-2"] = {"memory_gb": Figure.least_of([9.0]), "tflops": Figure.median_of([1e-5, 1e-5, 3e-5])}
    path = tmp_path / "measured.yaml"
    path.write_text(measured_file(run, figures, []))
    server = load_run_config(path).server
    assert (server.memory_gb, server.tflops, server.replicas) == (6.0, 1e-5, 3)
    assert "memory_gb: 6.0  # least of 2, 6-8" in path.read_text()


def test_no_figure_is_more_than_a_file_may_have(given: Path, tmp_path: Path) -> None:
    run = load_unmeasured(given)
    figures = {name: {key: Figure.median_of([3e12]) for key in of} for name, of in _figures(run).items()}
    path = tmp_path / "measured.yaml"
    path.write_text(measured_file(run, figures, []))
    assert load_run_config(path).clients[0].bandwidth_mbps == 1e9


def test_budgets_may_be_left_out_and_nothing_else(given: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("clients: [{name: a}, {name: b, count: 2}]\n")
    assert [client.name for client in load_unmeasured(bare).clients] == ["a", "b-0", "b-1"]
    with pytest.raises(InputError, match=r"bare.yaml: clients\[0\].memory_gb: is required"):
        load_run_config(bare)
    for text, message in [
        ("clients: [{count: 2}]\n", r"clients\[0\].name: is required"),
        ("clients: [{name: a, memory_gb: -1}]\n", r"clients\[0\].memory_gb: must be greater than 0"),
        ("clients: [a]\n", r"clients\[0\]: must be a mapping"),
        ("clients: 3\n", "clients: must be a list"),
        ("job: {}\n", "clients: is required"),
    ]:
        bare.write_text(text)
        with pytest.raises(InputError, match=message):
            load_unmeasured(bare)


def test_overrides_are_written_too_and_a_policy_is_none_of_a_cluster_file(given: Path, tmp_path: Path) -> None:
    run = load_unmeasured(given, ["job.batch_size=3", "clients.clinic.num_cpus=2"])
    path = tmp_path / "measured.yaml"
    path.write_text(measured_file(run, _figures(run), []))
    loaded = load_run_config(path)
    assert (loaded.job.batch_size, loaded.clients[-1].num_cpus) == (3, 2)
    with pytest.raises(InputError, match=r"--set policy.ranks: a cluster file has no policy"):
        load_unmeasured(given, ["policy.ranks=2"])
