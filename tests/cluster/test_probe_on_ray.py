"""``hsplit probe`` end to end on real Ray, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hsplit.cli import main
from hsplit.config import load_run_config
from tests.errors import error_lines

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_a_probe_writes_a_file_that_can_be_planned_and_launched(models: dict[str, Path], tmp_path: Path) -> None:
    import ray

    bare, to = tmp_path / "bare.yaml", tmp_path / "measured.yaml"
    job = f"{{model: {models['llama']}, dtype: fp32, max_length: 32, rank_set: [1, 2, 4]}}"
    bare.write_text(f"clients: [{{name: small, count: 2}}, {{name: large, num_cpus: 2}}]\njob: {job}\n")
    options = ["--repeats", "2", "--seconds", "0.1", "--json"]
    result = CliRunner().invoke(main, ["probe", "--cluster", str(bare), "--to", str(to), *options])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["cluster_file"] == str(to)
    figures = {holder["name"]: holder for holder in told["holders"]}
    assert list(figures) == ["small-0", "small-1", "large", "server"]
    measured = load_run_config(to)
    for holder in measured.clients:
        own = figures[holder.name]
        assert own["memory_gb"]["value"] == holder.memory_gb > 0.01
        assert own["tflops"]["value"] == holder.tflops > 0
        assert own["bandwidth_mbps"]["value"] == holder.bandwidth_mbps > 0
        assert own["latency_ms"]["value"] == holder.latency_ms >= 0
    assert (figures["server"]["memory_gb"]["value"], figures["server"]["tflops"]["value"]) == (
        measured.server.memory_gb,
        measured.server.tflops,
    )
    assert measured.clients[2].num_cpus == 2
    plan = CliRunner().invoke(main, ["plan", "--cluster", str(to), "--json"])
    assert plan.exit_code == 0, plan.output
    assert all(client["available"] for client in json.loads(plan.stdout)["clients"])
    # The cluster is the caller's.
    assert ray.is_initialized()


def test_a_node_that_is_not_there_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    bare, to = tmp_path / "bare.yaml", tmp_path / "measured.yaml"
    bare.write_text(f"clients: [{{name: small, node: elsewhere}}]\njob: {{model: {models['llama']}, dtype: fp32}}\n")
    result = CliRunner().invoke(main, ["probe", "--cluster", str(bare), "--to", str(to)])
    assert result.exit_code == 2
    (line,) = error_lines(result.stderr)
    assert line.startswith("error: small: node: elsewhere is not in the Ray cluster")
    assert not to.exists()
